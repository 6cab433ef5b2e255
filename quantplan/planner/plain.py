"""What plain flags lead to: ``-ngl``, ``--cpu-moe`` and their kin, many placements at a time.

The same predictions as `quantplan.predict` and `quantplan.costs.speed`, summed by layer and part of
a layer, so that all values of a flag are compared at the price of one.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quantplan.costs import compute, memory
from quantplan.costs.compute import Work
from quantplan.costs.decode import cache_s, logits_s, read_s, row_s
from quantplan.costs.factors import shipped
from quantplan.costs.host import copies_tied_output
from quantplan.costs.traffic import Read, Where, crossing_shares, output_read, read_of
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, Tensor
from quantplan.placement import Launch, layer_devices
from quantplan.workload import Workload

# llama.cpp's overrides of a layer name feed-forward tensors by what their names start with; the
# rest of the layer is never named.
_PART = re.compile(r"blk\.\d+\.ffn_(up|gate|down)(?:_up)?(_(?:ch)?exps|\.)?")
_STEMS = ("up", "gate", "down")
_KINDS = ("experts", "dense", "other")
N_PARTS = len(_STEMS) * len(_KINDS) + 1
_REST = N_PARTS - 1


def parts_of(stems: Sequence[str] = _STEMS, kinds: Sequence[str] = _KINDS) -> list[int]:
    """Indices of parts: ``ffn_`` tensors by stem (gate_up counts as gate) and kind."""
    return [
        _STEMS.index(stem) * len(_KINDS) + _KINDS.index(kind) for stem in stems for kind in kinds
    ]


def _part_of(tensor: Tensor) -> int:
    match = _PART.match(tensor.name)
    if match is None:
        return _REST
    kind = "other" if match[2] is None else "dense" if match[2] == "." else "experts"
    return parts_of([match[1]], [kind])[0]


@dataclass(frozen=True)
class Layouts:
    """Some placements; devices are indices into those of the machine, RAM last.

    Attributes:
        homes: Device of each layer and, last, of the output layer; one row per placement.
        parts: Device of each part of each layer; axes are placement, part, layer.
        is_overridden: Whether flags name single tensors, per placement.
    """

    homes: NDArray[np.intp]
    parts: NDArray[np.intp]
    is_overridden: NDArray[np.bool_]


@dataclass(frozen=True)
class Outcomes:
    """What placements lead to.

    Attributes:
        n_bytes: Memory used, compute buffers included; axes are placement and device.
        over_bytes: Bytes by which devices are over what is usable, summed, per placement.
        decode_s: Seconds per token with the context full, per placement.
    """

    n_bytes: NDArray[np.int64]
    over_bytes: NDArray[np.int64]
    decode_s: NDArray[np.float64]

    @property
    def best(self) -> int:
        """The fastest placement of those that fit; that which fits least badly where none does."""
        if (self.over_bytes == 0).any():
            return int(np.where(self.over_bytes == 0, self.decode_s, np.inf).argmin())
        return int(self.over_bytes.argmin())


class PlainCosts:
    """Model, machine and workload, ready to price plain placements of any types."""

    def __init__(
        self,
        inventory: Inventory,
        machine: Machine,
        workload: Workload,
        *,
        plans_with_high_end: bool = True,
        op_offload: bool = True,
    ) -> None:
        """Sorts the tensors into parts of layers.

        Args:
            inventory: The model.
            machine: The devices.
            workload: Context, slots, batch and KV types.
            plans_with_high_end: Whether compute buffers count with the high end of their estimate.
            op_offload: Whether weights in RAM may be streamed to a GPU for prompts.
        """
        self.inventory, self.machine, self.workload = inventory, machine, workload
        self.plans_with_high_end, self.op_offload = plans_with_high_end, op_offload
        self.ram = len(machine.devices) - 1
        self.n_layers = inventory.architecture.n_layers
        self.shares = np.zeros((N_PARTS, self.n_layers))
        self.has_experts = np.zeros((N_PARTS, self.n_layers), bool)
        loaded = [tensor for tensor in inventory.tensors if inventory.is_loaded(tensor)]
        self.in_layers = [tensor for tensor in loaded if tensor.layer is not None]
        self.outside = [tensor for tensor in loaded if tensor.layer is None]
        self.part = np.array([_part_of(tensor) for tensor in self.in_layers], np.intp)
        self.layer = np.array([tensor.layer for tensor in self.in_layers], np.intp)
        shares = crossing_shares(inventory)
        for part, tensor in zip(self.part, self.in_layers, strict=True):
            self.shares[part, tensor.layer] += shares.get(tensor.name, 0.0)
            self.has_experts[part, tensor.layer] |= tensor.is_expert
        self.is_matrix = np.array([len(tensor.shape_ne) > 1 for tensor in self.in_layers])
        self._prices: dict[tuple[str, tuple[int, ...], str], _Price] = {}
        self._buffers: dict[Work, int] = {}
        self._homes: dict[tuple[int, tuple[float, ...]], list[int]] = {}

    @cached_property
    def cache_bytes(self) -> NDArray[np.int64]:
        """KV cache and state of each layer."""
        found = memory.cache_bytes(self.inventory.architecture, self.workload)
        return np.array(found, np.int64)

    @cached_property
    def cache_s(self) -> NDArray[np.float64]:
        """Seconds to attend with the context full; axes are device and loaded layer."""
        arch, depth = self.inventory.architecture, self.workload.slot_context
        kinds = arch.caches[: arch.n_loaded_layers]
        rows = []
        for device in self.machine.devices:
            seconds = {
                kind: cache_s(device, arch, kind, self.workload, depth) for kind in set(kinds)
            }
            rows.append([seconds[kind] for kind in kinds])
        return np.array(rows)

    @cached_property
    def usable_bytes(self) -> NDArray[np.int64]:
        """Bytes of each device that may be used."""
        return np.array([d.usable_bytes for d in self.machine.devices], np.int64)

    def price(self, tensor: Tensor, qtype_name: str) -> "_Price":
        """Bytes and seconds of a tensor; equal ones are priced once."""
        key = (tensor.role, tensor.shape_ne, qtype_name)
        found = self._prices.get(key)
        if found is None:
            read = read_of(self.inventory, tensor, qtype_name)
            found = self._prices[key] = _Price(
                memory.weight_bytes(tensor, qtype_name),
                memory.cuda_padding_bytes(tensor, qtype_name),
                self.seconds(read),
            )
        return found

    def seconds(self, read: Read) -> NDArray[np.float64]:
        """Seconds to read and multiply matrices on each device."""
        return np.array([read_s(device, read) for device in self.machine.devices])

    def homes(self, n_gpu_layers: int, split: Sequence[float] = ()) -> list[int]:
        """Device of each layer and of the output layer, by ``-ngl`` and ``-ts``."""
        key = n_gpu_layers, tuple(split)
        if key not in self._homes:
            launch = Launch(n_gpu_layers=key[0], tensor_split=key[1], workload=self.workload)
            index = {device.name: d for d, device in enumerate(self.machine.devices)}
            names = layer_devices(self.inventory, self.machine, launch)
            self._homes[key] = [index[name] for name in names]
        return self._homes[key]

    @property
    def all_homes(self) -> list[list[int]]:
        """`homes` of every ``-ngl``, from 0."""
        return [self.homes(n) for n in range(self.n_layers + 2)]

    def layouts(
        self, homes: Sequence[Sequence[int]], moved: Sequence[NDArray[np.intp]] | None = None
    ) -> Layouts:
        """Placements from the homes of the layers.

        Args:
            homes: Device of each layer and the output layer, per placement.
            moved: Device by part and layer where a flag names one, else -1; per placement.
        """
        rows = np.array(homes, np.intp)
        parts = np.repeat(rows[:, None, :-1], N_PARTS, axis=1)
        is_overridden = np.zeros(len(rows), bool)
        if moved is not None:
            named = np.array(moved, np.intp)
            is_overridden |= (named >= 0).any(axis=(1, 2))
            parts = np.where(named >= 0, named, parts)
        return Layouts(rows, parts, is_overridden)

    def buffer_bytes(self, work: Work) -> int:
        """A compute buffer as plans reckon with it."""
        if work not in self._buffers:
            architecture, n_vocab = self.inventory.architecture, self.inventory.n_vocab
            found = compute.estimate(architecture, n_vocab, self._launch, work)
            self._buffers[work] = found.high if self.plans_with_high_end else found.expected
        return self._buffers[work]

    @cached_property
    def _launch(self) -> Launch:
        return Launch(workload=self.workload, op_offload=self.op_offload)

    @cached_property
    def streams(self) -> bool:
        """Whether large batches copy weights from RAM to the first GPU of this host."""
        return self.machine.streaming_gpu is not None and compute.streams(self._launch)

    @cached_property
    def n_pipeline_copies(self) -> int:
        """Copies of the graph's inputs where all is on GPUs and nothing is overridden."""
        is_pipeline = len(self.machine.gpus) > 1 and not self.machine.endpoints
        return compute.PIPELINE_COPIES if is_pipeline else 1


