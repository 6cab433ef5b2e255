"""Inventories: from files, from split files, from the catalog; and the dimensions behind them."""

import gzip
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, quant_shape_to_byte_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.errors import SourceError, UnsupportedModelError
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.architecture import read_architecture
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_headers, read_inventory
from tests.support.models import toy_moe

every_model = pytest.mark.parametrize("name", catalog_names())
TIED = {
    "Qwen3-4B-Instruct-2507",
    "Qwen3-4B-Thinking-2507",
    "Qwen3.5-0.8B",
    "Qwen3.5-2B",
    "Qwen3.5-4B",
    "gemma-3-270m",
    "c4ai-command-a-03-2025",
    "c4ai-command-r-v01",
    "gemma-3-12b-it",
    "gemma-3-27b-it",
    "gemma-4-31B-it",
}


model = cache(read_inventory)
"""A model of the catalog, read once; inventories cannot change."""


def catalog_json(name: str) -> dict[str, Any]:
    """A catalog entry as it is on disk."""
    packed = files("quantplan.inventory.catalog").joinpath(f"{name}.json.gz").read_bytes()
    entry: dict[str, Any] = json.loads(gzip.decompress(packed))
    return entry


def write_split(
    directory: Path,
    n_tensors: int = 5,
    *,
    per_shard: int = 2,
    empty_first: bool = False,
    stem: str = "model",
) -> list[Path]:
    """Writes a split model with the gguf package."""
    path = directory / f"{stem}.gguf"
    writer = gguf.GGUFWriter(
        path, "test", split_max_tensors=per_shard, small_first_shard=empty_first
    )
    writer.add_name("toy")
    writer.add_block_count(n_tensors)
    for layer in range(n_tensors):
        weights = np.zeros((3, 32 * (layer + 1)), np.float16)
        writer.add_tensor(f"blk.{layer}.attn_q.weight", weights)
    close(writer)
    return sorted(directory.glob(f"{stem}-*.gguf"))


def close(writer: gguf.GGUFWriter) -> None:
    """Writes everything added so far."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_small(path: Path, extra: Mapping[str, tuple[Any, GGUFValueType]] | None = None) -> Path:
    """Writes a model of one tensor with some metadata."""
    writer = gguf.GGUFWriter(path, "glm4moe")
    metadata = {
        "block_count": 2,
        "embedding_length": 256,
        "context_length": 512,
        "attention.head_count": 4,
        "expert_count": 4,
        "expert_used_count": 2,
        "nextn_predict_layers": 1,
    }
    for key, value in metadata.items():
        writer.add_uint32(f"glm4moe.{key}", value)
    for key, (value, kind) in (extra or {}).items():
        writer.add_key_value(key, value, kind)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 32), np.float16))
    close(writer)
    return path


# Files


@pytest.mark.parametrize("architecture", ["glm4moe", "qwen3moe"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_files_are_read_as_the_gguf_package_reads_them(
    tmp_path: Path, architecture: Any, dtype: Any
) -> None:
    """Tensors in their order with shapes, types and bytes are those that the gguf package finds."""
    path = toy_moe(tmp_path / "toy.gguf", architecture, dtype)
    inventory, reader = read_inventory(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape_ne, t.qtype, t.n_bytes, t.n_weights) for t in inventory.tensors] == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.n_bytes, t.n_elements)
        for t in reader.tensors
    ]
    assert inventory.n_bytes == sum(t.n_bytes for t in reader.tensors)
    assert inventory.name == f"toy {architecture}"
    assert inventory.source == str(path)


def test_what_a_name_means_is_the_same_for_text_and_path(tmp_path: Path) -> None:
    """A path may be given as text or as a Path."""
    path = toy_moe(tmp_path / "toy.gguf")
    assert read_inventory(str(path)) == read_inventory(path)


def test_a_model_without_a_name_is_called_as_its_file(tmp_path: Path) -> None:
    """Without general.name, the file's name is the model's."""
    assert read_inventory(write_small(tmp_path / "nameless.gguf")).name == "nameless"


def test_long_arrays_stay_out_of_the_metadata(tmp_path: Path) -> None:
    """Of a long vocabulary only the length is kept; short arrays are values."""
    words = [str(i) for i in range(3000)]
    path = write_small(
        tmp_path / "wordy.gguf", {"tokenizer.ggml.tokens": (words, GGUFValueType.ARRAY)}
    )
    inventory = read_inventory(path)
    assert inventory.array_lengths == {"tokenizer.ggml.tokens": 3000}
    assert "tokenizer.ggml.tokens" not in inventory.metadata
    few = read_inventory(toy_moe(tmp_path / "toy.gguf"))
    assert few.metadata["tokenizer.ggml.merges"][0] == "t h"
    assert few.array_lengths == {}


def test_a_file_goes_before_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is called like a catalog entry is the one that is read."""
    write_small(tmp_path / "GLM-4.5-Air")
    monkeypatch.chdir(tmp_path)
    assert len(read_inventory("GLM-4.5-Air").tensors) == 1
    assert len(read_inventory("glm-4.5-air").tensors) == 803


