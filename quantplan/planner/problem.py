"""Model, machine, workload and policy -> groups with options and their costs."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from quantplan.costs import compute, memory
from quantplan.costs.compute import BytesEstimate, Work
from quantplan.costs.decode import cache_s, read_s
from quantplan.costs.evidence import Evidence
from quantplan.costs.factors import shipped
from quantplan.costs.quality import LossTable
from quantplan.costs.traffic import (
    Read,
    boundary_crossings,
    crossing_shares,
    is_expert,
    output_read,
    read_of,
)
from quantplan.hardware import Device, Machine
from quantplan.inventory import Inventory, LayerCache, Tensor
from quantplan.placement import Launch
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
    """

    qtypes: tuple[str, ...]
    n_bytes: int
    padding_bytes: int
    largest_bytes: int
    reads: tuple[Read, ...]
    loss_nats: float


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share one decision.

    Attributes:
        tensors: The tensors.
        layer: Their layer; None outside the layers.
        place: Where they may live: on their layer's device; there or in RAM (``free``); on the
            device of the output; in RAM (``host``); or one copy in RAM and one beside the output,
            as llama.cpp does with tied embeddings.
        options: Ways to quantize them, most bytes first, none dominated by another.
        n_crossings: Hops to the CPU and back that they cause when they leave their layer's GPU.
    """

    tensors: tuple[Tensor, ...]
    layer: int | None
    place: Place
    options: tuple[Option, ...]
    n_crossings: float


@dataclass(frozen=True)
class Problem:
    """Everything that the integer program needs.

    Attributes:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types.
        policy: The rules.
        groups: One per decision.
        layer_devices: Name of the device of each loaded layer; its KV cache is there too.
        min_decode_tps: Least decode speed with the context full; None for no limit.
        plans_with_high_end: Whether compute buffers count with the high end of their estimate.
    """

    inventory: Inventory
    machine: Machine
    workload: Workload
    policy: Policy
    groups: tuple[Group, ...]
    layer_devices: tuple[str, ...]
    min_decode_tps: float | None
    plans_with_high_end: bool = True

    def with_layers(self, layer_devices: tuple[str, ...]) -> "Problem":
        """The same problem with the layers on other devices."""
        return replace(self, layer_devices=layer_devices)

    @cached_property
    def devices(self) -> dict[str, Device]:
        """The machine's devices by name."""
        return {device.name: device for device in self.machine.devices}

    @cached_property
    def output_device(self) -> Device:
        """Device of the output matrix: the last GPU, as with ``-ngl`` and ``-ts``."""
        return self.machine.gpus[-1] if self.machine.gpus else self.machine.ram

    @cached_property
    def cache_bytes(self) -> tuple[int, ...]:
        """Bytes of the KV cache and state per layer."""
        return memory.cache_bytes(self.inventory.architecture, self.workload)

    @cached_property
    def n_layers(self) -> int:
        """Layers that are loaded and so have a device."""
        return self.inventory.architecture.n_loaded_layers

    @cached_property
    def trailing_cache_bytes(self) -> int:
        """Cache of blocks that are not loaded (older llama.cpp builds); beside the output."""
        return sum(self.cache_bytes[self.n_layers :])

    def device_cache_bytes(self, device: Device) -> int:
        """KV cache and state of a device's layers."""
        pairs = zip(self.cache_bytes, self.layer_devices, strict=False)
        trailing = self.trailing_cache_bytes if device == self.output_device else 0
        return trailing + sum(n_bytes for n_bytes, name in pairs if name == device.name)

    @cached_property
    def _launch(self) -> Launch:
        return Launch(workload=self.workload)

    def is_streamed(self, group: Group) -> bool:
        """Whether large batches copy the group to a GPU when it is held in RAM."""
        return bool(self.machine.gpus) and group.layer is not None and compute.streams(self._launch)

    @cached_property
    def around_streamed_bytes(self) -> int:
        """What a GPU's compute buffer holds beside weights that are streamed to it."""
        architecture, n_vocab = self.inventory.architecture, self.inventory.n_vocab
        return self._planned(compute.around_streamed(architecture, n_vocab, self._launch))

    def may_pipeline(self) -> bool:
        """Whether several GPUs work as a pipeline if every tensor of a layer is on a GPU."""
        is_whole = self.machine.ram.name not in self.layer_devices
        return len(self.machine.gpus) > 1 and is_whole

    def compute_bytes(
        self, device: Device, streamed_bytes: int = 0, *, is_pipeline: bool = False
    ) -> int:
        """The compute buffer of a device that the plan reckons with.

        What is on the device is not settled yet: of all graphs that it may get the largest counts.

        Args:
            device: The device.
            streamed_bytes: The largest tensor that is streamed from RAM, to the first GPU.
            is_pipeline: Whether the GPUs work as a pipeline.
        """
        architecture, n_vocab = self.inventory.architecture, self.inventory.n_vocab
        is_first = device == self.machine.devices[0]
        is_gpu = device.kind == "gpu"
        work = Work(
            device_kind=device.kind,
            has_output=device == self.output_device,
            streamed_bytes=streamed_bytes if is_first and is_gpu else 0,
            n_input_copies=compute.PIPELINE_COPIES if is_pipeline else 1,
            is_first=is_first,
        )
        has_layers = (True,) if is_gpu else (False, True)
        if device.name not in self.layer_devices and not is_gpu:
            has_layers = (False,)
        has_experts = (False, True) if architecture.n_expert else (False,)
        return max(
            self._planned(compute.estimate(architecture, n_vocab, self._launch, graph))
            for layers in has_layers
            for experts in has_experts
            for graph in [replace(work, has_layers=layers, has_experts=experts)]
        )

    def _planned(self, estimate: BytesEstimate) -> int:
        return estimate.high if self.plans_with_high_end else estimate.expected

    @property
    def decode_price_nats_per_s(self) -> float:
        """Nats that a second per token is worth; 0 where a speed is asked for."""
        is_free = self.min_decode_tps is None
        return self.policy.decode_price_nats_per_s if is_free else 0.0

    @cached_property
    def cache_kinds(self) -> tuple[LayerCache, ...]:
        """The cache of each loaded layer; layers with equal ones take equal bytes and time."""
        return self.inventory.architecture.caches[: self.n_layers]

    def cache_s(self, kind: LayerCache, device: Device) -> float:
        """Seconds per token to attend to the cache of one layer, with the context full.

        A cache that all slots share is read whole for each of them.
        """
        arch, depth = self.inventory.architecture, self.workload.context / self.workload.n_streams
        return cache_s(device, arch, kind, self.workload, depth)

    @cached_property
    def base_decode_s(self) -> float:
        """Seconds per token that no type changes: caches, with the context full, and the rest."""
        caches = sum(
            self.cache_s(kind, self.devices[name])
            for kind, name in zip(self.cache_kinds, self.layer_devices, strict=True)
        )
        n_crossings = boundary_crossings(self.layer_devices, self.output_device.name)
        return self.fixed_decode_s + caches + n_crossings * shipped().crossing_s

    @property
    def fixed_decode_s(self) -> float:
        """Seconds per token that neither types nor places change."""
        return shipped().fixed_s

    def places(self, group: Group) -> tuple[Device, ...]:
        """Devices that a group may be on."""
        if group.place in ("host", "host_and_output"):
            return (self.machine.ram,)
        if group.layer is None:
            return (self.output_device,)
        home = self.devices[self.layer_devices[group.layer]]
        if group.place == "free" and home.kind == "gpu":
            return (home, self.machine.ram)
        return (home,)

    def copies_on(self, device: Device, group: Group, placed_on: str) -> int:
        """How many copies of a group a device holds when the group is placed somewhere."""
        is_copied_here = group.place == "host_and_output" and device == self.output_device
        return int(device.name == placed_on) + int(is_copied_here)

    def bytes_on(self, device: Device, group: Group, option: Option, placed_on: str) -> int:
        """Bytes that a group takes on a device when it is placed somewhere."""
        padding = option.padding_bytes if device.kind == "gpu" else 0
        return self.copies_on(device, group, placed_on) * (option.n_bytes + padding)

    def decode_s(
        self, group: Group, option: Option, placed_on: str, *, homeless: bool = False
    ) -> float:
        """Seconds per token to read and multiply a group on the device that it is placed on.

        Args:
            group: The tensors.
            option: Their types.
            placed_on: Name of the device.
            homeless: Leave out the hops that a group costs whose layer is on another device, as
                where layers have no device yet.
        """
        seconds = sum(read_s(self.devices[placed_on], read) for read in option.reads)
        if group.tensors[0].role == "token_embd" and self.inventory.has_tied_output:
            copy = output_read(group.tensors[0], option.qtypes[0])
            seconds += read_s(self.output_device, copy)
        if not homeless and group.layer is not None and group.n_crossings:
            is_away = placed_on != self.layer_devices[group.layer]
            seconds += self.hop_s(group) if is_away else 0.0
        return seconds

    def hop_s(self, group: Group) -> float:
        """Seconds per token that a group costs by leaving its layer's GPU."""
        return group.n_crossings * shipped().crossing_s


