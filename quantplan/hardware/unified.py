"""Memory that a GPU shares with the CPU, which is counted once."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from quantplan.errors import MachineError
from quantplan.hardware.table import GpuSpec, load_hardware
from quantplan.units import GIB, gib

# A driver that lets its GPU have all of the RAM may leave out a little.
_ALL = 0.98


def sharing(gpus: Iterable[GpuSpec]) -> list[GpuSpec]:
    """The GPUs that share the RAM of this host."""
    return [gpu for gpu in gpus if gpu.is_unified and gpu.network is None]


def check_parts(gpus: Sequence[GpuSpec], ram_bytes: int) -> None:
    """Refuses parts of the RAM that a person cannot mean.

    Raises:
        MachineError: Several GPUs share the RAM, or one leaves nothing of it to the CPU.
    """
    shared = sharing(gpus)
    if len(shared) > 1:
        raise MachineError(
            f"{len(shared)} GPUs share the RAM, but a chip has one: leave the others out, or write "
            f"those of other hosts as RPC HOST:PORT {shared[-1].model}@RATE,LATENCY"
        )
    for gpu in shared:
        if gpu.is_sized and _has_all(gpu, ram_bytes):
            usual = gib(_usual_bytes(gpu, ram_bytes))
            raise MachineError(
                f"the {gpu.model} would have {gib(gpu.capacity_bytes)} of {gib(ram_bytes)} of RAM, "
                "which it shares with the CPU: the last term is all the memory of the machine. "
                f"Write {gpu.model} without a size, for {usual}, or with its part of the memory"
            )


def share_ram(
    gpus: Sequence[GpuSpec], ram_bytes: int
) -> tuple[list[GpuSpec], int, tuple[str, ...]]:
    """Finds what GPUs of this host have of its RAM.

    A GPU has the part that is stated for it. Where none is, or it is all of the RAM, as some
    drivers say, it has the part that it usually gets. What firmware has set aside for one is not
    in the RAM that the system reports.

    Args:
        gpus: All GPUs of the machine.
        ram_bytes: All of its memory.

    Returns:
        The GPUs, the bytes that are theirs, and what was assumed, one sentence each.
    """
    found, said, shared_bytes = list(gpus), list[str](), 0
    for index, gpu in enumerate(found):
        if not sharing([gpu]):
            continue
        if gpu.is_sized and _is_set_aside(gpu, ram_bytes):
            said.append(
                f"firmware sets {gib(gpu.capacity_bytes)} aside for the {gpu.model}, beside the RAM"
            )
            continue
        if not gpu.is_sized or _has_all(gpu, ram_bytes):
            part_bytes = _usual_bytes(gpu, ram_bytes)
            found[index] = replace(gpu, capacity_bytes=part_bytes)
            said.append(
                f"{_rule(gpu)['by']} lets the {gpu.model} have {gib(part_bytes)} of the RAM, as is "
                f"usual; another part is written --machine '{gpu.model} ...GiB + ...'"
            )
        shared_bytes += found[index].capacity_bytes
    if shared_bytes:
        left = gib(ram_bytes - shared_bytes)
        said.append(f"the GPU shares the RAM, of which {left} are left to the CPU")
    return found, shared_bytes, tuple(said)


def _rule(gpu: GpuSpec) -> dict[str, Any]:
    rule: dict[str, Any] = load_hardware()["defaults"]["unified_memory"][gpu.unified]
    return rule


def _usual_bytes(gpu: GpuSpec, ram_bytes: int) -> int:
    rule = _rule(gpu)
    is_small = ram_bytes <= rule.get("small_gib", 0) * GIB
    return int(ram_bytes * rule["small_share" if is_small else "share"])


def _has_all(gpu: GpuSpec, ram_bytes: int) -> bool:
    return gpu.capacity_bytes > _ALL * ram_bytes


def _is_set_aside(gpu: GpuSpec, ram_bytes: int) -> bool:
    """Whether firmware gives the GPU memory that the system does not count as RAM."""
    return _rule(gpu).get("set_aside", False) and gpu.capacity_bytes >= ram_bytes
