"""What the integer program is made from: groups, and what they cost on each device."""

from dataclasses import dataclass, replace
from functools import cached_property

from quantplan.costs import compute, memory
from quantplan.costs.compute import BytesEstimate, Work
from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable, link
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, LayerCache
from quantplan.placement import Launch
from quantplan.planner.goal import Goal
from quantplan.planner.groups import Group, Option, form_groups
from quantplan.planner.times import DecodeTimes, TurnTimes
from quantplan.policy import Policy
from quantplan.workload import Workload


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
        goal: What is to be best, and what has to be reached.
        evidence: What was measured of the model's losses.
        plans_with_high_end: Whether compute buffers count with the high end of their estimate.
        output: Name of the GPU that holds the output matrix; layers are on it and on those before
            it. None where that is open: the last one, until `by_output` says otherwise.
    """

    inventory: Inventory
    machine: Machine
    workload: Workload
    policy: Policy
    groups: tuple[Group, ...]
    layer_devices: tuple[str, ...]
    goal: Goal
    evidence: Evidence | None = None
    plans_with_high_end: bool = True
    output: str | None = None

    def with_layers(self, layer_devices: tuple[str, ...], output: str | None = None) -> "Problem":
        """The same problem with the layers, and the output if it is named, on other devices."""
        return replace(self, layer_devices=layer_devices, output=output or self.output)

    def by_output(self) -> tuple["Problem", ...]:
        """The problem with the output on each GPU that it may be on, all layers beside it.

        llama.cpp has the output on the last GPU with a share of the layers. That is the last one,
        or one before a GPU that is unlike it. Of equal GPUs in a row only the last is tried, since
        they differ by a hop at most.
        """
        gpus = self.machine.gpus
        if self.output is not None or not gpus:
            return (self,)
        unnamed = [gpu.model_copy(update={"name": ""}) for gpu in gpus]
        ends = [gpu.name for gpu, a, b in zip(gpus, unnamed, unnamed[1:], strict=False) if a != b]
        names = (*ends, gpus[-1].name)
        return tuple(self.with_layers((name,) * self.n_layers, name) for name in names)

    def with_policy(self, policy: Policy) -> "Problem":
        """The same problem with other rules, every layer on the output's device."""
        made = self._rebuilt(self.machine, policy)
        return made.with_layers((self.output_device.name,) * self.n_layers, self.output)

    def without_gpus(self) -> "Problem":
        """The same problem on the RAM alone."""
        return self._rebuilt(self.machine.model_copy(update={"gpus": ()}), self.policy)

    def _rebuilt(self, machine: Machine, policy: Policy) -> "Problem":
        """The same problem with the groups that a machine and rules make."""
        made = build_problem(
            self.inventory, machine, self.workload, policy, self.goal, evidence=self.evidence
        )
        return replace(made, plans_with_high_end=self.plans_with_high_end)

    @cached_property
    def devices(self) -> dict[str, Device]:
        """The machine's devices by name."""
        return {device.name: device for device in self.machine.devices}

    @cached_property
    def output_device(self) -> Device:
        """Device of the output matrix: the last GPU for layers, as with ``-ngl`` and ``-ts``."""
        return self.layer_gpus[-1] if self.layer_gpus else self.machine.ram

    @cached_property
    def layer_gpus(self) -> tuple[Device, ...]:
        """GPUs that layers may be on, in order; those behind may hold experts."""
        gpus = self.machine.gpus
        if self.output is None:
            return gpus
        return gpus[: 1 + [gpu.name for gpu in gpus].index(self.output)]

    @cached_property
    def layer_places(self) -> tuple[str, ...]:
        """Names of the devices that layers may be on: first ones in RAM, the others on GPUs."""
        return (self.machine.ram.name, *(gpu.name for gpu in self.layer_gpus))

    def may_hold(self, device: Device, group: Group) -> bool:
        """Whether a group of a layer may be on a device in some split of the layers."""
        return device.kind == "cpu" or group.may_roam or device in self.layer_gpus

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
        has_streams = self.machine.streaming_gpu is not None and compute.streams(self._launch)
        return has_streams and group.layer is not None

    @cached_property
    def around_streamed_bytes(self) -> int:
        """What a GPU's compute buffer holds beside weights that are streamed to it."""
        architecture, n_vocab = self.inventory.architecture, self.inventory.n_vocab
        return self._planned(compute.around_streamed(architecture, n_vocab, self._launch))

    def may_pipeline(self) -> bool:
        """Whether several GPUs work as a pipeline if every tensor is on the GPU of its layer."""
        is_whole = self.machine.ram.name not in self.layer_devices
        return len(self.machine.gpus) > 1 and is_whole and not self.machine.endpoints

    def compute_bytes(
        self, device: Device, streamed_bytes: int = 0, *, is_pipeline: bool = False
    ) -> int:
        """The compute buffer of a device that the plan reckons with.

        What is on the device is not settled yet: of all graphs that it may get the largest counts.

        Args:
            device: The device.
            streamed_bytes: The largest tensor that is streamed from RAM, to the first GPU of this
                host.
            is_pipeline: Whether the GPUs work as a pipeline.
        """
        architecture, n_vocab = self.inventory.architecture, self.inventory.n_vocab
        is_first = device == self.machine.devices[0]
        is_gpu = device.kind == "gpu"
        work = Work(
            device_kind=device.kind,
            has_output=device == self.output_device,
            streamed_bytes=streamed_bytes if device == self.machine.streaming_gpu else 0,
            n_input_copies=compute.PIPELINE_COPIES if is_pipeline else 1,
            is_first=is_first,
            streams=device == self.machine.streaming_gpu and compute.streams(self._launch),
        )
        has_layers = (True,) if is_gpu else (False, True)
        if device.name not in self.layer_devices and device not in self.layer_gpus:
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
    def loss_weight(self) -> float:
        """Weight of the loss in the objective."""
        return 0.0 if self.goal.best == "speed" else 1.0

    @property
    def decode_price_nats_per_s(self) -> float:
        """Nats that a second per token is worth; 0 where a speed is asked for."""
        if self.goal.best == "speed":
            return self.policy.decode_price_nats_per_s or 1.0
        return self.policy.decode_price_nats_per_s if self.goal.prices_time else 0.0

    @property
    def max_summed_loss_nats(self) -> float | None:
        """Sum of the tensors' losses at which the model loses as much as it may."""
        most = self.goal.max_loss_nats
        return None if most is None else link().loss(most)

    @cached_property
    def unloaded_bytes(self) -> int:
        """Bytes in the file of tensors that the runtime does not load."""
        return sum(
            memory.weight_bytes(t, self.policy.candidates_for(t, is_loaded=False)[0])
            for t in self.inventory.tensors
            if not self.inventory.is_loaded(t)
        )

    @cached_property
    def cache_kinds(self) -> tuple[LayerCache, ...]:
        """The cache of each loaded layer; layers with equal ones take equal bytes and time."""
        return self.inventory.architecture.caches[: self.n_layers]

    @cached_property
    def cache_kind_numbers(self) -> tuple[int, ...]:
        """Layers with equal caches have equal numbers."""
        numbers: dict[LayerCache, int] = {}
        return tuple(numbers.setdefault(kind, len(numbers)) for kind in self.cache_kinds)

    @cached_property
    def decode(self) -> DecodeTimes:
        """Seconds per token with the context full."""
        return DecodeTimes(*self._setting)

    @cached_property
    def turn(self) -> TurnTimes:
        """Seconds of the workload's turn."""
        return TurnTimes(*self._setting)

    @property
    def _setting(self) -> tuple[Inventory, Machine, Workload, tuple[str, ...], Device]:
        """What times depend on."""
        split = self.layer_devices
        return self.inventory, self.machine, self.workload, split, self.output_device

    def places(self, group: Group) -> tuple[Device, ...]:
        """Devices that a group may be on."""
        if group.place in ("host", "host_and_output"):
            return (self.machine.ram,)
        if group.layer is None:
            return (self.output_device,)
        home = self.devices[self.layer_devices[group.layer]]
        if group.place == "free" and home.kind == "gpu":
            others = (gpu for gpu in self.machine.gpus if gpu != home and group.may_roam)
            return (home, *others, self.machine.ram)
        return (home,)

    def is_moved(self, group: Group, placed_on: str) -> bool:
        """Whether a group is on another device than its layer."""
        return group.layer is not None and placed_on != self.layer_devices[group.layer]

    def copies_on(self, device: Device, group: Group, option: Option, placed_on: str) -> int:
        """How many copies of a group a device holds when the group is placed somewhere."""
        is_tied_here = group.place == "host_and_output" and device == self.output_device
        return int(device.name == placed_on) + int(is_tied_here and option.is_copied)

    def bytes_on(self, device: Device, group: Group, option: Option, placed_on: str) -> int:
        """Bytes that a group takes on a device when it is placed somewhere."""
        padding = option.padding_bytes if device.kind == "gpu" else 0
        return self.copies_on(device, group, option, placed_on) * (option.n_bytes + padding)


def build_problem(
    inventory: Inventory,
    machine: Machine,
    workload: Workload,
    policy: Policy,
    goal: Goal,
    *,
    evidence: Evidence | None = None,
) -> Problem:
    """Forms the groups and prices every option.

    Args:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types.
        policy: The rules.
        goal: What is to be best, and what has to be reached.
        evidence: What was measured of the model's losses.

    Returns:
        A problem with every layer on the output's device, for the caller to split.
    """
    evidence = evidence and evidence.of(inventory)
    losses = LossTable(inventory, evidence)
    groups = form_groups(inventory, machine, workload, policy, goal=goal, losses=losses)
    problem = Problem(inventory, machine, workload, policy, groups, (), goal, evidence)
    return problem.with_layers((problem.output_device.name,) * problem.n_layers)
