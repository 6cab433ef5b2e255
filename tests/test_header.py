"""The header parser, compared with `gguf.GGUFReader` and fed with damage of every kind."""

import hashlib
import json
import re
import struct
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.errors import SourceError
from quantplan.inventory.header import (
    MAX_DECODED_ARRAY,
    Header,
    SkippedArray,
    parse_header,
    read_header,
)
from tests.support.headers import blob, strings, text, u32
from tests.support.models import toy_moe

READ_AHEAD_BYTES = 1 << 20
both_byte_orders = pytest.mark.parametrize("endianess", GGUFEndian, ids=lambda e: e.name.lower())
# One value of every type, at an end of its range where it has one.
SCALARS: Mapping[str, tuple[Any, GGUFValueType]] = {
    "t.u8": (255, GGUFValueType.UINT8),
    "t.i8": (-128, GGUFValueType.INT8),
    "t.u16": (65535, GGUFValueType.UINT16),
    "t.i16": (-32768, GGUFValueType.INT16),
    "t.u32": (2**32 - 1, GGUFValueType.UINT32),
    "t.i32": (-(2**31), GGUFValueType.INT32),
    "t.f32": (0.1, GGUFValueType.FLOAT32),
    "t.true": (True, GGUFValueType.BOOL),
    "t.false": (False, GGUFValueType.BOOL),
    "t.u64": (2**64 - 1, GGUFValueType.UINT64),
    "t.i64": (-(2**63), GGUFValueType.INT64),
    "t.f64": (1e300, GGUFValueType.FLOAT64),
    "t.text": ("größer, 大きい", GGUFValueType.STRING),
    "t.empty": ("", GGUFValueType.STRING),
}
ARRAY_VALUES: Mapping[GGUFValueType, Sequence[Any]] = {
    GGUFValueType.UINT8: [0, 255],
    GGUFValueType.INT8: [-128, 127],
    GGUFValueType.UINT16: [1, 65535],
    GGUFValueType.INT16: [-32768, 1],
    GGUFValueType.UINT32: [2**32 - 1],
    GGUFValueType.INT32: [-(2**31), 3],
    GGUFValueType.FLOAT32: [0.1, -2.5],
    GGUFValueType.BOOL: [True, False, True],
    GGUFValueType.UINT64: [2**64 - 1],
    GGUFValueType.INT64: [-(2**63)],
    GGUFValueType.FLOAT64: [1e-300],
    GGUFValueType.STRING: ["a", "", "ß"],
}
ARRAYS = {f"a.{kind.name.lower()}": (values, kind) for kind, values in ARRAY_VALUES.items()}
TENSORS: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]] = {
    "norm.weight": ((256,), GGMLQuantizationType.F32),
    "half.weight": ((7, 3), GGMLQuantizationType.F16),
    "brain.weight": ((5, 2), GGMLQuantizationType.BF16),
    "blocks.weight": ((64, 3), GGMLQuantizationType.Q8_0),
    "super.weight": ((512, 2, 4), GGMLQuantizationType.Q6_K),
    "four.weight": ((32, 2, 3, 2), GGMLQuantizationType.IQ4_NL),
    "one.weight": ((1,), GGMLQuantizationType.F32),
}


def write_with_gguf(path: Path, endianess: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    """Writes a file with every value type and several tensor types."""
    writer = gguf.GGUFWriter(path, "test", endianess=endianess)
    for key, (value, kind) in SCALARS.items():
        writer.add_key_value(key, value, kind)
    for key, (values, kind) in ARRAYS.items():
        writer.add_key_value(key, values, GGUFValueType.ARRAY, kind)
    for name, (shape_ne, kind) in TENSORS.items():
        shape = gguf.quant_shape_to_byte_shape(shape_ne[::-1], kind)
        writer.add_tensor(name, np.zeros(shape, np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parse(raw: bytes) -> Header:
    """Parses bytes in memory."""
    return parse_header(lambda offset, size: raw[offset : offset + size], len(raw), "toy")


def as_reader_sees(value: Any) -> Any:
    """Arrays are lists to the gguf package."""
    return list(value) if isinstance(value, tuple) else value


def assert_same_as_gguf(path: Path) -> None:
    """Compares everything that both parsers tell."""
    header, reader = read_header(path), gguf.GGUFReader(path)
    expected = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert {k: as_reader_sees(v) for k, v in header.metadata.items()} == expected
    assert list(header.metadata) == list(expected)
    assert header.version == reader.fields["GGUF.version"].contents()
    assert header.alignment == reader.alignment
    assert [
        (t.name, t.shape_ne, t.qtype.ggml_id, t.n_bytes, header.data_offset + t.offset)
        for t in header.tensors
    ] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), t.n_bytes, t.data_offset)
        for t in reader.tensors
    ]


