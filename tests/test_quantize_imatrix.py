"""Quantizing with an importance matrix, compared with llama.cpp's own quantizer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantplan.errors import RecipeError, SourceError
from quantplan.inventory.header import read_header
from quantplan.qtypes import QTYPES
from quantplan.quantize import quantize
from quantplan.quantize.imatrix import read_imatrix
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.models import toy_moe
from tests.support.quantizer import (
    imatrix_dat,
    imatrix_gguf,
    llama_quantize,
    random_imatrix,
    recipe_for,
    spread,
    stored,
    tiny,
)

TYPES = [t.name for t in QTYPES.values() if t.is_file_target and "llama.cpp" in t.runtimes]
# ggml takes 15 s to build their tables; benchmarks/quantize.py --imatrix compares these too.
SLOW_TO_START = {"IQ1_S", "IQ1_M", "IQ2_S"}
NAME = "blk.0.ffn_up.weight"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose rows admit every type."""
    return toy_moe(tmp_path_factory.mktemp("toy") / "toy.gguf", "qwen3moe")


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """A model of a single matrix."""
    rows = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float16)
    return tiny(tmp_path / "matrix.gguf", **{NAME: rows})


@needs_llama_cpp
def test_types_have_the_bytes_of_llama_cpp(toy: Path, tmp_path: Path) -> None:
    """Nearly each type of llama.cpp has its bytes, and each expert its own importance."""
    importance = random_imatrix(toy)
    wanted = [name for name in TYPES if name not in SLOW_TO_START]
    qtypes = spread(toy, wanted)
    llama_quantize(toy, tmp_path / "theirs.gguf", qtypes, imatrix=importance)
    theirs = stored(tmp_path / "theirs.gguf")
    assert {qtype for qtype, _ in theirs.values()} == set(wanted)
    imatrix = imatrix_gguf(tmp_path / "imatrix.gguf", importance)
    quantize(recipe_for(toy, qtypes), toy, tmp_path / "ours.gguf", imatrix=imatrix, threads=2)
    assert stored(tmp_path / "ours.gguf") == theirs


@needs_llama_cpp
def test_rows_that_types_do_not_fit_have_the_bytes_of_llama_cpp(tmp_path: Path) -> None:
    """Where expert rows, 352 as 1408 no multiple of 256, make the IQ types fall back, the bytes are
    llama.cpp's too, and those of the other matrices.
    """
    source = toy_moe(tmp_path / "toy.gguf", "glm4moe", layers=1)
    importance = random_imatrix(source)
    wanted = [name for name in TYPES if name.startswith("IQ") and name not in SLOW_TO_START]
    qtypes = spread(source, wanted)
    llama_quantize(source, tmp_path / "theirs.gguf", qtypes, imatrix=importance)
    imatrix = imatrix_gguf(tmp_path / "imatrix.gguf", importance)
    quantize(recipe_for(source, qtypes), source, tmp_path / "ours.gguf", imatrix=imatrix, threads=2)
    theirs = stored(tmp_path / "theirs.gguf")
    assert stored(tmp_path / "ours.gguf") == theirs
    assert set(wanted) <= {qtype for qtype, _ in theirs.values()}


@needs_llama_cpp
def test_a_real_model_gets_the_bytes_of_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2, whose rows make many types fall back, has llama.cpp's bytes."""
    importance = random_imatrix(smollm2)
    qtypes = {
        name: qtype
        for name, qtype in spread(smollm2, ["Q4_K", "Q4_0", "Q5_0", "Q6_K", "Q2_K"]).items()
        if name.startswith(("blk.0.", "blk.1.", "blk.2."))
    }
    qtypes |= dict.fromkeys(spread(smollm2, ["F16"]).keys() - qtypes.keys(), "F16")
    llama_quantize(smollm2, tmp_path / "theirs.gguf", qtypes, imatrix=importance)
    imatrix = imatrix_gguf(tmp_path / "imatrix.gguf", importance)
    recipe = recipe_for(smollm2, qtypes)
    quantize(recipe, smollm2, tmp_path / "ours.gguf", imatrix=imatrix, threads=2)
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")


def test_both_formats_give_the_same_file(toy: Path, tmp_path: Path) -> None:
    """The GGUF and the older format with the same numbers write the same tensors."""
    importance, recipe = random_imatrix(toy), recipe_for(toy, spread(toy, ["Q4_K", "IQ4_NL"]))
    quantize(recipe, toy, tmp_path / "plain.gguf")
    for name, write in (("new", imatrix_gguf), ("old", imatrix_dat)):
        quantize(recipe, toy, tmp_path / f"{name}.gguf", imatrix=write(tmp_path / name, importance))
    assert stored(tmp_path / "new.gguf") == stored(tmp_path / "old.gguf")
    assert stored(tmp_path / "new.gguf") != stored(tmp_path / "plain.gguf")
    hashes = [
        read_header(tmp_path / f"{name}.gguf").metadata.get("quantplan.imatrix_sha256")
        for name in ("new", "old", "plain")
    ]
    assert len(set(hashes)) == 3
    assert hashes[2] is None


