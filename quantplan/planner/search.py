"""Searches over splits of the layers, against a bound that covers all of them."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from quantplan.errors import SolverError
from quantplan.planner.diagnose import too_large, too_slow
from quantplan.planner.problem import Problem
from quantplan.planner.solve import (
    Solution,
    bound_over_splits,
    fastest_decode_s,
    solve_split,
    with_bound,
)
from quantplan.planner.split import first_splits, neighbours

# Relative gap at which the search over splits of several GPUs may stop.
_SPLIT_GAP = 1e-3
# Relative improvement that is worth another step of that search.
_PROGRESS = 1e-6
# Share of the time that may go into the bound.
_BOUND_SHARE = 0.3

_Found = TypeVar("_Found")


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


def reachable_gap(problem: Problem, gap: float) -> float:
    """The gap that a search over splits goes for: at least 0.1 %.

    The bound covers splits that llama.cpp cannot make, so it can rarely be met exactly.
    """
    return max(gap, _SPLIT_GAP) if problem.machine.gpus else gap


def best_solution(problem: Problem, *, gap: float, time_limit_s: float) -> tuple[Problem, Solution]:
    """Searches the split of the layers, types and places of least objective.

    Args:
        problem: Groups and budgets.
        gap: Relative gap at which the search may stop.
        time_limit_s: Time for the whole search, in seconds.

    Returns:
        The problem with the layers where they are, and its solution.

    Raises:
        NoPlanError: Nothing fits, or the speed asked for is out of reach.
        SolverError: Nothing was found in time.
    """
    good_enough = reachable_gap(problem, gap)
    # With several GPUs, which split is best matters more than the last digits of one.
    solver_gap = good_enough / 2 if len(problem.machine.gpus) > 1 else gap
    limits = Limits(good_enough, time.monotonic() + time_limit_s, solver_gap)
    target = problem.min_decode_tps
    solution = solve(problem, limits)
    fastest = None if solution else fastest_split(problem, limits)
    if fastest and target is not None and fastest[1] * target <= 1:
        # The first splits are too slow, but one that is fast enough is not far from them.
        solution = solve(problem, limits, [fastest[0]])
    if solution is not None:
        return problem.with_layers(solution.layer_devices), solution
    if limits.is_over:
        raise SolverError(f"no plan was found within {time_limit_s:g} s; give it more time")
    if fastest is None:
        raise too_large(problem)
    if target is None:
        raise SolverError("the search missed a plan that exists; please report this")
    raise too_slow(target, 1 / fastest[1])


def solve(
    problem: Problem, limits: Limits, splits: Sequence[tuple[str, ...]] = ()
) -> Solution | None:
    """Finds the types and places of least loss, then the fastest placement of those types.

    Without a speed target time has a price (the policy's nats per second), so that no bytes are
    spent on quality that nobody can tell. How many of the first layers are in RAM and how the
    others are shared out is searched: from several starts, one boundary at a time, until the answer
    is within the gap of a bound that covers every split, or no neighbour is better.

    Args:
        problem: Groups and budgets.
        limits: When to stop.
        splits: Splits to start from; by default those of `first_splits`.

    Returns:
        The solution, or None where none was found.

    Raises:
        SolverError: The solver failed, or its answer breaks a constraint.
    """
    if not problem.machine.gpus:
        split = problem.with_layers(first_splits(problem)[0])
        return solve_split(split, limits.solver_gap, limits.left_s)
    bound = bound_over_splits(problem, limits.gap / 10, _BOUND_SHARE * limits.left_s)
    if bound is None:
        return None

    def evaluate(split: Problem, best: Solution | None) -> Solution | None:
        cutoff = best.objective_nats * (1 - _PROGRESS) if best else None
        return solve_split(split, limits.solver_gap, limits.left_s, cutoff)

    best = _climb(
        problem,
        limits,
        splits or first_splits(problem),
        evaluate=evaluate,
        cost=lambda found: found.objective_nats,
        good_enough=bound / (1 - limits.gap),
    )
    return with_bound(best[1], bound, limits.gap) if best else None


def fastest_split(problem: Problem, limits: Limits) -> tuple[tuple[str, ...], float] | None:
    """The split of the layers, and its seconds per token, that decodes fastest within memory.

    Returns:
        None where no split fits.
    """
    target = problem.min_decode_tps
    best = _climb(
        replace(problem, min_decode_tps=None),
        limits,
        first_splits(problem),
        evaluate=lambda split, _: fastest_decode_s(split, _SPLIT_GAP, limits.left_s),
        cost=lambda seconds: seconds,
        good_enough=(1 - _SPLIT_GAP) / target if target else float("inf"),
    )
    return (best[0].layer_devices, best[1]) if best else None


def _climb(
    problem: Problem,
    limits: Limits,
    starts: Sequence[tuple[str, ...]],
    *,
    evaluate: Callable[[Problem, _Found | None], _Found | None],
    cost: Callable[[_Found], float],
    good_enough: float,
) -> tuple[Problem, _Found] | None:
    """Improves the best start one boundary at a time.

    Args:
        problem: The groups.
        limits: When to stop.
        starts: Splits to start from.
        evaluate: What a split is worth, given the best so far; None where it is impossible or no
            better.
        cost: The number to bring down.
        good_enough: Cost at which to stop.
    """
    best: tuple[Problem, _Found] | None = None
    tried: set[tuple[str, ...]] = set()
    candidates: Iterable[tuple[str, ...]] = starts
    while True:
        improved = False
        for layers in candidates:
            if layers in tried or (best and limits.is_over):
                continue
            tried.add(layers)
            split = problem.with_layers(layers)
            found = evaluate(split, best[1] if best else None)
            if found is None or (best and cost(found) >= cost(best[1]) * (1 - _PROGRESS)):
                continue
            best, improved = (split, found), True
            if cost(found) <= good_enough:
                return best
            if candidates is not starts:
                break
        if best is None or not improved:
            return best
        candidates = neighbours(problem, best[0].layer_devices)
