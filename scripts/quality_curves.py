"""Fits what runs of whole models at one type say: errors of types, link, scales and floors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.evidence import Link
from quantplan.qtypes import QTYPES
from scripts.quality_data import Measured, gaussian_errors

Array = NDArray[np.float64]

# Whole models above this KLD are broken; the link is not fitted to them.
VALID_KLD_NATS = 3.0
# Prior standard deviations, in ln: of a type's error where it is known on Gaussian rows (published
# runs use importance matrices) and where only its bits are; of one measurement.
_TYPE_SD, _NEW_TYPE_SD, _CURVE_SD = 0.25, 1.0, 0.08
# ln error falls by this much per bit per weight (from Q2_K to Q8_0 on Gaussian rows).
_LN_ERROR_PER_BIT = -1.42
# Beside the errors of a 4-bit baseline no floor can be seen; then it is about this, in nats.
_FLOOR_NATS, _LN_FLOOR_SD = 0.002, 0.7


@dataclass(frozen=True)
class Curves:
    """What runs of whole models say.

    Attributes:
        errors: Relative squared error by type.
        link: From summed loss to KLD.
        ln_scale: ln of loss per unit of error, by model.
        ln_floor: ln of the noise floor, by model.
        ln_scale_sd: Standard deviation of ln scale, by model.
        ln_floor_sd: Standard deviation of ln floor, by model.
        residuals: ln of measured over fitted KLD, by model and type.
    """

    errors: dict[str, float]
    link: Link
    ln_scale: dict[str, float]
    ln_floor: dict[str, float]
    ln_scale_sd: dict[str, float]
    ln_floor_sd: dict[str, float]
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
        + [1.3] * k + [math.log(_FLOOR_NATS)] * k + [math.log(0.3)]
    )  # fmt: skip
    sd = np.array(
        [_TYPE_SD if q in known else _NEW_TYPE_SD for q in types]
        + [1.0] * k
        + [_LN_FLOOR_SD] * k
        + [1.0]
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
    sds = np.sqrt(np.diag(np.linalg.inv(left)))
    return Curves(
        errors={q: math.exp(theta[i]) for q, i in at.items()},
        link=Link(math.exp(theta[-1]), VALID_KLD_NATS),
        ln_scale={name: float(theta[n + i]) for i, name in enumerate(names)},
        ln_floor={name: float(theta[n + k + i]) for i, name in enumerate(names)},
        ln_scale_sd={name: float(sds[n + i]) for i, name in enumerate(names)},
        ln_floor_sd={name: float(sds[n + k + i]) for i, name in enumerate(names)},
        residuals={(names[p[0]], types[p[1]]): p[3] - predict(theta, p)[0] for p in points},
    )


def _guess(name: str, known: Mapping[str, float]) -> float:
    return math.log(known["Q4_K"]) + _LN_ERROR_PER_BIT * (QTYPES[name].bpw - QTYPES["Q4_K"].bpw)