def build_problem(
    inventory: Inventory,
    machine: Machine,
    workload: Workload,
    policy: Policy,
    min_decode_tps: float | None,
    *,
    evidence: Evidence | None = None,
) -> Problem:
    """Forms the groups and prices every option.

    Args:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types.
        policy: The rules.
        min_decode_tps: Least decode speed; None for no limit.
        evidence: What was measured of the model's losses.

    Returns:
        A problem with every layer on the output's device, for the caller to split.
    """
    losses, shares = LossTable(inventory, evidence), crossing_shares(inventory)
    tied_roles = {role: index for index, tie in enumerate(policy.ties) for role in tie}
    buckets: dict[tuple[int | None, str], list[Tensor]] = defaultdict(list)
    # In an order of its own, so that the order of the file plays no part in the plan.
    for tensor in sorted(inventory.tensors, key=lambda t: (t.layer is None, t.layer or 0, t.name)):
        if inventory.is_loaded(tensor):
            place = _place(inventory, machine, policy, tensor)
            if place == "layer" and len(policy.candidates_for(tensor, is_loaded=True)) == 1:
                key = "fixed experts" if is_expert(tensor) else "fixed"
            elif tensor.role in tied_roles:
                # Rules of a person that differ within a tie undo it.
                key = f"tie {tied_roles[tensor.role]} {policy.tensor_rule(tensor)}"
            else:
                key = tensor.name
            buckets[tensor.layer, key].append(tensor)
    groups = tuple(
        Group(
            tensors=tuple(tensors),
            layer=layer,
            place=_place(inventory, machine, policy, tensors[0]),
            options=_options(inventory, machine, policy, losses, tensors),
            n_crossings=sum(shares.get(tensor.name, 0.0) for tensor in tensors),
        )
        for (layer, _), tensors in buckets.items()
    )
    problem = Problem(inventory, machine, workload, policy, groups, (), min_decode_tps)
    return problem.with_layers((problem.output_device.name,) * problem.n_layers)


