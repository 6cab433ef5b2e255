"""The present machine, as it is and as it might be."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from quantplan.errors import MachineError
from quantplan.hardware import detect
from quantplan.hardware.machine import Machine
from quantplan.hardware.table import GpuSpec, find_gpu
from tests.support.llama_cpp import needs_llama_cpp, packaged_folder, portable_cpu
from tests.test_cli import quantplan

GIB = 2**30


def test_this_machine_is_described() -> None:
    """The RAM is the system's, and its rate is measured."""
    found = detect.detect()
    assert found.ram.capacity_bytes == psutil.virtual_memory().total
    assert 0.2e9 < found.ram.bandwidth_bytes_per_s < 2e12
    assert "GB/s" in found.measured[0]
    assert Machine.model_validate_json(found.model_dump_json()) == found


def test_the_rate_of_the_ram_does_not_hang_on_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the thread that waits for the measuring ones gets its turn late, the rate is theirs."""

    class Barrier(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            index = super().wait(timeout)
            if threading.current_thread() is threading.main_thread():
                time.sleep(1)
            return index

    monkeypatch.setattr(threading, "Barrier", Barrier)
    assert detect.ram_bytes_per_s() < 2e12


def test_without_measuring_a_known_cpu_has_the_tables_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured if that is not wanted; a CPU that is not in the table is refused then."""
    monkeypatch.setattr(detect, "cpu_name", lambda: "AMD Ryzen 9 9950X 16-Core Processor")
    found = detect.detect(measure=False)
    assert found.ram.bandwidth_bytes_per_s == 86e9
    assert found.measured == ()
    monkeypatch.setattr(detect, "cpu_name", lambda: "abacus")
    with pytest.raises(MachineError, match="bandwidth of abacus is not known"):
        detect.detect(measure=False)


class Nvml:
    """NVML with two GPUs, one of them unknown to the table."""

    NVML_CLOCK_MEM = 2

    class NVMLError(Exception):
        """NVML's own error."""

    def __init__(
        self, names: list[str], *, has_driver: bool = True, is_virtual: bool = False
    ) -> None:
        self.names, self.has_driver, self.is_virtual = names, has_driver, is_virtual

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.names),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda index: self.names[index],
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=24 * 2**30),
            "nvmlDeviceGetMemoryBusWidth": self.bus_bits,
            "nvmlDeviceGetMaxClockInfo": lambda _, kind: {2: 9751}[kind],
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]

    def bus_bits(self, _: int) -> int:
        if self.is_virtual:
            raise self.NVMLError
        return 384

    def nvmlInit(self) -> None:  # noqa: N802 (NVML's name)
        if not self.has_driver:
            raise self.NVMLError


def test_gpus_are_those_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known GPU has the table's rates and its own memory; another one those of its bus."""
    names = ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 9999"]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(names))
    known, other = nvidia()[0]
    assert (known.model, known.bandwidth_bytes_per_s) == ("RTX 4090", 1008e9)
    assert other.model == names[1]
    assert known.capacity_bytes == other.capacity_bytes == 24 * 2**30
    assert other.bandwidth_bytes_per_s == pytest.approx(936e9, rel=0.001)


@pytest.mark.parametrize("module", [None, Nvml([], has_driver=False), Nvml([])])
def test_no_gpu_is_a_normal_case(monkeypatch: pytest.MonkeyPatch, module: Nvml | None) -> None:
    """Without the library, without a driver or without a GPU there is none, and no error."""
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert detect.nvidia_gpus() is None


def test_a_virtual_gpu_is_taken_for_a_common_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver hides the memory's bus, the rate is assumed, and said so."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(["GRID A9999-24C"], is_virtual=True))
    (found,), (said,) = nvidia()
    assert found.capacity_bytes == 24 * GIB
    assert "GRID A9999-24C (24.00 GiB) is not in the table" in said


