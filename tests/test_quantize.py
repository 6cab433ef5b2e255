"""Files written by `quantize`, compared with those of llama.cpp's own quantizer."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantplan.errors import InputError, QuantizeError, RecipeError, SourceError
from quantplan.inventory.header import read_header
from quantplan.qtypes import QTYPES
from quantplan.quantize import Progress, quantize
from quantplan.quantize.ggml import ggml
from quantplan.version import __version__
from tests.support.llama_cpp import llama_server, needs_llama_cpp
from tests.support.models import toy_moe
from tests.support.quantizer import (
    entries,
    llama_quantize,
    recipe_for,
    sparse,
    spread,
    stored,
    tiny,
)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A glm4moe with expert rows of 352 weights, by source type."""
    folder = tmp_path_factory.mktemp("toys")
    return {
        dtype: toy_moe(folder / f"{dtype}.gguf", "glm4moe", dtype)
        for dtype in ("F16", "BF16", "F32")
    }


@pytest.fixture
def toy(toys: dict[str, Path]) -> Path:
    """The toy with F16 weights."""
    return toys["F16"]


@pytest.fixture
def occupied(tmp_path: Path) -> Iterator[Path]:
    """A target that exists already; afterwards it is unchanged and nothing lies beside it."""
    target = tmp_path / "target" / "model.gguf"
    target.parent.mkdir()
    target.write_bytes(b"an older model")
    yield target
    assert target.read_bytes() == b"an older model"
    assert list(target.parent.iterdir()) == [target]


FAST_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0",
    "MXFP4", "TQ1_0", "TQ2_0", "F16",
)  # fmt: skip
SLOW_TYPES = ("IQ4_NL", "IQ4_XS", "IQ3_S")


@needs_llama_cpp
def test_a_real_model_gets_the_bytes_of_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    """Each type that SmolLM2's rows admit, or fall back to, has llama.cpp's bytes."""
    qtypes = spread(smollm2, FAST_TYPES)
    llama_quantize(smollm2, tmp_path / "theirs.gguf", qtypes)
    quantize(recipe_for(smollm2, qtypes), smollm2, tmp_path / "ours.gguf", threads=2)
    theirs = stored(tmp_path / "theirs.gguf")
    assert stored(tmp_path / "ours.gguf") == theirs
    assert {"Q8_0", "Q5_1", "Q5_0", "Q4_0", "F16"} < {qtype for qtype, _ in theirs.values()}


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_experts_get_the_bytes_of_llama_cpp(
    toys: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    """Expert tensors have llama.cpp's bytes, rows of 352 weights its fallbacks, from any source."""
    source = toys[dtype]
    qtypes = spread(source, (*FAST_TYPES, *SLOW_TYPES))
    llama_quantize(source, tmp_path / "theirs.gguf", qtypes)
    quantize(recipe_for(source, qtypes), source, tmp_path / "ours.gguf", threads=2)
    theirs = stored(tmp_path / "theirs.gguf")
    assert stored(tmp_path / "ours.gguf") == theirs
    assert {*FAST_TYPES, *SLOW_TYPES} <= {qtype for qtype, _ in theirs.values()}


@needs_llama_cpp
def test_every_type_has_the_bytes_of_llama_cpp(tmp_path: Path) -> None:
    """Each type that llama.cpp writes without an importance matrix has its bytes."""
    source = toy_moe(tmp_path / "toy.gguf", "qwen3moe")
    names = [
        t.name
        for t in QTYPES.values()
        if t.is_file_target and "llama.cpp" in t.runtimes and not t.needs_imatrix
    ]
    qtypes = spread(source, names)
    llama_quantize(source, tmp_path / "theirs.gguf", qtypes)
    quantize(recipe_for(source, qtypes), source, tmp_path / "ours.gguf", threads=2)
    theirs = stored(tmp_path / "theirs.gguf")
    assert stored(tmp_path / "ours.gguf") == theirs
    assert {qtype for qtype, _ in theirs.values()} == set(names)


@needs_llama_cpp
def test_llama_cpp_runs_what_was_written(smollm2: Path, tmp_path: Path) -> None:
    """llama.cpp loads a file of mixed types and still speaks English."""
    qtypes = spread(smollm2, ("Q8_0", "Q6_K", "Q4_K"))
    result = quantize(recipe_for(smollm2, qtypes), smollm2, tmp_path / "mix.gguf")
    with llama_server(result.path, ["-c", "64", "-t", "2"]) as server:
        assert "Paris" in server.complete("The capital of France is", 8)


def test_threads_do_not_change_the_file(toy: Path, tmp_path: Path) -> None:
    """One thread and three write the same file."""
    recipe = recipe_for(toy, spread(toy, FAST_TYPES))
    quantize(recipe, toy, tmp_path / "one.gguf", threads=1)
    quantize(recipe, toy, tmp_path / "three.gguf", threads=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()


def test_a_split_source_becomes_one_file(toy: Path, tmp_path: Path) -> None:
    """Shards give the file that the whole model gives, without the metadata of the split."""
    reader = gguf.GGUFReader(toy)
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "glm4moe", split_max_tensors=30)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.glob("toy-*.gguf"))
    assert len(shards) > 2
    recipe = recipe_for(toy, spread(toy, FAST_TYPES))
    quantize(recipe, toy, tmp_path / "whole.gguf")
    quantize(recipe, shards[1], tmp_path / "joined.gguf")
    assert stored(tmp_path / "joined.gguf") == stored(tmp_path / "whole.gguf")
    whole, joined = (read_header(tmp_path / f"{name}.gguf") for name in ("whole", "joined"))
    source = "quantplan.source_header_sha256"
    assert whole.metadata.pop(source) != joined.metadata.pop(source)
    assert whole.metadata == joined.metadata


