"""What a token, or a whole turn, takes with the layers split in some way: linear in the choices."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from quantplan.costs.decode import cache_s, network_s, read_s
from quantplan.costs.factors import shipped
from quantplan.costs.prefill import prefill_s
from quantplan.costs.speed import turn_depths
from quantplan.costs.traffic import (
    Read,
    Traffic,
    boundary_crossings,
    boundary_transfers,
    output_read,
)
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, LayerCache
from quantplan.planner.groups import Group, Option
from quantplan.workload import Workload


@dataclass(frozen=True)
class Times(ABC):
    """Seconds that each part of the model adds to what is timed.

    Attributes:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types.
        layer_devices: Name of the device of each loaded layer.
        output_device: Device of the output matrix.
    """

    inventory: Inventory
    machine: Machine
    workload: Workload
    layer_devices: tuple[str, ...]
    output_device: Device

    @property
    @abstractmethod
    def fixed_s(self) -> float:
        """Seconds that neither types nor places change."""

    @abstractmethod
    def weights_s(self, group: Group, option: Option, placed_on: str) -> float:
        """Seconds to read and multiply a group on the device that it is placed on."""

    @abstractmethod
    def cache_s(self, kind: LayerCache, device: Device) -> float:
        """Seconds to attend to the cache of one layer."""

    @abstractmethod
    def transfer_s(
        self, n_crossings: float, transfers: Mapping[str, float], output: str = ""
    ) -> float:
        """Seconds on the way between devices.

        Args:
            n_crossings: Hops there and back.
            transfers: How often a row of activations goes to or from each device.
            output: Device of the output, where its logits come back too.
        """

    @cached_property
    def base_s(self) -> float:
        """Seconds that no type changes: caches, hops where a device's layers end, and the rest."""
        output = self.output_device.name
        pairs = Counter(zip(self._cache_kinds, self.layer_devices, strict=True))
        caches = sum(n * self.cache_s(kind, self._devices[d]) for (kind, d), n in pairs.items())
        n_crossings = boundary_crossings(self.layer_devices, output)
        transfers = boundary_transfers(self.layer_devices, output)
        return self.fixed_s + caches + self.transfer_s(n_crossings, transfers, output)

    @cached_property
    def least_s(self) -> float:
        """Seconds at least, wherever layers are: fixed ones, the way to the output, its logits."""
        output = self.output_device.name
        return self.fixed_s + self.transfer_s(0, {output: 1.0}, output)

    def total_s(self, choices: Iterable[tuple[Group, tuple[Option, str]]]) -> float:
        """Seconds of the whole model, with an option and the name of a device for every group."""
        return self.base_s + sum(self.group_s(g, option, name) for g, (option, name) in choices)

    def group_s(
        self, group: Group, option: Option, placed_on: str, *, homeless: bool = False
    ) -> float:
        """Seconds that a group adds.

        Args:
            group: The tensors.
            option: Their types.
            placed_on: Name of the device.
            homeless: Leave out the hops that a group costs whose layer is on another device, as
                where layers have no device yet.
        """
        seconds = self.weights_s(group, option, placed_on)
        if homeless or group.layer is None or not group.n_crossings:
            return seconds
        home = self.layer_devices[group.layer]
        return seconds if placed_on == home else seconds + self.hop_s(group, (placed_on, home))

    def hop_s(self, group: Group, ends: Iterable[str]) -> float:
        """Seconds that a group costs by leaving the device of its layer.

        Args:
            group: The tensors.
            ends: Names of the devices that it is on and that its layer is on, as far as known.
        """
        return self.transfer_s(group.n_crossings, dict.fromkeys(ends, 2 * group.n_crossings))

    def way_s(self, group: Group, name: str) -> float:
        """Seconds of such a hop that are the network's to one of its two devices."""
        return self.transfer_s(0, {name: 2 * group.n_crossings})

    def boundary_s(self, name: str) -> float:
        """Seconds at least where layers on a device end before the output."""
        return self.transfer_s(boundary_crossings((name,), ""), {name: 2.0})

    @cached_property
    def _devices(self) -> dict[str, Device]:
        return {device.name: device for device in self.machine.devices}

    @property
    def _cache_kinds(self) -> tuple[LayerCache, ...]:
        """The cache of each loaded layer."""
        architecture = self.inventory.architecture
        return architecture.caches[: architecture.n_loaded_layers]

    def _network_s(self, transfers: Mapping[str, float], n_tokens: int, output: str) -> float:
        """Seconds on the way to and from other hosts, for a batch of tokens."""
        if not self.machine.endpoints:
            return 0.0
        architecture, n_vocab = self.inventory.architecture, self.inventory.n_vocab
        traffic = Traffic(architecture, {}, (), 0.0, transfers, n_vocab, output)
        return network_s(traffic, self.machine, n_tokens)


