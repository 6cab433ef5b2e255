"""The smallest change of each kind with which there is a plan."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

from quantplan.costs.quality import kld_nats, type_errors
from quantplan.errors import Change
from quantplan.hardware.machine import Machine
from quantplan.inventory.roles import EXPERT_CLASSES
from quantplan.planner.context import least_context, longest_context
from quantplan.planner.milp import build_relaxation
from quantplan.planner.model import Model
from quantplan.planner.problem import Problem
from quantplan.planner.search import Limits, any_solution, solve
from quantplan.planner.solution import Solution, within_limits
from quantplan.policy import SOURCE, Policy
from quantplan.qtypes import qtype
from quantplan.units import MIB, gib

# Memory is named in steps of a quarter of a GiB, times and losses in hundredths of themselves.
_MEMORY_STEP = 2**28
_TRIES = 6
# Gap at which the least loss, or the fastest plan, is known well enough.
ROUGH = Limits(1e-3, math.inf, 5e-4)
ANY_TPS = 1e-6
"""A speed that everything reaches: to ask for it leaves time without a price."""
# How far a limit is above a loss at least, relatively and in nats, for the solver's tolerance.
_STEP, _STEP_NATS = 1e-5, 1e-6
# KV types to fall back to, from the one that harms least.
_KV_TYPES = ("f16", "q8_0", "q4_0")

_Value = TypeVar("_Value")


def smallest_changes(
    problem: Problem, deadline: float, fastest: Solution | None = None
) -> tuple[Change, ...]:
    """The smallest change of each kind, alone, with which there is a solution.

    How much is missing follows from the program with a limit that may be exceeded, whose excess is
    minimised; contexts are bisected. Each change is confirmed by a solution.

    Args:
        problem: One that has no solution.
        deadline: When the time is up, on the monotonic clock.
        fastest: The fastest solution without any limit, where it is known.
    """
    goal = problem.goal
    finders: list[Callable[[Problem, float], list[Change]]] = []
    if goal.min_decode_tps is not None:
        finders.append(partial(_speed, fastest))
    if goal.max_turn_s is not None:
        finders.append(partial(_limit, "turn", goal.max_turn_s))
    if goal.max_loss_nats is not None:
        finders.append(partial(_loss, fastest))
    if goal.max_file_bytes is not None:
        finders.append(partial(_limit, "size", goal.max_file_bytes))
    n_asked = len(finders)
    finders += [_kv_type, _context, _types]
    if any(gpu.shares_ram for gpu in problem.machine.gpus):
        finders.append(_gpu_part)
    finders.append(partial(_memory, "ram"))
    if problem.machine.gpus:
        finders += [partial(_memory, "vram"), _without_gpus]
    finders.append(_floor)
    # Where nothing is found, changes of what was asked have the time that the others left.
    return _found_by(finders, problem, deadline) or _found_by(finders[:n_asked], problem, deadline)


def _found_by(
    finders: Sequence[Callable[[Problem, float], list[Change]]], problem: Problem, deadline: float
) -> tuple[Change, ...]:
    found: list[Change] = []
    for n, finder in enumerate(finders):
        # None may use up the time of those after it; the first, about what was asked, get most.
        left_s = deadline - time.monotonic()
        if left_s > 0:
            found += finder(problem, time.monotonic() + 2 * left_s / (len(finders) - n + 1))
    return tuple(found)


def _least_excess(problem: Problem, rows: Callable[[Model], Mapping[str, float]]) -> float:
    """Least amount by which rows have to be exceeded, in their unit; infinite where none helps.

    Args:
        problem: Groups, budgets and limits.
        rows: How many times the amount each row is raised by; below 0 where it is lowered.
    """
    least = math.inf
    for case in problem.by_output():
        model = build_relaxation(case)
        extra = model.lp.loosen(rows(model))
        model.lp.minimise({extra: 1.0})
        answers = map(model.lp.relaxation(), model.levels)
        least = min(least, *(answer.objective for answer in answers))
    return least


def _smallest(
    values: Sequence[_Value], changed: Callable[[_Value], Problem], deadline: float
) -> _Value | None:
    """The first of some values, each a larger change than the one before, that is found to do.

    A change that is just too small can take the solver longest, so none has all the time that is
    left: where the first does not do, the last is tried, and then those in between by halves.
    """

    def does(value: _Value, share: float) -> bool:
        now = time.monotonic()
        return any_solution(changed(value), now + share * max(0.0, deadline - now)) is not None

    if not values:
        return None
    if does(values[0], 1 / 3):
        return values[0]
    fails_at, does_at = 0, len(values) - 1
    if does_at == 0 or not does(values[does_at], 1 / 2):
        return None
    while does_at - fails_at > 1 and time.monotonic() < deadline:
        middle = (fails_at + does_at) // 2
        if does(values[middle], 1 / 2):
            does_at = middle
        else:
            fails_at = middle
    return values[does_at]


def reachable_tps(fastest: Solution) -> float:
    """The speed of a solution as it is named: rounded down, and a little below.

    So it can be asked for, and reached.
    """
    return math.floor(0.9999 / fastest.decode_s * 100) / 100


def _speed(fastest: Solution | None, problem: Problem, deadline: float) -> list[Change]:
    """The fastest solution within the other limits.

    It is solved for, not sought from what the relaxation reaches, which may be far above.
    """
    goal = problem.goal.at_best_speed
    if fastest is None or goal.limits:
        fastest = solve(replace(problem, goal=goal), replace(ROUGH, deadline=deadline))
    if fastest is None:
        return []
    value = reachable_tps(fastest)
    return [Change("speed", value, f"Lower the speed to {value:.2f} tokens/s")]


def _limit(kind: str, limit: float, problem: Problem, deadline: float) -> list[Change]:
    """A longer turn, or a larger file than was asked for."""
    excess = _least_excess(problem, lambda _: {kind: 1.0})
    if not math.isfinite(excess):
        return []
    reached = limit + (excess / 1000 if kind == "turn" else excess * MIB)
    tries = [reached * (1 + 0.0001 * 4**n) for n in range(_TRIES)]
    value = _smallest(tries, partial(_with_limit, problem, kind), deadline)
    return [] if value is None else [_limit_change(kind, value)]


def _loss(fastest: Solution | None, problem: Problem, deadline: float) -> list[Change]:
    """The least loss within the other limits.

    It is solved for, not sought from what the relaxation reaches, which may be far below.
    """
    least = least_loss(problem, replace(ROUGH, deadline=deadline), fastest)
    if least is None:
        return []
    # A little above, and rounded up, so that the loss named can be asked for.
    value = _rounded_up(kld_nats(least.loss_nats) * (1 + _STEP) + _STEP_NATS)
    return [Change("loss", float(value), f"Allow a loss of {value} nats per token")]


def _rounded_up(value: float) -> str:
    """A number above 0, rounded up to three significant digits."""
    places = max(0, 2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**places) / 10**places:.{places}f}"


def least_loss(
    problem: Problem, limits: Limits, fastest: Solution | None = None
) -> Solution | None:
    """The solution of least loss within all limits but that on the loss, whatever time costs.

    Args:
        problem: Groups, budgets and limits.
        limits: When to stop.
        fastest: The fastest solution without any limit, where it is known; a start where it keeps
            to the other limits, and so an answer where the time is short.
    """
    speed = problem.goal.min_decode_tps or ANY_TPS
    goal = replace(problem.goal, best="quality", min_decode_tps=speed, max_loss_nats=None)
    unlimited = replace(problem, goal=goal)
    known = fastest and within_limits(unlimited, fastest)
    return solve(unlimited, limits, [known.layer_devices] if known else (), known=known)


def _with_limit(problem: Problem, kind: str, value: float) -> Problem:
    goal = problem.goal
    if kind == "turn":
        goal = replace(goal, max_turn_s=value)
    else:
        goal = replace(goal, max_file_bytes=int(value))
    return replace(problem, goal=goal)


def _limit_change(kind: str, value: float) -> Change:
    if kind == "turn":
        value = math.ceil(value * 10) / 10
        return Change("turn", value, f"Allow {value:.1f} s for a turn")
    return Change("size", int(value), f"Allow {gib(int(value))} for the file")


def _memory(kind: Literal["ram", "vram"], problem: Problem, deadline: float) -> list[Change]:
    """More RAM, or more memory on every GPU alike."""
    machine = problem.machine
    devices = (machine.ram,) if kind == "ram" else machine.gpus
    shares = {device.name: 1 / len(devices) for device in devices}
    more = _least_memory(problem, shares, deadline)
    return [] if more is None else [_memory_change(machine, kind, more)]


def _gpu_part(problem: Problem, deadline: float) -> list[Change]:
    """Another border in the memory that a GPU and the CPU share: more or less for the GPU."""
    machine = problem.machine
    (gpu, *_), ram = [gpu for gpu in machine.gpus if gpu.shares_ram], machine.ram
    for sign, word in ((1, "more"), (-1, "less")):
        moved = _least_memory(problem, {gpu.name: sign, ram.name: -sign}, deadline)
        if moved is not None:
            part = gpu.capacity_bytes + sign * moved
            of = f"{gib(part)} of the {gib(gpu.capacity_bytes + ram.capacity_bytes)}"
            text = f"Let the GPU have {of} that it shares with the CPU, {gib(moved)} {word}"
            return [Change("gpu_part", part, text)]
    return []


def _least_memory(problem: Problem, shares: Mapping[str, float], deadline: float) -> int | None:
    """Bytes with which there is a solution, where devices have these shares of them more."""
    machine = problem.machine

    def rows(model: Model) -> dict[str, float]:
        of_pools = (sum(shares.get(d.name, 0.0) for d in pool) for pool in model.pools)
        return {f"memory_{p}": share for p, share in enumerate(of_pools) if share}

    def grown(more: float) -> Problem:
        n_bytes = {name: math.ceil(share * more) for name, share in shares.items()}
        return replace(problem, machine=machine.with_more(n_bytes))

    excess = _least_excess(problem, rows) * MIB
    if not math.isfinite(excess):
        return None
    first = max(1, math.ceil(excess / _MEMORY_STEP))
    steps = [float((first + extra) * _MEMORY_STEP) for extra in (0, 1, 2, 4, 8, 16, 32)]
    givers = [d.capacity_bytes for d in machine.devices if shares.get(d.name, 0.0) < 0]
    more = _smallest([s for s in steps if s <= min(givers, default=s)], grown, deadline)
    return None if more is None else int(more)


def _memory_change(machine: Machine, kind: Literal["ram", "vram"], more: int) -> Change:
    devices = (machine.ram,) if kind == "ram" else machine.gpus
    total = sum(device.capacity_bytes for device in devices) + more
    share = ", shared by all GPUs" if len(devices) > 1 else ""
    text = f"Add {gib(more)} of {kind.upper()}{share} ({gib(total)} in all)"
    if any(gpu.shares_ram for gpu in machine.gpus):
        owner = "CPU's" if kind == "ram" else "GPUs'" if len(devices) > 1 else "GPU's"
        text = f"Add {gib(more)} of memory to the {owner} part of it ({gib(total)} then)"
    return Change(kind, total, text)


def _context(problem: Problem, deadline: float) -> list[Change]:
    wanted = problem.workload.context
    if wanted <= least_context(problem):
        return []
    found = longest_context(problem, wanted - 1, deadline)
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


def _without_gpus(problem: Problem, deadline: float) -> list[Change]:
    """The RAM alone, where a GPU is too small for what it has to hold."""
    if any_solution(problem.without_gpus(), deadline) is None:
        return []
    what = "GPUs" if len(problem.machine.gpus) > 1 else "GPU"
    return [Change("gpus", 0, f"Leave the {what} out of the machine, and use the RAM alone")]


def _types(problem: Problem, deadline: float) -> list[Change]:
    """Types of fewer bits than the policy's, for what has no floor and most of the weights."""
    policy = problem.policy
    lower = _lower_types(policy)
    pattern = "|".join(_roles_for(problem, lower))
    if not pattern:
        return []
    usual = [name for name in policy.candidates if name != SOURCE]

    def rule(n_lower: int) -> str:
        return f"{pattern}={','.join([*usual, *lower[:n_lower]])}"

    def allowed(n_lower: int) -> Problem:
        return problem.with_policy(policy.allow(pattern, *usual, *lower[:n_lower]))

    n_lower = _smallest(range(1, len(lower) + 1), allowed, deadline)
    if n_lower is None:
        return []
    needs = any(qtype(name).needs_imatrix for name in lower[:n_lower])
    text = f"Allow types down to {lower[n_lower - 1]}: --allow '{rule(n_lower)}'"
    return [Change("types", rule(n_lower), text + (" (needs an importance matrix)" * needs))]


