"""What one token makes each device do: weights read and multiplied, caches read, hops taken."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal

from quantplan.inventory import Architecture, Inventory, LayerCache, Tensor
from quantplan.qtypes import qtype

Where = Literal["gpu", "hybrid", "cpu"]

_ATTENTION_CLASSES = ("attention", "recurrent", "indexer")
_SMALL_CLASSES = ("norm", "other")


@dataclass(frozen=True, slots=True)
class Read:
    """Matrices of one type and kind that a device reads for a token.

    Attributes:
        qtype: Their type.
        is_expert: Whether they are experts, of which a token uses a few.
        is_prompt_work: Whether every prompt token needs them; the output matrix serves the last one
            alone.
        n_bytes: Bytes read for one token.
        n_weights: Weights multiplied for one token.
        held_bytes: Bytes of all of them, used or not.
        held_weights: Weights of all of them.
        n_matrices: Matrix products (all experts of a tensor count as one).
    """

    qtype: str
    is_expert: bool
    is_prompt_work: bool
    n_bytes: float
    n_weights: float
    held_bytes: float
    held_weights: float
    n_matrices: int


def read_of(inventory: Inventory, tensor: Tensor, qtype_name: str) -> Read:
    """What one tensor adds: active experts only, one row of the embedding, else everything."""
    held_bytes, held_weights = float(tensor.bytes_as(qtype_name)), float(tensor.n_weights)
    n_bytes, n_weights = held_bytes, held_weights
    if tensor.is_expert:
        share = inventory.architecture.active_share
        n_bytes, n_weights = held_bytes * share, held_weights * share
    elif tensor.role_class == "embedding":
        n_bytes, n_weights = float(qtype(qtype_name).row_bytes(tensor.shape_ne[0])), 0.0
    return Read(
        qtype=qtype_name,
        is_expert=tensor.is_expert,
        is_prompt_work=tensor.role_class not in ("embedding", "output"),
        n_bytes=n_bytes,
        n_weights=n_weights,
        held_bytes=held_bytes,
        held_weights=held_weights,
        n_matrices=int(n_weights > 0 and tensor.role_class not in _SMALL_CLASSES),
    )


def output_read(tensor: Tensor, qtype_name: str) -> Read:
    """What a tied embedding adds where it serves as the output matrix."""
    n_bytes, n_weights = float(tensor.bytes_as(qtype_name)), float(tensor.n_weights)
    return Read(qtype_name, False, False, n_bytes, n_weights, n_bytes, n_weights, 1)


def crossing_shares(inventory: Inventory) -> dict[str, float]:
    """Part of a hop to the CPU and back that each tensor causes in RAM while its layer is on a GPU.

    A layer whose attention, or whose experts (feed-forward matrices in a dense layer), are in RAM
    costs one hop there and back; each tensor of these causes its equal part. So the time is linear
    in the choices. Tensors that cause none are left out.
    """
    blocks: dict[tuple[int, str], list[str]] = defaultdict(list)
    for tensor in inventory.tensors:
        block = _block(tensor)
        if tensor.layer is not None and block is not None:
            blocks[tensor.layer, block].append(tensor.name)
    return {
        name: 1 / len(names)
        for (layer, block), names in blocks.items()
        if not (block == "ffn" and (layer, "experts") in blocks)
        for name in names
    }


def boundary_crossings(layers: Sequence[str], output: str) -> float:
    """Hops where one device's layers end and the next one's begin; one way is half of one.

    Args:
        layers: Device name of each layer.
        output: Device name of the output layer.
    """
    return sum(a != b for a, b in zip(layers, (*layers[1:], output), strict=True)) / 2


def boundary_transfers(layers: Sequence[str], output: str) -> dict[str, float]:
    """How often a row of activations goes to or from each device because layers end there.

    The embeddings come from the CPU, and from one device to the next they go through it.

    Args:
        layers: Device name of each layer.
        output: Device name of the output layer.
    """
    homes = ("CPU", *layers, output)
    found: dict[str, float] = defaultdict(float)
    for a, b in pairwise(homes):
        if a != b:
            found[a] += 1
            found[b] += 1
    return found


def _block(tensor: Tensor) -> str | None:
    if tensor.is_expert:
        return "experts"
    if tensor.role_class == "ffn":
        return "ffn"
    return "attention" if tensor.role_class in _ATTENTION_CLASSES else None


@dataclass(frozen=True)
class Traffic:
    """What one token makes the devices do.

    Attributes:
        architecture: Dimensions of the model.
        reads: Matrices read, by the name of the device.
        cache_homes: Device name of each loaded layer's cache.
        n_crossings: Hops from a GPU to the CPU and back, or to the next device.
        transfers: How often a row of activations goes to or from each device, one way each.
        n_vocab: Logits that the output layer's device gives back.
        output: Name of that device.
    """

    architecture: Architecture
    reads: Mapping[str, tuple[Read, ...]]
    cache_homes: tuple[str, ...]
    n_crossings: float
    transfers: Mapping[str, float] = field(default_factory=dict)
    n_vocab: int = 0
    output: str = "CPU"

    @cached_property
    def caches(self) -> tuple[tuple[str, LayerCache, int], ...]:
        """Device, cache and number of the layers with equal caches on one device."""
        pairs = zip(self.cache_homes, self.architecture.caches, strict=False)
        return tuple((name, cache, n) for (name, cache), n in Counter(pairs).items())

    @cached_property
    def where(self) -> Where:
        """Whether GPUs, the CPU, or both multiply weights."""
        kinds = {
            "cpu" if name == "CPU" else "gpu"
            for name, reads in self.reads.items()
            if any(read.n_weights for read in reads)
        }
        if len(kinds) == 2:
            return "hybrid"
        return "cpu" if kinds == {"cpu"} else "gpu"


def collect(
    inventory: Inventory,
    assignment: Mapping[str, tuple[str, str]],
    layers: Sequence[str],
    output: str,
    caches: Sequence[str] | None = None,
) -> Traffic:
    """Sums what a token needs over the tensors that are loaded.

    Args:
        inventory: The model.
        assignment: Type and device name of each loaded tensor.
        layers: Device name of each layer; those of next-token-prediction blocks are not used.
        output: Device name of the output layer.
        caches: Device name of each layer's cache, which its layer attends on; that of the layer by
            default. Elsewhere it costs a hop there and back.
    """
    sums: dict[tuple[str, str, bool, bool], list[Read]] = defaultdict(list)
    shares = crossing_shares(inventory)
    homes = tuple(layers)[: inventory.architecture.n_loaded_layers]
    n_crossings = boundary_crossings(homes, output)
    transfers = boundary_transfers(homes, output)
    for tensor in inventory.tensors:
        if tensor.name not in assignment or not inventory.is_loaded(tensor):
            continue
        name, device = assignment[tensor.name]
        found = [(device, read_of(inventory, tensor, name))]
        if tensor.role == "token_embd" and inventory.has_tied_output:
            found.append((output, output_read(tensor, name)))
        for place, read in found:
            sums[place, read.qtype, read.is_expert, read.is_prompt_work].append(read)
        if tensor.layer is not None and device != homes[tensor.layer]:
            share = shares.get(tensor.name, 0.0)
            n_crossings += share
            for end in (device, homes[tensor.layer]):
                transfers[end] += 2 * share
    reads: dict[str, list[Read]] = defaultdict(list)
    for (device, *_), found_reads in sums.items():
        reads[device].append(_total(found_reads))
    cache_homes = homes if caches is None else tuple(caches)[: len(homes)]
    n_crossings += sum(a != b for a, b in zip(homes, cache_homes, strict=True))
    return Traffic(
        architecture=inventory.architecture,
        reads={device: tuple(found) for device, found in reads.items()},
        cache_homes=cache_homes,
        n_crossings=n_crossings,
        transfers=transfers,
        n_vocab=inventory.n_vocab,
        output=output,
    )


def _total(reads: Sequence[Read]) -> Read:
    first = reads[0]
    return Read(
        qtype=first.qtype,
        is_expert=first.is_expert,
        is_prompt_work=first.is_prompt_work,
        n_bytes=sum(r.n_bytes for r in reads),
        n_weights=sum(r.n_weights for r in reads),
        held_bytes=sum(r.held_bytes for r in reads),
        held_weights=sum(r.held_weights for r in reads),
        n_matrices=sum(r.n_matrices for r in reads),
    )