def test_metadata_are_carried_over_byte_for_byte(smollm2: Path, tmp_path: Path) -> None:
    """Every metadata entry stays as it is, but for what says how the file was made."""
    target = tmp_path / "q.gguf"
    quantize(recipe_for(smollm2, spread(smollm2, ["Q4_0"])), smollm2, target)
    before, after = read_header(smollm2), read_header(target)
    changed = {"general.file_type", "general.quantization_version"}
    changed |= {f"quantplan.{k}" for k in ("version", "backend", "source_header_sha256")}
    assert after.metadata["quantplan.source_header_sha256"] == before.sha256
    assert after.metadata["quantplan.version"] == __version__
    assert after.metadata["quantplan.backend"] == f"{ggml().name} {platform.machine()}"
    assert [k for k in after.spans if k not in changed] == [
        k for k in before.spans if k not in changed
    ]
    old, new = entries(smollm2, before), entries(target, after)
    assert all(new[key] == old[key] for key in new.keys() - changed)
    assert after.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert after.metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize(
    ("qtypes", "ftype"),
    [
        (["Q4_K", "Q4_K", "Q6_K"], "MOSTLY_Q4_K_M"),
        (["Q2_K"], "MOSTLY_Q2_K"),
        (["MXFP4"], "MOSTLY_MXFP4_MOE"),
        (["BF16"], "MOSTLY_BF16"),
        (["F32"], "ALL_F32"),
        (["Q2_0"], 41),
    ],
)
def test_file_type_states_the_type_with_most_bytes(
    tmp_path: Path, qtypes: list[str], ftype: str | int
) -> None:
    """general.file_type is llama.cpp's number of the quantized type that takes most bytes."""
    rows = np.ones((4, 256), np.float16)
    names = [f"blk.{i}.ffn_up.weight" for i in range(len(qtypes))]
    source = tiny(tmp_path / "s.gguf", **dict.fromkeys(names, rows))
    quantize(recipe_for(source, dict(zip(names, qtypes, strict=True))), source, tmp_path / "t.gguf")
    metadata = read_header(tmp_path / "t.gguf").metadata
    expected = ftype if isinstance(ftype, int) else gguf.LlamaFileType[ftype]
    assert metadata["general.file_type"] == expected


def test_the_gguf_package_reads_what_was_written(toy: Path, tmp_path: Path) -> None:
    """GGUFReader finds every tensor with its shape and type."""
    recipe = recipe_for(toy, spread(toy, FAST_TYPES))
    quantize(recipe, toy, tmp_path / "q.gguf")
    read = [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape)))
        for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors
    ]
    assert read == [(t.tensor, t.qtype, t.shape_ne) for t in recipe.tensors]


def test_progress_grows_to_the_whole_file(toy: Path, tmp_path: Path) -> None:
    """Progress names the tensors in order and ends with all bytes but the last padding."""
    seen: list[Progress] = []
    recipe = recipe_for(toy, spread(toy, ["Q5_0"]))
    result = quantize(recipe, toy, tmp_path / "q.gguf", progress=seen.append)
    assert list(dict.fromkeys(p.tensor for p in seen)) == [t.tensor for t in recipe.tensors]
    assert all(a.done_bytes < b.done_bytes for a, b in pairwise(seen))
    assert {p.total_bytes for p in seen} == {result.n_bytes}
    assert result.n_bytes == result.path.stat().st_size
    assert 0 <= result.n_bytes - seen[-1].done_bytes < 32