def test_inventories_survive_json(tmp_path: Path) -> None:
    """An inventory of a file or of the catalog is the same after a trip through JSON."""
    for source in (toy_moe(tmp_path / "toy.gguf"), "gemma-4-31B-it"):
        inventory = read_inventory(source)
        assert Inventory.model_validate_json(inventory.model_dump_json()) == inventory


# Sources that cannot be read


@pytest.mark.parametrize(
    "source", ["missing.gguf", "some/where", "some/where.gguf", "MISSING.GGUF"]
)
def test_a_missing_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """What looks like a path is refused as a missing file, not as an unknown model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=rf"{source}: .*no such file"):
        read_inventory(source)


@pytest.mark.parametrize("source", ["x" * 300, "x" * 300 + ".gguf", "a\0b", "", "."])
def test_impossible_names_are_refused(source: str) -> None:
    """A name that no file system takes is refused like any other unknown name."""
    with pytest.raises(SourceError):
        read_inventory(source)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    """A directory is refused as such, by name."""
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    for read in (read_inventory, read_headers):
        with pytest.raises(SourceError, match=rf"{re.escape(str(folder))}: is a directory"):
            read(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """What is neither file nor directory is refused without waiting for its data."""
    os.mkfifo(tmp_path / "pipe.gguf")
    for read in (read_inventory, read_headers):
        with pytest.raises(SourceError, match="is no regular file"):
            read(tmp_path / "pipe.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="Other systems refuse such names themselves.")
def test_a_file_name_without_a_unicode_spelling(tmp_path: Path) -> None:
    """A file whose name is no valid text is read so that JSON can hold it, or refused by name."""
    path = write_small(tmp_path / "plain.gguf").rename(tmp_path / "odd\udcff.gguf")
    try:
        inventory = read_inventory(path)
    except SourceError as error:
        assert error.faults
    else:
        assert len(json.loads(inventory.model_dump_json())["tensors"]) == 1


def test_a_gguf_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """A GGUF without an architecture, such as an importance matrix, is refused as no model."""
    path = write_small(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectur3"))
    with pytest.raises(SourceError, match=r"name no general\.architecture; this is no model"):
        read_inventory(path)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("three", GGUFValueType.STRING),
        ([1, 2], GGUFValueType.ARRAY),
        (math.inf, GGUFValueType.FLOAT32),
        (math.nan, GGUFValueType.FLOAT64),
        (-1, GGUFValueType.INT32),
        (list(range(3000)), GGUFValueType.ARRAY),
    ],
)
@pytest.mark.parametrize("key", ["split.count", "split.tensors.count"])
def test_senseless_split_counts_are_refused(
    tmp_path: Path, key: str, value: Any, kind: GGUFValueType
) -> None:
    """A shard count that is no count is refused as damage."""
    with pytest.raises(SourceError):
        read_inventory(write_small(tmp_path / "model.gguf", {key: (value, kind)}))


@given(edits=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_damaged_files_never_crash(
    tmp_path_factory: pytest.TempPathFactory, edits: Sequence[tuple[int, int]]
) -> None:
    """A damaged model file is read or refused with a SourceError."""
    path = write_small(tmp_path_factory.mktemp("damaged") / "model.gguf")
    raw = bytearray(path.read_bytes())
    for position, value in edits:
        raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        inventory = read_inventory(path)
    except SourceError as error:
        assert "model.gguf" in str(error)
    else:
        assert len(inventory.tensors) <= 1


# Split files


@pytest.mark.parametrize("empty_first", [False, True])
def test_any_shard_names_the_model(tmp_path: Path, empty_first: bool) -> None:
    """Whichever shard is named, the inventory is that of all of them, in order."""
    shards = write_split(tmp_path, empty_first=empty_first)
    assert len(shards) == 3 + empty_first
    expected = [t.name for shard in shards for t in gguf.GGUFReader(shard).tensors]
    assert sorted(expected) == [f"blk.{layer}.attn_q.weight" for layer in range(5)]
    inventories = [read_inventory(shard) for shard in shards]
    for inventory in inventories:
        assert [t.name for t in inventory.tensors] == expected
        assert inventory.tensors == inventories[0].tensors
        assert inventory.metadata == inventories[0].metadata
        assert inventory.header_sha256 == inventories[0].header_sha256
        assert inventory.name == "toy"


def test_a_split_model_is_the_same_as_a_whole_one(tmp_path: Path) -> None:
    """Split and whole, a model has the same tensors and metadata; how it is split is left out."""
    split = read_inventory(write_split(tmp_path)[0])
    write_split(tmp_path, per_shard=0, stem="whole")
    whole = read_inventory(tmp_path / "whole.gguf")
    assert split.tensors == whole.tensors
    assert split.metadata == whole.metadata
    assert split.header_sha256 != whole.header_sha256


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    """One error names every shard that is missing, so that all can be fetched at once."""
    shards = write_split(tmp_path, n_tensors=9)
    for missing in (shards[0], shards[2], shards[4]):
        missing.unlink()
    with pytest.raises(SourceError) as caught:
        read_inventory(shards[1])
    assert len(caught.value.faults) == 3
    for fault, missing in zip(caught.value.faults, shards[::2], strict=True):
        assert fault.startswith("3 of 5 shards are missing")
        assert str(missing) in fault


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    """A shard under another name, which does not lead to the others, says how it was called."""
    renamed = write_split(tmp_path)[0].rename(tmp_path / "best-model.gguf")
    with pytest.raises(SourceError, match=r"one of 3 shards, .*NAME-00001-of-00003\.gguf"):
        read_inventory(renamed)


def test_shards_of_different_models_are_refused(tmp_path: Path) -> None:
    """Shards that do not add up to the announced tensors come from different models."""
    shards = write_split(tmp_path)
    (tmp_path / "other").mkdir()
    others = write_split(tmp_path / "other", n_tensors=6)
    assert len(others) == len(shards)
    others[2].replace(shards[2])
    with pytest.raises(SourceError, match="come from different models"):
        read_inventory(shards[0])


def test_a_shard_twice_is_refused(tmp_path: Path) -> None:
    """A shard that is there under two names leaves its tensors twice, which is refused."""
    shards = write_split(tmp_path, n_tensors=6)
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(SourceError, match="4 different tensors in 6 entries, but 6 are announced"):
        read_inventory(shards[0])


def test_swapped_shards_are_refused(tmp_path: Path) -> None:
    """Shards whose names were exchanged are refused: the first one carries the metadata."""
    first, second, _ = write_split(tmp_path)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(SourceError):
        read_inventory(first)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_truncated_shard_is_named(tmp_path: Path, index: int) -> None:
    """A truncated shard is refused by its own name, whichever shard was asked for."""
    shards = write_split(tmp_path)
    raw = shards[index].read_bytes()
    shards[index].write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SourceError, match=rf"{shards[index].name}: truncated"):
        read_inventory(shards[0])


@pytest.mark.parametrize("numbers", ["00001-of-00000", "00000-of-00000", "00004-of-00003"])
def test_impossible_shard_numbers_are_refused(tmp_path: Path, numbers: str) -> None:
    """A shard number beyond the count, or a count of none, is refused by the file's name."""
    write_split(tmp_path)
    path = write_small(tmp_path / f"model-{numbers}.gguf")
    with pytest.raises(SourceError, match=numbers):
        read_inventory(path)


