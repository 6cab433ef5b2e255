"""Fits the sensitivities of tensors within a model, from runs with one tensor at a low type.

Tensors of all models share coefficients of features; families and shapes differ from them by
coefficients of their own, with smaller prior standard deviations the less is known of such
differences in general. What tensors of a shape show beyond all features is kept as it is, shrunk
by its noise: models of one shape agree in it (`SensitivityFit.same_shapes`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.families import family, quantized, shape
from quantplan.costs.scale import density
from quantplan.costs.sensitivity import Prior, by_role, depth, features, fixed_term
from quantplan.inventory import Inventory, Tensor
from scripts.quality_data import Measured

Array = NDArray[np.float64]

# Prior standard deviations of coefficients: pooled ones, and what is particular to a family and to
# a shape. Pooled depth has little: whatever is learned of it in some families misleads in others.
_POOLED_SD = {"part": 0.6, "class": 2.0, "size": 0.15, "sparsity": 1.0, "depth": 0.15, "edge": 1.0}
_FAMILY_SD = {"part": 0.6, "class": 0.6, "size": 0.1, "depth": 0.7, "edge": 0.7}
_SHAPE_SD = {"part": 0.3, "depth": 0.4, "edge": 0.4}
# One model weighs as much as this many independent tensors, however many it has.
_UNITS_PER_MODEL = 50.0
# Scatter of one single-tensor measurement about the features, relative to: the loss, the constant
# and the depth floor; and scatter of the loss between runs of one tensor.
_LOSS_SCATTER, _FLOOR_SCATTER, _DEPTH_SCATTER, _REPEAT_SCATTER = 0.6, 0.05, 0.3, 0.1
# How much of what a shape shows is passed on, and at most in ln. All of it would predict siblings'
# tables best (rank correlation 0.88 instead of 0.82). But of 8 pairs of nearly equal recipes of
# Qwen3.6-27B, which were made from such tables, it ranks 4 right, and up to 0.6 of it all 8.
_PASSED_ON, _MOST_BEYOND = 0.6, 1.5
# The depth floor is a step down the layers: full before, nothing after.
_STEP_AT, _STEP_WIDTH = 0.55, 0.12
# Steps of Gauss-Newton in ln shrink, since outliers change sides for ever at some length.
_N_STEPS, _FIRST_STEP, _STEP_DECAY = 40, 1.5, 0.9

Column = tuple[str, str]
"""Family or shape that a coefficient is particular to (empty for pooled ones), and feature."""


def depth_floor(unit: Sequence[Tensor], inventory: Inventory) -> float:
    """Shape of the noise floor over depth, from 1 (first layers) to 0 (last)."""
    return 1 / (1 + math.exp((depth(unit[0], inventory) - _STEP_AT) / _STEP_WIDTH))


def depth_floor_share(inventory: Inventory, document: Mapping[str, Any]) -> float:
    """What the depth floor begins with, over the mean loss of a matrix in the layers.

    That of models of the same shape, else of the family's models of the same density (dense ones,
    or mixtures of experts), else of all such models.
    """
    of_family = document["families"].get(family(inventory.architecture.name), {})
    pooled = document["floor"]["depth_share"]
    known = {**pooled, **of_family.get("depth_share", {})}
    found = known.get(density(inventory), max(pooled.values()))
    return float(Prior(document).same_shape(inventory).get("depth_share", found))


@dataclass(frozen=True)
class _Block:
    """One model in the fit: rows are tensors, in the order of the measurements.

    Attributes:
        columns: Which coefficients the columns of `design` belong to.
        starts: First row of each measurement.
    """

    columns: NDArray[np.int64]
    design: Array
    fixed: Array
    starts: NDArray[np.int64]
    kld: Array
    shape: Array


@dataclass(frozen=True)
class _Linearized:
    """One model's measurements at some coefficients.

    Attributes:
        slope: Of ln KLD, by coefficients of the block, level, floor and depth floor.
        miss: Ln of measured over predicted KLD.
        weight: One over the variance of the miss.
        noise: Standard deviation of the miss were the loss predicted exactly.
        of_loss: Share of the loss in the predicted KLD.
    """

    slope: Array
    miss: Array
    weight: Array
    noise: Array
    of_loss: Array


class SensitivityFit:
    """Coefficients of features, pooled and per family, from single-tensor measurements.

    ``ln KLD(unit) = ln(c0 + c1 * shape(depth) + sum of exp(level + coefficients * features))``,
    with a level, c0 and c1 per model; Gauss-Newton, Gaussian priors on the coefficients, and
    residuals beyond two standard deviations count linearly.
    """

    def __init__(self, models: Mapping[str, Measured]) -> None:
        """Fits all models that have single-tensor measurements."""
        self.models = {name: m for name, m in models.items() if m.units}
        self.columns: dict[Column, int] = {}
        self._shapes = {name: shape(m.inventory) for name, m in self.models.items()}
        self._blocks = [self._block(name) for name in self.models]
        self._solve()

    def _row(self, name: str, tensor: Tensor) -> dict[Column, float]:
        """Features of a tensor of a model, for everybody, its family and its shape."""
        model = self.models[name]
        row = {}
        for feature, value in features(tensor, model.inventory).items():
            row["", feature] = value
            if _kind(feature) in _FAMILY_SD:
                row[model.family, feature] = value
            if _kind(feature) in _SHAPE_SD:
                row[self._shapes[name], feature] = value
        return row

    def _block(self, name: str) -> _Block:
        units, inventory = self.models[name].units, self.models[name].inventory
        tensors = [t for u in units for t in u.tensors]
        rows = [self._row(name, t) for t in tensors]
        own: dict[Column, int] = {}
        for row in rows:
            for column in row:
                own.setdefault(column, len(own))
                self.columns.setdefault(column, len(self.columns))
        design = np.zeros((len(rows), len(own)))
        for i, row in enumerate(rows):
            for column, value in row.items():
                design[i, own[column]] = value
        return _Block(
            columns=np.array([self.columns[column] for column in own]),
            design=design,
            fixed=np.array([fixed_term(t) for t in tensors]),
            starts=np.cumsum([0, *(len(u.tensors) for u in units[:-1])]),
            kld=np.array([u.kld_nats for u in units]),
            shape=np.array([depth_floor(u.tensors, inventory) for u in units]),
        )

    def _index(self, m: int) -> NDArray[np.int64]:
        """Where the coefficients, level, floor and depth floor of one model are."""
        p, k = len(self.columns), len(self._blocks)
        own = [p + m, p + k + m, p + 2 * k + m]
        return np.concatenate([self._blocks[m].columns, np.array(own)])

    def _solve(self) -> None:
        k = len(self._blocks)
        families = {m.family for m in self.models.values()}
        sd = np.array(
            [_sd(column, families) for column in self.columns] + [3.0] * k + [0.15] * k + [1.0] * k
        )
        prior = np.zeros(len(sd))
        for m, block in enumerate(self._blocks):
            floor = float(np.percentile(block.kld, 3))
            above = math.log(max(float(np.median(block.kld)) - floor, 1e-5))
            level = above - float(np.median(block.fixed))
            prior[self._index(m)[-3:]] = level, math.log(0.9 * floor), above + math.log(0.3)
        self.theta = prior.copy()
        for i in range(_N_STEPS):
            left, right = np.diag(sd**-2), (prior - self.theta) / sd**2
            for m, block in enumerate(self._blocks):
                index = self._index(m)
                at = _linearize(block, self.theta[index])
                left[np.ix_(index, index)] += at.slope.T @ (at.slope * at.weight[:, None])
                right[index] += at.slope.T @ (at.weight * at.miss)
            limit = _FIRST_STEP * _STEP_DECAY**i
            step = np.clip(np.linalg.solve(left, right), -limit, limit)
            self.theta += step
            if np.abs(step).max() < 5e-3:
                break

    def coefficients(self, family: str = "") -> dict[str, float]:
        """Pooled coefficients, or what is particular to a family."""
        return {
            feature: round(float(self.theta[i]), 3)
            for (whose, feature), i in sorted(self.columns.items())
            if whose == family and abs(self.theta[i]) >= 5e-4
        }

    def same_shapes(self) -> dict[str, dict[str, Any]]:
        """What models of each shape have beyond pooled and family coefficients.

        Returns:
            By shape: the models, hundredths of ln s by role in the order of the layers, and the
            share of the depth floor (`depth_floor_shares`).
        """
        by_shape: dict[str, list[str]] = defaultdict(list)
        for name, own in self._shapes.items():
            by_shape[own].append(name)
        shares = self.depth_floor_shares()
        return {
            shape: {
                "models": names,
                "depth_share": round(math.exp(fmean(math.log(shares[n]) for n in names)), 4),
                "ln_hundredths": self._beyond(shape, names),
            }
            for shape, names in sorted(by_shape.items(), key=lambda item: item[1])
        }

    def _beyond(self, shape: str, names: Sequence[str]) -> dict[str, str]:
        """Coefficients of a shape, and residuals of its tensors, in hundredths by role."""
        sums: dict[str, Array] = defaultdict(lambda: np.array([0.0, _LOSS_SCATTER**-2]))
        for m, name in enumerate(self.models):
            if name in names:
                at = _linearize(self._blocks[m], self.theta[self._index(m)])
                pull = np.array([at.of_loss * at.miss, at.of_loss**2]) / at.noise**2
                for unit, own in zip(self.models[name].units, pull.T, strict=True):
                    for tensor in unit.tensors:
                        sums[tensor.name] += own
        inventory = self.models[names[0]].inventory

        def beyond(tensor: Tensor) -> float:
            above, below = sums[tensor.name]
            found = max(-_MOST_BEYOND, min(above / below, _MOST_BEYOND))
            for feature, value in features(tensor, inventory).items():
                if (shape, feature) in self.columns:
                    found += self.theta[self.columns[shape, feature]] * value
            return _PASSED_ON * float(found)

        return {
            role: " ".join(str(round(100 * beyond(t))) for t in tensors)
            for role, tensors in by_role(inventory).items()
        }

    def depth_floor_shares(self) -> dict[str, float]:
        """c1 over the mean loss of a matrix in the layers, by model."""
        found = {}
        for m, (name, model) in enumerate(self.models.items()):
            level, _, deep = self.theta[self._index(m)[-3:]]
            losses = []
            for tensor in quantized(model.inventory):
                if tensor.layer is not None:
                    row = self._row(name, tensor)
                    known = (self.theta[self.columns[c]] * v for c, v in row.items()
                             if c in self.columns)  # fmt: skip
                    losses.append(math.exp(fixed_term(tensor) + sum(known)))
            found[name] = math.exp(deep - level) / fmean(losses)
        return found

    def depth_floor_share(self) -> dict[str, float]:
        """c1 over the mean loss of a matrix in the layers; mean over families, by density."""
        return {
            kind: round(fmean(map(fmean, by_family.values())), 4)
            for kind, by_family in sorted(self._floors_by_family().items())
        }

    def family_depth_floor_share(self, family: str) -> dict[str, float]:
        """The same in a family: a mean in ln over its models, and the mean of all families once."""
        pooled = self.depth_floor_share()
        found = {}
        for kind, by_family in sorted(self._floors_by_family().items()):
            if family in by_family:
                ln_shares = map(math.log, [pooled[kind], *by_family[family]])
                found[kind] = round(math.exp(fmean(ln_shares)), 4)
        return found

    def _floors_by_family(self) -> dict[str, dict[str, list[float]]]:
        """Shares of models, by density and by family."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for name, share in self.depth_floor_shares().items():
            model = self.models[name]
            found[density(model.inventory)][model.family].append(share)
        return found


