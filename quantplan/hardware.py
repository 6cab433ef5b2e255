"""Devices and machines: what there is to place tensors on."""

import difflib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from quantplan.errors import MachineError
from quantplan.schema import Frozen
from quantplan.units import gb_per_s, gib, parse_bytes, parse_bytes_per_s

_TERM = re.compile(
    r"\s*(?:(?P<count>\d{1,3})\s*[xX](?:\s+|(?=[^\s@]{2})))?"  # 24XB is a misspelt unit
    r"(?P<what>[^@]+?)\s*(?:@\s*(?P<rate>.+?)\s*)?"
)
# llama.cpp takes no more (LLAMA_MAX_DEVICES).
_MAX_GPUS = 16


@cache
def _data() -> dict[str, Any]:
    """The GPU table and the defaults, with their sources (``data/hardware.json``)."""
    text = files("quantplan").joinpath("data/hardware.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def gpu_presets() -> tuple[str, ...]:
    """Names of GPUs and of memory classes that `Machine.parse` knows."""
    return (*_data()["gpus"], *_data()["classes"])


class _Described(Frozen):
    """A value that raises `MachineError` with every fault."""

    def __init__(self, **values: Any) -> None:
        """Turns what pydantic finds into sentences."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise MachineError(_fault(fault) for fault in error.errors()) from error


def _fault(fault: Any) -> str:
    """One validation fault as a sentence."""
    where = " ".join(map(str, fault["loc"]))
    return f"machine {where}: {fault['msg']} (got {fault['input']!r})"


class Device(_Described):
    """Something that holds tensors and reads them.

    Attributes:
        name: ``GPU0``, ``GPU1``, ... or ``CPU`` (the RAM).
        kind: ``gpu`` or ``cpu``.
        model: What it is, for people.
        capacity_bytes: Memory in total.
        margin_bytes: Part of it that a plan must leave free (driver context, desktop, system).
        bandwidth_bytes_per_s: Nominal memory bandwidth.
        flops_per_s: Half-precision matrix rate, for prefill.
        link_bytes_per_s: Rate at which a GPU reads host memory; 0 for the CPU.

    Raises:
        MachineError: A number is out of range; all of them are named.
    """

    name: str
    kind: Literal["gpu", "cpu"]
    model: str
    capacity_bytes: int = Field(ge=0)
    margin_bytes: int = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0, allow_inf_nan=False)
    flops_per_s: float = Field(gt=0, allow_inf_nan=False)
    link_bytes_per_s: float = Field(ge=0, allow_inf_nan=False)

    @property
    def usable_bytes(self) -> int:
        """Capacity less margin."""
        return max(0, self.capacity_bytes - self.margin_bytes)

    @classmethod
    def gpu(
        cls,
        index: int,
        capacity_bytes: int,
        bandwidth_bytes_per_s: float,
        *,
        model: str = "GPU",
        flops_per_s: float | None = None,
        link_bytes_per_s: float | None = None,
        margin_bytes: int | None = None,
    ) -> Self:
        """A GPU from plain numbers.

        Args:
            index: Position among the machine's GPUs, from 0.
            capacity_bytes: Memory in total.
            bandwidth_bytes_per_s: Nominal memory bandwidth.
            model: What it is, for people.
            flops_per_s: Half-precision matrix rate; by default in the RTX 3090's proportion to its
                bandwidth.
            link_bytes_per_s: Host-to-device rate; by default PCIe 4.0 x16.
            margin_bytes: Memory to leave free; by default 10 %, at most 1 GiB.

        Raises:
            MachineError: A number is out of range; all of them are named.
        """
        defaults = _data()["defaults"]
        return cls(
            name=f"GPU{index}",
            kind="gpu",
            model=model,
            capacity_bytes=capacity_bytes,
            margin_bytes=_margin(capacity_bytes, "gpu") if margin_bytes is None else margin_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            flops_per_s=flops_per_s or bandwidth_bytes_per_s * defaults["gpu_flops_per_byte"],
            link_bytes_per_s=link_bytes_per_s or defaults["link_gb_s"] * 1e9,
        )

    @classmethod
    def ram(
        cls, capacity_bytes: int, bandwidth_bytes_per_s: float, *, margin_bytes: int | None = None
    ) -> Self:
        """The CPU with its RAM.

        Args:
            capacity_bytes: Memory in total.
            bandwidth_bytes_per_s: Memory bandwidth.
            margin_bytes: Memory to leave free; by default 5 %, at most 4 GiB.

        Raises:
            MachineError: A number is out of range; all of them are named.
        """
        return cls(
            name="CPU",
            kind="cpu",
            model="RAM",
            capacity_bytes=capacity_bytes,
            margin_bytes=_margin(capacity_bytes, "ram") if margin_bytes is None else margin_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            flops_per_s=bandwidth_bytes_per_s * _data()["defaults"]["cpu_flops_per_byte"],
            link_bytes_per_s=0.0,
        )


def _margin(capacity_bytes: int, kind: Literal["gpu", "ram"]) -> int:
    defaults = _data()["defaults"]
    share = max(0.0, capacity_bytes * float(defaults[f"{kind}_margin_share"]))
    return round(min(share, float(defaults[f"{kind}_margin_max_mib"]) * 2**20))


class Machine(_Described):
    """One or more GPUs, or none, and the RAM.

    Attributes:
        gpus: GPUs in the order in which llama.cpp numbers them.
        ram: The CPU with its RAM.

    Raises:
        MachineError: The GPUs are not GPU0, GPU1, ... in this order, they are more than 16, or the
            RAM is not the CPU's. All faults are gathered.
    """

    gpus: tuple[Device, ...]
    ram: Device

    @model_validator(mode="after")
    def _devices_are_where_they_belong(self) -> Self:
        faults = [
            f"GPU {index} of the machine is {gpu.name!r} of kind {gpu.kind!r}: make it with "
            f"Device.gpu({index}, ...)"
            for index, gpu in enumerate(self.gpus)
            if (gpu.name, gpu.kind) != (f"GPU{index}", "gpu")
        ]
        if (self.ram.name, self.ram.kind) != ("CPU", "cpu"):
            faults.append(
                f"the machine's RAM is {self.ram.name!r} of kind {self.ram.kind!r}: make it with "
                "Device.ram(...)"
            )
        if len(self.gpus) > _MAX_GPUS:
            faults.append(
                f"the machine has {len(self.gpus)} GPUs, but llama.cpp takes at most {_MAX_GPUS}: "
                "leave some out"
            )
        if faults:
            raise MachineError(faults)
        return self

    @property
    def devices(self) -> tuple[Device, ...]:
        """GPUs first, then the CPU."""
        return (*self.gpus, self.ram)

    @classmethod
    def parse(cls, text: str, *, margin_bytes: int | None = None) -> Self:
        """Reads a machine from a line of text.

        The terms are joined by ``+``; the last one is the RAM. A GPU is a preset name
        (``RTX 4090``, ``24GiB``) or a capacity with a bandwidth (``24GiB@936GB/s``), with a count
        in front (``2x RTX 3090``). RAM is always a capacity with a bandwidth; a RAM term alone is a
        machine without a GPU.

        Args:
            text: For example ``RTX 4090 + 64GiB@80GB/s`` or ``2x RTX 3090 + 128GiB@200GB/s``.
            margin_bytes: Memory to leave free on every GPU, for the driver, its workspaces and
                whatever else runs there; by default 10 %, at most 1 GiB, which a desktop exceeds.

        Raises:
            MachineError: The text is not understood, or has more than 16 GPUs. All faults are
                gathered; unknown GPUs come with similar names.
        """
        *gpu_terms, ram_term = text.split("+")
        faults: list[str] = []
        gpus: list[Device] = []
        for term in gpu_terms:
            try:
                gpus += _parse_gpus(term, len(gpus), margin_bytes)
            except MachineError as error:
                faults += error.faults
        ram: Device | None = None
        try:
            ram = _parse_ram(ram_term)
        except MachineError as error:
            faults += error.faults
        if faults or ram is None:
            raise MachineError(faults)
        return cls(gpus=tuple(gpus), ram=ram)

    def describe(self) -> str:
        """One line for people."""
        gpus = [f"{g.model} ({gib(g.capacity_bytes)})" for g in self.gpus]
        rate = gb_per_s(self.ram.bandwidth_bytes_per_s)
        return " + ".join([*gpus, f"RAM {gib(self.ram.capacity_bytes)} at {rate}"])


def _parse_gpus(term: str, first_index: int, margin_bytes: int | None) -> list[Device]:
    match = _TERM.fullmatch(term)
    if match is None:
        raise MachineError(f"{term.strip()!r} is no GPU: write for example 2x RTX 3090")
    count = int(match["count"] or 1)
    if count == 0:
        raise MachineError(f"{term.strip()!r} is no GPU: leave it out, or write a count above 0")
    indices = range(first_index, first_index + count)
    if match["rate"]:
        capacity, rate = _capacity_and_rate(match)
        model = f"{gib(capacity)} GPU"
        return [
            Device.gpu(i, capacity, rate, model=model, margin_bytes=margin_bytes) for i in indices
        ]
    name, preset = _preset(match["what"])
    return [
        Device.gpu(
            i,
            preset["capacity_mib"] * 2**20,
            preset["bandwidth_gb_s"] * 1e9,
            model=name,
            flops_per_s=preset["half_tflops"] * 1e12,
            link_bytes_per_s=preset["link_gb_s"] * 1e9,
            margin_bytes=margin_bytes,
        )
        for i in indices
    ]


def _parse_ram(term: str) -> Device:
    match = _TERM.fullmatch(term)
    if match is None or match["count"] or not match["rate"]:
        raise MachineError(
            f"the RAM is missing: the last term {term.strip()!r} is not a capacity with a "
            "bandwidth. Write for example RTX 4090 + 64GiB@80GB/s (dual-channel DDR5-5600 reads "
            "about 80 GB/s)"
        )
    return Device.ram(*_capacity_and_rate(match))


def _capacity_and_rate(match: re.Match[str]) -> tuple[int, float]:
    faults: list[str] = []
    values: list[float] = []
    for parse, text in ((_amount, match["what"]), (_rate, match["rate"])):
        try:
            values.append(parse(text))
        except MachineError as error:
            faults += error.faults
    if faults:
        raise MachineError(faults)
    return int(values[0]), values[1]


def _key(name: str) -> str:
    """Compares names without case, spaces, hyphens and vendor words."""
    text = re.sub(r"\b(nvidia|geforce|amd|radeon)\b", "", name.lower())
    return re.sub(r"[\s\-_]+", "", text)


def _preset(name: str) -> tuple[str, dict[str, Any]]:
    presets = {**_data()["gpus"], **_data()["classes"]}
    by_key = {_key(n): n for n in presets}
    by_key.update({k.replace("gib", "gb"): n for k, n in by_key.items() if n.endswith("GiB")})
    known = by_key.get(_key(name))
    if known is None:
        near = difflib.get_close_matches(_key(name), by_key, n=3, cutoff=0.6)
        similar = " or ".join(dict.fromkeys(by_key[k] for k in near))
        hint = f"did you mean {similar}?" if near else f"known are {', '.join(gpu_presets())}."
        raise MachineError(f"unknown GPU {name!r}: {hint} Or give numbers: 24GiB@936GB/s")
    return known, presets[known]


def _amount(text: str) -> int:
    try:
        amount = parse_bytes(text)
    except ValueError as error:
        raise MachineError(str(error)) from error
    if text[-1].isdecimal():
        raise MachineError(f"the capacity {text!r} has no unit: write {text}GiB")
    return amount


def _rate(text: str) -> float:
    try:
        rate = parse_bytes_per_s(text)
    except ValueError as error:
        raise MachineError(str(error)) from error
    if rate <= 0:
        raise MachineError(f"the bandwidth {text!r} must be above 0")
    return rate
