"""Solves the program for one split of the layers, and checks the answer in integers."""

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import pulp

from quantplan.errors import SolverError
from quantplan.hardware import Device
from quantplan.planner.goal import Status
from quantplan.planner.groups import Group, Option
from quantplan.planner.linear import Answer
from quantplan.planner.milp import (
    add_cutoff,
    add_layers_in_ram,
    build_model,
    build_relaxation,
)
from quantplan.planner.model import Model, form_cohorts
from quantplan.planner.problem import Problem

# Losses below this many nats are equal: no text is long enough to tell them apart.
_NEGLIGIBLE_NATS = 1e-9
# Gap at which a guess is good enough.
_GUESS_GAP = 1e-3


@dataclass(frozen=True)
class DeviceBytes:
    """What is on one device, in bytes.

    Attributes:
        weights: Model buffer, without what CUDA pads.
        padding: What a CUDA buffer takes on top.
        cache: KV cache and recurrent state.
        compute: Compute buffer, as the plan reckons with it.
    """

    weights: int
    padding: int
    cache: int
    compute: int

    @classmethod
    def none(cls) -> "DeviceBytes":
        """Nothing, as on a GPU that is not used."""
        return cls(0, 0, 0, 0)

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.padding + self.cache + self.compute


@dataclass(frozen=True)
class Solution:
    """An answer to a problem, checked in integers.

    Attributes:
        status: ``optimal``, ``within_gap`` (of the gap asked for), or ``time_limit``: the search
            ended, by time or for want of a better split of the layers, with a larger gap.
        objective_nats: Loss plus the price of time, recomputed from the choices.
        bound_nats: Proven lower bound of the objective, over every split of the layers.
        choices: Option and device name of each group.
        layer_devices: Device name of each loaded layer.
        device_bytes: What is on each device, by name.
        loss_nats: Predicted loss per token.
        decode_s: Seconds per token with the context full.
    """

    status: Status
    objective_nats: float
    bound_nats: float
    choices: tuple[tuple[Option, str], ...]
    layer_devices: tuple[str, ...]
    device_bytes: dict[str, DeviceBytes]
    loss_nats: float
    decode_s: float

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``; 0 where the difference is negligible."""
        difference = self.objective_nats - self.bound_nats
        return difference / self.objective_nats if difference > _NEGLIGIBLE_NATS else 0.0


@dataclass(frozen=True)
class Bounds:
    """What the program without integers says of a split, or of all splits.

    The program is solved once for each size that the largest streamed tensor may have: with that
    settled, what is left is so close to linear that the bounds are within about 0.1 %.

    Attributes:
        problem: The problem with the split.
        model: The program.
        answers: Its solution at each level.
    """

    problem: Problem
    model: Model
    answers: tuple[Answer, ...]

    def nats(self, level: int) -> float:
        """Lower bound of the objective at a level; infinite where nothing fits."""
        return _nats(self.model, self.answers[level].bound)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Levels at which something fits, the lowest bound first."""
        fits = [i for i, answer in enumerate(self.answers) if answer.ending == "solved"]
        return tuple(sorted(fits, key=self.nats))

    @property
    def least_nats(self) -> float:
        """Lower bound of the objective."""
        return self.nats(self.order[0]) if self.order else math.inf


def split_bounds(problem: Problem) -> Bounds:
    """Bounds for a problem's split of the layers."""
    return _bounds(problem, build_model(problem))


def bounds_over_splits(problem: Problem) -> Bounds:
    """Bounds that hold for every split of the layers."""
    return _bounds(problem, build_relaxation(problem))


def bound_with_layers_in_ram(
    problem: Problem, *, at_least: int = 0, at_most: int | None = None
) -> float:
    """A lower bound over the splits with so many layers in RAM; infinite where none fits."""
    model = build_relaxation(problem)
    add_layers_in_ram(model, at_least, problem.n_layers if at_most is None else at_most)
    return _bounds(problem, model).least_nats


def _bounds(problem: Problem, model: Model) -> Bounds:
    return Bounds(problem, model, tuple(model.lp.relax(model.levels)))


def promising_split(relaxed: Bounds, time_limit_s: float) -> tuple[str, ...] | None:
    """How many layers each device has in a good solution of the relaxation, with integers.

    Args:
        relaxed: Bounds without integers.
        time_limit_s: Time at which to stop.
    """
    problem = relaxed.problem
    model = build_relaxation(problem, pooled=False)
    answer = model.lp.solve(_GUESS_GAP, time_limit_s, fixed=model.levels[relaxed.order[0]])
    if answer.ending != "solved":
        return None
    names = (problem.machine.ram.name, *(gpu.name for gpu in problem.machine.gpus))
    return tuple(
        name
        for name in names
        for (_, place), count in model.layers.items()
        if place == name
        for _ in range(round(answer.value(count)))
    )


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
            answer = model.lp.solve(gap / 10, left_s, fixed=model.levels[level])
            better = enough if answer.ending == "infeasible" else _nats(model, answer.bound)
            bound = max(bound, better)
        found = min(found, bound)
    return found


def _nats(model: Model, millinats: float) -> float:
    """An objective or bound of a program, in nats."""
    return max(0.0, millinats / 1000 + model.constant_nats)


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
        found = solve_level(bounds, level, gap, left_s, cutoff_nats)
        bound = min(bound, found.bound_nats if found else cutoff_nats or bounds.nats(level))
        if found is not None and (best is None or found.objective_nats < best.objective_nats):
            best = found
    return with_bound(best, bound, gap) if best else None


