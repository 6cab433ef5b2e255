"""Fits the loss model: errors of types, link, sensitivities, scale. See `fit` for the order.

Two data sets constrain different things. Runs of whole models at one type give the error of each
type, the link from summed loss to KLD, and the scale of each model. Runs with one tensor at a low
type give the shares of tensors. Both contain a noise floor: any change at all to a large model,
however small, changes its KLD, the more so the earlier the layer.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.evidence import Link
from quantplan.costs.sensitivity import scale_features
from quantplan.qtypes import QTYPES
from scripts.quality_data import Measured, gaussian_errors
from scripts.quality_shares import SensitivityFit

Array = NDArray[np.float64]

# Whole models above this KLD are broken; the link is not fitted to them.
VALID_KLD_NATS = 3.0
# Prior standard deviations, in ln: of a type's error where it is known on Gaussian rows (published
# runs use importance matrices) and where only its bits are; of one measurement.
_TYPE_SD, _NEW_TYPE_SD, _CURVE_SD = 0.25, 1.0, 0.08
# ln error falls by this much per bit per weight (from Q2_K to Q8_0 on Gaussian rows).
_LN_ERROR_PER_BIT = -1.42
_SCALE_RIDGE, _FAMILY_RIDGE = 0.1, 1.5
# Until families that were left out have been predicted.
_UNVALIDATED_SD = {"scale_new_family": 0.3, "scale_known_family": 0.3, "share": 0.5, "single": 0.1}


@dataclass(frozen=True)
class Curves:
    """What runs of whole models say.

    Attributes:
        errors: Relative squared error by type.
        link: From summed loss to KLD.
        ln_scale: ln of loss per unit of error, by model.
        ln_floor: ln of the noise floor, by model.
        residuals: ln of measured over fitted KLD, by model and type.
    """

    errors: dict[str, float]
    link: Link
    ln_scale: dict[str, float]
    ln_floor: dict[str, float]
    residuals: dict[tuple[str, str], float]


def fit_curves(models: Mapping[str, Measured]) -> Curves:
    """Fits ``KLD = floor + link(scale * (error(type) + error(baseline)))`` by Gauss-Newton.

    A baseline that is quantized itself errs independently of the model, so errors add.
    """
    models = {name: m for name, m in models.items() if m.curve}
    types = sorted({q for m in models.values() for q in m.curve} | {
        m.table.baseline for m in models.values() if m.table.baseline
    })  # fmt: skip
    at = {name: i for i, name in enumerate(types)}
    n, k = len(types), len(models)
    known = gaussian_errors()
    prior = np.array(
        [math.log(known[q]) if q in known else _guess(q, known) for q in types]
        + [1.3] * k + [math.log(0.002)] * k + [math.log(0.3)]
    )  # fmt: skip
    sd = np.array(
        [_TYPE_SD if q in known else _NEW_TYPE_SD for q in types] + [1.0] * k + [0.7] * k + [1.0]
    )
    points = [
        (i, at[q], at.get(m.table.baseline or "", -1), math.log(kld))
        for i, m in enumerate(models.values())
        for q, kld in m.curve.items()
        if kld < VALID_KLD_NATS
    ]

    def predict(theta: Array, point: tuple[int, int, int, float]) -> tuple[float, Array]:
        i, q, base, _ = point
        own, its = math.exp(theta[q]), math.exp(theta[base]) if base >= 0 else 0.0
        scale, floor, bend = np.exp(theta[[n + i, n + k + i, -1]])
        loss = scale * (own + its)
        kld = floor + loss + bend * loss**2
        slope = np.zeros_like(theta)
        gain = (1 + 2 * bend * loss) / kld
        slope[q] += gain * scale * own
        if base >= 0:
            slope[base] += gain * scale * its
        slope[n + i], slope[n + k + i], slope[-1] = gain * loss, floor / kld, bend * loss**2 / kld
        return math.log(kld), slope

    theta = prior.copy()
    for _ in range(60):
        left, right = np.diag(sd**-2), (prior - theta) / sd**2
        for point in points:
            value, slope = predict(theta, point)
            miss = point[3] - value
            weight = _CURVE_SD**-2 / max(1.0, abs(miss) / (2 * _CURVE_SD))
            left += weight * np.outer(slope, slope)
            right += weight * miss * slope
        step = np.linalg.solve(left, right)
        theta += step * min(1.0, 0.7 / np.abs(step).max())
        if np.abs(step).max() < 1e-4:
            break
    names = list(models)
    return Curves(
        errors={q: math.exp(theta[i]) for q, i in at.items()},
        link=Link(math.exp(theta[-1]), VALID_KLD_NATS),
        ln_scale={name: float(theta[n + i]) for i, name in enumerate(names)},
        ln_floor={name: float(theta[n + k + i]) for i, name in enumerate(names)},
        residuals={(names[p[0]], types[p[1]]): p[3] - predict(theta, p)[0] for p in points},
    )


def _guess(name: str, known: Mapping[str, float]) -> float:
    return math.log(known["Q4_K"]) + _LN_ERROR_PER_BIT * (QTYPES[name].bpw - QTYPES["Q4_K"].bpw)


def by_family(
    values: Mapping[str, float], models: Mapping[str, Measured]
) -> dict[str, list[float]]:
    """Values of models, by family."""
    found = defaultdict(list)
    for name, value in values.items():
        found[models[name].family].append(value)
    return found


def fit_scale(models: Mapping[str, Measured], ln_scale: Mapping[str, float]) -> dict[str, float]:
    """Ridge regression of ln scale on the features of models; a family counts as its root."""
    design, weight, ridge = _scale_design(models, list(ln_scale))
    target = np.array(list(ln_scale.values()))
    solved = np.linalg.solve(
        design.T @ (design * weight[:, None]) + ridge, design.T @ (weight * target)
    )
    names = scale_features(models[next(iter(ln_scale))].inventory)
    return {name: round(float(v), 4) for name, v in zip(names, solved, strict=True)}


def scale_spread(models: Mapping[str, Measured], names: Sequence[str]) -> dict[str, Any]:
    """How the error of a predicted scale grows away from the models that were fitted.

    With `fit_scale`'s normal matrix N, the variance for features x is in proportion to
    ``1 + x N^-1 x``. Errors of families left out are known at the leverage ``x N^-1 x`` that their
    models have then, so that is what ``usual`` says: the mean over models.

    Returns:
        ``inverse``, N^-1 in the order of the features, and ``usual``.
    """
    design, weight, ridge = _scale_design(models, names)
    families = np.array([models[name].family for name in names])

    def inverse(kept: NDArray[np.bool_]) -> NDArray[Any]:
        own = design[kept]
        found: NDArray[Any] = np.linalg.inv(own.T @ (own * weight[kept, None]) + ridge)
        return found

    usual = [
        float(x @ inverse(families != own) @ x)
        for x, own in zip(design, families, strict=True)
        if (families != own).any()
    ]
    whole = inverse(np.ones(len(names), dtype=np.bool_))
    return {
        "inverse": [[float(f"{v:.5g}") for v in row] for row in whole],
        "usual": round(fmean(usual), 4) if usual else 0.0,
    }


def _scale_design(
    models: Mapping[str, Measured], names: Sequence[str]
) -> tuple[Array, Array, Array]:
    """Features of models, their weights, and the ridge; the constant has next to none."""
    rows = [scale_features(models[name].inventory) for name in names]
    design = np.array([list(row.values()) for row in rows])
    size = Counter(models[name].family for name in names)
    weight = np.array([size[models[name].family] ** -0.5 for name in names])
    return design, weight, np.diag([1e-6] + [_SCALE_RIDGE] * (design.shape[1] - 1))


def fit(models: Mapping[str, Measured]) -> dict[str, Any]:
    """Fits everything: curves, then sensitivities, then scales; a document for `LossTable`.

    Standard deviations and provenance are the caller's to add.
    """
    curves = fit_curves(models)
    shares = SensitivityFit(models)
    scale = fit_scale(models, curves.ln_scale)
    families: dict[str, Any] = {}
    off = {
        name: value - sum(scale[k] * v for k, v in scale_features(models[name].inventory).items())
        for name, value in curves.ln_scale.items()
    }
    for family, values in by_family(off, models).items():
        shrunk = sum(values) / (len(values) + _FAMILY_RIDGE)
        families[family] = {"ln_scale": round(shrunk, 4)}
    for family in sorted({m.family for m in shares.models.values()}):
        own = families.setdefault(family, {})
        own["coefficients"] = shares.coefficients(family)
        own["depth_share"] = shares.family_depth_floor_share(family)
    # Most types differ little between models; a few runs are broken.
    type_sd = round(1.4826 * median(map(abs, curves.residuals.values())), 3)
    floors: dict[str, float] = {}
    for kind, is_sparse in (("dense", False), ("sparse", True)):
        alike = {n: v for n, v in curves.ln_floor.items() if models[n].is_sparse is is_sparse}
        if alike:
            middle = median(map(fmean, by_family(alike, models).values()))
            floors[kind] = round(math.exp(middle), 6)
    return {
        "type_error": {
            q: float(f"{e:.5g}") for q, e in sorted(curves.errors.items(), key=lambda i: i[1])
        },
        "link": {"curvature": round(curves.link.curvature, 4), "valid_kld_nats": VALID_KLD_NATS},
        "scale": scale,
        "scale_spread": scale_spread(models, list(curves.ln_scale)),
        "coefficients": shares.coefficients(),
        "families": families,
        "shapes": shares.same_shapes(),
        "floor": {"curve_nats": floors, "depth_share": shares.depth_floor_share()},
        "ln_sd": {**_UNVALIDATED_SD, "scale_with_curve": type_sd, "type": type_sd},
    }  # fmt: skip


def leave_one_family_out(
    models: Mapping[str, Measured], fitter: Callable[[Mapping[str, Measured]], dict[str, Any]] = fit
) -> dict[str, dict[str, Any]]:
    """The document fitted without each family, by family."""
    return {
        left: fitter({name: m for name, m in models.items() if m.family != left})
        for left in sorted({m.family for m in models.values()})
    }
