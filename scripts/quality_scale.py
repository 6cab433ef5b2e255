"""Fits scales and noise floors of whole models on metadata: mixed models.

A measured value is ``features * coefficients + effects of maker, family and shape + what is the
model's own + error of the measurement``, all Gaussian. So an effect that few models show shrinks,
and a family of many models counts little more than one of few.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.families import groups
from quantplan.costs.scale import Features, density, scale_features
from scripts.quality_curves import FLOOR_NATS, Curves
from scripts.quality_data import Measured

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Prior of a mixed model, in ln.

    Attributes:
        constant: Mean and standard deviation of the constant.
        feature_sd: Standard deviation of every other coefficient.
        group_sds: Standard deviation of the effects of makers, families and shapes.
        model_sd: Standard deviation of what is particular to one model.
    """

    constant: tuple[float, float]
    feature_sd: float
    group_sds: Mapping[str, float]
    model_sd: float

    @property
    def variance(self) -> float:
        """Of a model of which nothing but its features is known."""
        return math.hypot(*self.group_sds.values(), self.model_sd) ** 2


# The standard deviations of effects are about the most probable ones given all models; the fit is
# flat about them.
_SCALE = Spread(
    constant=(1.2, 1.0),
    feature_sd=0.5,
    group_sds={"maker": 0.15, "family": 0.15, "shape": 0.1},
    model_sd=0.06,
)
_FLOOR = Spread(
    constant=(math.log(FLOOR_NATS), 1.0),
    feature_sd=1.0,
    group_sds={"maker": 0.6, "family": 0.4, "shape": 0.3},
    model_sd=0.2,
)


@dataclass(frozen=True)
class _Row:
    features: Features
    groups: Mapping[str, str]
    value: float
    sd: float


@dataclass(frozen=True)
class _Mixed:
    coefficients: dict[str, float]
    effects: dict[tuple[str, str], float]
    covariance: Array


def _fit_mixed(rows: Sequence[_Row], spread: Spread) -> _Mixed:
    names = list(rows[0].features)
    members = sorted({group for row in rows for group in row.groups.items()})
    columns = [[row.features[name] for row in rows] for name in names]
    columns += [[float(row.groups[level] == one) for row in rows] for level, one in members]
    design = np.array(columns).T
    mean = np.zeros(design.shape[1])
    mean[0] = spread.constant[0]
    sd = np.array(
        [spread.constant[1]] + [spread.feature_sd] * (len(names) - 1)
        + [spread.group_sds[level] for level, _ in members]
    )  # fmt: skip
    weight = np.array([1 / (spread.model_sd**2 + row.sd**2) for row in rows])
    values = np.array([row.value for row in rows])
    covariance = np.linalg.inv(design.T @ (design * weight[:, None]) + np.diag(sd**-2))
    solved = covariance @ (design.T @ (weight * values) + mean / sd**2)
    found = [round(float(v), 4) for v in solved]
    n = len(names)
    return _Mixed(
        dict(zip(names, found[:n], strict=True)),
        dict(zip(members, found[n:], strict=True)),
        covariance[:n, :n],
    )


def _scale_rows(models: Mapping[str, Measured], curves: Curves) -> list[_Row]:
    return [
        _Row(
            scale_features(models[name].inventory),
            groups(models[name].inventory),
            value,
            curves.ln_scale_sd[name],
        )
        for name, value in curves.ln_scale.items()
    ]


def _floor_rows(models: Mapping[str, Measured], curves: Curves) -> list[_Row]:
    return [
        _Row(
            {"constant": 1.0, "sparse": float(density(models[name].inventory) == "sparse")},
            groups(models[name].inventory),
            value,
            curves.ln_floor_sd[name],
        )
        for name, value in curves.ln_floor.items()
    ]


@dataclass(frozen=True)
class Scales:
    """Scales and floors, in the form of ``quality.json``.

    Attributes:
        scale: Coefficients of ln scale.
        floors: Noise floor in nats per token, dense and sparse.
        effects: Effects on ln scale and ln floor, by level and name.
    """

    scale: dict[str, float]
    floors: dict[str, float]
    effects: dict[str, dict[str, dict[str, float]]]


def fit_scales(models: Mapping[str, Measured], curves: Curves) -> Scales:
    """Fits what metadata say of the scales and floors that curves show."""
    scale = _fit_mixed(_scale_rows(models, curves), _SCALE)
    floor = _fit_mixed(_floor_rows(models, curves), _FLOOR)
    constant, sparse = floor.coefficients["constant"], floor.coefficients["sparse"]
    effects: dict[str, dict[str, dict[str, float]]] = {level: {} for level in _SCALE.group_sds}
    for (level, one), value in scale.effects.items():
        effects[level][one] = {"ln_scale": value, "ln_floor": floor.effects[level, one]}
    return Scales(
        scale=scale.coefficients,
        floors={
            "dense": round(math.exp(constant), 6),
            "sparse": round(math.exp(constant + sparse), 6),
        },
        effects=effects,
    )


def scale_spread(models: Mapping[str, Measured], curves: Curves) -> dict[str, Any]:
    """How the error of a predicted scale grows away from the models that were fitted.

    With the covariance C of the coefficients and the variance v of a model beside its features,
    that of a prediction for features x is ``v + x C x``, in proportion to one plus the leverage
    ``x (C / v) x``. Errors of families left out are known at the leverage that their models have
    then, so that is what ``usual`` says: the mean over models.

    Returns:
        ``inverse``, C / v in the order of the features, and ``usual``.
    """
    rows = _scale_rows(models, curves)

    def inverse(kept: Sequence[_Row]) -> Array:
        found: Array = _fit_mixed(kept, _SCALE).covariance / _SCALE.variance
        return found

    usual = []
    for family in sorted({row.groups["family"] for row in rows}):
        others = [row for row in rows if row.groups["family"] != family]
        own = [
            np.array(list(row.features.values())) for row in rows if row.groups["family"] == family
        ]
        if others:
            without = inverse(others)
            usual += [float(x @ without @ x) for x in own]
    return {
        "inverse": [[float(f"{v:.5g}") for v in row] for row in inverse(rows)],
        "usual": round(fmean(usual), 4) if usual else 0.0,
    }