def _lower_types(policy: Policy) -> list[str]:
    """Types below all candidates, most bits first, without those that lose more for more bits."""
    usual = [qtype(name).bpw for name in policy.candidates if name != SOURCE]
    least = min(usual, default=0.0)
    errors = type_errors()
    below = [
        name
        for name in errors
        if qtype(name).bpw < least
        and qtype(name).is_file_target
        and "llama.cpp" in qtype(name).runtimes
    ]
    found: list[str] = []
    for name in sorted(below, key=lambda name: (qtype(name).bpw, errors[name])):
        if not found or errors[name] < errors[found[-1]]:
            found.append(name)
    return found[::-1]


def _roles_for(problem: Problem, names: Sequence[str]) -> list[str]:
    """Roles of experts, or of what a dense model has in their place, that fit all of the types.

    Those with a floor, and those that a person said something about, are left as they are.
    """
    inventory, policy = problem.inventory, problem.policy
    classes = EXPERT_CLASSES if inventory.architecture.n_expert else ("ffn",)
    blocks = {qtype(name).block for name in (*names, *policy.candidates) if name != SOURCE}
    all_roles, unfit = set(), set()
    for tensor in inventory.tensors:
        if tensor.role_class in classes:
            all_roles.add(tensor.role)
            is_open = policy.rule(tensor.role_class).floor is None
            is_open = is_open and policy.tensor_rule(tensor) is None
            is_whole = not any(tensor.shape_ne[0] % block for block in blocks)
            if not (is_open and is_whole and qtype(tensor.qtype).is_float):
                unfit.add(tensor.role)
    return sorted(all_roles - unfit)


def _floor(problem: Problem, deadline: float) -> list[Change]:
    """The highest floor for all classes with which there is a solution."""
    policy = problem.policy
    floors = {rule.floor for rule in policy.rules if rule.floor}
    if not floors:
        return []
    highest = max(qtype(floor).bpw for floor in floors)
    names = [n for n in policy.candidates if n != SOURCE and qtype(n).bpw < highest]
    names.sort(key=lambda name: -qtype(name).bpw)

    def lowered(name: str) -> Problem:
        rules = tuple(
            rule.model_copy(update={"floor": name})
            if rule.floor and qtype(rule.floor).bpw > qtype(name).bpw
            else rule
            for rule in policy.rules
        )
        return problem.with_policy(policy.model_copy(update={"rules": rules}))

    name = _smallest(names, lowered, deadline)
    return [] if name is None else [Change("floor", name, f"Lower the policy's floors to {name}")]
