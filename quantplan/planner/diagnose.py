"""Says what is in the way where there is no plan, and the smallest change of each kind."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Literal

from quantplan.costs.memory import CELL_PADDING
from quantplan.costs.quality import kld_nats
from quantplan.errors import Change, NoPlanError
from quantplan.hardware.machine import Machine
from quantplan.planner.bounds import bounds_over_splits
from quantplan.planner.goal import Goal
from quantplan.planner.milp import build_relaxation
from quantplan.planner.model import Model
from quantplan.planner.problem import Problem
from quantplan.planner.search import Limits, any_solution, solve
from quantplan.planner.solution import Solution
from quantplan.qtypes import qtype
from quantplan.units import MIB, gib

# Memory is named in steps of a quarter of a GiB, times and losses in hundredths of themselves.
_MEMORY_STEP = 2**28
_TRIES = 5
# Share of the time for what is possible at all; the rest is for changes.
_POSSIBLE_SHARE = 0.25
# Gap at which the least loss, or the fastest plan, is known well enough.
_ROUGH = Limits(1e-3, math.inf, 5e-4)
ANY_TPS = 1e-6
"""A speed that everything reaches: to ask for it leaves time without a price."""
# How far a limit is above a loss at least, relatively and in nats, for the solver's tolerance.
_STEP, _STEP_NATS = 1e-5, 1e-6
# KV types to fall back to, from the one that harms least.
_KV_TYPES = ("f16", "q8_0", "q4_0")


def no_plan(problem: Problem, time_limit_s: float) -> NoPlanError:
    """What is in the way, and the smallest change of each kind that removes it.

    Args:
        problem: One that has no solution.
        time_limit_s: Time for the search of changes, in seconds.
    """
    deadline = time.monotonic() + time_limit_s
    unlimited = None
    if problem.goal.limits:
        search = replace(_ROUGH, deadline=time.monotonic() + _POSSIBLE_SHARE * time_limit_s)
        unlimited = solve(replace(problem, goal=Goal(best="speed")), search)
    changes = smallest_changes(problem, deadline)
    advice = "".join(f"\n  - {change.text}" for change in changes)
    if advice:
        advice = "\nAny one of these changes is enough:" + advice
    if unlimited is None:
        return _too_large(problem, advice, changes)
    return _out_of_reach(problem, unlimited, advice, changes)


def _out_of_reach(
    problem: Problem, fastest: Solution, advice: str, changes: tuple[Change, ...]
) -> NoPlanError:
    """Something fits, but not within the limits of the goal."""
    goal, wanted = problem.goal, []
    if goal.min_decode_tps is not None:
        # Rounded down, and a little below, so that the speed named can be asked for.
        possible = math.floor(0.9999 / fastest.decode_s * 100) / 100
        wanted.append(
            f"decodes {goal.min_decode_tps:g} tokens/s with the context full: the fastest one that "
            f"the policy allows reaches {possible:.2f} tokens/s"
        )
    if goal.max_turn_s is not None:
        wanted.append(f"takes at most {goal.max_turn_s:g} s for a turn")
    if goal.max_loss_nats is not None:
        wanted.append(f"loses at most {goal.max_loss_nats:g} nats per token")
    if goal.max_file_bytes is not None:
        wanted.append(f"takes at most {gib(goal.max_file_bytes)} in the file")
    return NoPlanError(f"no plan {' and '.join(wanted)}.{advice}", changes=changes)


def _too_large(problem: Problem, advice: str, changes: tuple[Change, ...]) -> NoPlanError:
    """What the smallest allowed types need, against what the machine has."""
    weights = sum(group.options[-1].n_bytes for group in problem.groups)
    cache = sum(problem.cache_bytes)
    compute = sum(problem.compute_bytes(d) for d in problem.machine.devices)
    required = weights + cache + compute
    usable = sum(d.usable_bytes for d in problem.machine.devices)
    on_devices = ", ".join(f"{d.name} {gib(d.usable_bytes)}" for d in problem.machine.devices)
    workload = problem.workload
    message = (
        f"no plan fits: weights at their smallest allowed types ({gib(weights)}), the KV cache "
        f"({gib(cache)} at {workload.context} tokens, {workload.kv_type_k}/{workload.kv_type_v}) "
        f"and compute buffers ({gib(compute)}) need {gib(required)}; usable are {gib(usable)} "
        f"({on_devices}, margins taken off)."
    )
    if required <= usable:
        message += (
            " The total would do, but each device must hold its own compute buffer, and the last "
            "GPU the output matrix."
        )
    advice += "\nOr choose a smaller model."
    return NoPlanError(
        message + advice, required_bytes=required, available_bytes=usable, changes=changes
    )


def smallest_changes(problem: Problem, deadline: float) -> tuple[Change, ...]:
    """The smallest change of each kind, alone, with which there is a solution.

    How much is missing follows from the program with a limit that may be exceeded, whose excess is
    minimised; contexts are bisected. Each change is confirmed by a solution.
    """
    goal = problem.goal
    finders: list[Callable[[Problem, float], list[Change]]] = []
    if goal.min_decode_tps is not None:
        finders.append(partial(_limit, "speed", goal.min_decode_tps))
    if goal.max_turn_s is not None:
        finders.append(partial(_limit, "turn", goal.max_turn_s))
    if goal.max_loss_nats is not None:
        finders.append(_loss)
    if goal.max_file_bytes is not None:
        finders.append(partial(_limit, "size", goal.max_file_bytes))
    finders += [_kv_type, _context, _memory, _floor]
    found: list[Change] = []
    for n, finder in enumerate(finders):
        # None may use up the time of those after it; the first, about what was asked, get most.
        left_s = deadline - time.monotonic()
        if left_s > 0:
            found += finder(problem, time.monotonic() + 2 * left_s / (len(finders) - n + 1))
    return tuple(found)


def _least_excess(problem: Problem, rows: Callable[[Model], list[str]]) -> float:
    """Least amount by which rows have to be exceeded, in their unit; infinite where none helps."""
    least = math.inf
    for case in problem.by_output():
        model = build_relaxation(case)
        extra = model.lp.loosen(rows(model))
        model.lp.minimise({extra: 1.0})
        least = min(least, *(answer.objective for answer in model.lp.relax(model.levels)))
    return least


def _first_solvable(
    values: Iterable[float], changed: Callable[[float], Problem], deadline: float
) -> float | None:
    """The first of some values with which there is a solution."""
    for value in values:
        if time.monotonic() >= deadline:
            return None
        if any_solution(changed(value), deadline):
            return value
    return None


def _limit(kind: str, limit: float, problem: Problem, deadline: float) -> list[Change]:
    """Less speed, a longer turn, or a larger file than was asked for."""
    excess = _least_excess(problem, lambda _: [kind])
    if not math.isfinite(excess):
        return []
    reached, sign = _limit_reached(kind, limit, excess)
    tries = (reached * (1 + sign * 0.0001 * 4**n) for n in range(_TRIES))
    value = _first_solvable(tries, partial(_with_limit, problem, kind), deadline)
    return [] if value is None else [_limit_change(kind, value)]


def _loss(problem: Problem, deadline: float) -> list[Change]:
    """The least loss within the other limits.

    It is solved for, not sought from what the relaxation reaches, which may be far below.
    """
    least = least_loss(problem, replace(_ROUGH, deadline=deadline))
    if least is None:
        return []
    # A little above, and rounded up, so that the loss named can be asked for.
    value = _rounded_up(kld_nats(least.loss_nats) * (1 + _STEP) + _STEP_NATS)
    return [Change("loss", float(value), f"Allow a loss of {value} nats per token")]


def _rounded_up(value: float) -> str:
    """A number above 0, rounded up to three significant digits."""
    places = max(0, 2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**places) / 10**places:.{places}f}"


def least_loss(problem: Problem, limits: Limits) -> Solution | None:
    """The solution of least loss within all limits but that on the loss, whatever time costs."""
    speed = problem.goal.min_decode_tps or ANY_TPS
    goal = replace(problem.goal, best="quality", min_decode_tps=speed, max_loss_nats=None)
    return solve(replace(problem, goal=goal), limits)


def _limit_reached(kind: str, limit: float, excess: float) -> tuple[float, float]:
    """The limit that the relaxation reaches, and the direction in which it becomes easier."""
    if kind == "speed":
        return 1 / (1 / limit + excess / 1000), -1.0
    if kind == "turn":
        return limit + excess / 1000, 1.0
    return limit + excess * MIB, 1.0


def _with_limit(problem: Problem, kind: str, value: float) -> Problem:
    goal = problem.goal
    if kind == "speed":
        goal = replace(goal, min_decode_tps=value)
    elif kind == "turn":
        goal = replace(goal, max_turn_s=value)
    else:
        goal = replace(goal, max_file_bytes=int(value))
    return replace(problem, goal=goal)


def _limit_change(kind: str, value: float) -> Change:
    if kind == "speed":
        value = math.floor(value * 100) / 100
        return Change("speed", value, f"Lower the speed to {value:.2f} tokens/s")
    if kind == "turn":
        value = math.ceil(value * 10) / 10
        return Change("turn", value, f"Allow {value:.1f} s for a turn")
    return Change("size", int(value), f"Allow {gib(int(value))} for the file")


def _memory(problem: Problem, deadline: float) -> list[Change]:
    """More RAM; more memory on every GPU alike."""

    def of_ram(model: Model) -> list[str]:
        return [f"memory_{len(model.pools) - 1}"]

    def of_gpus(model: Model) -> list[str]:
        return [f"memory_{p}" for p in range(len(model.pools) - 1)]

    kinds: dict[Literal["ram", "vram"], Callable[[Model], list[str]]] = {"ram": of_ram}
    if problem.machine.gpus:
        kinds["vram"] = of_gpus
    found = []
    for kind, rows in kinds.items():
        excess = _least_excess(problem, rows) * MIB
        if not math.isfinite(excess):
            continue
        first = max(1, math.ceil(excess / _MEMORY_STEP))
        steps = (float((first + extra) * _MEMORY_STEP) for extra in (0, 1, 2, 4, 8, 16, 32))
        more = _first_solvable(steps, partial(_with_memory, problem, kind), deadline)
        if more is not None:
            found.append(_memory_change(problem.machine, kind, int(more)))
    return found


def _memory_change(machine: Machine, kind: Literal["ram", "vram"], more: int) -> Change:
    devices = (machine.ram,) if kind == "ram" else machine.gpus
    total = sum(device.capacity_bytes for device in devices) + more
    share = ", shared by all GPUs" if len(devices) > 1 else ""
    text = f"Add {gib(more)} of {kind.upper()}{share} ({gib(total)} in all)"
    return Change(kind, total, text)


def _with_memory(problem: Problem, kind: Literal["ram", "vram"], more: float) -> Problem:
    machine = problem.machine
    devices = (machine.ram,) if kind == "ram" else machine.gpus
    each = math.ceil(more / len(devices))
    grown = tuple(device.with_more(each) for device in devices)
    changes: dict[str, object] = {"ram": grown[0]} if kind == "ram" else {"gpus": grown}
    return replace(problem, machine=machine.model_copy(update=changes))


def with_context(problem: Problem, context: int) -> Problem:
    """The problem with another context."""
    workload = problem.workload.model_copy(update={"context": context})
    return replace(problem, workload=workload)


def longest_context(problem: Problem, most: int, deadline: float) -> tuple[int, int] | None:
    """The longest context, in steps of whole cells (256), with which there is a solution.

    A relaxation says how long it can be at most; from there solutions are looked for at ever
    shorter contexts.

    Args:
        problem: Groups, budgets and goal.
        most: Longest context that is wanted.
        deadline: When the time is up, on the monotonic clock.

    Returns:
        The longest that was found, and the one that no context is above; None where none is.
    """
    low, high = 0, max(1, most // CELL_PADDING)
    while low < high:
        middle = (low + high + 1) // 2
        fits = bool(bounds_over_splits(with_context(problem, middle * CELL_PADDING)))
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        return None
    bound, fits_at, fails_at, step = low, 0, low + 1, 1
    while fits_at + 1 < fails_at and time.monotonic() < deadline:
        at = max(fits_at + 1, fails_at - step) if not fits_at else (fits_at + fails_at) // 2
        if any_solution(with_context(problem, at * CELL_PADDING), deadline):
            fits_at = at
        else:
            fails_at, step = at, 2 * step
        if fails_at <= 1:
            return None
    return (fits_at * CELL_PADDING, bound * CELL_PADDING) if fits_at else None


def _context(problem: Problem, deadline: float) -> list[Change]:
    wanted = problem.workload.context
    found = longest_context(problem, wanted - 1, deadline) if wanted > CELL_PADDING else None
    if found is None or found[0] >= wanted:
        return []
    return [Change("context", found[0], f"Lower the context to {found[0]} tokens")]


def _kv_type(problem: Problem, deadline: float) -> list[Change]:
    work = problem.workload
    if not work.flash_attention:
        return []
    has = min(qtype(work.kv_type_k).bpw, qtype(work.kv_type_v).bpw)
    for name in _KV_TYPES:
        if qtype(name).bpw < has and time.monotonic() < deadline:
            smaller = work.model_copy(update={"kv_type_k": name, "kv_type_v": name})
            if any_solution(replace(problem, workload=smaller), deadline):
                return [Change("kv_type", name, f"Store the KV cache in {name}")]
    return []


def _floor(problem: Problem, deadline: float) -> list[Change]:
    """The highest floor for all classes with which there is a solution."""
    policy = problem.policy
    floors = {rule.floor for rule in policy.rules if rule.floor}
    if not floors:
        return []
    highest = max(qtype(floor).bpw for floor in floors)
    names = [n for n in policy.candidates if n != "SOURCE" and qtype(n).bpw < highest]
    names.sort(key=lambda name: -qtype(name).bpw)

    def lowered(name: str) -> Problem:
        rules = tuple(
            rule.model_copy(update={"floor": name})
            if rule.floor and qtype(rule.floor).bpw > qtype(name).bpw
            else rule
            for rule in policy.rules
        )
        return problem.with_policy(policy.model_copy(update={"rules": rules}))

    # The lowest floor first: mostly none is low enough.
    if not names or not any_solution(lowered(names[-1]), deadline):
        return []
    for name in names:
        if name == names[-1] or any_solution(lowered(name), deadline):
            return [Change("floor", name, f"Lower the policy's floors to {name}")]
    return []
