"""An answer to a problem, recomputed in integers and held against every limit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantplan.errors import SolverError
from quantplan.hardware.device import Device
from quantplan.planner.goal import Status
from quantplan.planner.groups import Group, Option
from quantplan.planner.problem import Problem

Choice = tuple[Option, str]
"""How a group is quantized, and the name of the device that it is on."""

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
        status: ``optimal``, ``within_gap`` (of the gap asked for), ``gap_left`` (no better split of
            the layers was found, and no proof closed the gap), or ``time_limit`` (the time was up).
        objective_nats: Loss plus the price of time, recomputed from the choices.
        bound_nats: Proven lower bound of the objective, over every split of the layers.
        choices: Option and device name of each group.
        layer_devices: Device name of each loaded layer.
        output_device: Device name of the output matrix.
        device_bytes: What is on each device, by name.
        loss_nats: Predicted loss per token.
        decode_s: Seconds per token with the context full.
    """

    status: Status
    objective_nats: float
    bound_nats: float
    choices: tuple[Choice, ...]
    layer_devices: tuple[str, ...]
    output_device: str
    device_bytes: dict[str, DeviceBytes]
    loss_nats: float
    decode_s: float

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``; 0 where the difference is negligible."""
        difference = self.objective_nats - self.bound_nats
        return difference / self.objective_nats if difference > _NEGLIGIBLE_NATS else 0.0

    def split(self, problem: Problem) -> Problem:
        """A problem with layers and output where the solution has them."""
        output = self.output_device if problem.machine.gpus else None
        return problem.with_layers(self.layer_devices, output)

    @property
    def is_closed(self) -> bool:
        """Whether the solution is proven to be within the gap that was asked for."""
        return self.status in ("optimal", "within_gap")

    def with_bound(self, bound_nats: float, gap: float, *, time_is_up: bool = False) -> "Solution":
        """The solution with another bound, and the status that follows from it."""
        bounded = replace(self, bound_nats=min(bound_nats, self.objective_nats))
        status: Status = "time_limit" if time_is_up else "gap_left"
        # Rounding may leave the objective a little above what the solver stopped at.
        if bounded.gap <= gap * 1.01:
            status = "within_gap" if bounded.gap else "optimal"
        return replace(bounded, status=status)


def checked(problem: Problem, choices: Sequence[Choice]) -> Solution:
    """Recomputes bytes, time and loss from the choices, and holds them against every limit.

    Args:
        problem: Groups, budgets, split and goal.
        choices: Option and device name of each group.

    Returns:
        A solution without a bound.

    Raises:
        SolverError: A limit is not kept.
    """
    device_bytes = {d.name: _bytes_of(problem, d, choices) for d in problem.machine.devices}
    for device in problem.machine.devices:
        used = device_bytes[device.name].total
        if used > device.usable_bytes:
            raise SolverError(
                f"the answer takes {used} bytes of {device.name}, but {device.usable_bytes} are "
                "usable; please report this"
            )
    pairs = list(zip(problem.groups, choices, strict=True))
    decode_s = problem.decode.total_s(pairs)
    loss = sum(option.loss_nats for option, _ in choices)
    _check_goal(problem, pairs, decode_s, loss)
    return Solution(
        status="gap_left",
        objective_nats=problem.loss_weight * loss + problem.decode_price_nats_per_s * decode_s,
        bound_nats=0.0,
        choices=tuple(choices),
        layer_devices=problem.layer_devices,
        output_device=problem.output_device.name,
        device_bytes=device_bytes,
        loss_nats=loss,
        decode_s=decode_s,
    )


def within_limits(problem: Problem, found: Solution) -> Solution | None:
    """A solution to the problem with other limits, where it keeps to these too."""
    try:
        return checked(found.split(problem), found.choices)
    except SolverError:
        return None


def _check_goal(
    problem: Problem,
    pairs: Sequence[tuple[Group, Choice]],
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
        turn_s = problem.turn.total_s(pairs)
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


def _bytes_of(problem: Problem, device: Device, choices: Sequence[Choice]) -> DeviceBytes:
    ram = problem.machine.ram.name
    weights = padding = streamed = 0
    is_pipeline = problem.may_pipeline()
    for group, (option, name) in zip(problem.groups, choices, strict=True):
        copies = problem.copies_on(device, group, option, name)
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
