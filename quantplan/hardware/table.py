"""GPUs and CPUs that are known by name (``data/hardware.json``)."""

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from quantplan.hardware.network import Network
from quantplan.llama_cpp import Vendor
from quantplan.units import GIB, MIB

# What a vendor adds to a name for another chip, or the same one with other clocks or memory.
_VARIANTS = {
    "ti", "super", "d", "xt", "xtx", "gre", "max", "pro", "ultra", "q", "laptop", "mobile",
    "notebook", "sff", "ada", "blackwell",
}  # fmt: skip
_REMARK = re.compile(r"\([^)]*\)")  # (TM), (RADV NAVI31)
_CAPACITY = re.compile(r"(\d+)gi?b")
# Drivers report this much less or more than the name says.
_CAPACITY_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """What is known of a GPU before it has its place in a machine.

    Attributes:
        model: What it is, for people.
        capacity_bytes: Memory in total.
        bandwidth_bytes_per_s: Nominal memory bandwidth.
        flops_per_s: Half-precision matrix rate; None for a rate that suits the bandwidth.
        vector_flops_per_s: Single-precision rate; None for the usual share of the matrix rate.
        link_bytes_per_s: Host-to-device rate; None for PCIe 4.0 x16.
        unified: Its memory is a part of the RAM, which this rule (``defaults.unified_memory``)
            usually sets; None where it has memory of its own.
        is_sized: Whether the memory was stated for this one; else it is the table's.
        network: The way to it, where another host lends it.
        vendor: Whose it is; None where that is not known.
    """

    model: str
    capacity_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float | None = None
    vector_flops_per_s: float | None = None
    link_bytes_per_s: float | None = None
    unified: str | None = None
    is_sized: bool = False
    network: Network | None = None
    vendor: Vendor | None = None

    @property
    def is_unified(self) -> bool:
        """Whether its memory is a part of the RAM."""
        return self.unified is not None

    def with_capacity(self, capacity_bytes: int) -> "GpuSpec":
        """The same GPU with another size of memory."""
        return replace(self, capacity_bytes=capacity_bytes, is_sized=True)


@cache
def load_hardware() -> dict[str, Any]:
    """The tables and the defaults, with their sources."""
    text = files("quantplan").joinpath("data/hardware.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def gpu_presets() -> tuple[str, ...]:
    """Names of GPUs and of memory classes that are known."""
    return (*load_hardware()["gpus"], *load_hardware()["classes"])


def gpu_spec(name: str) -> GpuSpec:
    """A known GPU or memory class.

    Args:
        name: As `gpu_presets` lists it.
    """
    found = (load_hardware()["gpus"] | load_hardware()["classes"])[name]
    return GpuSpec(
        model=name,
        capacity_bytes=found["capacity_mib"] * MIB,
        bandwidth_bytes_per_s=found["bandwidth_gb_s"] * 1e9,
        flops_per_s=found["half_tflops"] * 1e12,
        vector_flops_per_s=found["single_tflops"] * 1e12,
        link_bytes_per_s=found["link_gb_s"] * 1e9,
        unified=found.get("unified"),
        vendor=found.get("vendor"),
    )


def vendor_of(model: str) -> Vendor | None:
    """Whose the GPU of that name in the table is; None where there is none."""
    vendor: Vendor | None = load_hardware()["gpus"].get(model, {}).get("vendor")
    return vendor


def is_unified(model: str) -> bool:
    """Whether the memory of the GPU of that name in the table is a part of its host's RAM."""
    return "unified" in load_hardware()["gpus"].get(model, {})


def find_gpu(text: str, capacity_bytes: int | None = None) -> GpuSpec | None:
    """The known GPU that a driver means, with the table's memory; None where there is none.

    Every word of the known name must be in the text, in order; what only the text has must not make
    it another chip (``Laptop``, ``SUPER``). A size in the known name may be that of the memory
    instead.

    Args:
        text: For example ``AMD Radeon RX 7900 XTX (RADV NAVI31)``.
        capacity_bytes: Its memory, which tells cards of one name apart.
    """
    words = _words(text)
    fitting = [
        (len(known), -abs(spec.capacity_bytes - (capacity_bytes or spec.capacity_bytes)), name)
        for name in load_hardware()["gpus"]
        for known, spec in [(_words(name), gpu_spec(name))]
        if _names(words, known, capacity_bytes)
    ]
    return gpu_spec(max(fitting)[2]) if fitting else None


def nearest_class(capacity_bytes: int) -> GpuSpec:
    """The memory class whose capacity is nearest, for a GPU of which no more is known."""
    specs = [gpu_spec(name) for name in load_hardware()["classes"]]
    found = min(specs, key=lambda spec: abs(spec.capacity_bytes - capacity_bytes))
    return found.with_capacity(capacity_bytes)


def _names(words: list[str], known: list[str], capacity_bytes: int | None) -> bool:
    """Whether the words of a driver name a known GPU."""
    rest = iter(words)
    for word in known:
        size = _CAPACITY.fullmatch(word)
        if size and capacity_bytes and not any(_CAPACITY.fullmatch(w) for w in words):
            stated = int(size[1]) * GIB
            if abs(capacity_bytes / stated - 1) > _CAPACITY_TOLERANCE:
                return False
        elif word not in rest:
            return False
    return not _VARIANTS & (set(words) - set(known))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", _REMARK.sub(" ", text.lower()))


def cpu_presets() -> tuple[str, ...]:
    """Names of CPUs that are known."""
    return tuple(load_hardware()["cpus"])


def cpu_rates(name: str) -> tuple[int, float]:
    """Cores and reading rate of a known CPU, all sockets together.

    The rate is a measured one where one was published; else the memory channels' nominal rate times
    the share that is usually measured.

    Args:
        name: As `cpu_presets` lists it.

    Returns:
        Physical cores, and bytes per second.
    """
    cpu, defaults = load_hardware()["cpus"][name], load_hardware()["defaults"]
    nominal = cpu["channels"] * cpu["mt_s"] * 1e6 * 8 * defaults["ram_measured_share"]
    rate = cpu["measured_gb_s"] * 1e9 if cpu["measured_gb_s"] else nominal
    return cpu["cores"], rate


def find_cpu(text: str) -> tuple[int, float] | None:
    """`cpu_rates` of the known CPU whose name a text contains; None where there is none.

    Args:
        text: For example what the CPU calls itself, ``AMD Ryzen 9 7950X 16-Core Processor``.
    """
    found = [name for name in cpu_presets() if key(name) in key(text)]
    return cpu_rates(max(found, key=len)) if found else None


def key(name: str) -> str:
    """Compares names without case, spaces, hyphens and vendor words."""
    return re.sub(r"[\s\-_+]+", "", without_vendor(name))


def without_vendor(name: str) -> str:
    """A name without vendor words, in lower case."""
    return re.sub(r"\b(nvidia|geforce|amd|radeon|intel|apple)\b", "", name.lower())
