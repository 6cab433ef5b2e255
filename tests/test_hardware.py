"""Machines as people write them."""

import json
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantplan.errors import MachineError
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.hardware.table import (
    cpu_presets,
    cpu_rates,
    find_cpu,
    gpu_presets,
    gpu_spec,
    load_hardware,
)
from quantplan.llama_cpp import BACKENDS

GIB = 2**30
UNIFIED = [name for name in gpu_presets() if gpu_spec(name).is_unified]
CARDS = [name for name in gpu_presets() if name not in UNIFIED]
RAM = "64GiB@80GB/s"
RATES = ["bandwidth_bytes_per_s", "flops_per_s", "vector_flops_per_s"]


@pytest.mark.parametrize("name", gpu_presets())
def test_presets_are_understood_by_name(name: str) -> None:
    """Every preset makes a GPU of plausible size, speed and margin, called by its name."""
    (gpu,) = Machine.parse(f"{name} + {RAM}").gpus
    assert (gpu.name, gpu.kind, gpu.model) == ("GPU0", "gpu", name)
    assert 3 * GIB < gpu.capacity_bytes <= 384 * GIB
    assert 60e9 <= gpu.bandwidth_bytes_per_s <= 6000e9
    assert 5e12 <= gpu.flops_per_s <= 1400e12
    assert gpu.vector_flops_per_s <= gpu.flops_per_s <= 64 * gpu.vector_flops_per_s
    assert 10e9 <= gpu.link_bytes_per_s <= 100e9
    assert gpu.usable_bytes == gpu.capacity_bytes - gpu.margin_bytes


def test_every_gpu_of_the_table_has_a_vendor() -> None:
    """Whose a GPU is stands in the table; a class of memory is nobody's."""
    hardware = load_hardware()
    assert {gpu["vendor"] for gpu in hardware["gpus"].values()} == set(BACKENDS)
    assert all("vendor" not in gpu for gpu in hardware["classes"].values())
    gpus = Machine.parse(f"RX 7900 XTX 20GiB + Arc A770 + M2 Max + 24GiB + {RAM}").gpus
    assert [gpu.vendor for gpu in gpus] == ["amd", "intel", "apple", None]


def test_profiles_of_before_vendors_were_known_are_read(tmp_path: Path) -> None:
    """A profile without vendors is read, and a known GPU has that of the table."""
    machine = Machine.parse(f"RX 7900 XTX + 24GiB + {RAM}")
    saved = json.loads(machine.model_dump_json())
    for device in (*saved["gpus"], saved["ram"]):
        del device["vendor"]
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(saved))
    assert Machine.load(path) == machine


@pytest.mark.parametrize(
    ("name", "capacity_mib", "bandwidth_gb_s"),
    [
        ("RTX 3090", 24576, 936),
        ("RTX 4090", 24564, 1008),
        ("RTX 5090", 32607, 1792),
        ("RTX A6000", 49140, 768),
        ("RTX 3060", 12288, 360),
        ("Tesla T4", 15360, 320),
    ],
)
def test_well_known_cards(name: str, capacity_mib: int, bandwidth_gb_s: int) -> None:
    """Common cards have the memory that drivers list and the bandwidth of the data sheet."""
    (gpu,) = Machine.parse(f"{name} + {RAM}").gpus
    assert gpu.capacity_bytes == capacity_mib * 2**20
    assert gpu.bandwidth_bytes_per_s == bandwidth_gb_s * 1e9


@pytest.mark.parametrize(
    "spelling",
    [
        "RTX 4090",
        "rtx4090",
        "RTX-4090",
        "Rtx_4090",
        "NVIDIA GeForce RTX 4090",
        "  geforce rtx 4090",
    ],
)
def test_spellings_of_one_card(spelling: str) -> None:
    """Case, spaces, hyphens and vendor words make no difference."""
    assert Machine.parse(f"{spelling} + {RAM}") == Machine.parse(f"RTX 4090 + {RAM}")


