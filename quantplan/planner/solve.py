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
from quantplan.planner.milp import Model, build_model, form_cohorts
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
        compute: Compute buffer.
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
        bound_nats: Proven lower bound of the objective over every split of the layers with as many
            of them in RAM.
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


def _run(model: Model, gap: float, time_limit_s: float, good_enough: float | None = None) -> float:
    """Runs HiGHS.

    Args:
        model: What to solve.
        gap: Relative gap at which to stop.
        time_limit_s: Time at which to stop.
        good_enough: Objective, in the model's unit, at which to stop.

    Returns:
        The proven bound, in the objective's unit.

    Raises:
        SolverError: There is no solution to read for a reason other than infeasibility.
    """
    options = solver_options(gap, time_limit_s)
    if good_enough is not None:
        options["objective_target"] = good_enough
    with _quiet_stdout():
        model.lp.solve(pulp.HiGHS(msg=False, **options))
        highs = model.lp.solverModel
        status, info = highs.getModelStatus(), highs.getInfo()
    if model.lp.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        if status == highspy.HighsModelStatus.kInfeasible:
            raise _InfeasibleError
        raise SolverError(
            f"HiGHS stopped after {time_limit_s} s without a solution ({status.name}); "
            "give it more time"
        )
    return float(info.mip_dual_bound)


class _InfeasibleError(Exception):
    """The solver proved that no choice meets the constraints."""


def _price(problem: Problem) -> float:
    """Nats that a second per token is worth."""
    is_free = problem.min_decode_tps is None
    return problem.policy.decode_price_nats_per_s if is_free else 0.0


def _set_objective(model: Model) -> None:
    model.lp += model.loss_millinats() + _price(model.problem) * model.decode_ms()


def solve_split(
    problem: Problem, gap: float, time_limit_s: float, good_enough_nats: float | None = None
) -> Solution | None:
    """Solves a problem for its split of the layers; the bound is for this split."""
    model = build_model(problem, form_cohorts(problem))
    _set_objective(model)
    base = _price(problem) * problem.base_decode_s
    good_enough = None if good_enough_nats is None else (good_enough_nats - base) * 1000
    try:
        bound = _run(model, gap, time_limit_s, good_enough)
    except _InfeasibleError:
        return None
    chosen = [(option,) for option, _ in _choices(model)]
    fastest = build_model(problem, form_cohorts(problem, chosen))
    fastest.lp += fastest.decode_ms()
    try:
        _run(fastest, gap, time_limit_s)
    except _InfeasibleError as error:
        raise SolverError("the chosen types lost their placement; please report this") from error
    solution = _checked(problem, _choices(fastest))
    return with_bound(solution, bound / 1000 + base, gap)


def fastest_decode_s(problem: Problem, gap: float, time_limit_s: float) -> float | None:
    """Least seconds per token within memory for a problem's split; None where nothing fits."""
    model = build_model(problem, form_cohorts(problem))
    model.lp += model.decode_ms()
    try:
        _run(model, gap, time_limit_s)
    except _InfeasibleError:
        return None
    return float(pulp.value(model.lp.objective)) / 1000 + problem.base_decode_s


def pooled_bound(problem: Problem, gap: float, time_limit_s: float) -> float | None:
    """A lower bound of the objective over every split of the layers, in nats.

    Returns:
        None where not even pooled GPUs hold the model.
    """
    fastest = max(problem.machine.gpus, key=lambda gpu: gpu.bandwidth_bytes_per_s)
    n_cpu_layers = problem.layer_devices.count(problem.machine.ram.name)
    layers = (*problem.layer_devices[:n_cpu_layers],) + (fastest.name,) * (
        problem.n_layers - n_cpu_layers
    )
    pooled = problem.with_layers(layers)
    model = build_model(pooled, form_cohorts(pooled), pool_gpus=True)
    _set_objective(model)
    try:
        bound = _run(model, gap, time_limit_s)
    except _InfeasibleError:
        return None
    return bound / 1000 + _price(problem) * pooled.base_decode_s


def with_bound(solution: Solution, bound_nats: float, gap: float) -> Solution:
    """The solution with another bound, and the status that follows from it."""
    bounded = replace(solution, bound_nats=min(bound_nats, solution.objective_nats))
    # Rounding may leave the objective a little above what the solver stopped at.
    status: Status = "within_gap" if bounded.gap <= gap * 1.01 else "time_limit"
    return replace(bounded, status="optimal" if bounded.gap == 0.0 else status)


def _choices(model: Model) -> list[tuple[Option, str]]:
    """Option and device of each group.

    Within a cohort the earlier layers get the GPU before RAM and more bytes before fewer: runs of
    equal layers make short rules, and with the last rather than the first experts in RAM
    ik_llama.cpp was measured to prefill about 10 % faster.
    """
    ram = model.problem.machine.ram.name
    counted: dict[int, list[tuple[Option, str]]] = defaultdict(list)
    for choice, count in model.x.items():
        counted[choice[0]] += [(model.option(choice), choice[2])] * round(count.value() or 0)
    choices: dict[int, tuple[Option, str]] = {}
    for c, cohort in enumerate(model.cohorts):
        best_first = sorted(counted[c], key=lambda taken: (taken[1] == ram, -taken[0].n_bytes))
        choices.update(zip(cohort.members, best_first, strict=True))
    return [choices[g] for g in range(len(model.problem.groups))]


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
        objective_nats=loss + _price(problem) * decode_s,
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
    for group, (option, name) in zip(problem.groups, choices, strict=True):
        copies = problem.copies_on(device, group, name)
        weights += copies * option.n_bytes
        padding += copies * option.padding_bytes if device.kind == "gpu" else 0
        if problem.is_streamed(group) and name == ram:
            streamed = max(streamed, option.largest_bytes)
    return DeviceBytes(
        weights,
        padding,
        problem.device_cache_bytes(device),
        problem.compute_bytes(device, streamed),
    )
