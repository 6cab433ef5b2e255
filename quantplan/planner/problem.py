"""What the integer program is made from: groups, and what they cost on each device."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from quantplan.costs import compute, memory
from quantplan.costs.compute import Estimate, Work
from quantplan.costs.decode import cache_s, read_s
from quantplan.costs.evidence import Evidence
from quantplan.costs.factors import shipped
from quantplan.costs.prefill import prefill_s
from quantplan.costs.quality import LossTable, link
from quantplan.costs.speed import turn_depths
from quantplan.costs.traffic import (
    Read,
    Traffic,
    boundary_crossings,
    output_read,
)
from quantplan.hardware import Device, Machine
from quantplan.inventory import Inventory, LayerCache
from quantplan.placement import Launch
from quantplan.planner.goal import Goal
from quantplan.planner.groups import Group, Option, form_groups
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

    def with_layers(self, layer_devices: tuple[str, ...]) -> "Problem":
        """The same problem with the layers on other devices."""
        return replace(self, layer_devices=layer_devices)

    def with_policy(self, policy: Policy) -> "Problem":
        """The same problem with other rules, every layer on the output's device."""
        made = build_problem(
            self.inventory, self.machine, self.workload, policy, self.goal, evidence=self.evidence
        )
        return replace(made, plans_with_high_end=self.plans_with_high_end)

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

    def _planned(self, estimate: Estimate) -> int:
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

    def cache_s(self, kind: LayerCache, device: Device) -> float:
        """Seconds per token to attend to the cache of one layer, with the context full.

        A cache that all slots share is read whole for each of them.
        """
        arch, depth = self.inventory.architecture, self.workload.context / self.workload.n_streams
        return cache_s(device, arch, kind, self.workload, depth)

    @cached_property
    def base_decode_s(self) -> float:
        """Seconds per token that no type changes: caches, with the context full, and the rest."""
        return self.fixed_decode_s + self._of_caches(self.cache_s) + self._boundary_s

    @cached_property
    def base_turn_s(self) -> float:
        """Seconds of the workload's turn that no type changes."""
        boundaries = self.workload.answer_tokens * self._boundary_s
        return self.fixed_turn_s + self._of_caches(self.cache_turn_s) + boundaries

    def _of_caches(self, seconds: Callable[[LayerCache, Device], float]) -> float:
        """The sum over all layers."""
        pairs = Counter(zip(self.cache_kinds, self.layer_devices, strict=True))
        return sum(n * seconds(kind, self.devices[name]) for (kind, name), n in pairs.items())

    @property
    def _boundary_s(self) -> float:
        n_crossings = boundary_crossings(self.layer_devices, self.output_device.name)
        return n_crossings * shipped().crossing_s

    @property
    def fixed_decode_s(self) -> float:
        """Seconds per token that neither types nor places change."""
        return shipped().fixed_s

    @property
    def fixed_turn_s(self) -> float:
        """Seconds of the workload's turn that neither types nor places change."""
        return self.workload.answer_tokens * self.fixed_decode_s

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

    def turn_s(
        self, group: Group, option: Option, placed_on: str, *, homeless: bool = False
    ) -> float:
        """Seconds that a group adds to the workload's turn: its prompt, then its answer.

        Matrices take as long at any depth, so the time is linear in the choices.

        Args:
            group: The tensors.
            option: Their types.
            placed_on: Name of the device.
            homeless: Leave out hops, as in `decode_s`.
        """
        answer = self.decode_s(group, option, placed_on, homeless=homeless)
        prompt = self._prompt_s({placed_on: option.reads}, ())
        work = self.workload
        return work.answer_tokens * answer + work.prompt_tokens * prompt / work.ubatch

    def cache_turn_s(self, kind: LayerCache, device: Device) -> float:
        """Seconds that attention to the cache of one layer adds to the workload's turn.

        Both parts are integrals over the depth, as `SpeedPrediction.turn_s` forms them.
        """
        work, arch = self.workload, self.inventory.architecture
        prompt, answer = turn_depths(arch.caches[: self.n_layers], work)
        seconds = 0.0
        for depth, tokens in prompt.items():
            seconds += tokens * self._prompt_s({}, (kind,), device, depth) / work.ubatch
        for depth, tokens in answer.items():
            seconds += tokens * cache_s(device, arch, kind, work, depth)
        return seconds

    def turn_hop_s(self, group: Group) -> float:
        """Seconds per turn that a group costs by leaving its layer's GPU."""
        return self.workload.answer_tokens * self.hop_s(group)

    def _prompt_s(
        self,
        reads: Mapping[str, tuple[Read, ...]],
        kinds: tuple[LayerCache, ...],
        device: Device | None = None,
        depth: float = 0.0,
    ) -> float:
        """Seconds of one ubatch of a prompt for some matrices, or for the caches of a device."""
        architecture = self.inventory.architecture
        if kinds:
            architecture = architecture.model_copy(update={"caches": kinds})
        layers = (device.name,) * len(kinds) if device else ()
        traffic = Traffic(architecture, reads, layers, 0.0)
        return prefill_s(traffic, self.machine, self.workload, depth)


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
    losses = LossTable(inventory, evidence)
    groups = form_groups(inventory, machine, workload, policy, goal=goal, losses=losses)
    problem = Problem(inventory, machine, workload, policy, groups, (), goal, evidence)
    return problem.with_layers((problem.output_device.name,) * problem.n_layers)
