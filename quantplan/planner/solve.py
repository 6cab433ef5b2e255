"""Solves the program for one split of the layers."""

import math
import time

import pulp

from quantplan.planner.bounds import Bounds, split_bounds
from quantplan.planner.linear import Answer
from quantplan.planner.milp import add_cutoff, build_model
from quantplan.planner.model import Model, form_cohorts
from quantplan.planner.problem import Problem
from quantplan.planner.solution import Choice, Solution, checked


def solve_split(
    problem: Problem,
    gap: float,
    time_limit_s: float,
    cutoff_nats: float | None = None,
) -> Solution | None:
    """Solves a problem for its split of the layers; the bound is for this split.

    Args:
        problem: Groups, budgets and split.
        gap: Relative gap at which the solver may stop.
        time_limit_s: Time for each of the two runs, in seconds.
        cutoff_nats: Objective that the solution must not be above.

    Returns:
        None where there is no (such) solution, or none was found in time.
    """
    bounds, best, end = split_bounds(problem), None, time.monotonic() + time_limit_s
    bound = math.inf
    for level in bounds.order:
        if best is not None:
            cutoff_nats = best.objective_nats
        if cutoff_nats is not None and bounds.nats(level) >= cutoff_nats:
            bound = min(bound, bounds.nats(level))
            break
        left_s = max(0.1, end - time.monotonic())
        found, proven = solve_level(bounds, level, gap, left_s, cutoff_nats)
        bound = min(bound, proven)
        if found is not None and (best is None or found.objective_nats < best.objective_nats):
            best = found
    return best.with_bound(bound, gap) if best else None


def solve_level(
    bounds: Bounds, level: int, gap: float, time_limit_s: float, cutoff_nats: float | None = None
) -> tuple[Solution | None, float]:
    """Solves a split with the largest streamed tensor settled.

    Args:
        bounds: Those of the split.
        level: Index of the largest tensor that may be streamed.
        gap: Relative gap at which the solver may stop.
        time_limit_s: Time for each of the two runs, in seconds.
        cutoff_nats: Objective that the solution must not be above.

    Returns:
        The solution, or None where there is no (such) one or none was found in time; and the bound,
        or the cutoff where that is lower.
    """
    problem, model = bounds.problem, bounds.model
    if cutoff_nats is not None:
        model = build_model(problem)
        add_cutoff(model, cutoff_nats)
    answer = model.lp.solve(gap, time_limit_s, within=model.levels[level])
    least = max(model.in_nats(answer.bound), bounds.nats(level))
    if cutoff_nats is not None:
        least = min(least, cutoff_nats)
    if answer.ending != "solved":
        return None, least
    choices = _choices(model, answer)
    if problem.goal.best == "quality":
        choices = _fastest_places(problem, choices, gap, time_limit_s)
    solution = checked(problem, _in_layer_order(problem, choices))
    return solution.with_bound(least, gap), least


def _fastest_places(
    problem: Problem, choices: list[Choice], gap: float, time_limit_s: float
) -> list[Choice]:
    """The fastest placement of the types that were chosen."""
    model = build_model(problem, [(option,) for option, _ in choices])
    model.lp.minimise(model.decode_ms)
    answer = model.lp.solve(gap, time_limit_s)
    return _choices(model, answer) if answer.ending == "solved" else choices


def _choices(model: Model, answer: Answer) -> list[Choice]:
    """Option and device of each group; of groups with equal options, the first ones are on GPUs."""

    def count(variable: pulp.LpVariable) -> int:
        return round(answer.value(variable))

    places: dict[tuple[int, int], list[str]] = {}
    for k, shape in enumerate(model.shapes):
        for o, takers in enumerate(shape.takers):
            names = [[d.name] * count(model.x[k, o, d.name]) for d in shape.places]
            free = [name for equal in names for name in equal]
            for c, of_cohort in sorted(takers, key=lambda taker: model.cohorts[taker[0]].members):
                taken = count(model.t[c, of_cohort])
                places[c, of_cohort], free = free[:taken], free[taken:]
    choices: dict[int, Choice] = {}
    for c, cohort in enumerate(model.cohorts):
        chosen = [(o, name) for o in range(len(cohort.options)) for name in places[c, o]]
        for g, (o, name) in zip(cohort.members, chosen, strict=True):
            choices[g] = cohort.options[o], name
    return [choices[g] for g in range(len(model.problem.groups))]


def _in_layer_order(problem: Problem, choices: list[Choice]) -> list[Choice]:
    """Sorts the choices within each cohort: GPU before RAM, more bytes before fewer.

    The groups of a cohort cost the same whichever of them takes which choice. Runs of equal layers
    make short rules, and with the last rather than the first experts in RAM ik_llama.cpp was
    measured to prefill about 10 % faster.
    """
    ram = problem.machine.ram.name
    ordered = list(choices)
    for cohort in form_cohorts(problem):
        taken = [choices[g] for g in cohort.members]
        best_first = sorted(taken, key=lambda choice: (choice[1] == ram, -choice[0].n_bytes))
        for g, choice in zip(cohort.members, best_first, strict=True):
            ordered[g] = choice
    return ordered
