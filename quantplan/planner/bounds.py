"""Lower bounds of the objective: of one split of the layers, and over all of them."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from quantplan.planner.linear import Answer
from quantplan.planner.milp import add_cutoff, build_model, build_relaxation
from quantplan.planner.model import Model
from quantplan.planner.problem import Problem


@dataclass(frozen=True)
class Bounds:
    """What the program without integers says of a split, or of all splits.

    The program is solved once for each size that the largest streamed tensor may have: with that
    settled, what is left is so close to linear that the bounds are within about 0.1 %.

    Attributes:
        problem: The problem with the split.
        model: The program.
        answers: Its solution by level.
    """

    problem: Problem
    model: Model
    answers: Mapping[int, Answer]

    def nats(self, level: int) -> float:
        """Lower bound of the objective at a level; infinite where nothing fits."""
        return self.model.in_nats(self.answers[level].bound)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Levels at which something fits, the lowest bound first."""
        fits = [i for i, answer in self.answers.items() if answer.ending == "solved"]
        return tuple(sorted(fits, key=self.nats))

    @property
    def least_nats(self) -> float:
        """Lower bound of the objective."""
        return self.nats(self.order[0]) if self.order else math.inf


def split_bounds(problem: Problem) -> Bounds:
    """Bounds for a problem's split of the layers."""
    return _bounds(problem, build_model(problem))


def bounds_over_splits(problem: Problem) -> list[Bounds]:
    """Bounds that hold for every split of the layers, for each place of the output.

    Returns:
        Those where something fits, the lowest first: it bounds all of them.
    """
    found = [_bounds(each, build_relaxation(each)) for each in problem.by_output()]
    return sorted((b for b in found if b.order), key=lambda bounds: bounds.least_nats)


def _bounds(problem: Problem, model: Model) -> Bounds:
    relaxed = model.lp.relaxation()
    return Bounds(problem, model, dict(enumerate(map(relaxed, model.levels))))


def raised_bound(relaxed: Bounds, objective_nats: float, gap: float, time_limit_s: float) -> float:
    """A higher lower bound over every split, from counts that are integers.

    Args:
        relaxed: Bounds without integers.
        objective_nats: Of the best solution that is known.
        gap: Relative gap that is good enough.
        time_limit_s: Time at which to stop.
    """
    enough, end, found = objective_nats * (1 - gap), time.monotonic() + time_limit_s, math.inf
    for level in relaxed.order:
        bound = relaxed.nats(level)
        if bound < enough and time.monotonic() < end:
            model = build_relaxation(relaxed.problem, pooled=False)
            add_cutoff(model, enough)
            left_s = end - time.monotonic()
            answer = model.lp.solve(gap / 10, left_s, within=model.levels[level])
            better = enough if answer.ending == "infeasible" else model.in_nats(answer.bound)
            bound = max(bound, better)
        found = min(found, bound)
    return found
