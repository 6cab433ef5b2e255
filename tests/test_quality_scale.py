"""What metadata say of scale and noise floor, and how both are fitted."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantplan import Inventory
from quantplan import read_inventory as read
from quantplan.costs import load_data
from quantplan.costs.evidence import CurvePrior, Link, fit_curve
from quantplan.costs.families import maker, quantized, shape
from quantplan.costs.quality import LossTable, type_errors
from quantplan.costs.scale import ScalePrior
from quantplan.formats.sensitivity_tables import SensitivityTable
from scripts.quality_curves import Curves, fit_curves
from scripts.quality_data import OWN_TABLES, Measured, read_models, tables
from scripts.quality_scale import fit_scales, scale_spread
from tests.support.models import toy_moe

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K")
PRIOR = CurvePrior(ln_scale=1.2, ln_scale_sd=0.2, ln_floor=math.log(0.002), ln_floor_sd=0.5)
BEND = Link(0.9, 3.0)


def curve(scale: float, floor: float, types: tuple[str, ...] = TYPES) -> dict[str, float]:
    """A noiseless curve."""
    errors = type_errors()
    return {q: floor + BEND.kld(scale * errors[q]) for q in types}


def measured(name: str, scale: float, floor: float) -> Measured:
    """A model of the catalog with a noiseless curve."""
    found = curve(scale, floor)
    return Measured(read(name), SensitivityTable((), found, 0), "", (), found)


def seen(values: dict[str, tuple[float, float]], sd: float = 0.05) -> Curves:
    """Scales and floors as if they had been read off curves."""
    scales = {name: math.log(scale) for name, (scale, _) in values.items()}
    floors = {name: math.log(floor) for name, (_, floor) in values.items()}
    sds = dict.fromkeys(values, sd)
    return Curves(type_errors(), BEND, scales, floors, sds, sds, {})


def models(*names: str) -> dict[str, Measured]:
    """Models of the catalog; what they measure does not matter."""
    return {name: measured(name, 3.0, 0.002) for name in names}


def test_a_vocabulary_tells_the_maker() -> None:
    """One maker's models of two designs have one maker; without a vocabulary the design counts."""
    assert maker(read("GLM-4.7")) == maker(read("GLM-5.1")) == maker(read("GLM-4.7-Flash")) == "glm"
    assert maker(read("Qwen3-4B-Instruct-2507")) == maker(read("Qwen3.5-4B")) == "qwen"
    assert maker(read("DeepSeek-V3.1-Terminus")) != maker(read("Kimi-K2-Thinking"))
    assert maker(read("Llama-2-7B")) == "llama"
    gemma = read("gemma-3-270m")
    named = {**gemma.metadata, "tokenizer.ggml.pre": "default"}
    assert maker(gemma.model_copy(update={"metadata": named})) == maker(gemma) == "gemma"


def test_curves_give_back_what_made_them() -> None:
    """Scales and floors of noiseless curves are found, with the errors of the types."""
    truth = {"Qwen3.5-4B": (6.0, 0.001), "GLM-4.5-Air": (3.0, 0.005), "GLM-4.7": (4.0, 0.008)}
    found = fit_curves({name: measured(name, *values) for name, values in truth.items()})
    ratios = [found.ln_scale[name] - math.log(scale) for name, (scale, _) in truth.items()]
    # Scales and errors of types are known only together.
    assert np.ptp(ratios) < 0.06
    assert all(abs(ratio) < 0.2 for ratio in ratios)
    for name, (_, floor) in truth.items():
        assert math.exp(found.ln_floor[name]) == pytest.approx(floor, rel=0.15)
    assert max(map(abs, found.residuals.values())) < 0.04


def test_an_effect_that_few_models_show_shrinks() -> None:
    """One model off by a factor of two says less of its family than three do."""
    usual = {"GLM-4.5-Air": (3.0, 0.002), "DeepSeek-V3.1-Terminus": (3.0, 0.002)}
    odd = ("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B")

    def effect(names: tuple[str, ...]) -> float:
        found = fit_scales(
            models(*usual, *names), seen({**usual, **dict.fromkeys(names, (6.0, 0.002))})
        )
        effects = found.effects["family"]["qwen35"], found.effects["maker"]["qwen"]
        return sum(effect["ln_scale"] for effect in effects)

    assert 0 < effect(odd[:1]) < effect(odd) < math.log(2)


def test_a_twin_says_more_than_a_sibling() -> None:
    """What one model shows counts most for another of its shape, less for others of its family."""
    data = load_data("quality.json")
    values = {"Qwen3.5-27B": (6.0, 0.002), "GLM-4.5-Air": (3.0, 0.002), "GLM-4.7": (3.0, 0.002)}
    found = fit_scales(models(*values), seen(values))
    fitted_here = {**data, "scale": found.scale, "scale_effects": found.effects}
    prior = ScalePrior(fitted_here)
    twin, sibling = (read(name) for name in ("Qwen3.6-27B", "Qwen3.5-9B"))
    assert shape(twin) == shape(read("Qwen3.5-27B")) != shape(sibling)
    assert prior.is_known(sibling)
    known = found.effects["shape"].pop(shape(twin))["ln_scale"]
    assert known > 0
    assert ScalePrior(fitted_here).ln_scale(twin) < math.log(6) - known