def test_gpus_are_in_the_order_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has the fastest GPU first and hides some, NVML has all as they are plugged in."""
    names = ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090"]
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(names))
    found, (said,) = nvidia()
    assert [gpu.model for gpu in found] == ["RTX 3060", "RTX 4090", "RTX 3090"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in said
    listed = [f"CUDA{i}: {name} (24576 MiB, 24000 MiB free)" for i, name in enumerate(names[1::-1])]
    listing(tmp_path, monkeypatch, *listed)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(names))
    found, nothing = nvidia()
    assert [gpu.model for gpu in found] == ["RTX 4090", "RTX 3060"]
    assert not nothing


def nvidia() -> tuple[list[GpuSpec], list[str]]:
    """The GPUs that NVML knows."""
    found = detect.nvidia_gpus()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "capacity_gib", "name"),
    [
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 24, "RX 7900 XTX"),
        ("AMD Radeon RX 7900 XT", 20, "RX 7900 XT"),
        ("AMD Radeon 8060S Graphics (RADV STRIX_HALO)", 111, "Radeon 8060S"),
        ("AMD Instinct MI50/MI60", 32, "MI50 32GB"),
        ("Intel(R) Arc(tm) A770 Graphics (DG2)", 16, "Arc A770"),
        ("Apple M2 Max", 48, "M2 Max"),
        ("Apple M2", 16, "M2"),
        ("NVIDIA GeForce RTX 4060 Ti", 8, "RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "RTX 4060 Ti 16GB"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", 80, "H100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", 48, "RTX 6000 Ada"),
        ("Quadro RTX 6000", 24, "Quadro RTX 6000"),
        ("NVIDIA RTX A4000", 16, "RTX A4000"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("AMD Radeon RX 6800", 16, None),
        ("AMD Radeon RX 7900 XTXX", 24, None),
        ("Apple M9 Max", 48, None),
        ("MI50", 16, None),
    ],
)
def test_drivers_names_find_the_right_card(text: str, capacity_gib: int, name: str | None) -> None:
    """What a driver says finds the card that it is, and never a near relative."""
    found = find_gpu(text, capacity_gib * GIB)
    assert (found.model if found else None) == name


def listing(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Puts a llama-server in place that lists these devices, on a machine without NVIDIA."""
    listed = "".join(f"echo '  {line}'; " for line in lines)
    path = folder / "llama-server"
    path.write_text(f"""#!/bin/sh
case $1 in
--help) echo '  --list-devices';;
--version) echo 'version: 7000 (0123abcd)';;
--list-devices) echo 'Available devices:'; {listed};;
esac
""")
    path.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(detect, "ram_bytes_per_s", lambda: 70e9)
    monkeypatch.setattr(detect, "cpu_name", lambda: "AMD Ryzen 9 8945HX w/ Radeon 8060S")
    memory = SimpleNamespace(total=128 * GIB, available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_llama_cpp_lists_what_nvml_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known cards have the table's rates and their own memory, each once."""
    listing(
        tmp_path,
        monkeypatch,
        "ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24000 MiB free)",
        "ROCm1: AMD Radeon RX 7900 XTX (24560 MiB, 24000 MiB free)",
        "Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24576 MiB, 24000 MiB free)",
        "Vulkan1: AMD Radeon RX 7900 XTX (RADV NAVI31) (24576 MiB, 24000 MiB free)",
        "Vulkan2: Intel(R) Arc(tm) A770 Graphics (DG2) (16288 MiB, 16000 MiB free)",
        "Vulkan3: AMD Radeon Graphics (RADV RAPHAEL_MENDOCINO) (64000 MiB, 60000 MiB free)",
        "BLAS: OpenBLAS (0 MiB, 0 MiB free)",
    )
    machine = detect.detect()
    assert [gpu.model for gpu in machine.gpus] == ["RX 7900 XTX", "RX 7900 XTX", "Arc A770"]
    assert [gpu.name for gpu in machine.gpus] == ["GPU0", "GPU1", "GPU2"]
    assert machine.gpus[0].bandwidth_bytes_per_s == 960e9
    assert machine.gpus[0].capacity_bytes == 24560 * 2**20
    assert machine.ram.capacity_bytes == 128 * GIB
    assert machine.assumed == ()


def test_shared_memory_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has of the RAM the CPU has not; a chip's name says which GPU is in it."""
    listing(tmp_path, monkeypatch, "ROCm0: AMD Radeon(TM) Graphics (98304 MiB, 98000 MiB free)")
    machine = detect.detect(margin_bytes=2 * GIB)
    (gpu,) = machine.gpus
    assert (gpu.model, gpu.bandwidth_bytes_per_s, gpu.margin_bytes) == (
        "Radeon 8060S", 256e9, 2 * GIB
    )  # fmt: skip
    assert gpu.capacity_bytes + machine.ram.capacity_bytes == 128 * GIB
    assert "32.00 GiB are left to the CPU" in machine.summary()


@pytest.mark.parametrize(
    ("line", "rate", "said"),
    [
        ("Vulkan0: Intel(R) Iris(R) Xe Graphics (TGL GT2) (15000 MiB, 9 MiB free)", 70e9,
         "at the rate of the RAM"),
        ("Vulkan0: AMD Radeon RX 6650 XT (RADV NAVI23) (8192 MiB, 9 MiB free)", 288e9,
         r"State its bandwidth instead: --machine '8.00 GiB@...GB/s"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said(
    line: str, rate: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that the table has not is there with a rate that is stated to be assumed."""
    listing(tmp_path, monkeypatch, line)
    machine = detect.detect()
    assert machine.gpus[0].bandwidth_bytes_per_s == rate
    assert said in machine.assumed[0]


def test_a_busy_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other programs run, what was measured is said to be doubtful."""
    listing(tmp_path, monkeypatch, "CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23000 MiB free)")
    assert detect.detect().assumed == ()
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert "1000.0 programs were busy" in detect.detect().assumed[0]


def test_an_apple_chip_has_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama.cpp the chip's name says what GPU it has, and macOS how much of the RAM."""
    listing(tmp_path, monkeypatch)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(detect, "cpu_name", lambda: "Apple M2 Max")
    machine = detect.detect()
    assert [(g.model, g.capacity_bytes) for g in machine.gpus] == [("M2 Max", 96 * GIB)]
    assert machine.ram.capacity_bytes == 32 * GIB


@pytest.mark.parametrize(
    ("line", "gpu_gib", "ram_gib"),
    [
        ("CUDA0: NVIDIA GB10 (130500 MiB, 120000 MiB free)", 120, 8),
        ("MTL0: Apple M2 Max (110000 MiB, 100000 MiB free)", 110000 / 1024, 128 - 110000 / 1024),
        ("ROCm0: AMD Radeon(TM) Graphics (131072 MiB, 98000 MiB free)", 128, 128),
    ],
)
def test_a_driver_that_shares_all_leaves_the_cpu_a_part(
    line: str, gpu_gib: float, ram_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the RAM is no GPU's, but what the driver says less of is; and what firmware has set
    aside is not in the RAM.
    """
    listing(tmp_path, monkeypatch, line)
    parts = [device.capacity_bytes / GIB for device in detect.detect().devices]
    assert parts == pytest.approx([gpu_gib, ram_gib])


def test_a_machine_on_which_nothing_lists_gpus_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU and no llama.cpp is no error, but it is said that neither was found."""
    listing(tmp_path, monkeypatch)
    assert "lists one" in detect.detect().assumed[0]
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "none"))
    machine = detect.detect()
    assert machine.gpus == ()
    assert "no llama-server in this folder" in machine.assumed[0]


@needs_llama_cpp
def test_the_real_llama_cpp_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mesa's driver, which computes on the CPU, is listed as a GPU that shares the RAM."""
    for key, text in (portable_cpu(tmp_path) | {"GGML_VK_VISIBLE_DEVICES": "0"}).items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(packaged_folder()))
    gpus, assumed = detect.other_gpus("some CPU", 10e9)
    if not gpus:
        pytest.skip("llama.cpp finds no Vulkan device: install mesa-vulkan-drivers")
    assert gpus[0].is_unified
    assert gpus[0].bandwidth_bytes_per_s == 10e9
    assert "llvmpipe" in assumed[0]


def test_the_command_prints_the_machine() -> None:
    """`quantplan machine --json` prints a machine that loads back."""
    done = quantplan("machine", "--json")
    assert done.returncode == 0, done.stderr
    assert Machine.model_validate_json(done.stdout).ram.capacity_bytes > 0