# The catalog


@every_model
def test_catalog_models_are_whole(name: str) -> None:
    """An entry has all the tensors and weights of its data file, and one tensor a name."""
    entry, inventory = catalog_json(name), model(name)
    assert [t.name for t in inventory.tensors] == [tensor for tensor, _, _ in entry["tensors"]]
    assert inventory.n_weights == sum(math.prod(shape) for _, shape, _ in entry["tensors"])
    assert len(inventory.by_name) == len(inventory.tensors)
    assert (inventory.name, inventory.source) == (name, f"catalog:{name}")
    assert entry["source"]


@pytest.mark.parametrize(
    ("name", "n_tensors", "billions"),
    [
        ("GLM-4.5-Air", 803, 110.47),
        ("DeepSeek-V3.1-Terminus", 1086, 671.03),
        ("Qwen3-4B-Instruct-2507", 398, 4.02),
        ("Qwen3-VL-235B-A22B-Instruct", 1131, 235.09),
        ("Kimi-K2-Thinking", 1096, 1026.41),
    ],
)
def test_published_sizes(name: str, n_tensors: int, billions: float) -> None:
    """Well-known models have the tensors and the number of weights that are published."""
    inventory = model(name)
    assert len(inventory.tensors) == n_tensors
    assert round(inventory.n_weights / 1e9, 2) == billions


