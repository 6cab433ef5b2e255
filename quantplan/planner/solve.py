"""Solves the program for one split of the layers, and checks the answer in integers."""

import contextlib
import importlib.metadata
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import highspy
import pulp

from quantplan.errors import SolverError
from quantplan.hardware import Device
from quantplan.planner.milp import (
    Cohort,
    Model,
    add_cutoff,
    build_model,
    build_relaxation,
    form_cohorts,
)
from quantplan.planner.problem import Option, Problem

Status = Literal["optimal", "within_gap", "time_limit"]


# Losses below this many nats are equal: no text is long enough to tell them apart.
_NEGLIGIBLE_NATS = 1e-9


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


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keeps the banner that HiGHS prints to file descriptor 1 out of ``--json`` output."""
    if sys.stdout is not None:
        sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as null:  # noqa: PTH123 (a descriptor is needed)
            os.dup2(null.fileno(), 1)
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def solver_name() -> str:
    """Name and versions of the solver."""
    return " ".join(f"{p} {importlib.metadata.version(p)}" for p in ("pulp", "highspy"))


def solver_options(gap: float, time_limit_s: float) -> dict[str, Any]:
    """Options for HiGHS, as PuLP names them; one thread, so that answers repeat."""
    return {"gapRel": gap, "timeLimit": time_limit_s, "threads": 1, "random_seed": 0}


def _run(model: Model, gap: float, time_limit_s: float) -> float:
    """Runs HiGHS.

    Args:
        model: What to solve.
        gap: Relative gap at which to stop.
        time_limit_s: Time at which to stop.

    Returns:
        The proven bound, in the objective's unit.

    Raises:
        SolverError: HiGHS failed.
    """
    with _quiet_stdout():
        model.lp.solve(pulp.HiGHS(msg=False, **solver_options(gap, time_limit_s)))
        highs = model.lp.solverModel
        status, info = highs.getModelStatus(), highs.getInfo()
    if model.lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        ended = highspy.HighsModelStatus
        if status in (ended.kInfeasible, ended.kUnboundedOrInfeasible):
            raise _InfeasibleError
        if status == ended.kTimeLimit:
            raise _OutOfTimeError(float(info.mip_dual_bound))
        raise SolverError(f"HiGHS failed: {status.name}; please report this")
    return float(info.mip_dual_bound)


class _InfeasibleError(Exception):
    """The solver proved that no choice meets the constraints."""


class _OutOfTimeError(Exception):
    """The solver found nothing in time.

    Attributes:
        bound: What it proved by then, in the model's unit.
    """

    def __init__(self, bound: float) -> None:
        """Keeps the bound; it is 0 where nothing was proved."""
        self.bound = max(0.0, bound)
        super().__init__()


def solve_split(
    problem: Problem, gap: float, time_limit_s: float, cutoff_nats: float | None = None
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
    cohorts = form_cohorts(problem)
    model = build_model(problem, cohorts)
    if cutoff_nats is not None:
        add_cutoff(model, cutoff_nats)
    model.lp += model.objective()
    try:
        bound = _run(model, gap, time_limit_s)
    except (_InfeasibleError, _OutOfTimeError):
        return None
    chosen = [(option,) for option, _ in _choices(model)]
    fastest = build_model(problem, form_cohorts(problem, chosen))
    fastest.lp += fastest.decode_ms()
    try:
        _run(fastest, gap, time_limit_s)
    except (_InfeasibleError, _OutOfTimeError) as error:
        raise SolverError("the chosen types lost their placement; please report this") from error
    solution = _checked(problem, _in_layer_order(problem, cohorts, _choices(fastest)))
    base = problem.decode_price_nats_per_s * problem.base_decode_s
    return with_bound(solution, bound / 1000 + base, gap)


def fastest_decode_s(problem: Problem, gap: float, time_limit_s: float) -> float | None:
    """Least seconds per token within memory for a problem's split; None where nothing fits."""
    model = build_model(problem, form_cohorts(problem))
    model.lp += model.decode_ms()
    try:
        _run(model, gap, time_limit_s)
    except (_InfeasibleError, _OutOfTimeError):
        return None
    return float(pulp.value(model.lp.objective)) / 1000 + problem.base_decode_s


