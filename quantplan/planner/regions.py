"""Regions of splits, and bounds that hold in them: what a proof over all splits is made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantplan.planner.bounds import Bounds
from quantplan.planner.milp import build_relaxation
from quantplan.planner.problem import Problem

Counts = tuple[int, ...]
"""Layers in RAM, then on each GPU for layers, in order: what a split comes to."""

# What the solver may miss a whole number by.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Region:
    """The splits whose numbers of layers are in some ranges.

    Attributes:
        ranges: Least and most layers in RAM, then on each GPU for layers, in order.
    """

    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, counts: Counts) -> bool:
        """Whether a split is one of them."""
        return all(least <= n <= most for n, (least, most) in zip(counts, self.ranges, strict=True))

    def without(self, counts: Counts) -> Iterator["Region"]:
        """Regions without overlap that have all of these splits but one."""
        # The layers of the last device are those that are left.
        for d, (n, (least, most)) in enumerate(zip(counts[:-1], self.ranges, strict=False)):
            before, after = tuple((m, m) for m in counts[:d]), self.ranges[d + 1 :]
            if least < n:
                yield Region((*before, (least, n - 1), *after))
            if n < most:
                yield Region((*before, (n + 1, most), *after))


class RegionBounds:
    """Lower bounds of the objective over regions, from one relaxation."""

    def __init__(self, problem: Problem) -> None:
        """Builds the relaxation.

        Args:
            problem: Groups, budgets and goal.
        """
        self._problem = problem
        self._model = build_relaxation(problem, pooled=False)
        self._relaxed = self._model.lp.relaxation()
        self._levels = self._model.levels

    @property
    def everywhere(self) -> Region:
        """All splits."""
        return Region(((0, self._problem.n_layers),) * len(self._model.n_layers))

    def bounds(self, region: Region, levels: Iterable[int]) -> Bounds:
        """Bounds that hold for every split of a region.

        Args:
            region: The splits.
            levels: Indices of the largest tensor that may be streamed.
        """
        model, within = self._model, {}
        for name, (least, most) in zip(self._problem.layer_places, region.ranges, strict=True):
            within[model.n_layers[name]] = (float(least), float(most))
            if name in model.used:
                within[model.used[name]] = (float(least > 0), 1.0)
        answers = {n: self._relaxed({**self._levels[n], **within}) for n in levels}
        return Bounds(self._problem, model, answers)

    def nearest_split(self, bounds: Bounds) -> Counts:
        """The split of a region that is nearest to what its bound is reached with."""
        answer = bounds.answers[bounds.order[0]]
        parts = [answer.value(bounds.model.n_layers[name]) for name in self._problem.layer_places]
        counts = [int(part + _ROUNDING) for part in parts]
        by_rest = sorted(range(len(parts)), key=lambda d: counts[d] - parts[d])
        for d in by_rest[: self._problem.n_layers - sum(counts)]:
            counts[d] += 1
        return tuple(counts)
