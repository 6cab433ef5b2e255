"""Fits the loss model: errors of types, link, sensitivities, scale. See `fit` for the order.

Two data sets constrain different things. Runs of whole models at one type give the error of each
type, the link from summed loss to KLD, and the scale of each model. Runs with one tensor at a low
type give the shares of tensors. Both contain a noise floor: any change at all to a large model,
however small, changes its KLD, the more so the earlier the layer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.scale import quantized
from quantplan.costs.sensitivity import depth, features, fixed_term
from quantplan.inventory import Inventory, Tensor
from scripts.quality_curves import VALID_KLD_NATS, fit_curves
from scripts.quality_data import Measured, Unit
from scripts.quality_scale import fit_scales, scale_spread

Array = NDArray[np.float64]

# Of coefficients: pooled ones, and what is particular to a family.
_POOLED_SD = {"part": 0.6, "class": 2.0, "size": 0.15, "sparsity": 1.0, "depth": 0.3, "edge": 1.0}
_FAMILY_SD = {"part": 0.6, "class": 0.6, "size": 0.1, "depth": 0.7, "edge": 0.7}
# One model weighs as much as this many independent tensors, however many it has.
_UNITS_PER_MODEL = 50.0
# Scatter of one single-tensor measurement, relative to: the loss, the constant and the depth floor.
_LOSS_SCATTER, _FLOOR_SCATTER, _DEPTH_SCATTER = 0.6, 0.05, 0.3
# The depth floor is a step down the layers: full before, nothing after.
_STEP_AT, _STEP_WIDTH = 0.55, 0.12
# Until families that were left out have been predicted.
_UNVALIDATED_SD = {
    "scale_new_family": 0.3, "scale_known_family": 0.3,
    "floor_new_family": 0.8, "floor_known_family": 0.5,
    "share": 0.5, "single": 0.1,
}  # fmt: skip


def depth_floor(unit: Sequence[Tensor], inventory: Inventory) -> float:
    """Shape of the noise floor over depth, from 1 (first layers) to 0 (last)."""
    layer, n_layers = unit[0].layer, inventory.architecture.n_loaded_layers
    at = depth(unit[0], inventory) if layer is None else (layer + 0.5) / n_layers
    return 1 / (1 + math.exp((at - _STEP_AT) / _STEP_WIDTH))


@dataclass
class _Block:
    """One model in the fit of sensitivities: rows are tensors, `unit` maps them to measurements."""

    design: Array
    fixed: Array
    unit: NDArray[np.int64]
    kld: Array
    shape: Array


class SensitivityFit:
    """Coefficients of features, pooled and per family, from single-tensor measurements.

    ``ln KLD(unit) = ln(c0 + c1 * shape(depth) + sum of exp(level + coefficients * features))``,
    with a level, c0 and c1 per model; Gauss-Newton, Gaussian priors on the coefficients, and
    residuals beyond two standard deviations count linearly.
    """

    def __init__(self, models: Mapping[str, Measured]) -> None:
        """Fits all models that have single-tensor measurements."""
        self.models = {name: m for name, m in models.items() if m.units}
        self.columns: dict[str, int] = {}
        rows = {name: _rows(m.inventory, m.units, m.family) for name, m in self.models.items()}
        for found in rows.values():
            for row in found:
                for name in row:
                    self.columns.setdefault(name, len(self.columns))
        self._blocks = [self._block(m, rows[name]) for name, m in self.models.items()]
        self._solve()

    def _block(self, model: Measured, rows: list[dict[str, float]]) -> _Block:
        design = np.zeros((len(rows), len(self.columns)))
        for i, row in enumerate(rows):
            for name, value in row.items():
                design[i, self.columns[name]] = value
        units = model.units
        return _Block(
            design,
            np.array([fixed_term(t) for u in units for t in u.tensors]),
            np.array([i for i, u in enumerate(units) for _ in u.tensors]),
            np.array([u.kld_nats for u in units]),
            np.array([depth_floor(u.tensors, model.inventory) for u in units]),
        )

    def _solve(self) -> None:
        p, k = len(self.columns), len(self._blocks)
        sd = np.array([_sd(name) for name in self.columns] + [3.0] * k + [0.15] * k + [1.0] * k)
        prior = np.zeros(p + 3 * k)
        for m, block in enumerate(self._blocks):
            floor = float(np.percentile(block.kld, 3))
            above = math.log(max(float(np.median(block.kld)) - floor, 1e-5))
            prior[p + m] = above - float(np.median(block.fixed))
            prior[p + k + m] = math.log(0.9 * floor)
            prior[p + 2 * k + m] = above + math.log(0.3)
        theta = prior.copy()
        for _ in range(25):
            left, right = np.diag(sd**-2), (prior - theta) / sd**2
            for m, block in enumerate(self._blocks):
                index = np.r_[0:p, p + m, p + k + m, p + 2 * k + m]
                slope, miss, weight = _linearize(block, theta[index])
                left[np.ix_(index, index)] += slope.T @ (slope * weight[:, None])
                right[index] += slope.T @ (weight * miss)
            step = np.linalg.solve(left, right)
            theta += step * min(1.0, 1.5 / np.abs(step).max())
            if np.abs(step).max() < 5e-3:
                break
        self.theta = theta

    def coefficients(self, family: str | None = None) -> dict[str, float]:
        """Pooled coefficients, or what is particular to a family."""
        prefix = f"{family}: " if family else ""
        return {
            name.removeprefix(prefix): round(float(self.theta[i]), 3)
            for name, i in sorted(self.columns.items())
            if (name.startswith(prefix) if family else ": " not in name)
            and abs(self.theta[i]) >= 5e-4
        }

    def depth_floor_share(self) -> dict[str, float]:
        """c1 over the mean loss of a matrix in the layers; mean ln over families, by density."""
        p, k = len(self.columns), len(self._blocks)
        found: dict[str, dict[str, list[float]]] = {"dense": {}, "sparse": {}}
        for m, model in enumerate(self.models.values()):
            tensors = [t for t in quantized(model.inventory) if t.layer is not None]
            rows = _rows(model.inventory, [Unit((t,), 1.0) for t in tensors], model.family)
            ln_loss = [
                fixed_term(t)
                + sum(self.theta[self.columns[n]] * v for n, v in row.items() if n in self.columns)
                for t, row in zip(tensors, rows, strict=True)
            ]
            ln_mean = float(self.theta[p + m]) + math.log(fmean(map(math.exp, ln_loss)))
            kind = found["sparse" if model.is_sparse else "dense"]
            kind.setdefault(model.family, []).append(float(self.theta[p + 2 * k + m]) - ln_mean)
        return {
            kind: round(math.exp(fmean(map(fmean, by_family.values()))), 4)
            for kind, by_family in found.items()
            if by_family
        }


def _rows(inventory: Inventory, units: Iterable[Unit], family: str) -> list[dict[str, float]]:
    rows = []
    for unit in units:
        for tensor in unit.tensors:
            pooled = features(tensor, inventory)
            own = {f"{family}: {n}": v for n, v in pooled.items() if _kind(n) in _FAMILY_SD}
            rows.append({**pooled, **own})
    return rows


def _kind(name: str) -> str:
    word = name.split(maxsplit=1)[0]
    return "depth" if word.startswith("depth") else "edge" if word in ("first", "last") else word


def _sd(column: str) -> float:
    family, _, name = column.rpartition(": ")
    return (_FAMILY_SD if family else _POOLED_SD)[_kind(name)]


def _linearize(block: _Block, theta: Array) -> tuple[Array, Array, Array]:
    """Slopes of ln KLD, residuals and weights of one model's measurements."""
    n_units = len(block.kld)
    loss = np.exp(np.clip(block.design @ theta[:-3] + block.fixed + theta[-3], -30, 5))
    unit_loss = np.bincount(block.unit, loss, n_units)
    floor, deep = math.exp(theta[-2]), math.exp(theta[-1]) * block.shape
    total = floor + deep + unit_loss
    miss = np.log(block.kld) - np.log(total)
    sd = np.sqrt(
        (_LOSS_SCATTER * unit_loss) ** 2
        + (_FLOOR_SCATTER * floor) ** 2
        + (_DEPTH_SCATTER * deep) ** 2
    ) / total  # fmt: skip
    slope = np.zeros((n_units, len(theta)))
    np.add.at(slope[:, :-3], block.unit, block.design * (loss / total[block.unit])[:, None])
    slope[:, -3], slope[:, -2], slope[:, -1] = unit_loss / total, floor / total, deep / total
    weight = _UNITS_PER_MODEL / n_units / sd**2 / np.maximum(1.0, np.abs(miss) / sd / 2)
    return slope, miss, weight


