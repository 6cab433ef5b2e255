"""Reads what llama.cpp's log says about memory."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

MIB = 2**20

# Builds before 2025 and ik_llama.cpp name no kind for weights.
_BUFFER = re.compile(r": +(\S+) (?:(model|KV|RS|compute) )?buffer size = +([\d.]+) MiB")
_DEVICE = re.compile(r"using device (\S+) \(([^)]*)\)")
# | - NAME (description) | total = free + (self = model + context + compute) + unaccounted |
_ROW = re.compile(
    r"memory_breakdown_print: \| +- (?P<name>\w+)(?: \((?P<description>.*)\))? *\|"
    r"(?: +\d+ = +\d+ \+ \()? *\d+ = +(?P<model>\d+) \+ +(?P<context>\d+) \+ +(?P<compute>\d+)"
)
_HOST = "Host"
# A buffer of a device: CUDA0, MTL0_Mapped, RPC0[127.0.0.1:50052]; others (CPU_Mapped, CUDA_Host)
# are in RAM.
_DEVICE_BUFFER = re.compile(r"([A-Za-z]+\d+)(?:\[(.+)\]|_\w+)?")


@dataclass(frozen=True)
class Buffers:
    """What llama.cpp said it allocated, in MiB by buffer name as printed.

    Attributes:
        model: Weights.
        kv: Attention caches, summed over the caches of one buffer.
        recurrent: States of recurrent layers.
        compute: Scratch memory of the graphs.
    """

    model: Mapping[str, float]
    kv: Mapping[str, float]
    recurrent: Mapping[str, float]
    compute: Mapping[str, float]

    @classmethod
    def parse(cls, log: str) -> "Buffers":
        """Reads the buffer sizes out of a log, as ``-lv 4`` writes it."""
        sizes = {kind: defaultdict[str, float](float) for kind in ("model", "KV", "RS", "compute")}
        for context in log.split("constructing llama_context"):
            reserved = {}  # a context may reserve its scratch memory again, in place of the old
            for name, kind, mib in _BUFFER.findall(context):
                if kind == "compute":
                    reserved[name] = float(mib)
                else:
                    sizes[kind or "model"][name] += float(mib)
            for name, scratch_mib in reserved.items():
                sizes["compute"][name] += scratch_mib
        return cls(
            *({name: round(mib, 2) for name, mib in sums.items()} for sums in sizes.values())
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table that llama.cpp prints of its memory.

    Attributes:
        name: Of the device as llama.cpp prints it, ``Host`` for RAM.
        model_mib: Weights, in whole MiB.
        context_mib: Caches and states, in whole MiB.
        compute_mib: Compute buffers, in whole MiB.
    """

    name: str
    model_mib: int
    context_mib: int
    compute_mib: int


def read_table(log: str) -> tuple[Row, ...]:
    """The first table of the memory, RAM last; empty where there is none or not all of it."""
    rows = []
    for line in log.splitlines(keepends=True):
        if line.endswith("\n") and (match := _ROW.search(line)):
            sizes = (int(match[kind]) for kind in ("model", "context", "compute"))
            rows.append(Row(match["name"], *sizes))
            if match["name"] == _HOST:
                return tuple(rows)
    return ()


def read_devices(log: str) -> tuple[tuple[str, str], ...]:
    """Names and descriptions of the devices in use, in order; RAM is none of them."""
    return tuple(dict.fromkeys(_DEVICE.findall(log)))


def place_of(buffer: str, devices: tuple[tuple[str, str], ...]) -> str:
    """The device whose memory a buffer takes, ``Host`` for RAM.

    An RPC device is known by its endpoint: the number in its buffers' names is another one.

    Args:
        buffer: Name of the buffer as printed.
        devices: What `read_devices` returned.
    """
    match = _DEVICE_BUFFER.fullmatch(buffer)
    if not match:
        return buffer if any(buffer == name for name, _ in devices) else _HOST
    name, endpoint = match.groups()
    if endpoint:
        return next((n for n, described in devices if described == endpoint), buffer)
    return str(name)