@every_model
def test_catalog_names_in_any_case(name: str) -> None:
    """A model of the catalog is found in any case."""
    spellings = (name.lower(), name.upper(), name.swapcase())
    assert {read_inventory(s).header_sha256 for s in spellings} == {model(name).header_sha256}


def test_catalog_entries_are_told_apart() -> None:
    """No two entries have the same hash."""
    hashes = Counter(model(name).header_sha256 for name in catalog_names())
    assert max(hashes.values()) == 1


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("GLM-4.5-Ai", "GLM-4.5-Air"),
        ("glm-4.5-airr", "GLM-4.5-Air"),
        ("glm45air", "GLM-4.5-Air"),
        ("Kimi-K2-Think", "Kimi-K2-Thinking"),
        ("qwen3.5-122b", "Qwen3.5-122B-A10B"),
        ("deepseek-v3.1-term", "DeepSeek-V3.1-Terminus"),
    ],
)
def test_near_names_are_suggested(name: str, near: str) -> None:
    """A name that is almost one of the catalog comes with the right one ahead of others."""
    with pytest.raises(SourceError, match=rf"'{name}' is neither .*Did you mean {near}[ ,?]"):
        read_inventory(name)


def test_a_name_like_no_other_lists_what_is_known() -> None:
    """A name without a near one comes with the whole catalog."""
    with pytest.raises(SourceError) as caught:
        read_inventory("zzz")
    assert all(name in str(caught.value) for name in catalog_names())


@every_model
def test_tied_output(name: str) -> None:
    """Exactly the models that publish no output matrix use their embedding for it."""
    assert model(name).has_tied_output == (name in TIED)


@every_model
def test_vocabulary_rows(name: str) -> None:
    """The vocabulary is as long as the output matrix has rows, or the embedding where tied."""
    inventory = model(name)
    rows = {t.shape_ne[1] for t in inventory.tensors if t.role in ("output", "token_embd")}
    assert rows == {inventory.n_vocab}


# Bytes


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)
kinds = [kind for kind in GGMLQuantizationType if kind != GGMLQuantizationType.Q8_1]


