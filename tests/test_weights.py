"""Errors of types on real weights, and importance matrices."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantplan.costs import load_data
from quantplan.errors import InputError, QuantizeError, SourceError
from quantplan.qtypes import QTYPES
from quantplan.quantize import quantize
from quantplan.quantize.ggml import ggml
from quantplan.quantize.imatrix import read_imatrix
from quantplan.quantize.weights import WeightErrors, measure_weights
from tests.support.models import steps
from tests.support.quantizer import recipe_for, tiny

NAME = "blk.0.ffn_up.weight"


def model(path: Path, weights: np.ndarray) -> Path:
    return tiny(path, **{NAME.replace(".", "__"): weights})


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_gaussian_rows_have_the_shipped_errors(tmp_path: Path) -> None:
    """On Gaussian weights, with an importance matrix, ratios are one; some types need it more."""
    source = model(tmp_path / "m.gguf", gaussian(64, 4096))
    types = ["Q8_0", "Q4_K", "Q3_K", "IQ4_XS", "IQ3_S"]
    uniform = {NAME: np.ones((1, 4096), dtype=np.float32)}
    found = measure_weights(source, types, imatrix=uniform)
    assert found.ratios() == {(NAME, name): pytest.approx(1, abs=0.05) for name in types}
    without = load_data("type_error.json")["without_imatrix"]
    errors = measure_weights(source, types).errors[NAME]
    assert errors == {name: pytest.approx(without[name], rel=0.05) for name in types}
    assert errors["IQ3_S"] > 1.4 * found.errors[NAME]["IQ3_S"]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_the_error_is_that_of_another_quantizer(tmp_path: Path, name: str) -> None:
    """The gguf package's own quantizer makes the same error on the same rows."""
    weights = gaussian(16, 256) * np.linspace(0.1, 3, 256, dtype=np.float32)
    found = measure_weights(model(tmp_path / "m.gguf", weights), [name], rows_per_tensor=16)
    kind = gguf.GGMLQuantizationType[name]
    back = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    expected = float(((back - weights) ** 2).sum() / (weights**2).sum())
    assert found.errors[NAME][name] == pytest.approx(expected, rel=2e-3)


def test_outliers_cost_what_they_cost(tmp_path: Path) -> None:
    """A few huge columns make a plain block format worse than on Gaussian rows."""
    weights = gaussian(32, 512)
    weights[:, ::64] *= 30
    ratios = measure_weights(model(tmp_path / "m.gguf", weights), ["Q4_0"]).ratios()
    assert ratios[NAME, "Q4_0"] > 1.5


def test_one_huge_row_hides_no_other(tmp_path: Path) -> None:
    """An output that is a thousand times larger than all others counts like ten of them."""
    weights = gaussian(32, 256)
    plain = measure_weights(model(tmp_path / "m.gguf", weights), ["Q4_0"]).errors[NAME]
    weights[3] = 0
    weights[3, 0] = 1000  # which Q4_0 hits exactly
    found = measure_weights(model(tmp_path / "n.gguf", weights), ["Q4_0"]).errors[NAME]
    assert found["Q4_0"] == pytest.approx(plain["Q4_0"] * 31 / 41, rel=0.05)


def test_a_huge_row_that_a_type_loses_counts_in_full(tmp_path: Path) -> None:
    """One row of a thousand, with nearly all of the output, is measured in any sample, uncapped."""
    weights = gaussian(1000, 64)
    weights[777] = 500  # which Q4_0 takes for zeros, beside weights that are twenty times as large
    weights[777, ::32] = 10_000
    own = weights[777]
    lost = float((own[own == 500] ** 2).sum() / (own**2).sum())
    source = model(tmp_path / "m.gguf", weights)
    found = measure_weights(source, ["Q4_0"], rows_per_tensor=20)
    assert found.errors[NAME]["Q4_0"] == pytest.approx(lost, rel=0.05)


@pytest.mark.parametrize("rows_per_tensor", [8, 16])
def test_heavy_rows_hide_no_others_in_a_small_sample(tmp_path: Path, rows_per_tensor: int) -> None:
    """Rows that are in every sample count there as among all rows, also where they are half."""
    weights = gaussian(1000, 256)
    weights[::125] = 40  # which Q4_K hits
    source = model(tmp_path / "m.gguf", weights)
    every = measure_weights(source, ["Q4_K"], rows_per_tensor=1000).errors[NAME]
    found = measure_weights(source, ["Q4_K"], rows_per_tensor=rows_per_tensor).errors[NAME]
    assert found["Q4_K"] == pytest.approx(every["Q4_K"], rel=0.15)