@dataclass(frozen=True, slots=True)
class _Price:
    n_bytes: int
    padding_bytes: int
    seconds: NDArray[np.float64]


class TypedModel:
    """A model in given types: bytes and seconds of every part of every layer."""

    def __init__(self, costs: PlainCosts, qtypes: Mapping[str, str]) -> None:
        """Sums the tensors.

        Args:
            costs: Model, machine and workload.
            qtypes: Type by full tensor name; tensors left out keep theirs.
        """
        self.costs, self.qtypes = costs, qtypes
        n_devices, shape = len(costs.machine.devices), (N_PARTS, costs.n_layers)
        self.n_bytes = np.zeros((2, *shape), np.int64)  # in RAM, on a GPU
        self.largest = np.zeros(shape, np.int64)
        self.seconds = np.zeros((n_devices, *shape))
        self.outside_bytes = np.zeros((3, 2), np.int64)  # output layer, embedding, its copy
        self.outside_s = np.zeros((3, n_devices))
        prices = [costs.price(t, qtypes.get(t.name, t.qtype)) for t in costs.in_layers]
        self._tensor_s = np.array([price.seconds for price in prices])
        sizes = np.array([(price.n_bytes, price.padding_bytes) for price in prices], np.int64)
        at = costs.part, costs.layer
        np.add.at(self.n_bytes[0], at, sizes[:, 0])
        np.add.at(self.n_bytes[1], at, sizes.sum(axis=1))
        for d in range(n_devices):
            np.add.at(self.seconds[d], at, self._tensor_s[:, d])
        np.maximum.at(self.largest, at, np.where(costs.is_matrix, sizes[:, 0], 0))
        for tensor in costs.outside:
            self._add_outside(tensor)

    def _add_outside(self, tensor: Tensor) -> None:
        name, arch = self.qtypes.get(tensor.name, tensor.qtype), self.costs.inventory.architecture
        price = self.costs.price(tensor, name)
        both = (price.n_bytes, price.n_bytes + price.padding_bytes)
        row = 1 if tensor.role_class == "embedding" else 0
        self.outside_bytes[row] += both
        self.outside_s[row] += price.seconds
        if tensor.role == "token_embd" and self.costs.inventory.has_tied_output:
            repacks = not self.costs.machine.gpus
            for on_gpu in (False, True):
                if copies_tied_output(arch, tensor, name, on_gpu=on_gpu, repacks=repacks):
                    self.outside_bytes[2, int(on_gpu)] += both[on_gpu]
            self.outside_s[2] += self.costs.seconds(output_read(tensor, name))

    def seconds_by_type(
        self, devices: NDArray[np.intp], homes: NDArray[np.intp]
    ) -> dict[tuple[str, str], float]:
        """Decode seconds by device name and type, without hops.

        Args:
            devices: Device of each loaded tensor of a layer.
            homes: Device of each layer and, last, of the output layer.
        """
        costs = self.costs
        names = [device.name for device in costs.machine.devices]
        found: dict[tuple[str, str], float] = defaultdict(float)
        seconds = self._tensor_s[np.arange(len(devices)), devices].tolist()
        for tensor, d, s in zip(costs.in_layers, devices.tolist(), seconds, strict=True):
            found[names[d], self.qtypes.get(tensor.name, tensor.qtype)] += s
        for layer, d in enumerate(homes[: costs.cache_s.shape[1]].tolist()):
            found[names[d], "cache"] += float(costs.cache_s[d, layer])
        for tensor in costs.outside:
            is_embedding = tensor.role_class == "embedding"
            d = costs.ram if is_embedding else int(homes[-1])
            name = self.qtypes.get(tensor.name, tensor.qtype)
            found[names[d], name] += float(costs.price(tensor, name).seconds[d])
        return found

    def evaluate(self, layouts: Layouts) -> Outcomes:
        """Memory and speed of placements."""
        costs, ram = self.costs, self.costs.ram
        output = layouts.homes[:, -1]
        used = np.zeros((len(output), ram + 1), np.int64)
        for d in range(ram + 1):
            on_gpu = int(d != ram)
            here = layouts.parts == d
            used[:, d] += (here * self.n_bytes[on_gpu]).sum(axis=(1, 2))
            used[:, d] += ((layouts.homes[:, :-1] == d) * costs.cache_bytes).sum(axis=1)
            used[:, d] += (output == d) * self.outside_bytes[0, on_gpu]
            used[:, d] += (output == d) * self.outside_bytes[2, on_gpu]
        used[:, ram] += self.outside_bytes[1, 0]
        used += self._buffers(layouts)
        over = np.maximum(0, used - costs.usable_bytes).sum(axis=1)
        return Outcomes(used, over, self._decode_s(layouts))

    def _buffers(self, layouts: Layouts) -> NDArray[np.int64]:
        """Compute buffers; axes are placement and device."""
        costs, ram = self.costs, self.costs.ram
        in_ram = layouts.parts == ram
        streamed = (in_ram * self.largest).max(axis=(1, 2)) * costs.streams
        whole = ~(layouts.homes == ram).any(axis=1) & ~layouts.is_overridden
        found = np.zeros((len(whole), ram + 1), np.int64)
        for d, device in enumerate(costs.machine.devices):
            has_layers = (layouts.homes[:, :-1] == d).any(axis=1)
            has_experts = ((layouts.parts == d) & costs.has_experts).any(axis=(1, 2))
            for b in range(len(whole)):
                work = Work(
                    device_kind=device.kind,
                    has_layers=bool(has_layers[b]),
                    has_experts=bool(has_experts[b]),
                    has_output=bool(layouts.homes[b, -1] == d),
                    streamed_bytes=int(streamed[b]) if device == costs.machine.streaming_gpu else 0,
                    n_input_copies=costs.n_pipeline_copies if whole[b] else 1,
                    is_first=d == 0,
                    streams=costs.streams and device == costs.machine.streaming_gpu,
                )
                found[b, d] = costs.buffer_bytes(work)
        return found

    def _decode_s(self, layouts: Layouts) -> NDArray[np.float64]:
        costs, ram = self.costs, self.costs.ram
        n_loaded = costs.cache_s.shape[1]
        output, homes = layouts.homes[:, -1], layouts.homes[:, :-1]
        part, layer = np.ogrid[:N_PARTS, : costs.n_layers]
        seconds = self.seconds[layouts.parts, part, layer].sum(axis=(1, 2))
        seconds += costs.cache_s[homes[:, :n_loaded], np.arange(n_loaded)].sum(axis=1)
        seconds += self.outside_s[0, output] + self.outside_s[1, ram] + self.outside_s[2, output]
        away = (layouts.parts != homes[:, None, :]) * costs.shares
        crossings = away.sum(axis=(1, 2))
        run = np.concatenate([homes[:, :n_loaded], output[:, None]], axis=1)
        crossings += (run[:, 1:] != run[:, :-1]).sum(axis=1) / 2
        found: NDArray[np.float64] = seconds + crossings * shipped().crossing_s + shipped().fixed_s
        return found + self._network_s(layouts, run, away) if costs.machine.endpoints else found

    def _network_s(
        self, layouts: Layouts, run: NDArray[np.intp], away: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Seconds per token on the way to and from other hosts, per placement.

        Args:
            layouts: The placements.
            run: Device of each loaded layer and of the output layer, per placement.
            away: Hops that each part of each layer causes by leaving its layer, as `layouts.parts`.
        """
        costs = self.costs
        machine, inventory = costs.machine, costs.inventory
        path = np.concatenate([np.full((len(run), 1), costs.ram), run], axis=1)
        seconds = np.zeros(len(run))
        for d, device in enumerate(machine.gpus):
            if device.network is not None:
                is_here = path == d
                n_ways = (is_here[:, 1:] != is_here[:, :-1]).sum(axis=1, dtype=np.float64)
                is_end = (layouts.parts == d) | (layouts.homes[:, None, :-1] == d)
                n_ways += 2 * (away * is_end).sum(axis=(1, 2))
                seconds += n_ways * row_s(device.network, inventory.architecture)
                seconds += is_here[:, -1] * logits_s(device.network, inventory.n_vocab)
        return seconds

    def where(self, layouts: Layouts, b: int) -> Where:
        """Whether GPUs, the CPU or both multiply weights in a placement."""
        held = layouts.parts[b][self.n_bytes[0] > 0]
        in_ram = self.costs.ram in held or layouts.homes[b, -1] == self.costs.ram
        on_gpu = bool((held != self.costs.ram).any()) or layouts.homes[b, -1] != self.costs.ram
        return "hybrid" if in_ram and on_gpu else "cpu" if in_ram else "gpu"