def solve_level(
    bounds: Bounds, level: int, gap: float, time_limit_s: float, cutoff_nats: float | None = None
) -> Solution | None:
    """Solves a split with the largest streamed tensor settled; the bound is for that alone.

    See `try_level`.
    """
    return try_level(bounds, level, gap, time_limit_s, cutoff_nats)[0]


def try_level(
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
    answer = model.lp.solve(gap, time_limit_s, fixed=model.levels[level])
    least = max(_nats(model, answer.bound), bounds.nats(level))
    if cutoff_nats is not None:
        least = min(least, cutoff_nats)
    if answer.ending != "solved":
        return None, least
    choices = _choices(model, answer)
    if problem.goal.best == "quality":
        choices = _fastest_places(problem, choices, gap, time_limit_s)
    solution = _checked(problem, _in_layer_order(problem, choices))
    return with_bound(solution, least, gap), least


def _fastest_places(
    problem: Problem, choices: list[tuple[Option, str]], gap: float, time_limit_s: float
) -> list[tuple[Option, str]]:
    """The fastest placement of the types that were chosen."""
    model = build_model(problem, [(option,) for option, _ in choices])
    model.lp.minimise(model.decode_ms)
    answer = model.lp.solve(gap, time_limit_s)
    return _choices(model, answer) if answer.ending == "solved" else choices


def with_bound(solution: Solution, bound_nats: float, gap: float) -> Solution:
    """The solution with another bound, and the status that follows from it."""
    bounded = replace(solution, bound_nats=min(bound_nats, solution.objective_nats))
    # Rounding may leave the objective a little above what the solver stopped at.
    status: Status = "within_gap" if bounded.gap <= gap * 1.01 else "time_limit"
    return replace(bounded, status="optimal" if bounded.gap == 0.0 else status)


def _choices(model: Model, answer: Answer) -> list[tuple[Option, str]]:
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
    choices: dict[int, tuple[Option, str]] = {}
    for c, cohort in enumerate(model.cohorts):
        chosen = [(o, name) for o in range(len(cohort.options)) for name in places[c, o]]
        for g, (o, name) in zip(cohort.members, chosen, strict=True):
            choices[g] = cohort.options[o], name
    return [choices[g] for g in range(len(model.problem.groups))]


def _in_layer_order(
    problem: Problem, choices: list[tuple[Option, str]]
) -> list[tuple[Option, str]]:
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


def _checked(problem: Problem, choices: list[tuple[Option, str]]) -> Solution:
    """Recomputes bytes, time and loss from the choices, and holds them against the budgets."""
    device_bytes = {d.name: _bytes_of(problem, d, choices) for d in problem.machine.devices}
    for device in problem.machine.devices:
        used = device_bytes[device.name].total
        if used > device.usable_bytes:
            raise SolverError(
                f"the answer takes {used} bytes of {device.name}, but {device.usable_bytes} are "
                "usable; please report this"
            )
    pairs = list(zip(problem.groups, choices, strict=True))
    decode_s = problem.base_decode_s + sum(problem.decode_s(g, o, name) for g, (o, name) in pairs)
    loss = sum(option.loss_nats for option, _ in choices)
    _check_goal(problem, pairs, decode_s, loss)
    return Solution(
        status="time_limit",
        objective_nats=problem.loss_weight * loss + problem.decode_price_nats_per_s * decode_s,
        bound_nats=0.0,
        choices=tuple(choices),
        layer_devices=problem.layer_devices,
        device_bytes=device_bytes,
        loss_nats=loss,
        decode_s=decode_s,
    )


def _check_goal(
    problem: Problem,
    pairs: list[tuple[Group, tuple[Option, str]]],
    decode_s: float,
    loss_nats: float,
) -> None:
    """Holds recomputed times and losses against their limits.

    Raises:
        SolverError: One of them is not kept.
    """
    goal, most = problem.goal, problem.max_summed_loss_nats
    broken = []
    if goal.min_decode_tps is not None and decode_s * goal.min_decode_tps > 1:
        broken.append(f"{decode_s:.6f} s per token, more than {goal.min_decode_tps} tokens/s allow")
    if goal.max_turn_s is not None:
        turn_s = problem.base_turn_s + sum(problem.turn_s(g, o, name) for g, (o, name) in pairs)
        if turn_s > goal.max_turn_s:
            broken.append(f"{turn_s:.6f} s for a turn of at most {goal.max_turn_s} s")
    if most is not None and loss_nats > most:
        broken.append(f"a summed loss of {loss_nats:.9f} nats, of which {most:.9f} are allowed")
    if goal.max_file_bytes is not None:
        n_bytes = problem.unloaded_bytes + sum(option.n_bytes for _, (option, _) in pairs)
        if n_bytes > goal.max_file_bytes:
            broken.append(f"{n_bytes} bytes in the file, more than {goal.max_file_bytes}")
    if broken:
        raise SolverError(f"the answer takes {' and '.join(broken)}; please report this")


def _bytes_of(problem: Problem, device: Device, choices: list[tuple[Option, str]]) -> DeviceBytes:
    ram = problem.machine.ram.name
    weights = padding = streamed = 0
    is_pipeline = problem.may_pipeline()
    for group, (option, name) in zip(problem.groups, choices, strict=True):
        copies = problem.copies_on(device, group, name)
        weights += copies * option.n_bytes
        padding += copies * option.padding_bytes if device.kind == "gpu" else 0
        is_pipeline &= not problem.is_moved(group, name)
        if problem.is_streamed(group) and name == ram:
            streamed = max(streamed, option.largest_bytes)
    return DeviceBytes(
        weights=weights,
        padding=padding,
        cache=problem.device_cache_bytes(device),
        compute=problem.compute_bytes(device, streamed, is_pipeline=is_pipeline),
    )
