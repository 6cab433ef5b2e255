"""The present machine: its GPUs, CPU and RAM, and the rate at which all cores read memory."""

import platform
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from quantplan.errors import LlamaCppError, MachineError
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.hardware.table import (
    GpuSpec,
    find_cpu,
    find_gpu,
    nearest_class,
)
from quantplan.hardware.unified import share_ram
from quantplan.llama_cpp import BACKENDS, Vendor
from quantplan.runtime.find import ListedGpu, find_llama_cpp, list_gpus
from quantplan.threads import usable_threads
from quantplan.units import gb_per_s, gib

# Larger than any cache in common use; three arrays of it per thread at most fill a quarter of RAM.
_ARRAY_BYTES = 192 * 2**20
_TRIAD_S = 1.0
_MIN_ROUNDS = 3
# An idle machine has fewer programs running than this share of its threads.
_IDLE_SHARE = 0.5
_REMARK = re.compile(r"\([^)]*\)")
# What drivers call GPUs that have no memory of their own; llvmpipe is Mesa's, on the CPU.
_SHARES_RAM = re.compile(
    r"radeon( vega \d+| \d{3}m)?( graphics)?$|\b(iris|uhd|llvmpipe)\b|intel (hd )?graphics"
    r"|intel arc( \d{3}[vt])?( gpu| graphics)?$"
)


_Nvidia = tuple[str, GpuSpec, str]
"""The driver's name of a GPU, what it is, and what was assumed of it."""


def detect(*, measure: bool = True, margin_bytes: int | None = None) -> Machine:
    """Describes the machine that this runs on.

    NVIDIA GPUs are found through NVML (the package ``nvidia-ml-py``), if it is installed and a
    driver is there, and are in the order of this machine's llama.cpp, if there is one; otherwise
    GPUs are those that it lists, or that an Apple chip has. Their rates come from the table of
    known ones; what is not known is assumed, and ``Machine.assumed`` says so.

    Args:
        measure: Measure the RAM's bandwidth (some seconds on all cores); else take that of the CPU
            in the table.
        margin_bytes: Memory to leave free on every GPU; by default 10 %, at most 1 GiB.

    Raises:
        MachineError: Nothing was measured and the CPU is not in the table, or the margin leaves
            nothing of a GPU.
    """
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    name = cpu_name()
    measured: tuple[str, ...] = ()
    n_busy = psutil.getloadavg()[0]
    if measure:
        rate = round(ram_bytes_per_s(), -8)
        n_threads = usable_threads()
        measured = (f"RAM read and written at {rate / 1e9:.1f} GB/s (triad, {n_threads} threads)",)
    else:
        known = find_cpu(name)
        if known is None:
            raise MachineError(
                f"the bandwidth of {name} is not known, and was not to be measured: measure it, or "
                "give numbers such as 64GiB@80GB/s"
            )
        rate = known[1]
    gpus, assumed = nvidia_gpus() or other_gpus(name, rate)
    if measure and n_busy > _IDLE_SHARE * usable_threads():
        assumed.append(
            f"nothing else slowed the RAM down, but {n_busy:.1f} programs were busy in the last "
            "minute: measure again when the machine is idle"
        )
    total_bytes = psutil.virtual_memory().total
    gpus, shared_bytes, sharing = share_ram(gpus, total_bytes)
    found = Machine(
        gpus=tuple(Device.of(i, gpu) for i, gpu in enumerate(gpus)),
        ram=Device.ram(total_bytes, rate, model=name, cores=cores, shared_bytes=shared_bytes),
        measured=measured,
        assumed=(*assumed, *sharing),
    )
    return found if margin_bytes is None else found.with_margin(margin_bytes)