@given(kind=st.sampled_from(kinds), n_blocks=st.integers(1, 20), rest=shapes)
@settings(deadline=None)
def test_bytes_equal_the_gguf_package(
    kind: GGMLQuantizationType, n_blocks: int, rest: tuple[int, ...]
) -> None:
    """A tensor of any shape takes exactly the bytes that the gguf package computes, at any type."""
    shape_ne = (n_blocks * gguf.GGML_QUANT_SIZES[kind][0], *rest)
    tensor = Tensor(name="blk.0.x.weight", shape_ne=shape_ne, qtype=kind.name)
    assert tensor.n_bytes == math.prod(quant_shape_to_byte_shape(shape_ne[::-1], kind))
    assert tensor.n_bytes == tensor.bytes_as(kind.name.lower())


@every_model
def test_catalog_bytes_equal_the_gguf_package(name: str) -> None:
    """Every tensor of a model takes the bytes of the gguf package in the source and as Q8_0."""
    for tensor in model(name).tensors:
        shape = tensor.shape_ne[::-1]
        for qtype in (tensor.qtype, *(["Q8_0"] if tensor.is_quantizable else [])):
            expected = math.prod(quant_shape_to_byte_shape(shape, GGMLQuantizationType[qtype]))
            assert tensor.bytes_as(qtype) == expected


def test_rows_that_do_not_fit_are_refused() -> None:
    """Asking for a type whose blocks do not fill the rows is an error, not a rounded size."""
    tensor = Tensor(name="blk.0.ffn_down_exps.weight", shape_ne=(1408, 4096, 128), qtype="BF16")
    with pytest.raises(
        ValueError, match=r"1408 weights are no whole number of blocks of Q6_K \(256 weights\)"
    ):
        tensor.bytes_as("Q6_K")


# Dimensions


@every_model
def test_dimensions_can_be_derived(name: str) -> None:
    """Every model has an architecture, with as many layers and caches as it has blocks."""
    inventory = model(name)
    arch = inventory.architecture
    layers = {t.layer for t in inventory.tensors if t.layer is not None}
    assert layers == set(range(arch.n_layers))
    assert len(arch.caches) == arch.n_layers
    assert arch.n_embd == inventory.by_name["token_embd.weight"].shape_ne[0]
    assert arch.context_length >= 4096
    depths = {t.shape_ne[2] for t in inventory.tensors if t.role.endswith("_exps")}
    assert depths == ({arch.n_expert} if arch.n_expert else set())
    assert arch.active_share == (arch.n_expert_used / arch.n_expert if arch.n_expert else 1)