def test_every_misfit_is_named_at_once(toy: Path, occupied: Path) -> None:
    """One error names all that keeps a recipe from being carried out."""
    recipe = recipe_for(toy, {})
    by_name = {t.tensor: t for t in recipe.tensors}

    def change(name: str, **changes: Any) -> None:
        by_name[name] = by_name[name].model_copy(update=changes)

    change("blk.0.attn_q.weight", shape_ne=(256, 511))
    change("blk.0.attn_k.weight", qtype="Q9_9")
    change("blk.0.attn_v.weight", qtype="IQ2_XXS")
    change("blk.0.attn_output.weight", qtype="IQ4_KS")
    change("blk.0.attn_norm.weight", qtype="Q8_0")
    change("blk.1.ffn_down_exps.weight", qtype="Q4_K")
    change("blk.2.attn_q.weight", qtype="Q8_K")
    del by_name["output.weight"]
    extra = by_name["token_embd.weight"].model_copy(update={"tensor": "extra.weight"})
    tensors = (*by_name.values(), extra, extra)
    with pytest.raises(RecipeError) as caught:
        quantize(recipe.model_copy(update={"tensors": tensors}), toy, occupied)
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 9, faults
    for part in (
        "blk.0.attn_q.weight has the shape (256, 512), but the recipe was made for (256, 511)",
        "blk.0.attn_k.weight: there is no type 'Q9_9'",
        "blk.0.attn_v.weight cannot become IQ2_XXS: the type needs an importance matrix",
        "blk.0.attn_output.weight cannot become IQ4_KS: llama.cpp's quantizer writes no such file",
        "blk.0.attn_norm.weight cannot become Q8_0: llama.cpp loads this tensor only as floating",
        "blk.1.ffn_down_exps.weight cannot become Q4_K: rows of 352 weights are no whole number",
        "blk.2.attn_q.weight cannot become Q8_K",
        "the recipe lacks output.weight",
        "the source lacks extra.weight",
        "the recipe names extra.weight 2 times",
    ):
        assert part in faults


def test_a_source_without_tensors_is_refused(tmp_path: Path, occupied: Path) -> None:
    """A file of metadata only is refused with what to name instead."""
    source = tiny(tmp_path / "vocabulary.gguf")
    with pytest.raises(RecipeError, match="holds no tensors, only metadata"):
        quantize(recipe_for(source, {}), source, occupied)


def test_quantized_tensors_are_copied_but_not_converted(toy: Path, tmp_path: Path) -> None:
    """A quantized source can be copied as it is, and is refused where its type would change."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    recipe = recipe_for(toy, spread(toy, FAST_TYPES))
    quantize(recipe, toy, first)
    quantize(recipe, first, second)
    assert stored(second) == stored(first)
    with pytest.raises(RecipeError, match="quantizing twice costs quality"):
        quantize(recipe_for(first, spread(first, ["Q4_0"])), first, tmp_path / "third.gguf")


def test_the_source_is_never_the_target(toy: Path, tmp_path: Path) -> None:
    """A target that is the source, even by another name, is refused and stays as it is."""
    source = Path(shutil.copy(toy, tmp_path / "source.gguf"))
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(RecipeError, match="is a file of the source"):
            quantize(recipe_for(source, spread(source, ["Q8_0"])), source, target)
    assert source.read_bytes() == toy.read_bytes()


def test_a_place_that_cannot_take_the_file_is_refused(toy: Path, tmp_path: Path) -> None:
    """A missing folder and a folder of the target's name are named before any work is done."""
    recipe = recipe_for(toy, spread(toy, ["Q8_0"]))
    with pytest.raises(RecipeError, match="is no directory; create it"):
        quantize(recipe, toy, tmp_path / "missing" / "q.gguf")
    with pytest.raises(RecipeError, match="is a directory; name a file"):
        quantize(recipe, toy, tmp_path)