def cpu_name() -> str:
    """What the CPU calls itself; the architecture where it says nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine() or "CPU"


def ram_bytes_per_s() -> float:
    """Measures the rate at which all cores stream through memory together.

    The triad a = b + s c of the STREAM benchmark, with one slice per thread; numpy takes two passes
    for it, which are counted as what they move. Reading alone, which decoding does, is as fast or a
    little faster.

    Returns:
        Bytes per second of the best round, as STREAM reports it.
    """
    n_threads = usable_threads()
    room = psutil.virtual_memory().available // 4
    n = max(2**16, min(_ARRAY_BYTES, room // 3) // n_threads // 8)
    slices = [tuple(np.ones(n) for _ in range(3)) for _ in range(n_threads)]
    # numpy multiplies b's slice into a and adds c: two reads and a write, twice.
    moved = 5 * n * 8 * n_threads
    barrier = threading.Barrier(n_threads)
    ends = time.monotonic() + _TRIAD_S
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for index in range(1_000_000):
            work = [pool.submit(_triad, barrier, *arrays) for arrays in slices]
            starts, stops = zip(*(one.result() for one in work), strict=True)
            best = max(best, moved / (max(stops) - min(starts)))
            if index >= _MIN_ROUNDS and time.monotonic() > ends:
                break
    return best


def _triad(
    barrier: threading.Barrier,
    a: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    b: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    c: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> tuple[float, float]:
    """A = 3 b + c in place; numpy releases the interpreter lock while it works.

    Returns:
        When it began and ended. Who waits for it may get a turn long after either.
    """
    barrier.wait()
    start = time.perf_counter()
    np.multiply(b, 3.0, out=a)
    np.add(a, c, out=a)
    return start, time.perf_counter()


def nvidia_gpus() -> tuple[list[GpuSpec], list[str]] | None:
    """The NVIDIA GPUs, and what was assumed of them; None without GPU or driver.

    They are those that a llama.cpp lists, in its order. Without one they are in that of the PCI
    bus, while CUDA has the fastest first unless the environment says otherwise.
    """
    try:
        import pynvml  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        found = [_nvidia_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    if not found:
        return None
    found, assumed = _as_llama_cpp_has_them(found) if len(found) > 1 else (found, [])
    assumed += [said for _, _, said in found if said]
    return [spec for _, spec, _ in found], assumed


def _as_llama_cpp_has_them(found: list[_Nvidia]) -> tuple[list[_Nvidia], list[str]]:
    """Those GPUs of NVML that llama.cpp lists, in its order; else all, and what that assumes."""
    try:
        listed = _distinct(list_gpus(find_llama_cpp().server))
    except LlamaCppError:
        listed = []
    left, ordered = list(found), []
    for gpu in listed:
        same = next((one for one in left if _plain(one[0]) == _plain(gpu.description)), None)
        if same is not None:
            left.remove(same)
            ordered.append(same)
    if ordered or len({name for name, _, _ in found}) == 1:
        return ordered or found, []
    said = (
        "the GPUs are in the order of the PCI bus, as llama.cpp has them with "
        "CUDA_DEVICE_ORDER=PCI_BUS_ID; compare with llama-server --list-devices"
    )
    return found, [said]


def _nvidia_gpu(pynvml: Any, index: int) -> _Nvidia:
    """One GPU.

    It is that of the table where its name is known; else it has the memory's bus and clock, and
    where a virtual GPU hides them, those of common cards.
    """

    def call(what: str, *arguments: object) -> Any:
        return getattr(pynvml, f"nvmlDeviceGet{what}")(*arguments)

    handle = call("HandleByIndex", index)
    raw = call("Name", handle)
    name = raw.decode() if isinstance(raw, bytes) else str(raw)
    try:
        capacity = int(call("MemoryInfo", handle).total)
    except pynvml.NVMLError:  # unified memory has no size of its own
        known = find_gpu(name)
        if known is None:
            raise MachineError(
                f"the driver does not say how much memory {name} has: describe the machine instead"
            ) from None
        return name, known, ""
    known = find_gpu(name, capacity)
    if known is not None:
        return name, known.with_capacity(capacity), ""
    try:
        bus_bits = int(str(call("MemoryBusWidth", handle)))
        clock_mhz = int(str(call("MaxClockInfo", handle, pynvml.NVML_CLOCK_MEM)))
    except pynvml.NVMLError:
        return name, *_common_card(name, capacity, "nvidia")
    # Two transfers per clock of the rate that NVML states.
    rate = 2e6 * clock_mhz * bus_bits / 8
    return name, GpuSpec(name, capacity, rate, vendor="nvidia"), ""


def _common_card(name: str, capacity_bytes: int, vendor: Vendor | None) -> tuple[GpuSpec, str]:
    """A GPU of which only the memory's size is known, and what is assumed of it."""
    alike = nearest_class(capacity_bytes)
    rate = gb_per_s(alike.bandwidth_bytes_per_s)
    said = (
        f"{name} ({gib(capacity_bytes)}) is not in the table: it is taken for a common card of "
        f"{alike.model}, at {rate}. State its bandwidth instead: --machine "
        f"'{gib(capacity_bytes)}@...GB/s + ...'"
    )
    return GpuSpec(name, capacity_bytes, alike.bandwidth_bytes_per_s, vendor=vendor), said


