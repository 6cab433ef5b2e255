"""The context as what is looked for: the longest one with which there is a solution."""

import time
from dataclasses import replace

from quantplan.costs.memory import CELL_PADDING, pad
from quantplan.planner.bounds import bounds_over_splits
from quantplan.planner.problem import Problem
from quantplan.planner.search import any_solution

# Share of the time that is left for one context: of one that is just too long it takes longest to
# find that nothing fits, and shorter ones have to be tried too.
_TRY_SHARE = 0.25


def with_context(problem: Problem, context: int) -> Problem:
    """The problem with another context."""
    workload = problem.workload.model_copy(update={"context": context})
    return replace(problem, workload=workload)


def least_context(problem: Problem) -> int:
    """The shortest context that is worth a plan: a step of cells, or all of a limited turn."""
    work, has_turn = problem.workload, problem.goal.max_turn_s is not None
    return pad(work.prompt_tokens + work.answer_tokens if has_turn else 1, CELL_PADDING)


def longest_context(problem: Problem, most: int, deadline: float) -> tuple[int, int] | None:
    """The longest context, in steps of whole cells (256), with which there is a solution.

    It is at least as long as a turn whose time is limited.

    A relaxation says how long it can be at most; from there solutions are looked for at ever
    shorter contexts.

    Args:
        problem: Groups, budgets and goal.
        most: Longest context that is wanted.
        deadline: When the time is up, on the monotonic clock.

    Returns:
        The longest that was found, and the one that no context is above; None where none is.
    """
    least = least_context(problem) // CELL_PADDING
    low, high = least - 1, max(least, most // CELL_PADDING)
    while low < high:
        middle = (low + high + 1) // 2
        fits = bool(bounds_over_splits(with_context(problem, middle * CELL_PADDING)))
        low, high = (middle, high) if fits else (low, middle - 1)
    if low < least:
        return None
    bound, fits_at, fails_at, step = low, least - 1, low + 1, 1
    while fits_at + 1 < fails_at and time.monotonic() < deadline:
        at = (fits_at + fails_at) // 2
        if fits_at < least:
            at = max(least, fails_at - step)
        now = time.monotonic()
        until = now + _TRY_SHARE * (deadline - now)
        if any_solution(with_context(problem, at * CELL_PADDING), until):
            fits_at = at
        else:
            fails_at, step = at, 2 * step
        if fails_at <= least:
            return None
    return (fits_at * CELL_PADDING, bound * CELL_PADDING) if fits_at >= least else None