def bound_over_splits(problem: Problem, gap: float, time_limit_s: float) -> float | None:
    """A lower bound of the objective over every split of the layers, in nats.

    Returns:
        None where not even the relaxation has a solution, so that no split has one.
    """
    model = build_relaxation(problem)
    model.lp += model.objective()
    try:
        bound = _run(model, gap, time_limit_s)
    except _InfeasibleError:
        return None
    except _OutOfTimeError as error:
        bound = error.bound
    return bound / 1000 + problem.decode_price_nats_per_s * model.base_decode_s


def with_bound(solution: Solution, bound_nats: float, gap: float) -> Solution:
    """The solution with another bound, and the status that follows from it."""
    bounded = replace(solution, bound_nats=min(bound_nats, solution.objective_nats))
    # Rounding may leave the objective a little above what the solver stopped at.
    status: Status = "within_gap" if bounded.gap <= gap * 1.01 else "time_limit"
    return replace(bounded, status="optimal" if bounded.gap == 0.0 else status)


def _choices(model: Model) -> list[tuple[Option, str]]:
    """Option and device of each group."""
    counted: dict[int, list[tuple[Option, str]]] = defaultdict(list)
    for choice, count in model.x.items():
        counted[choice[0]] += [(model.option(choice), choice[2])] * round(count.value() or 0)
    choices: dict[int, tuple[Option, str]] = {}
    for c, cohort in enumerate(model.cohorts):
        choices.update(zip(cohort.members, counted[c], strict=True))
    return [choices[g] for g in range(len(model.problem.groups))]


def _in_layer_order(
    problem: Problem, cohorts: tuple[Cohort, ...], choices: list[tuple[Option, str]]
) -> list[tuple[Option, str]]:
    """Sorts the choices within each cohort: GPU before RAM, more bytes before fewer.

    The groups of a cohort cost the same whichever of them takes which choice. Runs of equal layers
    make short rules, and with the last rather than the first experts in RAM ik_llama.cpp was
    measured to prefill about 10 % faster.
    """
    ram = problem.machine.ram.name
    ordered = list(choices)
    for cohort in cohorts:
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
    if problem.min_decode_tps is not None and decode_s * problem.min_decode_tps > 1:
        raise SolverError(
            f"the answer takes {decode_s:.6f} s per token, more than {problem.min_decode_tps} "
            "tokens/s allow; please report this"
        )
    loss = sum(option.loss_nats for option, _ in choices)
    return Solution(
        status="time_limit",
        objective_nats=loss + problem.decode_price_nats_per_s * decode_s,
        bound_nats=0.0,
        choices=tuple(choices),
        layer_devices=problem.layer_devices,
        device_bytes=device_bytes,
        loss_nats=loss,
        decode_s=decode_s,
    )


def _bytes_of(problem: Problem, device: Device, choices: list[tuple[Option, str]]) -> DeviceBytes:
    ram = problem.machine.ram.name
    weights = padding = streamed = 0
    is_pipeline = problem.may_pipeline()
    for group, (option, name) in zip(problem.groups, choices, strict=True):
        copies = problem.copies_on(device, group, name)
        weights += copies * option.n_bytes
        padding += copies * option.padding_bytes if device.kind == "gpu" else 0
        if group.layer is not None and name == ram:
            is_pipeline = False
            if problem.is_streamed(group):
                streamed = max(streamed, option.largest_bytes)
    return DeviceBytes(
        weights=weights,
        padding=padding,
        cache=problem.device_cache_bytes(device),
        compute=problem.compute_bytes(device, streamed, is_pipeline=is_pipeline),
    )
