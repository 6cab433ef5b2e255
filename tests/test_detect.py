"""The present machine, as it is and as it might be."""

import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from quantplan import detect
from quantplan.errors import MachineError
from quantplan.hardware import Machine
from tests.test_cli import quantplan


def test_this_machine_is_described_in_a_few_seconds() -> None:
    """The RAM is the system's, its rate is measured on all threads, in about a second."""
    start = time.monotonic()
    found = detect.detect()
    assert time.monotonic() - start < 20  # 5 s on a machine that does nothing else
    assert found.ram.capacity_bytes == psutil.virtual_memory().total
    assert 0.2e9 < found.ram.bandwidth_bytes_per_s < 2e12
    assert "GB/s" in found.measured[0]
    assert Machine.model_validate_json(found.model_dump_json()) == found


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

    class NVMLError(Exception):
        """NVML's own error."""

    def __init__(self, names: list[str], *, has_driver: bool = True) -> None:
        self.names, self.has_driver = names, has_driver

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.names),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda index: self.names[index],
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=24 * 2**30),
            "nvmlDeviceGetMemoryBusWidth": lambda _: 384,
            "nvmlDeviceGetMaxClockInfo": lambda _, kind: {2: 9751}[kind],
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]

    def nvmlInit(self) -> None:  # noqa: N802 (NVML's name)
        if not self.has_driver:
            raise self.NVMLError


def test_gpus_are_those_of_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known GPU has the table's rates and its own memory; another one those of its bus."""
    names = ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 9999"]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(names))
    known, other = detect.nvidia_gpus()
    assert (known.name, known.model, known.bandwidth_bytes_per_s) == ("GPU0", "RTX 4090", 1008e9)
    assert (other.name, other.model) == ("GPU1", names[1])
    assert known.capacity_bytes == other.capacity_bytes == 24 * 2**30
    assert other.bandwidth_bytes_per_s == pytest.approx(936e9, rel=0.001)


@pytest.mark.parametrize("module", [None, Nvml([], has_driver=False), Nvml([])])
def test_no_gpu_is_a_normal_case(monkeypatch: pytest.MonkeyPatch, module: Nvml | None) -> None:
    """Without the library, without a driver or without a GPU there is none, and no error."""
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert detect.nvidia_gpus() == []


def test_the_command_prints_the_machine() -> None:
    """`quantplan machine --json` prints a machine that loads back."""
    done = quantplan("machine", "--json")
    assert done.returncode == 0, done.stderr
    assert Machine.model_validate_json(done.stdout).ram.capacity_bytes > 0
