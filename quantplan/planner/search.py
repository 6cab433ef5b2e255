"""Searches over splits of the layers, from as many of them on the GPUs as fit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from quantplan.planner.diagnose import too_large, too_slow
from quantplan.planner.problem import Problem
from quantplan.planner.solve import (
    Solution,
    fastest_decode_s,
    pooled_bound,
    solve_split,
    with_bound,
)
from quantplan.planner.split import first_splits, least_layer_bytes, neighbours

# Relative gap at which the search over splits of the layers may stop.
_SPLIT_GAP = 1e-3
# Relative improvement that is worth another step of that search.
_PROGRESS = 1e-6

_Found = TypeVar("_Found")


def best_solution(problem: Problem, *, gap: float, time_limit_s: float) -> tuple[Problem, Solution]:
    """Solves with every layer on the GPUs, or with as few of the first layers in RAM as fit.

    Args:
        problem: Groups and budgets.
        gap: Relative gap at which the solver may stop.
        time_limit_s: Time for each run of the solver, in seconds.

    Returns:
        The problem with the layers where they are, and its solution.

    Raises:
        NoPlanError: Nothing fits, or the speed asked for is out of reach.
    """
    for n_cpu_layers in _layer_counts(problem):
        splits = first_splits(problem, n_cpu_layers)
        solution = solve(problem, splits=splits, gap=gap, time_limit_s=time_limit_s)
        if solution is None and problem.min_decode_tps is not None:
            fastest = fastest_split(problem, splits)
            if fastest is not None:
                if fastest[1] * problem.min_decode_tps > 1:
                    raise too_slow(problem.min_decode_tps, 1 / fastest[1])
                solution = solve(problem, splits=[fastest[0]], gap=gap, time_limit_s=time_limit_s)
        if solution is not None:
            return problem.with_layers(solution.layer_devices), solution
    raise too_large(problem)


def _layer_counts(problem: Problem) -> range:
    """Numbers of layers in RAM to try, from the least that arithmetic allows."""
    if not problem.machine.gpus:
        return range(problem.n_layers, problem.n_layers + 1)
    room = sum(gpu.usable_bytes - problem.compute_bytes(gpu, 0) for gpu in problem.machine.gpus)
    layers = least_layer_bytes(problem)
    n_cpu = 0
    while n_cpu < len(layers) and sum(layers[n_cpu:]) > room:
        n_cpu += 1
    return range(n_cpu, problem.n_layers + 1)


def solve(
    problem: Problem,
    *,
    splits: Sequence[tuple[str, ...]] = (),
    gap: float = 1e-4,
    time_limit_s: float = 60.0,
) -> Solution | None:
    """Finds the types and places of least loss, then the fastest placement of those types.

    Without a speed target time has a price (the policy's nats per second), so that no bytes are
    spent on quality that nobody can tell. With several GPUs the best of the given splits of the
    layers is improved one boundary at a time, until it is within the gap of the bound that pooled
    GPUs give or no neighbour is better.

    Args:
        problem: Groups and budgets.
        splits: Splits of the layers to start from, with equally many layers in RAM; by default the
            problem's own.
        gap: Relative gap at which the search may stop; with several GPUs at least 0.1 %.
        time_limit_s: Time for each run of the solver, in seconds.

    Returns:
        The solution, or None where the solver proved that there is none for these splits.

    Raises:
        SolverError: The solver found nothing in time, or its answer breaks a constraint.
    """
    starts = splits or (problem.layer_devices,)
    if len(problem.machine.gpus) < 2:
        return solve_split(problem.with_layers(starts[0]), gap, time_limit_s)
    # Which split is best matters more than the last digits of one.
    gap = max(gap, _SPLIT_GAP)
    pooled = pooled_bound(problem.with_layers(starts[0]), gap / 10, time_limit_s)
    if pooled is None:
        return None
    good_enough = pooled / (1 - gap)
    best = _climb(
        problem,
        starts,
        lambda split: solve_split(split, gap / 2, time_limit_s, good_enough),
        lambda found: found.objective_nats,
        good_enough,
    )
    return with_bound(best[1], pooled, gap) if best else None


def fastest_split(
    problem: Problem, splits: Sequence[tuple[str, ...]], *, time_limit_s: float = 60.0
) -> tuple[tuple[str, ...], float] | None:
    """The split of the layers, and its seconds per token, that decodes fastest within memory.

    Args:
        problem: Groups and budgets; a speed target plays no part.
        splits: Splits to start from; their neighbours are tried while that helps.
        time_limit_s: Time for each run of the solver, in seconds.

    Returns:
        None where no split fits.
    """
    best = _climb(
        replace(problem, min_decode_tps=None),
        splits,
        lambda split: fastest_decode_s(split, _SPLIT_GAP, time_limit_s),
        lambda seconds: seconds,
        0.0,
    )
    return (best[0].layer_devices, best[1]) if best else None


def _climb(
    problem: Problem,
    starts: Sequence[tuple[str, ...]],
    evaluate: Callable[[Problem], _Found | None],
    cost: Callable[[_Found], float],
    good_enough: float,
) -> tuple[Problem, _Found] | None:
    """Improves the best start one boundary at a time.

    Args:
        problem: The groups.
        starts: Splits to start from.
        evaluate: What a split is worth; None where it is impossible.
        cost: The number to bring down.
        good_enough: Cost at which to stop.
    """
    best: tuple[Problem, _Found] | None = None
    tried: set[tuple[str, ...]] = set()
    candidates: Iterable[tuple[str, ...]] = starts
    while True:
        improved = False
        for layers in candidates:
            if layers in tried:
                continue
            tried.add(layers)
            split = problem.with_layers(layers)
            found = evaluate(split)
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