@both_byte_orders
def test_header_equals_the_gguf_package(tmp_path: Path, endianess: GGUFEndian) -> None:
    """Every value type, shape, type and offset is read as the gguf package reads it."""
    path = write_with_gguf(tmp_path / "every.gguf", endianess)
    assert_same_as_gguf(path)
    assert read_header(path).byte_order == ("<" if endianess == GGUFEndian.LITTLE else ">")
    assert len(read_header(path).metadata) == len(SCALARS) + len(ARRAYS) + 1


@both_byte_orders
def test_version_2_equals_the_gguf_package(tmp_path: Path, endianess: GGUFEndian) -> None:
    """Version 2, which differs from 3 in its number alone, is read too."""
    path = write_with_gguf(tmp_path / "two.gguf", endianess)
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I" if endianess == GGUFEndian.LITTLE else ">I", 2)
    path.write_bytes(raw)
    assert read_header(path).version == 2
    assert_same_as_gguf(path)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_model_header_equals_the_gguf_package(tmp_path: Path, dtype: Any) -> None:
    """The header of a whole model with a vocabulary is read as the gguf package reads it."""
    assert_same_as_gguf(toy_moe(tmp_path / "toy.gguf", dtype=dtype))


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_other_alignments_equal_the_gguf_package(tmp_path: Path, alignment: int) -> None:
    """The data section starts where general.alignment says."""
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "test")
    writer.add_custom_alignment(alignment)
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, np.zeros(33, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(tmp_path / "aligned.gguf").alignment == alignment
    assert_same_as_gguf(tmp_path / "aligned.gguf")


@pytest.mark.parametrize("kind", sorted(ARRAYS))
def test_long_arrays_are_skipped_but_counted(tmp_path: Path, kind: str) -> None:
    """An array longer than any per-layer setting is not decoded, yet its length is known."""
    values, item_type = ARRAYS[kind]
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "test")
    for key, length in (("short", MAX_DECODED_ARRAY), ("long", MAX_DECODED_ARRAY + 1)):
        repeated = (list(values) * length)[:length]
        writer.add_key_value(key, repeated, GGUFValueType.ARRAY, item_type)
    writer.add_string("last", "after the array")
    writer.add_tensor("a.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, fields = read_header(path), gguf.GGUFReader(path).fields
    assert list(header.metadata["short"]) == fields["short"].contents()
    assert header.metadata["long"] == SkippedArray(len(fields["long"].data))
    assert header.metadata["last"] == "after the array"


@pytest.mark.parametrize(
    "lengths",
    [
        [0] * 200_000,
        [READ_AHEAD_BYTES - 8] * 2 + [3] * 3000,
        [3] * 3000 + [READ_AHEAD_BYTES + 1, 0, 3 * READ_AHEAD_BYTES, 5],
        [READ_AHEAD_BYTES // 3] * 7 + [1] * 3000,
    ],
    ids=["empty", "as-long-as-the-buffer", "longer-than-the-buffer", "across-its-end"],
)
def test_strings_of_any_length_are_walked(lengths: Sequence[int]) -> None:
    """What follows a long array of strings is found, whatever their lengths."""
    raw = blob([("vocabulary", strings(lengths)), ("last", u32(7))])
    header = parse(raw)
    assert header.metadata == {"vocabulary": SkippedArray(len(lengths)), "last": 7}
    assert header.spans["vocabulary"] == (24, 24 + 18 + 16 + sum(lengths) + 8 * len(lengths))


@given(pattern=st.lists(st.integers(0, 3000), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_strings_across_the_buffer_are_walked(pattern: list[int]) -> None:
    """Wherever the end of a read-ahead falls among the strings, what follows them is found."""
    lengths = pattern * (2200 // len(pattern) + 1)
    header = parse(blob([("vocabulary", strings(lengths)), ("last", u32(7))]))
    assert header.metadata == {"vocabulary": SkippedArray(len(lengths)), "last": 7}


@both_byte_orders
def test_spans_carry_the_entries(tmp_path: Path, endianess: GGUFEndian) -> None:
    """Entries copied byte by byte by their spans, in another order, say the same to the reader."""
    path = write_with_gguf(tmp_path / "every.gguf", endianess)
    raw, header = path.read_bytes(), read_header(path)
    spans = list(header.spans.values())
    assert [begin for begin, _ in spans] == [24, *(end for _, end in spans[:-1])]
    copied = b"".join(raw[slice(*header.spans[key])] for key in reversed(header.spans))
    path.write_bytes(raw[:24] + copied + raw[spans[-1][1] :])
    assert read_header(path).metadata == header.metadata
    assert_same_as_gguf(path)


def test_hash_identifies_the_header_alone(tmp_path: Path) -> None:
    """The hash is that of the bytes before the data, without padding: weights do not change it."""
    raw = blob([("k", u32(1))], data=bytes(64))
    end = 24 + len(text("k") + u32(1)) + len(text("a")) + 4 + 8 + 4 + 8
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    assert read_header(path).sha256 == hashlib.sha256(raw[:end]).hexdigest()
    assert parse(blob([("k", u32(1))], data=b"\1" * 64)).sha256 == parse(raw).sha256
    assert parse(blob([("k", u32(2))])).sha256 != parse(raw).sha256


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGML" + bytes(60), b"PK\3\4" + bytes(99)])
def test_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file that is empty, too short or of another format is refused by name."""
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"other\.gguf: .*(not a GGUF|truncated)"):
        read_header(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """A missing file and a directory are refused by name, not with an operating system's error."""
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(SourceError, match=path.name):
            read_header(path)


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_unknown_versions_are_refused(version: int) -> None:
    """Versions other than 2 and 3 are refused with the version."""
    with pytest.raises(SourceError, match=f"version {version} "):
        parse(blob(version=version))


@both_byte_orders
def test_truncation_anywhere_is_refused(tmp_path: Path, endianess: GGUFEndian) -> None:
    """A file that ends one byte or more before its last tensor's end is refused, wherever."""
    path = write_with_gguf(tmp_path / "every.gguf", endianess)
    raw, header = path.read_bytes(), read_header(path)
    end = header.data_offset + max(t.offset + t.n_bytes for t in header.tensors)
    assert parse(raw[:end]).metadata == header.metadata
    for n_bytes in range(end):
        with pytest.raises(SourceError, match="truncated"):
            parse(raw[:n_bytes])


@pytest.mark.parametrize("n_bytes", [3, 100, 1500, 4000])
def test_truncated_files_are_refused(tmp_path: Path, n_bytes: int) -> None:
    """A truncated file on disk is refused with its name and size."""
    path = write_with_gguf(tmp_path / "every.gguf")
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(SourceError, match=rf"every\.gguf: truncated .*\b{n_bytes}\b"):
        read_header(path)


def test_a_source_that_shrinks_is_refused() -> None:
    """A source that delivers less than its stated size, as a shrinking file does, is refused."""
    raw = blob([("k", text("value"))])
    with pytest.raises(SourceError, match="ended early"):
        parse_header(lambda offset, size: raw[:30][offset : offset + size], len(raw), "toy")


ABSURD = 1 << 60
HUGE_ARRAY = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT64, ABSURD)


@pytest.mark.parametrize(
    "raw",
    [
        blob(counts=(ABSURD, 0)),
        blob(counts=(0, ABSURD)),
        blob(counts=(2**64 - 1, 2**64 - 1)),
        blob(counts=(1, 1), tensors=())[:24] + struct.pack("<Q", ABSURD) + bytes(200),
        blob([("k", struct.pack("<IQ", GGUFValueType.STRING, ABSURD))]),
        *(
            blob([("k", struct.pack("<IIQ", GGUFValueType.ARRAY, kind, length))])
            for kind in (GGUFValueType.STRING, GGUFValueType.UINT8, GGUFValueType.FLOAT64)
            for length in (MAX_DECODED_ARRAY, ABSURD, 2**64 - 1)
        ),
        blob(
            [("k", struct.pack("<IIQQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 3, 2**64 - 1))]
        ),
        blob(tensors=[("a", (2**63, 2**63, 2**63, 2**63), 0, 0)]),
        blob(tensors=[("a", (ABSURD,), 0, 0)]),
        blob(tensors=[("a", (8,), 0, 2**64 - 32)]),
    ],
)
def test_absurd_numbers_cost_nothing(raw: bytes) -> None:
    """Counts, lengths and sizes beyond the file are refused before memory is taken for them."""
    n_read = 0

    def read_at(offset: int, size: int) -> bytes:
        nonlocal n_read
        n_read += len(raw[offset : offset + size])
        return raw[offset : offset + size]

    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            parse_header(read_at, len(raw), "toy")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20
    assert n_read <= 4 * len(raw)


@pytest.mark.parametrize("what", ["key", "tensor name"])
def test_an_absurd_name_in_a_big_file_costs_nothing(tmp_path: Path, what: str) -> None:
    """A damaged name length below the size of a big file does not pull the file into memory."""
    n_bytes = 1 << 25
    raw = b"GGUF" + struct.pack("<IQQ", 3, *((0, 1) if what == "key" else (1, 0)))
    path = tmp_path / "big.gguf"
    with path.open("wb") as file:
        file.write(raw + struct.pack("<Q", n_bytes))
        file.truncate(2 * n_bytes)  # sparse: takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(SourceError):
            read_header(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 23


NESTED = struct.pack("<IIQIQ", 9, 9, 1, 4, 0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (blob([("k", u32(1)), ("k", u32(2))]), "key 'k' occurs twice"),
        (blob(tensors=[("a", (8,), 0, 0), ("a", (8,), 0, 32)]), "tensor name occurs twice"),
        (blob([("k", struct.pack("<II", 13, 0))]), "'k' has the unknown value type 13"),
        (blob([("k", struct.pack("<IIQ", 9, 99, 0))]), "'k' has the unknown value type 99"),
        (blob([("k", NESTED)]), "'k' is an array of arrays"),
        *(
            (blob(tensors=[("a", (256,), kind, 0)]), rf"'a' has the unknown type number {kind}\.")
            for kind in (4, 5, 31, 32, 33, 36, 37, 38, 99, 2**32 - 1)
        ),
        (blob(tensors=[("a", (), 0, 0)]), "'a' has 0 dimensions"),
        (blob(tensors=[("a", (1,) * 5, 0, 0)]), "'a' has 5 dimensions"),
        (blob(tensors=[("a", (8, 0), 0, 0)]), "'a' has an empty shape"),
        (blob(tensors=[("a", (33,), 8, 0)]), "'a': rows of 33 weights"),
        (blob(tensors=[("a", (8,), 0, 16)]), "'a' starts at byte 16 .* alignment 32"),
        (blob(tensors=[("a", (9,), 0, 0), ("b", (1,), 0, 32)]), "'b' overlaps 'a'"),
        (blob(tensors=[("a", (8,), 0, 32), ("b", (9,), 0, 0)]), "'a' overlaps 'b'"),
        (blob(tensors=[("a", (1,), 0, 0), ("b", (1,), 0, 0)]), "overlaps"),
        (blob(tensors=[("a", (8,), 0, 64)]), "truncated"),
        *(
            (blob([("general.alignment", value)]), "general.alignment is .*, .* power of two")
            for value in (
                u32(0),
                u32(24),
                struct.pack("<Ii", GGUFValueType.INT32, -32),
                struct.pack("<If", GGUFValueType.FLOAT32, 32.0),
                struct.pack("<I", GGUFValueType.STRING) + text("32"),
                struct.pack("<IIQ", 9, 4, 0),
            )
        ),
    ],
)
def test_contradictions_are_refused(raw: bytes, message: str) -> None:
    """A header that contradicts itself is refused, naming the key or tensor and what is wrong."""
    with pytest.raises(SourceError, match=message) as caught:
        parse(raw)
    assert str(caught.value).startswith("toy: ")


def test_tensors_may_be_stored_in_any_order() -> None:
    """The order of the header need not be that of the data, and gaps are no fault."""
    header = parse(blob(tensors=[("b", (8,), 0, 96), ("a", (8,), 0, 0)], data=bytes(128)))
    assert [(t.name, t.offset) for t in header.tensors] == [("b", 96), ("a", 0)]


def test_a_header_without_tensors_needs_no_data(tmp_path: Path) -> None:
    """A file of metadata alone, as the gguf package writes a vocabulary, is no truncated file."""
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_string("general.name", "words")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert path.stat().st_size % 32, "the writer pads, so this test shows nothing"
    assert_same_as_gguf(path)


SMALL = blob(
    [
        ("general.architecture", struct.pack("<I", GGUFValueType.STRING) + text("x")),
        ("general.alignment", u32(32)),
        ("layers", struct.pack("<IIQ3i", 9, GGUFValueType.INT32, 3, 1, 2, 3)),
        ("words", strings(["a", "bc", ""])),
        ("ok", struct.pack("<I?", GGUFValueType.BOOL, True)),
    ],
    [("blk.0.a.weight", (32, 2), 8, 0), ("b", (4, 2, 2), 1, 96)],
    data=bytes(128),
)
edits = st.lists(
    st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4
)


def accept_or_refuse(raw: bytes) -> None:
    """Parses; whatever is accepted must lie inside the file."""
    try:
        header = parse(raw)
    except SourceError as error:
        assert error.faults
        return
    assert all(header.data_offset + t.offset + t.n_bytes <= len(raw) for t in header.tensors)
    assert set(header.spans) == set(header.metadata)


@given(edits=edits)
@settings(max_examples=400, deadline=None)
def test_flipped_bytes_never_crash(edits: Sequence[tuple[int, int]]) -> None:
    """A damaged header is read or refused with a SourceError; nothing else ever comes out."""
    raw = bytearray(SMALL)
    for position, value in edits:
        raw[position] = value
    accept_or_refuse(bytes(raw))


@given(
    begin=st.integers(0, len(SMALL)),
    n_lost=st.integers(0, 64),
    inserted=st.binary(max_size=16) | st.just(bytes(8)) | st.just(b"\xff" * 8),
)
@settings(max_examples=300, deadline=None)
def test_lost_and_inserted_bytes_never_crash(begin: int, n_lost: int, inserted: bytes) -> None:
    """A header with bytes lost or inserted is read or refused with a SourceError."""
    accept_or_refuse(SMALL[:begin] + inserted + SMALL[begin + n_lost :])


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_noise_after_the_magic_number_never_crashes(noise: bytes) -> None:
    """Noise that starts like a GGUF is read or refused with a SourceError."""
    accept_or_refuse(b"GGUF\3\0\0\0" + noise)


CORPUS = json.loads(Path(__file__).with_name("data").joinpath("header_corpus.json").read_text())


@pytest.mark.parametrize("says", sorted(CORPUS))
def test_every_known_damage_is_refused_alike(says: str) -> None:
    """What benchmarks/fuzz_header.py found once is answered as it was then."""
    raw = bytes.fromhex(CORPUS[says])
    if says == "accepted":
        accept_or_refuse(raw)
        return
    with pytest.raises(SourceError) as caught:
        parse_header(lambda offset, size: raw[offset : offset + size], len(raw), "fuzz")
    assert re.sub(r"'.*'|\".*\"|\d+", "_", str(caught.value), flags=re.DOTALL) == says


TYPES: Mapping[GGUFValueType, st.SearchStrategy[Any]] = {
    GGUFValueType.UINT8: st.integers(0, 2**8 - 1),
    GGUFValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: st.integers(0, 2**16 - 1),
    GGUFValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    GGUFValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.UINT64: st.integers(0, 2**64 - 1),
    GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    GGUFValueType.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}


def typed(kinds: Callable[[GGUFValueType], st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Pairs of a value type and such a value."""
    return st.sampled_from(list(TYPES)).flatmap(lambda k: st.tuples(st.just(k), kinds(k)))


values = typed(TYPES.__getitem__) | typed(lambda k: st.lists(TYPES[k], min_size=1, max_size=5))


@given(
    entries=st.dictionaries(st.text("abc._é", min_size=1, max_size=12), values, max_size=8),
    endianess=st.sampled_from(GGUFEndian),
)
@settings(max_examples=60, deadline=None)
def test_any_metadata_survive(
    tmp_path_factory: pytest.TempPathFactory,
    entries: Mapping[str, tuple[GGUFValueType, Any]],
    endianess: GGUFEndian,
) -> None:
    """Whatever the gguf package writes as metadata is read back unchanged, in either byte order."""
    path = tmp_path_factory.mktemp("any") / "any.gguf"
    writer = gguf.GGUFWriter(path, "test", endianess=endianess)
    for key, (kind, value) in entries.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)
    writer.add_tensor("a.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {k: as_reader_sees(v) for k, v in read_header(path).metadata.items()}
    assert read == {"general.architecture": "test"} | {k: v for k, (_, v) in entries.items()}