def _place(inventory: Inventory, machine: Machine, policy: Policy, tensor: Tensor) -> Place:
    if tensor.role_class == "embedding":
        is_tied = inventory.has_tied_output and tensor.role == "token_embd"
        is_copied = bool(machine.gpus) or inventory.architecture.always_copies_tied_output
        return "host_and_output" if is_tied and is_copied else "host"
    if tensor.layer is None:
        return "output"
    may_leave = bool(machine.gpus) and policy.rule(tensor.role_class).may_leave_gpu
    return "free" if may_leave else "layer"


def _options(
    inventory: Inventory,
    machine: Machine,
    policy: Policy,
    losses: LossTable,
    tensors: list[Tensor],
) -> tuple[Option, ...]:
    """Options of a group: tied tensors take the same wanted type, each with its own fallback."""
    choices = [policy.candidates_for(t, is_loaded=True) for t in tensors]
    longest = max(map(len, choices))
    found = {}
    for index in range(longest):
        # Tensors with fewer candidates (a fixed type) keep their last one.
        qtypes = tuple(names[min(index, len(names) - 1)] for names in choices)
        found[qtypes] = _option(inventory, losses, tensors, qtypes)
    return _undominated(found.values(), machine)


def _option(
    inventory: Inventory, losses: LossTable, tensors: list[Tensor], qtypes: tuple[str, ...]
) -> Option:
    pairs = list(zip(tensors, qtypes, strict=True))
    sizes = [memory.weight_bytes(t, q) for t, q in pairs]
    return Option(
        qtypes=qtypes,
        n_bytes=sum(sizes),
        padding_bytes=sum(memory.cuda_padding_bytes(t, q) for t, q in pairs),
        largest_bytes=max(sizes),
        reads=tuple(read_of(inventory, t, q) for t, q in pairs),
        loss_nats=sum(losses.loss_nats(t, q) for t, q in pairs),
    )


def _undominated(options: Collection[Option], machine: Machine) -> tuple[Option, ...]:
    """Options, most bytes first, without those that another one equals or beats in everything.

    Everything is bytes, loss, and seconds per token on each device: a type of fewer bits may be
    slower to unpack.
    """
    priced = [
        (o.n_bytes, o.loss_nats, *(sum(read_s(d, r) for r in o.reads) for d in machine.devices))
        for o in options
    ]
    by_price = sorted(zip(priced, options, strict=True), key=lambda pair: pair[0])
    kept: list[tuple[tuple[float, ...], Option]] = []
    for price, option in by_price:
        if not any(all(a <= b for a, b in zip(k, price, strict=True)) for k, _ in kept):
            kept.append((price, option))
    return tuple(option for _, option in reversed(kept))