def _kind(feature: str) -> str:
    word = feature.split(maxsplit=1)[0]
    return "depth" if word.startswith("depth") else "edge" if word in ("first", "last") else word


def _sd(column: Column, families: Iterable[str]) -> float:
    whose, feature = column
    table = _POOLED_SD if not whose else _FAMILY_SD if whose in families else _SHAPE_SD
    return table[_kind(feature)]


def _linearize(block: _Block, theta: Array) -> _Linearized:
    """Slopes of ln KLD, residuals and weights of one model's measurements."""
    exponent = block.design @ theta[:-3] + block.fixed + theta[-3]
    loss = np.exp(np.clip(exponent, -30, 5))
    unit_loss = np.add.reduceat(loss, block.starts)
    floor, deep = math.exp(theta[-2]), math.exp(theta[-1]) * block.shape
    total = floor + deep + unit_loss
    miss = np.log(block.kld) - np.log(total)
    of_floor, of_deep = _FLOOR_SCATTER * floor, _DEPTH_SCATTER * deep
    sd = np.sqrt((_LOSS_SCATTER * unit_loss) ** 2 + of_floor**2 + of_deep**2) / total
    repeat = np.hypot(_REPEAT_SCATTER * unit_loss, _FLOOR_SCATTER * (floor + deep)) / total
    n_rows = np.diff([*block.starts, len(loss)])
    own = block.design * (loss / np.repeat(total, n_rows))[:, None]
    slope = np.column_stack([
        np.add.reduceat(own, block.starts), unit_loss / total, floor / total, deep / total
    ])  # fmt: skip
    weight = _UNITS_PER_MODEL / len(block.kld) / sd**2 / np.maximum(1.0, np.abs(miss) / sd / 2)
    return _Linearized(slope, miss, weight, repeat, unit_loss / total)