class DecodeTimes(Times):
    """Seconds per token of the answer, with the context full."""

    @property
    def fixed_s(self) -> float:
        """Seconds per token that neither types nor places change."""
        return shipped().fixed_s

    def weights_s(self, group: Group, option: Option, placed_on: str) -> float:
        """Seconds per token to read and multiply a group; of a tied embedding the output too."""
        seconds = sum(read_s(self._devices[placed_on], read) for read in option.reads)
        if group.tensors[0].role == "token_embd" and self.inventory.has_tied_output:
            copy = output_read(group.tensors[0], option.qtypes[0])
            seconds += read_s(self.output_device, copy)
        return seconds

    def cache_s(self, kind: LayerCache, device: Device) -> float:
        """Seconds per token to attend to the cache of one layer.

        A cache that all slots share is read whole for each of them.
        """
        arch, depth = self.inventory.architecture, self.workload.slot_context
        return cache_s(device, arch, kind, self.workload, depth)

    def transfer_s(
        self, n_crossings: float, transfers: Mapping[str, float], output: str = ""
    ) -> float:
        """Seconds per token on the way between devices."""
        return n_crossings * shipped().crossing_s + self._network_s(transfers, 1, output)


class TurnTimes(Times):
    """Seconds of the workload's turn: its prompt from an empty context, then its answer.

    Matrices take as long at any depth, so that a turn is linear in the choices too.
    """

    @cached_property
    def _decode(self) -> DecodeTimes:
        return DecodeTimes(
            self.inventory, self.machine, self.workload, self.layer_devices, self.output_device
        )

    def _together_s(self, token_s: float, ubatch_s: float) -> float:
        """Seconds of a turn, from those per token of the answer and per ubatch of the prompt."""
        work = self.workload
        return work.answer_tokens * token_s + work.prompt_tokens / work.ubatch * ubatch_s

    @property
    def fixed_s(self) -> float:
        """Seconds per turn that neither types nor places change."""
        return self.workload.answer_tokens * self._decode.fixed_s

    def weights_s(self, group: Group, option: Option, placed_on: str) -> float:
        """Seconds per turn to read and multiply a group on the device that it is placed on."""
        token_s = self._decode.weights_s(group, option, placed_on)
        return self._together_s(token_s, self._prompt_s({placed_on: option.reads}, ()))

    def cache_s(self, kind: LayerCache, device: Device) -> float:
        """Seconds per turn to attend to the cache of one layer.

        Both parts are integrals over the depth, as `SpeedPrediction.turn_s` forms them.
        """
        work, arch = self.workload, self.inventory.architecture
        prompt, answer = turn_depths(self._cache_kinds, work)
        seconds = 0.0
        for depth, tokens in prompt.items():
            seconds += tokens * self._prompt_s({}, (kind,), device, depth) / work.ubatch
        for depth, tokens in answer.items():
            seconds += tokens * cache_s(device, arch, kind, work, depth)
        return seconds

    def transfer_s(
        self, n_crossings: float, transfers: Mapping[str, float], output: str = ""
    ) -> float:
        """Seconds per turn on the way between devices."""
        token_s = self._decode.transfer_s(n_crossings, transfers, output)
        return self._together_s(token_s, self._network_s(transfers, self.workload.ubatch, output))

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
