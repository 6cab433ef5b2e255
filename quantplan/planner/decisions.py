"""Decisions around the integer program: context, KV type, ubatch and number of GPUs left open."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from quantplan.costs.memory import CELL_PADDING
from quantplan.errors import SolverError
from quantplan.planner.bounds import Bounds, bounds_over_splits
from quantplan.planner.changes import least_loss
from quantplan.planner.context import least_context, longest_context, with_context
from quantplan.planner.diagnose import no_plan
from quantplan.planner.goal import Goal
from quantplan.planner.problem import Problem
from quantplan.planner.search import (
    Limits,
    any_solution,
    in_faster_places,
    reachable_gap,
    solve,
)
from quantplan.planner.solution import Solution, within_limits

# No loss of a quantized KV cache was measured for whole models, so the integer program cannot weigh
# it. F16 is kept unless Q8_0 makes the objective at least a tenth smaller, or is needed to fit.
_KV_TYPES = (("f16", 1.0), ("q8_0", 1 / 0.9))
# Small ubatches make prompts slow, which a goal about decoding does not see: each halving has to
# make the objective at least a hundredth smaller.
_UBATCHES = tuple((2048 >> n, 1.01**n) for n in range(5))
# Least time for saying what would have to change where there is no plan.
_DIAGNOSIS_S = 10.0
# Share of the time that is left that may go into finding the longest context.
_CONTEXT_SHARE = 0.5
# The same for faster places of the types; a gain that is worth others, about what runs scatter.
_HURRY_SHARE, _NOTICEABLE_GAIN = 0.2, 0.05


@dataclass(frozen=True)
class Open:
    """What is left to decide beside types and places.

    Attributes:
        context: Find the longest context with which the goal is reached.
        kv_type: Choose F16 or Q8_0 for the KV cache.
        ubatch: Choose the physical batch.
        n_gpus: Choose how many GPUs to use: the first so many.
    """

    context: bool = False
    kv_type: bool = False
    ubatch: bool = False
    n_gpus: bool = False


@dataclass(frozen=True)
class Variant:
    """One way to settle what is open.

    Attributes:
        problem: The problem with it.
        handicap: What its objective is multiplied by before variants are compared: above 1 for what
            harms in a way that the objective does not know.
    """

    problem: Problem
    handicap: float


def variants(problem: Problem, left_open: Open) -> Iterator[Variant]:
    """Every way to settle the KV type, the ubatch and the number of GPUs."""
    work, machine, goal = problem.workload, problem.machine, problem.goal
    is_float = work.flash_attention
    kv_types = _KV_TYPES if left_open.kv_type and is_float else (("", 1.0),)
    ubatches: tuple[tuple[int, float], ...] = ((work.ubatch, 1.0),)
    if left_open.ubatch:
        knows = goal.max_turn_s is not None
        ubatches = tuple((n, 1.0 if knows else handicap) for n, handicap in _UBATCHES)
    n_gpus = [len(machine.gpus)]
    if left_open.n_gpus and machine.gpus:
        n_gpus = list(range(1, len(machine.gpus) + 1))
    for (kv_type, a), (ubatch, b), n in product(kv_types, ubatches, n_gpus):
        changes: dict[str, object] = {"ubatch": ubatch, "batch": max(work.batch, ubatch)}
        if kv_type:
            changes |= {"kv_type_k": kv_type, "kv_type_v": kv_type}
        changed = replace(
            problem,
            workload=work.model_copy(update=changes),
            machine=machine.model_copy(update={"gpus": machine.gpus[:n]}),
        )
        home = (changed.output_device.name,) * changed.n_layers
        yield Variant(changed.with_layers(home), a * b)


def best_solution(
    problem: Problem,
    left_open: Open = Open(),
    *,
    gap: float,
    time_limit_s: float,
) -> tuple[Problem, Solution]:
    """Searches the decisions, the split of the layers, types and places of least objective.

    Args:
        problem: Groups and budgets.
        left_open: What is to be decided beside types and places.
        gap: Relative gap at which the search may stop.
        time_limit_s: Time for the whole search, in seconds.

    Returns:
        The problem as it was decided, and its solution, whose bound covers all variants.

    Raises:
        NoPlanError: Nothing fits, or the goal is out of reach.
        SolverError: Nothing was found in time.
    """
    good_enough = reachable_gap(problem, gap)
    # With GPUs, which split is best matters more than the last digits of one.
    solver_gap = good_enough / 2 if problem.machine.gpus else gap
    limits = Limits(good_enough, time.monotonic() + time_limit_s, solver_gap)
    candidates = list(variants(problem, left_open))
    if left_open.context:
        candidates = _at_longest_context(candidates, limits)
    found = _best_variant(candidates, limits)
    if found is None and not limits.is_over:
        found = _from_extremes(candidates, limits)
    if found is not None:
        return _hurried(*found, limits)
    if left_open.context:
        problem = with_context(problem, least_context(problem))
    # That no longest context was found in time does not say that there is no plan.
    until = time.monotonic() + _CONTEXT_SHARE * limits.left_s
    is_late = left_open.context and any_solution(problem, until) is not None
    if limits.is_over or is_late:
        raise SolverError(f"no plan was found within {time_limit_s:g} s; give it more time")
    raise no_plan(problem, max(_DIAGNOSIS_S, limits.left_s), at_least_context=left_open.context)


def _hurried(problem: Problem, found: Solution, limits: Limits) -> tuple[Problem, Solution]:
    """The solution in noticeably faster places, where nothing gives time a price."""
    if problem.goal.best == "quality" and not problem.goal.prices_time:
        anywhere = replace(problem, output=None)
        until = time.monotonic() + _HURRY_SHARE * limits.left_s
        found = in_faster_places(anywhere, found, _NOTICEABLE_GAIN, until)
    return found.split(problem), found


def _best_variant(candidates: list[Variant], limits: Limits) -> tuple[Problem, Solution] | None:
    """Solves variants in the order of their bounds while one may be better."""
    bounded: list[tuple[float, Variant, list[Bounds]]] = []
    for variant in candidates:
        relaxed = bounds_over_splits(variant.problem)
        if relaxed or not variant.problem.machine.gpus:
            least_nats = relaxed[0].least_nats if relaxed else float("inf")
            bounded.append((variant.handicap * least_nats, variant, relaxed))
    bounded.sort(key=lambda item: item[0])
    best: tuple[Variant, Solution] | None = None
    best_nats = proven = float("inf")
    for nats, variant, relaxed in bounded:
        if best is not None and (nats >= best_nats * (1 - limits.gap) or limits.is_over):
            proven = min(proven, nats)
            continue
        solution = solve(variant.problem, limits, relaxed=relaxed)
        if solution is None:
            continue
        proven = min(proven, variant.handicap * solution.bound_nats)
        if variant.handicap * solution.objective_nats < best_nats:
            best_nats, best = variant.handicap * solution.objective_nats, (variant, solution)
    if best is None:
        return None
    variant, solution = best
    solution = limits.judged(solution, proven / variant.handicap)
    return solution.split(variant.problem), solution


def _from_extremes(candidates: list[Variant], limits: Limits) -> tuple[Problem, Solution] | None:
    """Starts from any solution, or from the fastest and the least loss, where no split would do."""
    for problem in (variant.problem for variant in candidates):
        if problem.machine.gpus and not bounds_over_splits(problem):
            continue
        for start in filter(None, _extremes(problem, limits)):
            known = within_limits(problem, start)
            solution = solve(problem, limits, [start.layer_devices], known=known)
            if solution is not None:
                return solution.split(problem), solution
    return None


def _extremes(problem: Problem, limits: Limits) -> Iterator[Solution | None]:
    """Where to start from, the cheapest first; those of other goals may be beyond the limits."""
    yield any_solution(problem, limits.deadline)
    yield solve(replace(problem, goal=Goal(best="speed")), limits)
    if problem.goal.min_decode_tps is not None and problem.goal.at_best_speed.limits:
        yield solve(replace(problem, goal=problem.goal.at_best_speed), limits)
    if problem.goal.max_loss_nats is not None:
        yield least_loss(problem, limits)


def _at_longest_context(candidates: list[Variant], limits: Limits) -> list[Variant]:
    """The variants that reach the goal with the longest context, at that context.

    Larger ubatches and fewer GPUs make room for less, so that only what is needed is given up.
    """
    deadline = time.monotonic() + _CONTEXT_SHARE * limits.left_s
    longest = 0
    for variant in candidates:
        most = _most_context(variant.problem)
        if longest >= most:
            break
        if longest and not any_solution(
            with_context(variant.problem, longest + CELL_PADDING), deadline
        ):
            continue
        found = longest_context(variant.problem, most, deadline)
        longest = max(longest, found[0] if found else 0)
    if not longest:
        return []
    return [replace(v, problem=with_context(v.problem, longest)) for v in candidates]


def _most_context(problem: Problem) -> int:
    """The context that the model was trained for, for each slot with a cache of its own."""
    trained = problem.inventory.architecture.context_length or problem.workload.context
    return int(trained) * problem.workload.n_streams