def fit(models: Mapping[str, Measured]) -> dict[str, Any]:
    """Fits everything: curves, then sensitivities, then scales; a document for `LossTable`.

    Standard deviations and provenance are the caller's to add.
    """
    curves = fit_curves(models)
    shares = SensitivityFit(models)
    scales = fit_scales(models, curves)
    # Most types differ little between models; a few runs are broken.
    type_sd = round(1.4826 * median(map(abs, curves.residuals.values())), 3)
    return {
        "type_error": {
            q: float(f"{e:.5g}") for q, e in sorted(curves.errors.items(), key=lambda i: i[1])
        },
        "link": {"curvature": round(curves.link.curvature, 4), "valid_kld_nats": VALID_KLD_NATS},
        "scale": scales.scale,
        "scale_effects": scales.effects,
        "scale_spread": scale_spread(models, curves),
        "coefficients": shares.coefficients(),
        "families": {
            family: {"coefficients": shares.coefficients(family)}
            for family in sorted({m.family for m in shares.models.values()})
        },
        "floor": {"curve_nats": scales.floors, "depth_share": shares.depth_floor_share()},
        "ln_sd": {**_UNVALIDATED_SD, "scale_with_curve": type_sd, "type": type_sd},
    }


def leave_one_family_out(
    models: Mapping[str, Measured], fitter: Callable[[Mapping[str, Measured]], dict[str, Any]] = fit
) -> dict[str, dict[str, Any]]:
    """The document fitted without each family, by family."""
    return {
        left: fitter({name: m for name, m in models.items() if m.family != left})
        for left in sorted({m.family for m in models.values()})
    }