@pytest.mark.parametrize("name", [n for n in gpu_presets() if n.endswith("GiB")])
def test_memory_classes_may_be_written_in_gb(name: str) -> None:
    """A memory class is the same in GB, as vendors write it."""
    text = f"{name.replace('GiB', 'GB')} + {RAM}"
    assert Machine.parse(text) == Machine.parse(f"{name} + {RAM}")


@given(
    counts=st.lists(st.integers(1, 4), max_size=4),
    names=st.lists(st.sampled_from(CARDS), min_size=4, max_size=4),
    sign=st.sampled_from(["x ", "X ", " x  ", "x", " X"]),
    joint=st.sampled_from(["+", " + ", "  +\t"]),
)
@settings(deadline=None)
def test_counts_make_so_many_gpus(
    counts: list[int], names: list[str], sign: str, joint: str
) -> None:
    """Terms with counts make so many GPUs, numbered through in the order of the text."""
    wanted = list(zip(counts, names, strict=False))
    text = joint.join([*(f"{count}{sign}{name}" for count, name in wanted), RAM])
    machine = Machine.parse(text)
    assert [gpu.model for gpu in machine.gpus] == [n for count, n in wanted for _ in range(count)]
    assert [gpu.name for gpu in machine.gpus] == [f"GPU{i}" for i in range(sum(counts))]
    assert machine.devices == (*machine.gpus, machine.ram)
    assert machine.ram == Machine.parse(RAM).ram


def test_gpus_from_plain_numbers() -> None:
    """A GPU may be a capacity with a bandwidth; its other rates follow a known card."""
    machine = Machine.parse("2x 24GiB@936GB/s + 128 GiB @ 200 GB/s")
    assert [g.capacity_bytes for g in machine.gpus] == [24 * GIB] * 2
    assert [g.bandwidth_bytes_per_s for g in machine.gpus] == [936e9] * 2
    assert machine.gpus[1].flops_per_s == pytest.approx(142e12, rel=0.01)
    assert machine.gpus[1].link_bytes_per_s == 25e9
    assert machine.ram.capacity_bytes == 128 * GIB
    assert machine.ram.bandwidth_bytes_per_s == 200e9


@pytest.mark.parametrize("name", cpu_presets())
def test_cpus_are_understood_by_name(name: str) -> None:
    """A capacity with the name of a CPU is RAM that reads as fast as that CPU does."""
    ram = Machine.parse(f"96GiB {name}").ram
    cores, rate = cpu_rates(name)
    assert (ram.capacity_bytes, ram.bandwidth_bytes_per_s, ram.model) == (96 * GIB, rate, name)
    assert ram.flops_per_s == pytest.approx(cores * 134e9)
    assert 25e9 <= rate <= 620e9
    assert find_cpu(f"AMD {name} 16-Core Processor") is not None


def test_an_unknown_cpu_comes_with_near_ones() -> None:
    """A CPU that is not known is refused with similar names, or with how to give numbers."""
    with pytest.raises(MachineError, match=r"unknown CPU 'Ryzen 9 9950Y': did you mean .*9950X"):
        Machine.parse("96GiB Ryzen 9 9950Y")


def test_a_name_with_another_capacity_is_that_card_with_that_much_memory() -> None:
    """A GPU of one name and several sizes takes the size that is written."""
    (gpu,) = Machine.parse(f"RTX 4090 48GiB + {RAM}").gpus
    assert (gpu.model, gpu.capacity_bytes) == ("RTX 4090", 48 * GIB)
    assert Machine.parse(f"RTX 5060 Ti 16GB + {RAM}").gpus[0].capacity_bytes == 16311 * 2**20


@pytest.mark.parametrize("name", UNIFIED)
@given(ram_gib=st.integers(1, 512), rate=st.sampled_from(["", "@200GB/s"]))
@settings(deadline=None)
def test_memory_that_a_gpu_shares_is_counted_once(name: str, ram_gib: int, rate: str) -> None:
    """GPU and CPU together have the memory of the machine, each a part, and that is said."""
    machine = Machine.parse(f"{name} + {ram_gib}GiB{rate}")
    (gpu,) = machine.gpus
    assert gpu.capacity_bytes + machine.ram.capacity_bytes == ram_gib * GIB
    assert 0 < machine.ram.capacity_bytes <= gpu.capacity_bytes
    assert machine.ram.margin_bytes == Device.ram(ram_gib * GIB, 1e9).margin_bytes
    assert any("are left to the CPU" in said for said in machine.assumed)
    assert any(f"lets the {name} have" in said for said in machine.assumed)


