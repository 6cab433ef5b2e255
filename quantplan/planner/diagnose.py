"""Says what is in the way where there is no plan, and the smallest change of each kind."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantplan.errors import Change, NoPlanError
from quantplan.planner.changes import ROUGH, reachable_tps, smallest_changes
from quantplan.planner.goal import Goal
from quantplan.planner.problem import Problem
from quantplan.planner.search import any_solution, solve
from quantplan.planner.solution import Solution
from quantplan.units import gib
from quantplan.words import listed

# Share of the time for what is possible at all; the rest is for changes.
_POSSIBLE_SHARE = 0.25
_ENOUGH = "Any one of these changes is enough:"
_NONE_ENOUGH = "\nNo single change was found that is enough: change more than one thing."


@dataclass(frozen=True)
class _Limit:
    """One limit of a goal.

    Attributes:
        name: What it is on, in a word.
        clause: What it asks of a plan.
        alone: The goal without the others.
    """

    name: str
    clause: str
    alone: Goal


def no_plan(
    problem: Problem, time_limit_s: float, *, at_least_context: bool = False
) -> NoPlanError:
    """What is in the way, and the smallest change of each kind that removes it.

    Args:
        problem: One that has no solution.
        time_limit_s: Time for the search of changes, in seconds.
        at_least_context: Whether its context is what was chosen for want of a shorter one.
    """
    deadline = time.monotonic() + time_limit_s
    possible_by = time.monotonic() + _POSSIBLE_SHARE * time_limit_s
    context = f" The context of {problem.workload.context} tokens is the shortest that was tried."
    said = context if at_least_context else ""
    limits = _limits_of(problem.goal, problem.workload.context)
    if limits:
        fastest = solve(_unlimited(problem), replace(ROUGH, deadline=possible_by))
        if fastest is not None:
            message = _out_of_reach(problem, limits, fastest, possible_by)
            changes = smallest_changes(problem, deadline, fastest)
            advice = _advice(_ENOUGH, changes) or _NONE_ENOUGH
            return NoPlanError(message + said + advice, changes=changes)
    return _too_large(problem, limits, deadline, said)


def _unlimited(problem: Problem) -> Problem:
    return replace(problem, goal=Goal(best="speed"))


def _limits_of(goal: Goal, context: int) -> list[_Limit]:
    tps, turn_s, nats = goal.min_decode_tps, goal.max_turn_s, goal.max_loss_nats
    found = []
    if tps is not None:
        clause = f"decodes {tps:g} tokens/s with the context of {context} tokens full"
        found.append(_Limit("speed", clause, Goal(min_decode_tps=tps)))
    if turn_s is not None:
        clause = f"takes at most {turn_s:g} s for a turn"
        found.append(_Limit("turn", clause, Goal(max_turn_s=turn_s)))
    if nats is not None:
        clause = f"loses at most {nats:g} nats per token"
        found.append(_Limit("loss", clause, Goal(max_loss_nats=nats)))
    if goal.max_file_bytes is not None:
        clause = f"takes at most {gib(goal.max_file_bytes)} in the file"
        found.append(_Limit("size", clause, Goal(max_file_bytes=goal.max_file_bytes)))
    return found


def _advice(heading: str, changes: Sequence[Change]) -> str:
    lines = "".join(f"\n  - {change.text}" for change in changes)
    return f"\n{heading}{lines}" if lines else ""


def _out_of_reach(
    problem: Problem, limits: Sequence[_Limit], fastest: Solution, deadline: float
) -> str:
    """Something fits, but not within the limits of the goal: one of them, or all together."""
    message = f"no plan {listed([limit.clause for limit in limits])}"
    if len(limits) > 1:
        message += " at the same time"
    possible = reachable_tps(fastest)
    tps = problem.goal.min_decode_tps
    if tps is not None and tps > possible:
        fast = f"the fastest one that the policy allows reaches {possible:.2f} tokens/s"
        return f"{message}: {fast}."
    others = [replace(problem, goal=limit.alone) for limit in limits if limit.name != "speed"]
    if len(limits) > 1 and all(any_solution(other, deadline) for other in others):
        message += "; each of these alone can be had"
    return f"{message}."


def _too_large(
    problem: Problem, limits: Sequence[_Limit], deadline: float, said: str
) -> NoPlanError:
    """What the smallest allowed types need, against what the machine has."""
    weights = sum(group.options[-1].n_bytes for group in problem.groups)
    cache = sum(problem.cache_bytes)
    compute = sum(problem.compute_bytes(d) for d in problem.machine.devices)
    required = weights + cache + compute
    usable = sum(d.usable_bytes for d in problem.machine.devices)
    on_devices = ", ".join(f"{d.name} {gib(d.usable_bytes)}" for d in problem.machine.devices)
    workload = problem.workload
    named = f"the limit{'s' * (len(limits) > 1)} on {listed([limit.name for limit in limits])}"
    message = (
        f"no plan fits{f', even without {named}' if limits else ''}: weights at their smallest "
        f"allowed types ({gib(weights)}), the KV cache ({gib(cache)} at {workload.context} tokens, "
        f"{workload.kv_type_k}/{workload.kv_type_v}) and compute buffers ({gib(compute)}) need "
        f"{gib(required)}; usable are {gib(usable)} ({on_devices}, margins taken off).{said}"
    )
    if required <= usable:
        message += (
            " The total would do, but each device must hold its own compute buffer, and the last "
            "GPU the output matrix."
        )
    until = (time.monotonic() + deadline) / 2 if limits else deadline
    changes = smallest_changes(problem, until)
    message += _advice(_ENOUGH, changes)
    if limits and not changes:
        heading = f"Without {named} any one of these changes is enough:"
        message += _advice(heading, smallest_changes(_unlimited(problem), deadline))
    return NoPlanError(
        f"{message}\nOr choose a smaller model.",
        required_bytes=required,
        available_bytes=usable,
        changes=changes,
    )
