"""Reads what llama.cpp's log says about memory."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

PRINTED_MIB = 0.01
"""What the last digit of a printed size stands for."""


# Builds before 2025 and ik_llama.cpp name no kind for weights.
_BUFFER = re.compile(r": +(\S+) +(?:(model|KV|RS|output|compute) )?buffer size = +([\d.]+) MiB")
_KINDS = ("model", "KV", "RS", "output", "compute")
# A context may reserve these again, in place of the old.
_REPLACED = ("output", "compute")
_DEVICE = re.compile(r"using device (\S+) \(([^)]*)\)")
# | - NAME (description) | total = free + (self = model + context + compute) + unaccounted |
_ROW = re.compile(
    r"memory_breakdown_print: \| +- (?P<name>\w+)(?: \((?P<description>.*)\))? *\|"
    r"(?: +\d+ = +\d+ \+ \()? *\d+ = +(?P<model>\d+) \+ +(?P<context>\d+) \+ +(?P<compute>\d+)"
)
_ROW_KINDS = ("model", "context", "compute")
# Of builds before and since November 2026.
_RESERVED = ("graph splits", "graph: nodes = ")
_END_OF_FIT = ("fit params to free", "while trying to fit")
HOST = "Host"
"""What llama.cpp's table calls RAM."""

# Buffers are named after their device (CUDA0, MTL0_Mapped); those in RAM after none (CPU_Mapped,
# CUDA_Host). The number in the name of an RPC buffer is not that of the device.
_NUMBERED = re.compile(r"([A-Za-z]+\d+)(?:_\w+)?")
_RPC_BUFFER = re.compile(r"RPC\d*\[(.+)\]")


@dataclass(frozen=True)
class Buffers:
    """What llama.cpp said it allocated, in MiB by buffer name as printed.

    Attributes:
        model: Weights.
        kv: Attention caches, summed over the caches of one buffer.
        recurrent: States of recurrent layers.
        output: Logits and embeddings that the caller reads.
        compute: Scratch memory of the graphs.
        n_lines: Lines that state weights, caches or states, by buffer name; each is rounded.
    """

    model: Mapping[str, float]
    kv: Mapping[str, float]
    recurrent: Mapping[str, float]
    output: Mapping[str, float]
    compute: Mapping[str, float]
    n_lines: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, log: str) -> "Buffers":
        """Reads the buffer sizes out of a log, as ``-lv 4`` writes it."""
        sizes = {kind: defaultdict[str, float](float) for kind in _KINDS}
        lines = Counter(name for name, kind, _ in _BUFFER.findall(log) if kind not in _REPLACED)
        for context in log.split("constructing llama_context"):
            reserved = {}
            for name, kind, mib in _BUFFER.findall(context):
                if kind in _REPLACED:
                    reserved[kind, name] = float(mib)
                else:
                    sizes[kind or "model"][name] += float(mib)
            for (kind, name), mib in reserved.items():
                sizes[kind][name] += mib
        kinds = {
            kind: {name: round(mib, 2) for name, mib in sizes[kind].items()} for kind in _KINDS
        }
        return cls(
            model=kinds["model"],
            kv=kinds["KV"],
            recurrent=kinds["RS"],
            output=kinds["output"],
            compute=kinds["compute"],
            n_lines=lines,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """What llama.cpp's table of its memory says of one device.

    Attributes:
        name: Of the device as llama.cpp prints it, ``Host`` for RAM.
        model_mib: Weights, in whole MiB.
        context_mib: Caches and states, in whole MiB.
        compute_mib: Compute buffers, in whole MiB.
        n_lines: Lines of the table that these are the sums of; each is rounded down.
    """

    name: str
    model_mib: int
    context_mib: int
    compute_mib: int
    n_lines: int = 1

    def __add__(self, other: "Row") -> "Row":
        """Both together, on the device of the first."""
        return Row(
            self.name,
            self.model_mib + other.model_mib,
            self.context_mib + other.context_mib,
            self.compute_mib + other.compute_mib,
            self.n_lines + other.n_lines,
        )


def read_table(log: str) -> tuple[Row, ...]:
    """The first table of the memory, RAM last; empty where there is none or not all of it.

    Behind the line of RAM, one for each other layout follows in which the CPU holds weights
    (``CPU_REPACK``): those are in RAM too. So the table ends with the first line of another kind.
    """
    rows: list[Row] = []
    for line in log[: log.rfind("\n") + 1].splitlines():
        has_host = bool(rows) and rows[-1].name == HOST
        if match := _ROW.search(line):
            row = Row(match["name"], *(int(match[kind]) for kind in _ROW_KINDS))
            rows = [*rows[:-1], rows[-1] + row] if has_host else [*rows, row]
        elif has_host:
            return tuple(rows)
    return ()


def has_laid_out(log: str) -> bool:
    """Whether llama.cpp has laid the model out, or has given up; what follows allocates."""
    return bool(read_table(log)) or any(sign in log for sign in _END_OF_FIT)


def has_reserved(log: str) -> bool:
    """Whether a context has all its buffers; what follows computes."""
    return any(sign in log for sign in _RESERVED)


def is_idle(log: str) -> bool:
    """Whether llama-server has started and computes nothing."""
    return "all slots are idle" in log


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that a log names, RAM apart.

    Attributes:
        names: In order.
        by_endpoint: Names of the RPC devices by address.
    """

    names: tuple[str, ...]
    by_endpoint: Mapping[str, str]

    @classmethod
    def parse(cls, log: str) -> "Devices":
        """Reads which devices are in use; logs that do not say so are asked for their buffers."""
        described = dict.fromkeys(_DEVICE.findall(log))
        names = tuple(dict.fromkeys(name for name, _ in described))
        if not names:
            matches = (_NUMBERED.fullmatch(name) for name, _, _ in _BUFFER.findall(log))
            names = tuple(sorted({m[1] for m in matches if m}, key=_by_number))
        return cls(names, {endpoint: name for name, endpoint in described})

    def holding(self, buffer: str) -> str:
        """The device whose memory a buffer takes, ``Host`` for RAM.

        An RPC device is known by its address.

        Args:
            buffer: Name of the buffer as printed.
        """
        if match := _RPC_BUFFER.fullmatch(buffer):
            return self.by_endpoint.get(match[1], buffer)
        device = buffer.partition("_")[0]
        return device if device in self.names else HOST


def _by_number(name: str) -> tuple[str, int]:
    kind = name.rstrip("0123456789")
    return kind, int(name[len(kind) :])