@pytest.mark.parametrize(
    ("text", "gpu_gib", "ram_gib"),
    [
        ("M2 Ultra + 192GiB@800GB/s", 144, 48),
        ("M3 Max + 64GiB@400GB/s", 48, 16),
        ("M4 Pro + 48GiB@273GB/s", 36, 12),
        ("M1 + 15GiB", 10, 5),
        ("Radeon 8060S + 128GiB Ryzen AI Max 395", 96, 32),
        ("GB10 + 128GiB", 120, 8),
        ("M3 Max 56GiB + 64GiB", 56, 8),
    ],
)
def test_a_gpu_that_shares_the_ram_has_its_usual_part_of_it(
    text: str, gpu_gib: float, ram_gib: float
) -> None:
    """Without a size it has what the system usually lets it have, with one it has that."""
    machine = Machine.parse(text)
    parts = [device.capacity_bytes / GIB for device in machine.devices]
    assert parts == pytest.approx([gpu_gib, ram_gib], abs=0.01)


def test_a_gpu_that_shares_the_ram_tells_its_rate() -> None:
    """Where the RAM's bandwidth is left out, the CPU gets the usual share of the GPU's."""
    machine = Machine.parse("M3 Max + 64GiB")
    assert machine.ram.bandwidth_bytes_per_s == pytest.approx(0.8 * 400e9)
    assert "the CPU reads the RAM at 320 GB/s" in machine.assumed[-1]
    with pytest.raises(MachineError, match="RAM's bandwidth is missing"):
        Machine.parse("RPC 192.168.1.7:50052 M3 Max@1Gbit/s,0.2ms + 64GiB")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("M3 Max 64GiB + 64GiB@400GB/s", r"all the memory of the machine.*for 48\.00 GiB"),
        ("Radeon 8060S 96GiB + 32GiB", r"96\.00 GiB of 32\.00 GiB"),
        ("2x M2 Ultra + 192GiB", "2 GPUs share the RAM.*RPC HOST:PORT M2 Ultra@"),
        ("M3 Max 64GiB", r"the RAM is missing.*M3 Max \+ 64\.00 GiB"),
        ("64GiB M3 Max", r"the RAM is missing.*M3 Max \+ 64\.00 GiB"),
    ],
)
def test_parts_of_the_ram_that_cannot_be_are_refused(text: str, says: str) -> None:
    """A GPU with all of the RAM, two that share it, or no RAM at all come with what to write."""
    with pytest.raises(MachineError, match=says):
        Machine.parse(text)


def test_a_gpu_of_another_host_has_memory_of_that_host() -> None:
    """The RAM of this host is whole, whatever the other one's GPU shares."""
    machine = Machine.parse(f"RPC 192.168.1.7:50052 M2 Max 40GiB@1Gbit/s,0.2ms + {RAM}")
    assert machine.gpus[0].capacity_bytes == 40 * GIB
    assert machine.ram == Machine.parse(RAM).ram
    assert machine.assumed == ()


def test_profiles_are_machines(tmp_path: Path) -> None:
    """A saved profile is read back equal, also as the text of a machine; a broken one is named."""
    machine = Machine.parse(f"RTX 4090 + {RAM}").model_copy(update={"measured": ("a run",)})
    path = tmp_path / "my machine.json"
    machine.save(path)
    assert Machine.load(path) == Machine.parse(path) == Machine.parse(str(path)) == machine
    assert "measured: a run" in machine.summary()
    path.write_text('{"gpus": []}', encoding="utf-8")
    with pytest.raises(MachineError, match="ram"):
        Machine.load(path)
    with pytest.raises(MachineError, match="cannot be read"):
        Machine.parse(str(tmp_path / "none.json"))