@pytest.mark.parametrize("scale", [0, 1e-9])
def test_dead_rows_say_nothing(tmp_path: Path, scale: float) -> None:
    """Most of the rows are zeros, or nearly so: the error is that of the others."""
    weights = gaussian(16, 256)
    plain = measure_weights(model(tmp_path / "m.gguf", weights), ["Q4_K"])
    both = np.concatenate([weights, scale * gaussian(24, 256)]).astype(np.float32)
    found = measure_weights(model(tmp_path / "n.gguf", both), ["Q4_K"])
    assert found.errors[NAME] == pytest.approx(plain.errors[NAME])


def test_a_type_that_hits_all_weights_is_known_to_be_good(tmp_path: Path) -> None:
    """Weights on the grid of a type have next to no error there, and not the usual one."""
    weights = np.random.default_rng(0).integers(-8, 8, (16, 256)).astype(np.float32)
    weights[:, ::32] = -8  # the largest of each block of Q4_0, which is 8 steps
    ratios = measure_weights(model(tmp_path / "m.gguf", weights), ["Q4_0"]).ratios()
    assert 0 < ratios[NAME, "Q4_0"] < 1e-4


def test_rows_that_do_not_fit_are_measured_as_they_would_be_written(tmp_path: Path) -> None:
    """Where a row is no multiple of 256, the fallback is what gets an error."""
    found = measure_weights(model(tmp_path / "m.gguf", gaussian(8, 96)), ["Q4_K", "Q6_K"])
    assert found.errors[NAME].keys() == {"Q5_0", "Q8_0"}


def test_each_expert_has_its_own_importance(tmp_path: Path) -> None:
    """Errors count by the importance of the expert's own columns."""
    weights = gaussian(2, 8, 256)
    weights[0, :, 128:] *= 100  # columns that one expert never sees anything in
    path = model(tmp_path / "m.gguf", weights)
    importance = np.ones((2, 256), dtype=np.float32)
    plain = measure_weights(path, ["Q4_K"], imatrix={NAME: importance}).errors[NAME]["Q4_K"]
    importance[0, 128:] = 0
    found = measure_weights(path, ["Q4_K"], imatrix={NAME: importance})
    assert found.has_imatrix
    assert found.errors[NAME]["Q4_K"] != pytest.approx(plain, rel=1e-3)


def test_outside_the_layers_importance_does_not_count(tmp_path: Path) -> None:
    """One large column of the output does not hide what a type does to the others."""
    weights = gaussian(16, 256)
    source = tiny(tmp_path / "m.gguf", output__weight=weights, blk__0__ffn_up__weight=weights)
    importance = np.ones((1, 256), dtype=np.float32)
    importance[0, 0] = 1e6
    names = ("output.weight", NAME)
    imatrix = dict.fromkeys(names, importance)
    found = measure_weights(source, ["Q4_0"], imatrix=imatrix, rows_per_tensor=16).ratios()
    assert found[names[0], "Q4_0"] > 3 * found[names[1], "Q4_0"]


def test_types_that_need_an_imatrix_get_one_or_are_refused(tmp_path: Path) -> None:
    """IQ2_XXS is measured with an importance matrix, and refused with every other fault without."""
    path = model(tmp_path / "m.gguf", gaussian(4, 256))
    with pytest.raises(InputError, match="IQ2_XXS needs an importance matrix") as caught:
        measure_weights(path, ["IQ2_XXS", "Q9"], rows_per_tensor=0)
    assert len(caught.value.faults) == 3
    importance = {NAME: np.ones((1, 256), dtype=np.float32)}
    found = measure_weights(path, ["IQ2_XXS"], imatrix=importance)
    gaussian_error = load_data("type_error.json")["relative_squared_error"]["IQ2_XXS"]
    assert found.errors[NAME]["IQ2_XXS"] == pytest.approx(gaussian_error, rel=0.3)
    with pytest.raises(QuantizeError, match="needs an importance matrix"):
        ggml().prepare(QTYPES["IQ2_XXS"])


@pytest.mark.parametrize("name", ["Q8_K", "F16", "I8", "IQ4_KS", "Q4_0_R8", ""])
def test_only_types_that_the_library_quantizes_to_are_measured(tmp_path: Path, name: str) -> None:
    """Formats of activations, of integers and of other programs would end the process in ggml."""
    path = model(tmp_path / "m.gguf", gaussian(4, 256))
    with pytest.raises(InputError, match=f"'{name}' is no type that the bundled ggml quantizes to"):
        measure_weights(path, ["Q4_K", name])


