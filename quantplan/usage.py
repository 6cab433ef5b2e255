"""Memory by device and by what holds it: weights by class of tensor, KV cache, buffers, free."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantplan.inventory import RoleClass
from quantplan.predict import DeviceUse
from quantplan.recipe import RecipeTensor

PARTS = MappingProxyType(
    {
        "attention": "attention",
        "recurrent": "recurrent",
        "ffn": "feed-forward",
        "shared_experts": "shared experts",
        "up_gate_experts": "up and gate experts",
        "down_experts": "down experts",
        "embedding": "embedding",
        "output": "output",
        "other": "other weights",
        "kv": "KV cache",
        "compute": "compute buffer",
        "free": "free",
    }
)
"""What holds memory, in the order of a memory map, with words for people."""

_PART_OF: dict[RoleClass, str] = {
    "indexer": "attention",
    "router": "other",
    "norm": "other",
    "nextn": "other",
}


@dataclass(frozen=True)
class MemoryMap:
    """What holds the memory of one device.

    Attributes:
        name: ``GPU0``, ..., ``CPU``.
        model: What the device is.
        capacity_bytes: Memory in total.
        margin_bytes: Part of what is free that is left alone on purpose.
        parts: Bytes by key of `PARTS`, without parts that hold nothing. The sum is the capacity,
            or more where the device is too full.
    """

    name: str
    model: str
    capacity_bytes: int
    margin_bytes: int
    parts: dict[str, int]

    @property
    def used_bytes(self) -> int:
        """Everything but what is free."""
        return sum(n for part, n in self.parts.items() if part != "free")


def memory_maps(
    devices: Sequence[DeviceUse], tensors: Sequence[RecipeTensor]
) -> tuple[MemoryMap, ...]:
    """What holds the memory of each device.

    Args:
        devices: Predicted use of each device; the compute buffer counts with its high end.
        tensors: Type and device of every tensor. Weights beyond these are the copy of a tied output
            matrix; the padding of buffers counts as other weights.
    """
    is_tied = all(entry.tensor != "output.weight" for entry in tensors)
    found = {device.name: dict.fromkeys(PARTS, 0) for device in devices}
    for entry in tensors:
        if entry.device in found:
            tensor = entry.written
            part = _PART_OF.get(tensor.role_class, tensor.role_class)
            found[entry.device][part] += tensor.n_bytes
    maps = []
    for device in devices:
        parts = found[device.name]
        copied = device.weights_bytes - sum(parts.values())
        parts["output" if is_tied else "other"] += copied
        parts["other"] += device.padding_bytes
        parts["kv"] = device.kv_bytes
        parts["compute"] = device.compute_high_bytes
        parts["free"] = max(0, device.free_bytes)
        maps.append(
            MemoryMap(
                name=device.name,
                model=device.model,
                capacity_bytes=device.capacity_bytes,
                margin_bytes=device.margin_bytes,
                parts={part: n for part, n in parts.items() if n > 0},
            )
        )
    return tuple(maps)
