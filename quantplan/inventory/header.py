"""Reads the header of a GGUF file: metadata and tensor list, never weights, never vocabulary.

The format is ggml's ``docs/gguf.md``. Values are kept as spans of the file, so that a rewritten
file can carry them over byte for byte, and only the small ones are decoded: walking the 151,552
tokens and 318,088 merges of a vocabulary as spans takes milliseconds, decoding them seconds.
"""

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType

from quantplan.errors import SourceError
from quantplan.inventory.header_cache import keep_header, kept_header
from quantplan.inventory.ranges import open_ranges
from quantplan.qtypes import QType, qtype_by_id

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
# Longest key that the format allows; a longer name is a damaged length.
MAX_NAME_BYTES = 2**16 - 1
# Longest string that llama.cpp loads.
MAX_STRING_BYTES = 2**30
# Arrays up to this length are decoded (per-layer settings); longer ones are vocabulary.
MAX_DECODED_ARRAY = 2048
_READ_AHEAD_BYTES = 1 << 20

_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

ReadAt = Callable[[int, int], bytes]
"""Reads ``size`` bytes at ``offset``; fewer come back at the end of the source."""


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """An array that was walked but not decoded, such as a vocabulary."""

    length: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header lists it.

    Attributes:
        name: Full name, such as ``blk.0.attn_q.weight``.
        shape_ne: Shape in GGUF order, row length first.
        qtype: Tensor type.
        offset: Bytes from the start of the data section to the tensor's data.
        n_bytes: Exact bytes of the tensor's data.
    """

    name: str
    shape_ne: tuple[int, ...]
    qtype: QType
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one GGUF file.

    Attributes:
        version: GGUF version (2 or 3).
        byte_order: ``<`` or ``>``, as in the struct module.
        metadata: Decoded values by key; long arrays are `SkippedArray`.
        spans: Byte range of each whole key-value entry (key, type and value) by key.
        tensors: Tensors in file order.
        alignment: Alignment of tensor data in bytes.
        data_offset: Where the data section starts, in bytes.
        sha256: Hash of the file's bytes before the data section.
    """

    version: int
    byte_order: str
    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_offset: int
    sha256: str