def other_gpus(cpu: str, ram_bytes_per_s: float) -> tuple[list[GpuSpec], list[str]]:
    """GPUs that llama.cpp lists, or that an Apple chip has, and what was assumed of them.

    Args:
        cpu: Name of the CPU, which on Apple's and AMD's chips says what GPU is in it.
        ram_bytes_per_s: The RAM's rate, which is that of a GPU that shares it and is not known.
    """
    try:
        llama_cpp = find_llama_cpp()
        listed = list_gpus(llama_cpp.server) if llama_cpp.devices else ()
    except LlamaCppError as error:
        if cpu.startswith("Apple") and (inside := find_gpu(cpu)):
            return [inside], []
        reason = str(error).partition("\n")[0]
        return [], [f"no GPU, as neither NVML nor a llama.cpp lists one here ({reason})"]
    if not listed:
        return [], [f"no GPU, as neither NVML nor {llama_cpp.server} lists one"]
    found = [_listed_gpu(gpu, cpu, ram_bytes_per_s) for gpu in _distinct(listed)]
    own = [(spec, said) for spec, said in found if not spec.is_unified]
    # llama.cpp uses a GPU that shares the RAM only where there is no other one.
    used = own or found[:1]
    return [spec for spec, _ in used], [said for _, said in used if said]


def _distinct(listed: Sequence[ListedGpu]) -> list[ListedGpu]:
    """Every GPU once: one that several backends know counts for the first of these."""
    found: list[ListedGpu] = []
    backends: dict[str, list[ListedGpu]] = {}
    for gpu in listed:
        backends.setdefault(gpu.name.rstrip("0123456789"), []).append(gpu)
    for gpus in backends.values():
        known = Counter(_plain(gpu.description) for gpu in found)
        for gpu in gpus:
            if known[_plain(gpu.description)]:
                known[_plain(gpu.description)] -= 1
            else:
                found.append(gpu)
    return found


def _listed_gpu(gpu: ListedGpu, cpu: str, ram_bytes_per_s: float) -> tuple[GpuSpec, str]:
    """What is known of a listed GPU, and what was assumed; empty where nothing was."""
    known = find_gpu(gpu.description, gpu.capacity_bytes)
    if known is not None:
        return known.with_capacity(gpu.capacity_bytes), ""
    vendor = _vendor(gpu)
    what = f"{gpu.description} ({gib(gpu.capacity_bytes)})"
    if _SHARES_RAM.search(_plain(gpu.description)):
        inside = find_gpu(cpu.partition("w/")[2])  # as AMD writes it
        if inside is not None and "radeon" in gpu.description.lower():
            return inside.with_capacity(gpu.capacity_bytes), f"{what} is a {inside.model}"
        spec = GpuSpec(
            gpu.description, gpu.capacity_bytes, ram_bytes_per_s, unified="other",
            is_sized=True, link_bytes_per_s=ram_bytes_per_s, vendor=vendor,
        )  # fmt: skip
        return spec, f"{what} reads its memory at the rate of the RAM"
    return _common_card(gpu.description, gpu.capacity_bytes, vendor)


def _vendor(gpu: ListedGpu) -> Vendor | None:
    """Whose a listed GPU is: as its backend is for, else as its name says."""
    for vendor, backend in BACKENDS.items():
        if gpu.name.startswith(backend) or vendor in gpu.description.lower():
            return vendor
    return None


def _plain(description: str) -> str:
    return " ".join(_REMARK.sub(" ", description.lower()).split())