def test_a_file_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    """The size is known beforehand, and too little space is stated with both numbers."""
    free = shutil.disk_usage(tmp_path).free
    try:
        source = sparse(tmp_path / "huge.gguf", n_rows=free // 4096 * 2)
    except OSError:
        pytest.skip("the file system holds no sparse file of four times its free space")
    recipe = recipe_for(source, {"blk.0.ffn_up.weight": "Q8_0"})
    with pytest.raises(RecipeError, match=r"MiB free, but q[.]gguf takes \d+\.\d\d MiB"):
        quantize(recipe, source, tmp_path / "q.gguf")


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 1e30, -2e9])
@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "IQ3_S", "BF16"])
def test_weights_out_of_range_are_refused(
    tmp_path: Path, occupied: Path, weight: float, qtype: str
) -> None:
    """A weight on which ggml would end the process, or make nonsense, names its tensor instead."""
    rows = np.ones((8, 256), np.float32)
    rows[5, 77] = weight
    source = tiny(
        tmp_path / "s.gguf", blk__0__ffn_up__weight=np.ones_like(rows), output__weight=rows
    )
    recipe = recipe_for(source, spread(source, [qtype]))
    with pytest.raises(QuantizeError, match=r"^output\.weight: it holds the weight"):
        quantize(recipe, source, occupied)


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0", "F16"])
def test_weights_too_large_for_a_type_are_refused(
    tmp_path: Path, occupied: Path, qtype: str
) -> None:
    """Where the scale of a block, or a number, overflows half precision, the type is refused."""
    rows = np.full((4, 256), 1e8, np.float32)
    source = tiny(tmp_path / "s.gguf", output__weight=rows)
    with pytest.raises(QuantizeError, match=f"up to 1e[+]08 are too large for {qtype}"):
        quantize(recipe_for(source, {"output.weight": qtype}), source, occupied)


def test_a_truncated_source_is_refused(toy: Path, tmp_path: Path, occupied: Path) -> None:
    """A source that lacks its last bytes is refused before anything is written."""
    recipe = recipe_for(toy, spread(toy, ["Q8_0"]))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(toy.read_bytes()[:-100])
    with pytest.raises(SourceError, match="truncated GGUF file"):
        quantize(recipe, cut, occupied)


def test_a_big_endian_source_is_refused(tmp_path: Path, occupied: Path) -> None:
    """A big-endian source is refused with what to do."""
    source = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(source, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output.weight", np.ones((4, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="is big-endian; convert it"):
        quantize(recipe_for(source, {}), source, occupied)


def test_a_damaged_result_never_gets_the_name(toy: Path, occupied: Path) -> None:
    """What does not read back as it was laid out is thrown away."""

    def damage(_: Progress) -> None:
        (partial,) = occupied.parent.glob("*.partial")
        with partial.open("r+b") as file:
            file.write(b"JUNK")

    with pytest.raises(QuantizeError, match="cannot be read back"):
        quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, occupied, progress=damage)


def test_an_existing_target_is_replaced(toy: Path, tmp_path: Path) -> None:
    """A finished file takes the place and the mode of the older one."""
    target = tmp_path / "q.gguf"
    target.write_bytes(b"an older model")
    target.chmod(0o604)
    quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, target)
    assert read_header(target).tensors
    assert target.stat().st_mode & 0o777 == 0o604
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_new_file_has_the_mode_of_the_umask(toy: Path, tmp_path: Path, umask: int) -> None:
    """Who may read a new file is what the user's umask says."""
    before = os.umask(umask)
    try:
        quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, tmp_path / "q.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "q.gguf").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_written(toy: Path, tmp_path: Path, exists: bool) -> None:
    """A symbolic link as the target leads to the file that is written, and remains a link."""
    real, link = tmp_path / "disk" / "q.gguf", tmp_path / "link.gguf"
    real.parent.mkdir()
    if exists:
        real.write_bytes(b"an older model")
    link.symlink_to(real)
    result = quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, link)
    assert result.path == link
    assert link.readlink() == real
    assert read_header(real).tensors
    assert list(real.parent.iterdir()) == [real]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_target_that_is_no_regular_file_is_refused(toy: Path, tmp_path: Path) -> None:
    """A pipe, even behind a link, is neither written to nor replaced."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for target in (pipe, link):
        with pytest.raises(RecipeError, match="is no regular file"):
            quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, target)
    assert pipe.is_fifo()


def test_no_threads_are_refused(toy: Path, occupied: Path) -> None:
    """Fewer than one thread is an error of the caller."""
    with pytest.raises(InputError, match="threads is 0; it must be at least 1"):
        quantize(recipe_for(toy, {}), toy, occupied, threads=0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux states a process's peak memory")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A matrix of 1 GiB is quantized in less than 300 MiB of memory."""
    source = sparse(tmp_path / "large.gguf", n_rows=1 << 17)
    recipe = recipe_for(source, {"blk.0.ffn_up.weight": "Q4_0"})
    recipe.save(tmp_path / "recipe.json")
    script = (
        "import sys; from quantplan.quantize import quantize;"
        "from quantplan.recipe import Recipe;"
        "quantize(Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3], threads=4);"
        "print(open('/proc/self/status').read())"
    )
    names = [str(tmp_path / name) for name in ("recipe.json", "large.gguf", "q.gguf")]
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, check=True
    )
    peak_kib = int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak_kib < 300 << 10