def projected_widths(rows: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Widths of a layer's K and V rows, from the matrices that make them or read them."""
    if "attn_qkv" in rows:
        q_width = rows["attn_output"][0]
        k_width = (rows["attn_qkv"][1] - q_width) // 2
        return k_width, k_width
    if "attn_kv_b" in rows:  # expanded, so there are as many keys and values as there are queries
        return rows.get("attn_q_b", rows.get("attn_q", ()))[1], rows["attn_output"][0]
    if "attn_kv_a_mqa" in rows:
        return rows["attn_kv_a_mqa"][1], 0
    if "attn_k" not in rows:
        return 0, 0
    # Gemma's full-attention layers take the keys for values.
    return rows["attn_k"][1], rows.get("attn_v", rows["attn_k"])[1]


@every_model
def test_caches_are_as_wide_as_their_projections(name: str) -> None:
    """Each layer's cache rows are as wide as the matrices that fill them."""
    inventory = model(name)
    for layer, kept in enumerate(inventory.architecture.caches):
        shapes = {t.role: t.shape_ne for t in inventory.tensors if t.layer == layer}
        k_width, v_width = (0, 0) if kept.state_elements else projected_widths(shapes)
        assert (kept.k_width, kept.v_width) == (k_width, v_width)
        assert kept.indexer_k_width == shapes.get("indexer.attn_k", (0, 0))[1]
        assert (kept.state_elements > 0) == (k_width == 0)


@every_model
def test_recurrent_states(name: str) -> None:
    """A recurrent layer keeps its convolution's window and a state matrix, others keep none."""
    inventory = model(name)
    arch, metadata = inventory.architecture, inventory.metadata
    convolutions = {t.shape_ne for t in inventory.tensors if t.role == "ssm_conv1d"}
    states = {cache.state_elements for cache in arch.caches} - {0}
    if not convolutions:
        assert (states, arch.convolved_width) == (set(), 0)
        return
    ((kernel, width),) = convolutions
    size, inner = (metadata[f"{arch.name}.ssm.{key}"] for key in ("state_size", "inner_size"))
    assert arch.convolved_width == width
    assert states == {(kernel - 1) * width + size * inner}
    n_recurrent = sum(t.role == "ssm_conv1d" for t in inventory.tensors)
    assert n_recurrent == sum(cache.state_elements > 0 for cache in arch.caches)


def test_sliding_windows() -> None:
    """Gemma slides over 1024 tokens in five of six layers, which is where its windows are."""
    windows = [cache.window for cache in model("gemma-4-31B-it").architecture.caches]
    assert windows == [1024, 1024, 1024, 1024, 1024, 0] * 10


@pytest.mark.parametrize(("name", "n_loaded"), [("GLM-4.5-Air", 46), ("GLM-5.1", 78)])
def test_prediction_layers_are_not_loaded(name: str, n_loaded: int) -> None:
    """All of the last, next-token-prediction block is left unloaded, and nothing else."""
    inventory = model(name)
    assert inventory.architecture.n_loaded_layers == n_loaded
    skipped = {t.name for t in inventory.tensors if not inventory.is_loaded(t)}
    assert skipped == {n for n in inventory.by_name if n.startswith(f"blk.{n_loaded}.")}
    assert any("nextn" in name for name in skipped)


def test_a_toy_model_has_the_same_rules(tmp_path: Path) -> None:
    """What is loaded is told by a file's metadata just as by the catalog's."""
    glm = read_inventory(toy_moe(tmp_path / "glm.gguf", layers=3))
    assert {t.layer for t in glm.tensors if not glm.is_loaded(t)} == {3}
    qwen = read_inventory(toy_moe(tmp_path / "qwen.gguf", "qwen3moe", layers=3))
    assert all(map(qwen.is_loaded, qwen.tensors))
    assert (qwen.architecture.n_expert, qwen.architecture.n_expert_used) == (8, 2)


PLAIN = {
    "general.architecture": "toy",
    "toy.block_count": 6,
    "toy.embedding_length": 512,
    "toy.context_length": 4096,
    "toy.attention.head_count": 8,
}


def dims(**values: Any) -> Any:
    """The architecture of a plain model with some keys more, `__` for a dot."""
    extra = {f"toy.{key.replace('__', '.')}": value for key, value in values.items()}
    return read_architecture(PLAIN | extra)


def test_defaults_are_llama_cpps() -> None:
    """Without more keys, all heads have their own keys and values, as wide as the model."""
    arch = dims()
    assert {(c.k_width, c.v_width, c.window) for c in arch.caches} == {(512, 512, 0)}
    assert (arch.q_width, arch.n_head, arch.n_nextn, arch.n_expert) == (512, 8, 0, 0)


def test_settings_may_differ_by_layer() -> None:
    """Heads given by layer make caches by layer."""
    arch = dims(attention__head_count_kv=(1, 2, 3, 4, 5, 6), attention__key_length=32)
    assert [cache.k_width for cache in arch.caches] == [32, 64, 96, 128, 160, 192]
    assert [cache.v_width for cache in arch.caches] == [64, 128, 192, 256, 320, 384]


def test_layers_that_share_a_cache_have_none() -> None:
    """The last loaded layers share the caches of earlier ones; prediction layers come after."""
    arch = dims(attention__shared_kv_layers=2, nextn_predict_layers=1)
    kept = [cache.k_width > 0 for cache in arch.caches[: arch.n_loaded_layers]]
    assert kept == [True, True, True, False, False]


@pytest.mark.parametrize("period", [2, 3, 6])
def test_window_periods(period: int) -> None:
    """A pattern given as a number slides in all but every so-manieth layer."""
    arch = dims(attention__sliding_window=128, attention__sliding_window_pattern=period)
    assert [c.window == 0 for c in arch.caches] == [(i + 1) % period == 0 for i in range(6)]


@pytest.mark.parametrize("key", ["general.architecture", "toy.block_count", "toy.embedding_length"])
def test_missing_keys_are_named(key: str) -> None:
    """A model without a key that its memory depends on is refused by that key."""
    metadata = {k: v for k, v in PLAIN.items() if k != key}
    with pytest.raises(UnsupportedModelError, match=r"block_count|embedding_length"):
        read_architecture(metadata)


@pytest.mark.parametrize("key", ["ssm.state_size", "wkv.head_size"])
def test_unknown_recurrence_is_refused(key: str) -> None:
    """A model whose recurrent state is not modelled is refused, rather than planned too small."""
    with pytest.raises(UnsupportedModelError, match="the caches of architecture 'toy'"):
        read_architecture(PLAIN | {f"toy.{key}": 16})


@pytest.mark.parametrize(
    "values",
    [
        {"attention__head_count": (8,) * 5},
        {"attention__head_count_kv": (8,) * 5},
        {"attention__sliding_window": 128, "attention__sliding_window_pattern": (True,) * 5},
    ],
    ids=lambda values: list(values)[-1],
)
def test_arrays_shorter_than_the_model_are_refused(values: dict[str, Any]) -> None:
    """A setting by layer that lacks layers is refused, rather than planned too small."""
    with pytest.raises(UnsupportedModelError, match="5 entries for 6 layers"):
        dims(**values)


KEYS = (
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "context_length",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_mla",
    "attention.value_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.shared_kv_layers",
)
# Keys that matter only beside others.
BESIDE = {
    "attention.sliding_window_pattern": {"toy.attention.sliding_window": 128},
    "attention.key_length_mla": {
        "toy.attention.kv_lora_rank": 512,
        "toy.rope.dimension_count": 64,
    },
}
DELTA_NET = {
    "general.architecture": "qwen35",
    "qwen35.ssm.conv_kernel": 4,
    "qwen35.ssm.inner_size": 512,
    "qwen35.ssm.group_count": 2,
    "qwen35.ssm.state_size": 16,
}
NONSENSE = ("many", "", -1, 0, math.nan, math.inf, (), ("a",) * 6, (1,), True)


def assert_refused_or_sound(metadata: Mapping[str, Any]) -> None:
    """Whatever is accepted must be usable."""
    try:
        arch = read_architecture(metadata)
    except UnsupportedModelError as error:
        assert error.faults
        return
    assert len(arch.caches) == arch.n_layers > 0
    assert 0 <= arch.n_nextn <= arch.n_layers
    assert all(min(cache.model_dump().values()) >= 0 for cache in arch.caches)
    assert arch.active_share >= 0


@pytest.mark.parametrize("key", KEYS)
def test_senseless_values_never_crash(key: str) -> None:
    """A value of the wrong type or range is refused as unsupported, or leaves a sound model."""
    for value in NONSENSE:
        assert_refused_or_sound(PLAIN | BESIDE.get(key, {}) | {f"toy.{key}": value})


@pytest.mark.parametrize(
    "key",
    [
        "full_attention_interval",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.group_count",
        "ssm.state_size",
    ],
)
def test_senseless_recurrence_never_crashes(key: str) -> None:
    """So is one that describes recurrent layers."""
    plain = {k.replace("toy.", "qwen35."): v for k, v in PLAIN.items()} | DELTA_NET
    assert sum(c.state_elements > 0 for c in read_architecture(plain).caches) == 5
    for value in NONSENSE:
        assert_refused_or_sound(plain | {f"qwen35.{key}": value})