def test_a_scale_that_is_hardly_known_counts_little() -> None:
    """A curve without information moves no coefficient."""
    names = ("Qwen3.5-4B", "GLM-4.5-Air", "Qwen3.5-27B")
    curves = seen(dict.fromkeys(names, (3.0, 0.002)))
    odd = replace(
        curves,
        ln_floor={**curves.ln_floor, "GLM-4.5-Air": math.log(0.2)},
        ln_floor_sd={**curves.ln_floor_sd, "GLM-4.5-Air": 10.0},
    )
    one, other = fit_scales(models(*names), curves), fit_scales(models(*names), odd)
    assert other.floors["sparse"] == pytest.approx(one.floors["sparse"], rel=0.1)


def test_leverage_grows_away_from_what_was_fitted() -> None:
    """A model much smaller than all others has the largest leverage."""
    names = ("Qwen3.5-4B", "GLM-4.5-Air", "Qwen3.5-27B")
    found = scale_spread(models(*names), seen(dict.fromkeys(names, (3.0, 0.002))))
    inverse = np.array(found["inverse"])

    def leverage(root: float) -> float:
        x = np.array([1.0, 1.0, root])
        return float(x @ inverse @ x)

    assert leverage(2.7) > leverage(0.5) > 0
    assert found["usual"] > 0


@pytest.mark.parametrize(
    ("name", "other"),
    [("GLM-4.6", "Qwen3.5-122B-A10B"), ("Qwen3.5-122B-A10B", "Qwen3.5-27B")],
)
def test_floors_are_those_of_their_like(name: str, other: str) -> None:
    """Mixtures of experts have larger floors than dense models, those of GLM the largest."""
    prior = ScalePrior(load_data("quality.json"))
    assert prior.floor_nats(read(name)) > 1.5 * prior.floor_nats(read(other))


def fitted(found: dict[str, float], height_sd: float = 0.0) -> tuple[float, float]:
    """Scale and the standard deviation of its logarithm."""
    fit = fit_curve(
        found, None, type_errors(), BEND, type_sd=0.06, prior=PRIOR, height_sd=height_sd
    )
    return math.exp(fit.ln_scale), fit.ln_scale_sd


def test_one_type_is_combined_with_what_is_expected() -> None:
    """A single run at few bits moves the scale nearly all the way, one that is mostly floor not."""
    assert fitted(curve(5.0, 0.002, ("Q4_K",)))[0] == pytest.approx(5.0, rel=0.1)
    expected = math.exp(PRIOR.ln_scale)
    assert fitted(curve(5.0, 0.002, ("Q8_0",)))[0] == pytest.approx(expected, rel=0.1)


def test_a_broken_run_hardly_counts() -> None:
    """A run with three times the KLD that its type should have moves the scale by little."""
    sound = curve(4.0, 0.002)
    assert fitted({**sound, "Q2_K": 3 * sound["Q2_K"]})[0] == pytest.approx(4.0, rel=0.06)


def test_a_short_text_says_less() -> None:
    """What the text leaves unsure of all KLDs alike remains, however many types were run."""
    long, short = fitted(curve(5.0, 0.002)), fitted(curve(5.0, 0.002), height_sd=0.2)
    assert short[1] > 2 * long[1]
    assert math.exp(PRIOR.ln_scale) < short[0] < long[0]


def test_a_curve_makes_a_table_surer() -> None:
    """Measuring never adds doubt about the scale of a model."""
    dense: Inventory = read("Qwen3.5-4B")
    plain = LossTable(dense)
    table = LossTable(dense, measured("Qwen3.5-4B", 6.0, 0.001).table.evidence)
    assert table.scale_ln_sd < plain.scale_ln_sd


def test_tiny_models_are_not_extrapolated_to(tmp_path: Path) -> None:
    """A toy model has the scale of the smallest known model, not one of thousands of nats."""
    toy = read(toy_moe(tmp_path / "toy.gguf"))
    small = ScalePrior(load_data("quality.json")).ln_scale(toy)
    assert 0 < small < math.log(100)


def test_tables_that_were_measured_here_are_in_the_fit() -> None:
    """Each is of a model of the catalog, matrix by matrix, and the shipped constants name it."""
    models, skipped = read_models(tables(OWN_TABLES))
    assert models
    assert not skipped
    assert models.keys() <= set(load_data("quality.json")["models"])
    for model in models.values():
        assert len(model.units) == len(quantized(model.inventory))