@pytest.mark.parametrize("n_columns", [128, 512])
def test_an_importance_matrix_of_another_model_is_refused(tmp_path: Path, n_columns: int) -> None:
    """Columns that are too few or too many are named before anything is measured."""
    path = model(tmp_path / "m.gguf", gaussian(4, 256))
    importance = {NAME: np.ones((1, n_columns), dtype=np.float32)}
    with pytest.raises(InputError, match=f"{n_columns} values for it; it is of another model"):
        measure_weights(path, ["Q4_K"], imatrix=importance)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """NaN would end the process in ggml; it is an error before."""
    weights = gaussian(4, 256)
    weights[2, 7] = np.nan
    with pytest.raises(QuantizeError, match="not finite"):
        measure_weights(model(tmp_path / "m.gguf", weights), ["Q4_K"])


def test_a_matrix_for_other_tensors_is_not_taken_for_a_quantized_model(tmp_path: Path) -> None:
    """Where the importance matrix that a type needs has none of the tensors, that is said."""
    source = model(tmp_path / "m.gguf", gaussian(16, 256))
    other = {"blk.7.ffn_up.weight": np.ones((1, 256), dtype=np.float32)}
    with pytest.raises(InputError, match="not in the importance matrix"):
        measure_weights(source, ["IQ2_XXS"], imatrix=other)


def test_a_quantized_model_has_no_errors_to_measure(tmp_path: Path) -> None:
    """Of a model that is quantized already nothing is written, and the message says why."""
    source = model(tmp_path / "m.gguf", gaussian(64, 256))
    quantize(recipe_for(source, {NAME: "Q8_0"}), source, tmp_path / "q.gguf")
    with pytest.raises(SourceError, match="it is quantized already"):
        measure_weights(tmp_path / "q.gguf", ["Q4_K"])


def test_errors_survive_saving(tmp_path: Path) -> None:
    """What is saved loads back equal; another file, or one with infinite errors, is refused."""
    found = measure_weights(model(tmp_path / "m.gguf", gaussian(4, 256)), ["Q4_K"])
    path = tmp_path / "e.json"
    path.write_text(found.model_dump_json(), encoding="utf-8")
    assert WeightErrors.load(path) == found
    broken = found.model_copy(update={"errors": {NAME: {"Q4_K": np.inf}}}).model_dump_json()
    for text in ("{}", broken):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SourceError, match="is no file of `quantplan measure-weights`"):
            WeightErrors.load(path)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_models_are_blurred_by_the_steps_of_their_own_types(tmp_path: Path, name: str) -> None:
    """Within a block, or its part with a scale of its own, weights lie a whole number of the steps
    apart by which real models are blurred.
    """
    source = model(tmp_path / "m.gguf", gaussian(8, 256))
    quantize(recipe_for(source, {NAME: name}), source, tmp_path / "q.gguf")
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    tensor = next(t for t in reader.tensors if t.name == NAME)
    weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 16)
    step = steps(tensor.data, tensor.tensor_type).reshape(-1, 16)
    apart = (weights - weights[:, :1]) / step
    assert np.abs(apart - apart.round()).max() < 1e-2
    assert np.abs(apart).max() > 1.5


def gguf_imatrix(path: Path, sums: np.ndarray, counts: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_tensor(f"{NAME}.in_sum2", sums)
    writer.add_tensor(f"{NAME}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_imatrix(tmp_path: Path) -> None:
    """Sums are divided by the counts of their expert; an expert without tokens counts as 1."""
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    counts = np.array([[2], [0], [4]], dtype=np.float32)
    found = read_imatrix(gguf_imatrix(tmp_path / "i.gguf", sums, counts))
    expected = np.array([sums[0] / 2, np.ones(4), sums[2] / 4])
    np.testing.assert_allclose(found[NAME], expected)


def test_legacy_imatrix(tmp_path: Path) -> None:
    """The older format holds sums times calls, entry after entry."""
    values = np.array([2, 4, 6], dtype="<f4")
    name = NAME.encode()
    content = struct.pack(f"<ii{len(name)}sii", 1, len(name), name, 2, 3) + values.tobytes()
    path = tmp_path / "i.dat"
    path.write_bytes(content + struct.pack("<i", 7))
    np.testing.assert_allclose(read_imatrix(path)[NAME], [[1, 2, 3]])


@pytest.mark.parametrize(
    "content", [b"", b"\x01\0\0\0", struct.pack("<iii", 1, -5, 0), b"junk" * 9]
)
def test_what_is_no_imatrix_is_refused(tmp_path: Path, content: bytes) -> None:
    """A broken file is an error of its own, not a crash."""
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="importance matrix"):
        read_imatrix(path)


def test_a_negative_importance_is_refused(tmp_path: Path) -> None:
    """Mean squares cannot be negative."""
    sums, counts = -np.ones((1, 4), dtype=np.float32), np.ones((1, 1), dtype=np.float32)
    with pytest.raises(SourceError, match="below 0"):
        read_imatrix(gguf_imatrix(tmp_path / "i.gguf", sums, counts))
