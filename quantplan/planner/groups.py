"""Model, machine, workload and policy -> groups of tensors, and the options that each has."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from quantplan.costs import memory
from quantplan.costs.decode import read_s
from quantplan.costs.host import copies_tied_output
from quantplan.costs.memory import cuda_padding_bytes
from quantplan.costs.prefill import prefill_s
from quantplan.costs.quality import LossTable
from quantplan.costs.traffic import Read, Traffic, crossing_shares, read_of
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, Tensor
from quantplan.planner.goal import Goal
from quantplan.policy import Policy
from quantplan.workload import Workload

Place = Literal["layer", "free", "output", "host", "host_and_output"]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to quantize a group.

    Attributes:
        qtypes: Type of each tensor of the group.
        n_bytes: Bytes in a model buffer.
        padding_bytes: Bytes that a CUDA buffer takes on top.
        largest_bytes: Bytes of the largest tensor.
        reads: What each tensor makes its device do per token.
        loss_nats: Predicted loss.
        is_copied: Whether a tied embedding is held once more, beside the output.
    """

    qtypes: tuple[str, ...]
    n_bytes: int
    padding_bytes: int
    largest_bytes: int
    reads: tuple[Read, ...]
    loss_nats: float
    is_copied: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share one decision.

    Attributes:
        tensors: The tensors.
        layer: Their layer; None outside the layers.
        place: Where they may live: on their layer's device; there or in RAM (``free``); on the
            device of the output; in RAM (``host``); or in RAM, and where the option says so once
            more beside the output, as llama.cpp does with tied embeddings.
        options: Ways to quantize them, most bytes first, none dominated by another.
        n_crossings: Hops to the CPU and back that they cause when they leave their layer's GPU.
    """

    tensors: tuple[Tensor, ...]
    layer: int | None
    place: Place
    options: tuple[Option, ...]
    n_crossings: float

    @property
    def may_roam(self) -> bool:
        """Whether they may be on any GPU, as experts may, with or without their layer."""
        return self.place == "free" and self.tensors[0].is_expert


def form_groups(
    inventory: Inventory,
    machine: Machine,
    workload: Workload,
    policy: Policy,
    *,
    goal: Goal,
    losses: LossTable,
) -> tuple[Group, ...]:
    """Forms the groups of the tensors that are loaded, and prices every option.

    Args:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types.
        policy: The rules.
        goal: What is to be best, and what has to be reached.
        losses: Predicted loss of every tensor at every type.
    """
    offers = _Offers(inventory, machine, workload, policy, goal, losses)
    shares = crossing_shares(inventory)
    tied_roles = {role: index for index, tie in enumerate(policy.ties) for role in tie}
    buckets: dict[tuple[int | None, str], list[Tensor]] = defaultdict(list)
    # In an order of its own, so that the order of the file plays no part in the plan.
    for tensor in sorted(inventory.tensors, key=lambda t: (t.layer is None, t.layer or 0, t.name)):
        if inventory.is_loaded(tensor):
            place = _place(inventory, machine, policy, tensor)
            if place == "layer" and len(policy.candidates_for(tensor, is_loaded=True)) == 1:
                key = "fixed experts" if tensor.is_expert else "fixed"
            elif tensor.role in tied_roles:
                # Rules of a person that differ within a tie undo it.
                key = f"tie {tied_roles[tensor.role]} {policy.tensor_rule(tensor)}"
            else:
                key = tensor.name
            buckets[tensor.layer, key].append(tensor)
    return tuple(
        Group(
            tensors=tuple(tensors),
            layer=layer,
            place=_place(inventory, machine, policy, tensors[0]),
            options=offers.options(tensors),
            n_crossings=sum(shares.get(tensor.name, 0.0) for tensor in tensors),
        )
        for (layer, _), tensors in buckets.items()
    )


def _place(inventory: Inventory, machine: Machine, policy: Policy, tensor: Tensor) -> Place:
    if tensor.role_class == "embedding":
        is_tied = inventory.has_tied_output and tensor.role == "token_embd"
        return "host_and_output" if is_tied else "host"
    if tensor.layer is None:
        return "output"
    may_leave = bool(machine.gpus) and policy.rule(tensor.role_class).may_leave_gpu
    return "free" if may_leave else "layer"


@dataclass
class _Offers:
    """Forms the options of groups; what equal layers share is worked out once."""

    inventory: Inventory
    machine: Machine
    workload: Workload
    policy: Policy
    goal: Goal
    losses: LossTable
    _made: dict[tuple[object, ...], tuple[Option, ...]] = field(default_factory=dict)
    _sizes: dict[tuple[object, ...], tuple[int, int, Read, tuple[float, ...]]] = field(
        default_factory=dict
    )

    def options(self, tensors: Sequence[Tensor]) -> tuple[Option, ...]:
        """Options of a group, most bytes first; equal ones are the same object.

        Tied tensors take the same wanted type, each with its own fallback.
        """
        choices = [self.policy.candidates_for(t, is_loaded=True) for t in tensors]
        wanted = []
        for index in range(max(map(len, choices))):
            # Tensors with fewer candidates (a fixed type) keep their last one.
            qtypes = tuple(names[min(index, len(names) - 1)] for names in choices)
            loss = sum(self.losses.loss_nats(t, q) for t, q in zip(tensors, qtypes, strict=True))
            wanted.append((qtypes, loss))
        key = (*((t.role, t.shape_ne, t.qtype) for t in tensors), *wanted)
        if key not in self._made:
            self._made[key] = self._undominated(tensors, dict(wanted))
        return self._made[key]

    def _undominated(
        self, tensors: Sequence[Tensor], losses: Mapping[tuple[str, ...], float]
    ) -> tuple[Option, ...]:
        """Options, most bytes first, without those that another one equals or beats in everything.

        Everything is bytes, loss, a second copy, and seconds on each device: a type of fewer bits
        may be slower to unpack.
        """
        priced = []
        for qtypes, loss in losses.items():
            parts = [self._priced(t, q) for t, q in zip(tensors, qtypes, strict=True)]
            option = Option(
                qtypes=qtypes,
                n_bytes=sum(part[0] for part in parts),
                padding_bytes=sum(part[1] for part in parts),
                largest_bytes=max(part[0] for part in parts),
                reads=tuple(part[2] for part in parts),
                loss_nats=loss,
                is_copied=self._is_copied(tensors[0], qtypes[0]),
            )
            seconds = (sum(part) for part in zip(*(part[3] for part in parts), strict=True))
            priced.append(((option.n_bytes, loss, option.is_copied, *seconds), option))
        kept: list[tuple[tuple[float, ...], Option]] = []
        for price, option in sorted(priced, key=lambda pair: pair[0]):
            if not any(all(a <= b for a, b in zip(k, price, strict=True)) for k, _ in kept):
                kept.append((price, option))
        return tuple(option for _, option in reversed(kept))

    def _is_copied(self, tensor: Tensor, name: str) -> bool:
        architecture, on_gpu = self.inventory.architecture, bool(self.machine.gpus)
        return tensor.role == "token_embd" and copies_tied_output(
            architecture, tensor, name, on_gpu=on_gpu, repacks=not on_gpu
        )

    def _priced(self, tensor: Tensor, name: str) -> tuple[int, int, Read, tuple[float, ...]]:
        """Bytes, padding, what is read, and seconds on each device: per token, and per prompt."""
        key = (tensor.role, tensor.shape_ne, name)
        if key not in self._sizes:
            read = read_of(self.inventory, tensor, name)
            seconds = [read_s(device, read) for device in self.machine.devices]
            if self.goal.max_turn_s is not None:
                for device in self.machine.devices:
                    work = Traffic(self.inventory.architecture, {device.name: (read,)}, (), 0.0)
                    seconds.append(prefill_s(work, self.machine, self.workload, 0.0))
            n_bytes, padding = memory.weight_bytes(tensor, name), cuda_padding_bytes(tensor, name)
            self._sizes[key] = n_bytes, padding, read, tuple(seconds)
        return self._sizes[key]
