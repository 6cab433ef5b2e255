"""The present machine: its GPUs, CPU and RAM, and the rate at which all cores read memory."""

import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from quantplan.errors import MachineError
from quantplan.hardware import Device, Machine, cpu_presets, find_cpu

# Larger than any cache in common use; three arrays of it per thread at most fill a quarter of RAM.
_ARRAY_BYTES = 192 * 2**20
_TRIAD_S = 1.0
_MIN_ROUNDS = 3


def detect(*, measure: bool = True) -> Machine:
    """Describes the machine that this runs on.

    NVIDIA GPUs are found through NVML (the package ``nvidia-ml-py``), if it is installed and a
    driver is there; other GPUs have to be added by hand. Bandwidth and arithmetic rates of a GPU
    come from the table of known ones, else from its memory bus and clock.

    Args:
        measure: Measure the RAM's bandwidth (some seconds on all cores); else take that of the CPU
            in the table.

    Raises:
        MachineError: Nothing was measured and the CPU is not in the table.
    """
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    name = cpu_name()
    measured: tuple[str, ...] = ()
    if measure:
        rate = ram_bytes_per_s()
        n_threads = usable_threads()
        measured = (f"RAM read and written at {rate / 1e9:.1f} GB/s (triad, {n_threads} threads)",)
    else:
        known = find_cpu(name)
        if known is None:
            raise MachineError(
                f"the bandwidth of {name} is not known, and was not to be measured: measure it, or "
                f"give numbers such as 64GiB@80GB/s. Known are {', '.join(cpu_presets())}"
            )
        rate = known[1]
    ram = Device.ram(psutil.virtual_memory().total, rate, model=name, cores=cores)
    return Machine(gpus=tuple(nvidia_gpus()), ram=ram, measured=measured)


def cpu_name() -> str:
    """What the CPU calls itself; the architecture where it says nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


def usable_threads() -> int:
    """Threads that may run at once here, as far as the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


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
    barrier = threading.Barrier(n_threads + 1)
    ends = time.monotonic() + _TRIAD_S
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for index in range(1_000_000):
            work = [pool.submit(_triad, barrier, *arrays) for arrays in slices]
            barrier.wait()
            start = time.perf_counter()
            for one in work:
                one.result()
            best = max(best, moved / (time.perf_counter() - start))
            if index >= _MIN_ROUNDS and time.monotonic() > ends:
                break
    return best


def _triad(
    barrier: threading.Barrier,
    a: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    b: "np.ndarray[tuple[int], np.dtype[np.float64]]",
    c: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> None:
    """A = 3 b + c in place; numpy releases the interpreter lock while it works."""
    barrier.wait()
    np.multiply(b, 3.0, out=a)
    np.add(a, c, out=a)


def nvidia_gpus() -> list[Device]:
    """The NVIDIA GPUs in the order of NVML, which is that of the PCI bus; [] without driver."""
    try:
        import pynvml  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_nvidia_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _nvidia_gpu(pynvml: object, index: int) -> Device:
    """One GPU, from the table where its name is known; else with the memory's bus and clock."""
    call: Callable[..., object] = lambda name, *args: getattr(pynvml, f"nvmlDeviceGet{name}")(*args)  # noqa: E731
    handle = call("HandleByIndex", index)
    raw = call("Name", handle)
    name = raw.decode() if isinstance(raw, bytes) else str(raw)
    capacity = int(getattr(call("MemoryInfo", handle), "total"))  # noqa: B009 (untyped)
    try:
        (known,) = Machine.parse(f"{name} + 1GiB@1GB/s").gpus
    except MachineError:
        bus_bits = int(str(call("MemoryBusWidth", handle)))
        memory_clock = 2  # getattr(pynvml, "NVML_CLOCK_MEM")
        clock_mhz = int(str(call("MaxClockInfo", handle, memory_clock)))
        # Two transfers per clock of the rate that NVML states.
        known = Device.gpu(0, capacity, 2e6 * clock_mhz * bus_bits / 8, model=name)
    return known.model_copy(update={"name": f"GPU{index}", "capacity_bytes": capacity})