def test_reading_back_weighs_errors_by_importance(tmp_path: Path) -> None:
    """The errors of matrices in the layers are of what they put out, as the matrix tells: those of
    a column that no text reaches do not count.
    """
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float16)
    rows[:, ::32] *= 100  # which blunts the others in their blocks
    names = NAME, "output.weight"
    source = tiny(tmp_path / "source.gguf", **dict.fromkeys(names, rows))
    importance = np.ones((1, 512), np.float32)
    importance[:, ::32] = 1e-3
    imatrix = imatrix_gguf(tmp_path / "imatrix.gguf", dict.fromkeys(names, importance))
    recipe = recipe_for(source, dict.fromkeys(names, "Q8_0"))
    found = quantize(recipe, source, tmp_path / "q.gguf", imatrix=imatrix, verify=True).verification
    assert found is not None
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    errors = [found.relative_squared_error[name] for name in names]
    for name, columns, error in zip(names, (importance[0], np.ones(512)), errors, strict=True):
        new = gguf.quants.dequantize(read[name].data, read[name].tensor_type)
        lost, total = (w.astype(np.float64) ** 2 @ columns for w in (new - rows, rows))
        assert error == pytest.approx(lost.sum() / total.sum(), rel=1e-4)
    assert errors[0] > 10 * errors[1]


@pytest.mark.parametrize("name", [t for t in TYPES if QTYPES[t].needs_imatrix])
def test_types_that_need_an_imatrix_are_refused_without(
    matrix: Path, tmp_path: Path, name: str
) -> None:
    """What llama-quantize refuses without an importance matrix is refused before writing."""
    other = imatrix_gguf(tmp_path / "other", {"token_embd.weight": np.ones((1, 256), np.float32)})
    for imatrix in (None, other):
        with pytest.raises(RecipeError, match=f"cannot become {name}: the type needs an importa"):
            quantize(recipe_for(matrix, {NAME: name}), matrix, tmp_path / "t.gguf", imatrix=imatrix)


@pytest.mark.parametrize(
    ("importance", "says"),
    [
        ({NAME: np.ones((1, 128))}, "256 columns in 1 experts, but .* 128 values"),
        ({NAME: np.ones((2, 256))}, "256 columns in 1 experts, but .* 512 values"),
        ({"blk.9.ffn_up.weight": np.ones((1, 256))}, "knows no tensor of the source"),
    ],
)
def test_an_imatrix_of_another_model_is_refused(
    matrix: Path, tmp_path: Path, importance: dict[str, Any], says: str
) -> None:
    """An importance matrix with other columns, experts or names is refused."""
    path = imatrix_dat(tmp_path / "imatrix.dat", importance)
    with pytest.raises(RecipeError, match=says):
        quantize(recipe_for(matrix, {NAME: "Q4_K"}), matrix, tmp_path / "t.gguf", imatrix=path)


@pytest.mark.parametrize("write", [imatrix_gguf, imatrix_dat])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e30])
def test_damaged_importances_are_refused(tmp_path: Path, write: Any, value: float) -> None:
    """A value that is negative, huge or no number names its tensor."""
    values = np.ones((1, 256), np.float32)
    values[0, 7] = value
    with pytest.raises(SourceError, match=f"{NAME} has values below 0, above 1e[+]15 or not fin"):
        read_imatrix(write(tmp_path / "imatrix", {NAME: values}))


@pytest.mark.parametrize("write", [imatrix_gguf, imatrix_dat])
def test_truncated_importances_are_refused(tmp_path: Path, write: Any) -> None:
    """An importance matrix that ends anywhere before its end is refused."""
    path = write(tmp_path / "imatrix", {NAME: np.ones((1, 256), np.float32)})
    raw = path.read_bytes().rstrip(b"\0")
    for n_bytes in [*range(0, 64, 3), len(raw) - 40]:
        path.write_bytes(raw[:n_bytes])
        with pytest.raises(SourceError):
            read_imatrix(path)


def test_experts_without_a_token_count_as_one(tmp_path: Path) -> None:
    """An expert that no token has reached is quantized as if all its columns were alike."""
    values = np.full((2, 256), 5, np.float32)
    path = imatrix_gguf(tmp_path / "imatrix", {NAME: values}, count=1)
    assert (read_imatrix(path)[NAME] == 5).all()
    path = imatrix_gguf(tmp_path / "imatrix", {NAME: values}, count=0)
    assert (read_imatrix(path)[NAME] == 1).all()