class _Cursor:
    """Walks a source forwards through a read-ahead buffer; every step is bounds-checked."""

    def __init__(self, read_at: ReadAt, size: int, name: str) -> None:
        self.offset = 0
        self.order = "<"
        self._read_at, self._size, self._name = read_at, size, name
        self._buffer, self._start = b"", 0

    def fail(self, what: str) -> SourceError:
        return SourceError(f"{self._name}: {what}. Download or convert the file again.")

    def require(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._size - self.offset:
            raise self.fail(
                f"truncated or damaged GGUF header: {what} needs {n_bytes} bytes at byte "
                f"{self.offset}, but the file ends at byte {self._size}"
            )

    def skip(self, n_bytes: int, what: str) -> None:
        self.require(n_bytes, what)
        self.offset += n_bytes

    def take(self, n_bytes: int, what: str) -> bytes:
        self.require(n_bytes, what)
        begin = self.offset - self._start
        if begin < 0 or begin + n_bytes > len(self._buffer):
            self._start, begin = self.offset, 0
            self._buffer = self._read_at(self.offset, max(n_bytes, _READ_AHEAD_BYTES))
            if len(self._buffer) < n_bytes:
                raise self.fail(f"the source ended early while reading {what}")
        self.offset += n_bytes
        return self._buffer[begin : begin + n_bytes]

    def scalar(self, code: str, what: str) -> Any:
        layout = self.order + code
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        n_bytes = self.scalar("Q", what)
        self.require(n_bytes, what)
        if n_bytes > limit:
            raise self.fail(f"damaged GGUF header: {what} has {n_bytes} bytes, more than {limit}")
        raw = self.take(n_bytes, what)
        return raw.decode("utf-8", errors="replace")

    def skip_strings(self, count: int, what: str) -> None:
        """Skips ``count`` strings by their length prefixes, within the buffer where it can."""
        self.require(8 * count, what)
        unpack = struct.Struct(self.order + "Q").unpack_from
        while count:
            self.take(8, what)
            position = self.offset - self._start - 8
            buffer, end = self._buffer, len(self._buffer)
            while count and position + 8 <= end:
                position += 8 + unpack(buffer, position)[0]
                count -= 1
            self.offset = self._start
            self.skip(position, what)


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.scalar("I", what)
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.fail(f"{what} has the unknown value type {number}") from None


def _array(cursor: _Cursor, what: str) -> Any:
    item_type = _value_type(cursor, what)
    length = cursor.scalar("Q", what)
    if item_type is GGUFValueType.ARRAY:
        raise cursor.fail(f"{what} is an array of arrays, which no loader accepts")
    decode = length <= MAX_DECODED_ARRAY
    if item_type is GGUFValueType.STRING:
        if decode:
            cursor.require(8 * length, what)
            return tuple(cursor.string(what) for _ in range(length))
        cursor.skip_strings(length, what)
        return SkippedArray(length)
    code = _SCALAR_FORMATS[item_type]
    n_bytes = struct.calcsize("=" + code) * length
    if decode:
        return struct.unpack(f"{cursor.order}{length}{code}", cursor.take(n_bytes, what))
    cursor.skip(n_bytes, what)
    return SkippedArray(length)


def _value(cursor: _Cursor, key: str) -> Any:
    what = f"the value of {key!r}"
    value_type = _value_type(cursor, what)
    if value_type is GGUFValueType.ARRAY:
        return _array(cursor, what)
    if value_type is GGUFValueType.STRING:
        return cursor.string(what)
    return cursor.scalar(_SCALAR_FORMATS[value_type], what)


def _preamble(cursor: _Cursor) -> int:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise cursor.fail(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    raw = cursor.take(4, "the version")
    version = int.from_bytes(raw, "little")
    if version not in VERSIONS and int.from_bytes(raw, "big") in VERSIONS:
        version, cursor.order = int.from_bytes(raw, "big"), ">"
    if version not in VERSIONS:
        raise cursor.fail(f"GGUF version {version} is not supported; versions are {VERSIONS}")
    return version


def _tensor_entry(cursor: _Cursor, index: int) -> TensorEntry:
    what = f"tensor {index}"
    name = cursor.string(what, MAX_NAME_BYTES)
    n_dims = cursor.scalar("I", what)
    if not 0 < n_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape_ne = struct.unpack(f"{cursor.order}{n_dims}Q", cursor.take(8 * n_dims, what))
    type_id = cursor.scalar("I", what)
    offset = cursor.scalar("Q", what)
    qtype = qtype_by_id(type_id)
    if qtype is None:
        raise cursor.fail(f"tensor {name!r} has the unknown type number {type_id}")
    if not all(shape_ne):
        raise cursor.fail(f"tensor {name!r} has an empty shape {shape_ne}")
    try:
        n_bytes = qtype.tensor_bytes(shape_ne)
    except ValueError as error:
        raise cursor.fail(f"tensor {name!r}: {error}") from None
    return TensorEntry(name, shape_ne, qtype, offset, n_bytes)


def _check_data(cursor: _Cursor, header: Header, size: int) -> None:
    """Checks that every tensor lies inside the file, aligned, and none overlaps another."""
    end, previous = 0, "the header"
    for tensor in sorted(header.tensors, key=lambda t: t.offset):
        if tensor.offset % header.alignment:
            raise cursor.fail(
                f"tensor {tensor.name!r} starts at byte {tensor.offset} of the data section, which "
                f"is not a multiple of the alignment {header.alignment}"
            )
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name!r} overlaps {previous!r}")
        end, previous = tensor.offset + tensor.n_bytes, tensor.name
    if header.tensors and header.data_offset + end > size:
        raise cursor.fail(
            f"truncated GGUF file: {previous!r} ends at byte {header.data_offset + end}, but the "
            f"file has {size} bytes"
        )


def parse_header(read_at: ReadAt, size: int, name: str) -> Header:
    """Parses a GGUF header.

    Args:
        read_at: Reads bytes of the source at an offset.
        size: Size of the source in bytes.
        name: How messages call the source.

    Raises:
        SourceError: The source is no GGUF, is truncated or contradicts itself. Counts and lengths
            are checked against the size before anything is allocated for them.
    """
    cursor = _Cursor(read_at, size, name)
    version = _preamble(cursor)
    n_tensors = cursor.scalar("Q", "the tensor count")
    n_keys = cursor.scalar("Q", "the metadata count")
    # The smallest entries: a key is 8 + 4 + 1 bytes; a tensor 8 + 4 + 8 + 4 + 8.
    cursor.require(n_keys * 13 + n_tensors * 32, f"{n_keys} metadata keys, {n_tensors} tensors")
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(n_keys):
        begin = cursor.offset
        key = cursor.string(f"metadata key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r} occurs twice")
        metadata[key] = _value(cursor, key)
        spans[key] = (begin, cursor.offset)
    tensors = tuple(_tensor_entry(cursor, index) for index in range(n_tensors))
    if len({t.name for t in tensors}) != n_tensors:
        raise cursor.fail("a tensor name occurs twice")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment}, which is not a power of two")
    data_offset = -(-cursor.offset // alignment) * alignment
    header = Header(
        version, cursor.order, metadata, spans, tensors, alignment, data_offset,
        _sha256(read_at, cursor.offset),
    )  # fmt: skip
    _check_data(cursor, header, size)
    return header


def _sha256(read_at: ReadAt, end: int) -> str:
    digest = hashlib.sha256()
    for offset in range(0, end, _READ_AHEAD_BYTES):
        digest.update(read_at(offset, min(_READ_AHEAD_BYTES, end - offset)))
    return digest.hexdigest()


def read_header(source: str | os.PathLike[str]) -> Header:
    """Reads the header of a GGUF file on disk, or behind an HTTP URL.

    Headers of remote files are kept on the disk; the server is then only asked whether the file is
    the same, and whether it may be read.

    Raises:
        SourceError: The file cannot be opened, or `parse_header` refuses it.
    """
    with open_ranges(source) as file:
        kept = kept_header(file.cache_key) if file.cache_key else None
        if kept is not None:
            return parse_header(lambda at, n: kept[at : at + n], file.size, file.name)
        header = parse_header(file.read_at, file.size, file.name)
        if file.cache_key:
            keep_header(file.cache_key, file.read_at(0, header.data_offset))
        return header
