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
FLOOR_NATS, _LN_FLOOR_SD = 0.002, 0.7


@dataclass(frozen=True)
class Curves:
    """What runs of whole models say.

    Attributes:
        errors: Relative squared error by type.
        link: From summed loss to KLD.
        ln_scale: ln of loss per unit of error, by model.
        ln_floor: ln of the noise floor by model.
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


class _Points:
    """All runs as arrays, and the model of their KLDs.

    Parameters are ln errors of types, ln scales and ln floors of models, and ln curvature of the
    link.
    """

    def __init__(self, models: Mapping[str, Measured], types: Mapping[str, int]) -> None:
        """Takes models with a curve, and the index of every type."""
        runs = [
            (i, types[q], types.get(m.table.baseline or "", -1), math.log(kld))
            for i, m in enumerate(models.values())
            for q, kld in m.curve.items()
            if kld < VALID_KLD_NATS
        ]
        self.model, self.qtype, self.base = np.array([run[:3] for run in runs]).T
        self.ln_kld = np.array([run[3] for run in runs])
        self._n, self._k = len(types), len(models)

    def predict(self, theta: Array) -> tuple[Array, Array]:
        """Ln KLD of every run, and its derivatives."""
        n, k, rows = self._n, self._k, np.arange(len(self.ln_kld))
        own = np.exp(theta[self.qtype])
        its = np.where(self.base >= 0, np.exp(theta[self.base]), 0.0)
        loss = np.exp(theta[n + self.model]) * (own + its)
        floor = np.exp(theta[n + k + self.model])
        bent = math.exp(theta[-1]) * loss**2
        kld = floor + loss + bent
        by_loss = (loss + 2 * bent) / kld
        slope = np.zeros((len(rows), len(theta)))
        slope[rows, self.qtype] = by_loss * own / (own + its)
        slope[rows, self.base] += by_loss * its / (own + its)
        slope[rows, n + self.model] = by_loss
        slope[rows, n + k + self.model] = floor / kld
        slope[:, -1] = bent / kld
        return np.log(kld), slope


def fit_curves(models: Mapping[str, Measured]) -> Curves:
    """Fits ``KLD = floor + link(scale * error)`` by Gauss-Newton.

    A baseline that is quantized itself errs independently of the model, so errors of the type and
    of the baseline add.
    """
    models = {name: m for name, m in models.items() if m.curve}
    types = sorted({q for m in models.values() for q in m.curve} | {
        m.table.baseline for m in models.values() if m.table.baseline
    })  # fmt: skip
    n, k = len(types), len(models)
    known = gaussian_errors()
    points = _Points(models, {name: i for i, name in enumerate(types)})
    prior = np.array(
        [math.log(known[q]) if q in known else _guess(q, known) for q in types]
        + [1.3] * k + [math.log(FLOOR_NATS)] * k + [math.log(0.3)]
    )  # fmt: skip
    sd = np.array(
        [_TYPE_SD if q in known else _NEW_TYPE_SD for q in types]
        + [1.0] * k + [_LN_FLOOR_SD] * k + [1.0]
    )  # fmt: skip
    theta = prior.copy()
    for _ in range(60):
        value, slope = points.predict(theta)
        miss = points.ln_kld - value
        weight = _CURVE_SD**-2 / np.maximum(1.0, np.abs(miss) / (2 * _CURVE_SD))
        normal = slope.T @ (slope * weight[:, None]) + np.diag(sd**-2)
        step = np.linalg.solve(normal, slope.T @ (weight * miss) + (prior - theta) / sd**2)
        theta += step * min(1.0, 0.7 / np.abs(step).max())
        if np.abs(step).max() < 1e-4:
            break
    names = list(models)
    sds = np.sqrt(np.diag(np.linalg.inv(normal)))
    residuals = points.ln_kld - points.predict(theta)[0]
    return Curves(
        errors=dict(zip(types, map(float, np.exp(theta[:n])), strict=True)),
        link=Link(math.exp(theta[-1]), VALID_KLD_NATS),
        ln_scale=dict(zip(names, map(float, theta[n : n + k]), strict=True)),
        ln_floor=dict(zip(names, map(float, theta[n + k : n + 2 * k]), strict=True)),
        ln_scale_sd=dict(zip(names, map(float, sds[n : n + k]), strict=True)),
        ln_floor_sd=dict(zip(names, map(float, sds[n + k : n + 2 * k]), strict=True)),
        residuals={
            (names[i], types[q]): float(miss)
            for i, q, miss in zip(points.model, points.qtype, residuals, strict=True)
        },
    )


def _guess(name: str, known: Mapping[str, float]) -> float:
    return math.log(known["Q4_K"]) + _LN_ERROR_PER_BIT * (QTYPES[name].bpw - QTYPES["Q4_K"].bpw)
