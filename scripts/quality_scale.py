"""Fits scales and noise floors of whole models on metadata: mixed models.

A measured value is ``features * coefficients + effect of the maker + effect of the family + what is
the model's own + error of the measurement``, all Gaussian. So an effect that few models show
shrinks, and a family of many models counts little more than one of few.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.families import maker
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
        maker_sd: Standard deviation of the effects of makers.
        family_sd: Standard deviation of the effects of families.
        model_sd: Standard deviation of what is particular to one model.
    """

    constant: tuple[float, float]
    feature_sd: float
    maker_sd: float
    family_sd: float
    model_sd: float

    @property
    def variance(self) -> float:
        """Of a model of which nothing but its features is known."""
        return self.maker_sd**2 + self.family_sd**2 + self.model_sd**2


# The standard deviations of effects are the most probable ones given all models, to two steps of a
# grid; the fit is flat about them.
_SCALE = Spread(constant=(1.2, 1.0), feature_sd=0.5, maker_sd=0.15, family_sd=0.15, model_sd=0.1)
_FLOOR = Spread(
    constant=(math.log(FLOOR_NATS), 1.0), feature_sd=1.0, maker_sd=0.6, family_sd=0.4, model_sd=0.3
)


@dataclass(frozen=True)
class _Row:
    features: Features
    maker: str
    family: str
    value: float
    sd: float


@dataclass(frozen=True)
class _Mixed:
    coefficients: dict[str, float]
    makers: dict[str, float]
    families: dict[str, float]
    covariance: Array


def _fit_mixed(rows: Sequence[_Row], spread: Spread) -> _Mixed:
    names = list(rows[0].features)
    makers = sorted({row.maker for row in rows})
    families = sorted({row.family for row in rows})
    columns = [[row.features[name] for row in rows] for name in names]
    columns += [[float(row.maker == one) for row in rows] for one in makers]
    columns += [[float(row.family == one) for row in rows] for one in families]
    design = np.array(columns).T
    mean = np.zeros(design.shape[1])
    mean[0] = spread.constant[0]
    sd = np.array(
        [spread.constant[1]] + [spread.feature_sd] * (len(names) - 1)
        + [spread.maker_sd] * len(makers) + [spread.family_sd] * len(families)
    )  # fmt: skip
    weight = np.array([1 / (spread.model_sd**2 + row.sd**2) for row in rows])
    values = np.array([row.value for row in rows])
    covariance = np.linalg.inv(design.T @ (design * weight[:, None]) + np.diag(sd**-2))
    solved = covariance @ (design.T @ (weight * values) + mean / sd**2)
    found = [round(float(v), 4) for v in solved]
    n, k = len(names), len(makers)
    return _Mixed(
        dict(zip(names, found, strict=False)),
        dict(zip(makers, found[n:], strict=False)),
        dict(zip(families, found[n + k :], strict=True)),
        covariance[:n, :n],
    )


def _scale_rows(models: Mapping[str, Measured], curves: Curves) -> list[_Row]:
    return [
        _Row(
            scale_features(models[name].inventory),
            maker(models[name].inventory),
            models[name].family,
            value,
            curves.ln_scale_sd[name],
        )
        for name, value in curves.ln_scale.items()
    ]


def _floor_rows(models: Mapping[str, Measured], curves: Curves) -> list[_Row]:
    return [
        _Row(
            {"constant": 1.0, "sparse": float(density(models[name].inventory) == "sparse")},
            maker(models[name].inventory),
            models[name].family,
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
        makers: Effects on ln scale and ln floor, by maker.
        families: The same, by family.
    """

    scale: dict[str, float]
    floors: dict[str, float]
    makers: dict[str, dict[str, float]]
    families: dict[str, dict[str, float]]


def fit_scales(models: Mapping[str, Measured], curves: Curves) -> Scales:
    """Fits what metadata say of the scales and floors that curves show."""
    scale = _fit_mixed(_scale_rows(models, curves), _SCALE)
    floor = _fit_mixed(_floor_rows(models, curves), _FLOOR)
    constant, sparse = floor.coefficients["constant"], floor.coefficients["sparse"]

    def effects(of_scale: dict[str, float], of_floor: dict[str, float]) -> dict[str, Any]:
        return {
            one: {"ln_scale": of_scale[one], "ln_floor": of_floor[one]} for one in sorted(of_scale)
        }

    return Scales(
        scale=scale.coefficients,
        floors={
            "dense": round(math.exp(constant), 6),
            "sparse": round(math.exp(constant + sparse), 6),
        },
        makers=effects(scale.makers, floor.makers),
        families=effects(scale.families, floor.families),
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
    for family in sorted({row.family for row in rows}):
        others = [row for row in rows if row.family != family]
        own = [np.array(list(row.features.values())) for row in rows if row.family == family]
        if others:
            without = inverse(others)
            usual += [float(x @ without @ x) for x in own]
    return {
        "inverse": [[float(f"{v:.5g}") for v in row] for row in inverse(rows)],
        "usual": round(fmean(usual), 4) if usual else 0.0,
    }
