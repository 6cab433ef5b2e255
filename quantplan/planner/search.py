"""Searches over splits of the layers, against a bound that covers all of them."""

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quantplan.planner.bounds import Bounds, bounds_over_splits, raised_bound, split_bounds
from quantplan.planner.problem import Problem
from quantplan.planner.regions import Counts, Region, RegionBounds
from quantplan.planner.solution import Solution, checked
from quantplan.planner.solve import solve_level, solve_split
from quantplan.planner.split import (
    devices_of,
    first_splits,
    layer_counts,
    neighbours,
    promising_split,
)

# Relative gap at which the search over splits of several GPUs may stop.
_SPLIT_GAP = 1e-3
# Relative improvement that is worth another step of that search.
_PROGRESS = 1e-6
# Shares of the time that is left that may go into two better bounds, one more split, and a guess.
_REGIONS_SHARE = 0.5
_BOUND_SHARE = 0.2
_SPLIT_SHARE = 0.2
_GUESS_SHARE = 0.1
_CLIMB_SHARE = 0.5
# Part of the gap within which the bound of a split is as good as that of all.
_CLIMB_GAP = 0.25
# Gap at which any solution is good enough.
_ANY_GAP = 0.9

Layers = tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        gap: Relative gap to the bound over all splits that is good enough.
        deadline: When the time is up, on the monotonic clock.
        solver_gap: Relative gap at which the solver may stop within one split.
    """

    gap: float
    deadline: float
    solver_gap: float = 1e-4

    @property
    def left_s(self) -> float:
        """Seconds that are left; a little even afterwards, for a run that has begun."""
        return max(0.1, self.deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.deadline

    def judged(self, found: Solution, bound_nats: float) -> Solution:
        """What a search found, with the bound that covers all of it and how it ended."""
        return found.with_bound(bound_nats, self.gap, time_is_up=self.is_over)


def reachable_gap(problem: Problem, gap: float) -> float:
    """The gap that a search over splits goes for: at least 0.1 %.

    The bound covers splits that llama.cpp cannot make, so it can rarely be met exactly.
    """
    return max(gap, _SPLIT_GAP) if problem.machine.gpus else gap


def solve(
    problem: Problem,
    limits: Limits,
    splits: Sequence[Layers] = (),
    relaxed: Sequence[Bounds] | None = None,
    known: Solution | None = None,
) -> Solution | None:
    """Finds the split of the layers, the types and the places of least objective.

    How many of the first layers are in RAM and how the others are shared out is searched on bounds:
    the program without integers says in milliseconds how good a split can be. From several starts
    one boundary is moved at a time. The program with integers is then solved for splits in the
    order of their bounds, until none is left that could be better by more than the gap. So for each
    place of the output, in the order of their bounds too.

    Args:
        problem: Groups and budgets.
        limits: When to stop.
        splits: Splits to start from, beside those of `first_splits`.
        relaxed: What `bounds_over_splits` says, where it is known already.
        known: A solution of the problem, under harder limits and so perhaps not its best.

    Returns:
        The solution, or None where none was found.

    Raises:
        SolverError: The solver failed, or its answer breaks a constraint.
    """
    if not problem.machine.gpus:
        split = problem.with_layers(first_splits(problem)[0])
        found = solve_split(split, limits.solver_gap, limits.left_s)
        return found and limits.judged(found, found.bound_nats)
    best, bound_nats = known, float("inf")
    for bounds in bounds_over_splits(problem) if relaxed is None else relaxed:
        least = bounds.least_nats
        if best is None or (best.objective_nats * (1 - limits.gap) > least and not limits.is_over):
            best = _solve_with_output(bounds, limits, splits, best) or best
            least = max(least, best.bound_nats) if best else least
        bound_nats = min(bound_nats, least)
    return best and limits.judged(best, bound_nats)


def _solve_with_output(
    relaxed: Bounds, limits: Limits, splits: Sequence[Layers], known: Solution | None
) -> Solution | None:
    """The best solution with the output where it is; its bound is for these splits."""
    problem = relaxed.problem
    found = _Search(problem, limits, relaxed.least_nats, best=known)
    starts = [*(s for s in splits if found.may_have(s)), *first_splits(problem)]
    if len(problem.layer_gpus) > 1:
        guess, bound_nats = promising_split(relaxed, _GUESS_SHARE * limits.left_s)
        found.raise_bound(bound_nats)
        starts = [*([guess] if guess else []), *starts]
    found.climb(starts, relaxed.least_nats)
    if found.solve_in_order() is None:
        return None
    # From the cheapest proof to the dearest, until one closes the gap.
    for prove in (found.bound_by_regions, found.bound_with_integers):
        if found.is_closed or limits.is_over:
            break
        found.raise_bound(prove(relaxed))
    return found.answer


def in_faster_places(
    problem: Problem, found: Solution, least_gain: float, deadline: float
) -> Solution:
    """The solution with its types in faster places, with another split of the layers.

    Where nothing gives time a price, splits of the layers that lose alike are equal to the program.

    Args:
        problem: One whose objective is the loss.
        found: A solution of it.
        least_gain: Relative gain in speed that is worth a change.
        deadline: When to stop, on the monotonic clock.
    """
    goal, pairs = problem.goal, list(zip(problem.groups, found.choices, strict=True))
    if goal.max_turn_s is not None:  # nor may a turn become longer
        own_s = found.split(problem).turn.total_s(pairs)
        goal = replace(goal, max_turn_s=min(goal.max_turn_s, own_s * (1 + _PROGRESS)))
    groups = tuple(replace(group, options=(option,)) for group, (option, _) in pairs)
    settled = replace(problem, groups=groups, goal=replace(goal, best="speed"))
    known = checked(found.split(settled), found.choices)
    search = Limits(least_gain, deadline, least_gain / 2)
    fastest = solve(settled, search, [found.layer_devices], known=known)
    if fastest is None or fastest.decode_s > found.decode_s * (1 - least_gain):
        return found
    again = checked(fastest.split(problem), fastest.choices)
    return replace(again, status=found.status, bound_nats=found.bound_nats)


def any_solution(problem: Problem, deadline: float) -> Solution | None:
    """Some solution, however far from the best; None where none was found by the deadline."""
    cases = problem.by_output()
    if problem.machine.gpus:
        cases = tuple(bounds.problem for bounds in bounds_over_splits(problem))
    for split in (each.with_layers(layers) for each in cases for layers in first_splits(each)):
        bounds = split_bounds(split)
        for level in bounds.order[:1]:
            left_s = max(0.1, deadline - time.monotonic())
            found, _ = solve_level(bounds, level, _ANY_GAP, left_s)
            if found is not None:
                return found
        if time.monotonic() >= deadline:
            break
    return None


@dataclass
class _Search:
    """Splits whose bounds are known, and the best solution so far.

    Attributes:
        problem: Groups and budgets.
        limits: When to stop.
        bound_nats: A bound that covers every split.
        bounds: By split.
        best: The best solution.
        proven: Bounds that hold in integers, by split and level.
    """

    problem: Problem
    limits: Limits
    bound_nats: float
    bounds: dict[Layers, Bounds] = field(default_factory=dict)
    best: Solution | None = None
    proven: dict[tuple[Layers, int], float] = field(default_factory=dict)

    @property
    def answer(self) -> Solution | None:
        """The best solution with the bound over all splits."""
        return self.best and self.best.with_bound(self.bound_nats, self.limits.gap)

    @property
    def is_closed(self) -> bool:
        """Whether the best solution is proven to be within the gap."""
        return self.answer is not None and self.answer.is_closed

    def may_have(self, layers: Layers) -> bool:
        """Whether a split has layers only where they may be with the output where it is."""
        return set(layers) <= set(self.problem.layer_places)

    def raise_bound(self, nats: float) -> None:
        """Notes another bound that covers every split."""
        self.bound_nats = max(self.bound_nats, nats)

    def climb(self, starts: Sequence[Layers], floor_nats: float) -> None:
        """Looks at the starts, then moves one boundary of the best split at a time.

        It ends where the best split is as good as all of them, by a part of the gap.

        Args:
            starts: Splits to begin with.
            floor_nats: What no split's bound without integers is below.
        """
        best, until = None, time.monotonic() + _CLIMB_SHARE * self.limits.left_s
        good_enough = floor_nats * (1 + max(_PROGRESS, _CLIMB_GAP * self.limits.gap))
        for layers in starts:
            found = self._look_at(layers)
            if best is None or found.least_nats < best.least_nats:
                best = found
            if best.least_nats <= good_enough or time.monotonic() > until:
                return
        while best is not None and best.order and best.least_nats > good_enough:
            for layers in neighbours(self.problem, best.problem.layer_devices):
                if time.monotonic() > until:
                    return
                found = self._look_at(layers)
                if found.least_nats < best.least_nats * (1 - _PROGRESS):
                    best = found
                    break
            else:
                return

    def solve_in_order(self) -> Solution | None:
        """Solves splits in the order of their bounds while one may be better by the gap."""
        waiting = sorted(
            (
                (bounds.nats(level), layers, level)
                for layers, bounds in self.bounds.items()
                for level in bounds.order
                if (layers, level) not in self.proven
            ),
            key=lambda item: item[0],
        )
        for nats, layers, level in waiting:
            cutoff = None
            if self.best is not None:
                cutoff = self._enough
                if max(nats, self.bound_nats) > cutoff or self.limits.is_over:
                    break
            left_s = _SPLIT_SHARE * self.limits.left_s
            found, bound = solve_level(
                self.bounds[layers], level, self.limits.solver_gap, left_s, cutoff
            )
            self.proven[layers, level] = bound
            if found is not None and (cutoff is None or found.objective_nats < cutoff):
                self.best = found
        return self.best

    def bound_with_integers(self, relaxed: Bounds) -> float:
        """The relaxation's bound with integers, as far as it is raised in a part of the time."""
        if self.best is None:
            return 0.0
        left_s = _BOUND_SHARE * self.limits.left_s
        return raised_bound(relaxed, self.best.objective_nats, self.limits.gap, left_s)

    def bound_by_regions(self, relaxed: Bounds) -> float:
        """The least bound of all splits, from regions that are narrowed down where it is lowest.

        The bound of a region knows nothing of the order of layers. So the most promising split of
        the region with the lowest bound is looked at by itself, and solved where it may be better;
        what is left of the region is cut into smaller ones.
        """
        until = time.monotonic() + _REGIONS_SHARE * self.limits.left_s
        regions, numbers, least = RegionBounds(self.problem), itertools.count(), math.inf
        everywhere = regions.everywhere
        bounds = regions.bounds(everywhere, relaxed.order)
        waiting = [(bounds.least_nats, next(numbers), everywhere, bounds)]
        while waiting and waiting[0][0] < min(least, self._enough) and time.monotonic() < until:
            _, _, region, bounds = heapq.heappop(waiting)
            split = self._best_split(region) or regions.nearest_split(bounds)
            layers = devices_of(self.problem, split)
            self._look_at(layers)
            self.solve_in_order()
            least = min(least, self._proven_of(layers))
            levels = [level for level in bounds.order if bounds.nats(level) < self._enough]
            for part in region.without(split):
                found = regions.bounds(part, levels)
                heapq.heappush(waiting, (found.least_nats, next(numbers), part, found))
        return min(least, self._enough, *(nats for nats, *_ in waiting[:1]))

    @property
    def _enough(self) -> float:
        """The bound at which the gap is closed.

        To prove that nothing is better at all would take several times as long.
        """
        gap = max(self.limits.gap, _PROGRESS)
        return self.best.objective_nats * (1 - gap) if self.best else math.inf

    def _best_split(self, region: Region) -> Counts | None:
        """The split of the best solution, where it is in a region."""
        if self.best is None or not self.may_have(self.best.layer_devices):
            return None
        counts = layer_counts(self.problem, self.best.layer_devices)
        return counts if counts in region else None

    def _proven_of(self, layers: Layers) -> float:
        """The bound of a split, with integers where it was solved."""
        bounds = self._look_at(layers)
        levels = (self.proven.get((layers, i), bounds.nats(i)) for i in bounds.order)
        return min(levels, default=float("inf"))

    def _look_at(self, layers: Layers) -> Bounds:
        if layers not in self.bounds:
            self.bounds[layers] = split_bounds(self.problem.with_layers(layers))
        return self.bounds[layers]