def test_a_file_is_a_profile_whatever_its_name(tmp_path: Path) -> None:
    """A file that is there is read as a profile, and named where it is none, such as a model."""
    machine = Machine.parse("RTX 4090 + 64GiB@80GB/s")
    machine.save(tmp_path / "desk.profile")
    assert Machine.parse(str(tmp_path / "desk.profile")) == machine
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(MachineError, match=r"model\.gguf is no profile of a machine"):
        Machine.parse(str(model))
    os.truncate(model, 2**30)
    with pytest.raises(MachineError, match=r"model\.gguf is no profile .* more than 256 MiB"):
        Machine.parse(str(model))
    with pytest.raises(MachineError, match="the RAM is missing"):
        Machine.parse(str(tmp_path))


def test_another_kind_of_json_is_refused_in_few_words(tmp_path: Path) -> None:
    """A file of another kind, however long, is said to be no profile, without what it holds."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"gpus": "x" * 10**5, "tensors": [{"name": "y"}] * 10**4}))
    with pytest.raises(MachineError, match=r"recipe\.json is no profile of a machine") as caught:
        Machine.parse(str(path))
    parts = ("machine gpus: Input should be", "lacks ram", "a machine has no tensors")
    assert all(part in fault for part, fault in zip(parts, caught.value.faults, strict=True))
    assert len(str(caught.value)) < 1000


def test_ram_alone_is_a_machine_without_gpu() -> None:
    """One term is the RAM, and the CPU reads host memory over no link."""
    machine = Machine.parse(RAM)
    assert machine.gpus == ()
    assert (machine.ram.name, machine.ram.kind) == ("CPU", "cpu")
    assert machine.ram.link_bytes_per_s == 0


@pytest.mark.parametrize(
    ("device", "margin_bytes"),
    [
        (Device.gpu(0, 5 * GIB, 1e9), GIB // 2),
        (Device.gpu(0, 80 * GIB, 1e9), GIB),
        (Device.ram(40 * GIB, 1e9), 2 * GIB),
        (Device.ram(512 * GIB, 1e9), 4 * GIB),
        (Device.gpu(0, 80 * GIB, 1e9, margin_bytes=0), 0),
        (Device.ram(8 * GIB, 1e9, margin_bytes=3 * GIB), 3 * GIB),
    ],
)
def test_margins(device: Device, margin_bytes: int) -> None:
    """By default a tenth of a GPU stays free, at most 1 GiB, and a twentieth of RAM, at most 4."""
    assert device.margin_bytes == margin_bytes
    assert device.usable_bytes == device.capacity_bytes - margin_bytes


def test_a_margin_of_ones_own_holds_for_every_gpu() -> None:
    """The margin that a person gives is kept free on each GPU; that of the RAM stays."""
    text = "2x RTX 3090 + 24GiB@936GB/s + 64GiB@80GB/s"
    usual, own = Machine.parse(text), Machine.parse(text, margin_bytes=2 * GIB)
    assert [gpu.margin_bytes for gpu in own.gpus] == [2 * GIB] * 3
    assert own.ram == usual.ram


def test_a_margin_that_leaves_nothing_of_a_gpu_is_refused() -> None:
    """Each GPU that has no more than the margin a person gives is named with what it has."""
    text = "RTX 4090 + 8GiB@300GB/s + RTX 3060 + 64GiB@80GB/s"
    with pytest.raises(MachineError) as caught:
        Machine.parse(text, margin_bytes=12 * GIB)
    small, just_as_large = caught.value.faults
    assert "12.00 GiB leaves nothing of GPU1" in small
    assert "which has 8.00 GiB" in small
    assert "GPU2 (RTX 3060), which has 12.00 GiB" in just_as_large


def test_a_margin_above_the_capacity_leaves_nothing() -> None:
    """A device whose margin exceeds its memory offers none, not a negative amount."""
    assert Device.gpu(0, GIB, 1e9, margin_bytes=2 * GIB).usable_bytes == 0


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("RTX 409", "RTX 4090"),
        ("RTX 3091", "RTX 3090"),
        ("5090", "RTX 5090"),
        ("RTX A6001", "RTX A6000"),
        ("RX 7900XTXX", "RX 7900 XTX"),
        ("P40", "Tesla P40"),
        ("NVIDIA V100", "Tesla V100 16GB, Tesla V100 32GB or MI100"),
    ],
)
def test_near_names_are_suggested(text: str, near: str) -> None:
    """A name that is almost right comes with the right one."""
    with pytest.raises(MachineError, match=rf"unknown GPU '{text}': did you mean .*\b{near}\b"):
        Machine.parse(f"{text} + {RAM}")


def test_a_name_like_no_other_says_how_to_give_numbers() -> None:
    """A name without a near one comes with another way to say it, not with a hundred names."""
    with pytest.raises(MachineError, match=r"unknown GPU 'abacus': give numbers.* 24GiB@936GB/s"):
        Machine.parse(f"abacus + {RAM}")
    with pytest.raises(MachineError, match=r"unknown CPU 'abacus': give numbers.* 96GiB@80GB/s"):
        Machine.parse("64GiB abacus")


@pytest.mark.parametrize("text", ["RTX 4090", "RTX 3090 + RTX 4090", "2x 64GiB@80GB/s", ""])
def test_missing_ram_is_explained(text: str) -> None:
    """A text without RAM says what to write instead."""
    with pytest.raises(MachineError, match=r"the RAM is missing.*64GiB@80GB/s"):
        Machine.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RTX 4090 + 48GiB", r"the RAM's bandwidth is missing: write 48GiB@80GB/s"),
        ("64GiB", r"the RAM's bandwidth is missing: write 64GiB@80GB/s"),
        ("64GiB DDR5-6000", r"'DDR5-6000' is a kind of memory.*64GiB@77GB/s for two channels"),
        ("RTX 4090 + 64GB DDR4 3200", r"64GB@41GB/s for two channels"),
        ("64GiB LPDDR5X", r"64GiB@72GB/s for two channels of 5600"),
        ("64GiB DDR4", r"64GiB@41GB/s for two channels of 3200"),
    ],
)
def test_a_missing_bandwidth_is_explained(text: str, says: str) -> None:
    """RAM without its bandwidth comes with the bandwidth that such memory usually has."""
    with pytest.raises(MachineError, match=says) as caught:
        Machine.parse(text)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["0x RTX 4090", "RTX 3090 + 000xRTX 4090", "0x 24GiB@936GB/s"])
def test_no_gpu_is_no_count(text: str) -> None:
    """A count of 0 is refused instead of leaving the GPU out."""
    with pytest.raises(MachineError, match="count above 0"):
        Machine.parse(f"{text} + {RAM}")


@pytest.mark.parametrize("text", ["RTX 4090 + 64@80GB/s", "64 @ 300GB/s + 64GiB@80GB/s"])
def test_a_capacity_needs_a_unit(text: str) -> None:
    """A bare number is no capacity; the message says how to write it."""
    with pytest.raises(MachineError, match="'64' has no unit: write 64GiB"):
        Machine.parse(text)


def test_llama_cpp_takes_no_more_than_16_gpus() -> None:
    """Sixteen GPUs make a machine, seventeen are refused."""
    assert len(Machine.parse(f"16x 24GiB + {RAM}").gpus) == 16
    with pytest.raises(MachineError, match=r"17 GPUs, but .* takes at most 16"):
        Machine.parse(f"16x 24GiB + 8GiB + {RAM}")


def test_devices_in_the_wrong_place_are_all_named() -> None:
    """GPUs out of order, a CPU among them and a GPU as the RAM are faults of one error."""
    gpu, ram = Device.gpu(0, GIB, 1e9), Device.ram(GIB, 1e9)
    with pytest.raises(MachineError) as caught:
        Machine(gpus=(gpu, gpu, ram), ram=gpu)
    assert len(caught.value.faults) == 3
    parts = ("GPU 1 of the machine is 'GPU0'", "GPU 2 of the machine is 'CPU'", "RAM is 'GPU0'")
    assert all(part in fault for part, fault in zip(parts, caught.value.faults, strict=True))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Device.gpu(0, -5, 1e9), ["capacity_bytes"]),
        (lambda: Device.gpu(0, -GIB, 1e9, margin_bytes=-1), ["capacity_bytes", "margin_bytes"]),
        (lambda: Device.gpu(0, GIB, 1e9, link_bytes_per_s=-1.0), ["link_bytes_per_s"]),
        (lambda: Device.ram(GIB, float("inf")), RATES),
        (lambda: Device.ram(GIB, float("nan")), RATES),
    ],
)
def test_numbers_out_of_range_are_all_named(make: Callable[[], Device], names: list[str]) -> None:
    """A device of impossible numbers is a MachineError that names each of them."""
    with pytest.raises(MachineError) as caught:
        make()
    assert [fault.split()[1].rstrip(":") for fault in caught.value.faults] == names


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("RTX 409 + 24XB@9GB/s + 64GiB", ["'RTX 409'", "'24XB'", "bandwidth is missing"]),
        ("foo + bar + 1GiB@0GB/s", ["'foo'", "'bar'", "must be above 0"]),
        ("+ 24GiB@fast + many@80GB/s", ["''", "'fast'", "'many'"]),
        ("24XB@fast + 64GiB@80GB/s", ["'24XB'", "'fast'"]),
        ("RTX 4090 + some@slow", ["'some'", "'slow'"]),
    ],
)
def test_all_faults_come_at_once(text: str, faults: list[str]) -> None:
    """Every fault of the line is reported in one error, in the order of the line."""
    with pytest.raises(MachineError) as caught:
        Machine.parse(text)
    assert len(caught.value.faults) == len(faults)
    assert all(part in fault for part, fault in zip(faults, caught.value.faults, strict=True))


words = st.sampled_from(["RTX 4090", "24GiB", "@", "+", "x ", "2", "80GB/s", " ", "0", "/s", "é"])


@given(st.text(max_size=30) | st.lists(words, max_size=8).map("".join))
@example("9" * 400 + "@80GB/s")
@example("64GiB@" + "9" * 400 + "GB/s")
@example("9" * 5000 + f"x RTX 4090 + {RAM}")
@settings(deadline=None)
def test_any_text_is_a_machine_or_a_machine_error(text: str) -> None:
    """Whatever is typed, the answer is a machine that works or a MachineError with a reason."""
    try:
        machine = Machine.parse(text)
    except MachineError as error:
        assert error.faults
        assert all(error.faults)
        return
    assert all(device.bandwidth_bytes_per_s > 0 for device in machine.devices)
    assert machine.describe()


def test_description_names_every_device() -> None:
    """One line names each GPU with its memory, and the RAM with its bandwidth."""
    described = Machine.parse(f"2x RTX 3090 + RTX 3060 + {RAM}").describe()
    assert described == (
        "RTX 3090 (24.00 GiB) + RTX 3090 (24.00 GiB) + RTX 3060 (12.00 GiB) + "
        "RAM 64.00 GiB at 80 GB/s"
    )


@given(
    gpus=st.lists(st.sampled_from(CARDS), max_size=3),
    capacity_gib=st.integers(1, 4096),
    rate=st.integers(1, 2000),
)
@settings(deadline=None)
def test_machines_survive_json(gpus: list[str], capacity_gib: int, rate: int) -> None:
    """A machine is the same after a trip through JSON."""
    machine = Machine.parse(" + ".join([*gpus, f"{capacity_gib}GiB@{rate}GB/s"]))
    assert Machine.model_validate_json(machine.model_dump_json()) == machine


def test_devices_cannot_change() -> None:
    """A device is a value: its fields cannot be assigned."""
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Machine.parse(RAM).ram, "capacity_bytes", 1)  # noqa: B010 (mypy knows it is refused)


def test_numbers_of_the_table_come_with_a_source() -> None:
    """The table says of every GPU and CPU where its numbers are from, and when they were read."""
    table = json.loads(files("quantplan").joinpath("data/hardware.json").read_text())
    assert table["source"]
    assert table["date"]
    for entry in (*table["gpus"].values(), *table["cpus"].values()):
        assert entry["source"]
        assert entry["date"]
    assert (*table["gpus"], *table["classes"]) == gpu_presets()
