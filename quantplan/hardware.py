"""Devices and machines: what there is to place tensors on."""

import difflib
import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from quantplan.display import Table, html_card
from quantplan.errors import MachineError
from quantplan.schema import Frozen
from quantplan.units import gb_per_s, gib, parse_bytes, parse_bytes_per_s

_TERM = re.compile(
    r"\s*(?:(?P<count>\d{1,3})\s*[xX](?:\s+|(?=[^\s@]{2})))?"  # 24XB is a misspelt unit
    r"(?P<what>[^@]+?)\s*(?:@\s*(?P<rate>.+?)\s*)?"
)
_CAPACITY = r"(?P<capacity>\d+(?:\.\d+)?\s*[GMT]i?B)"
_CAPACITY_FIRST = re.compile(rf"\s*{_CAPACITY}\s+(?P<name>[^@]*?[A-Za-z][^@]*?)\s*", re.IGNORECASE)
_CAPACITY_LAST = re.compile(rf"\s*(?P<name>[^@]+?)\s+{_CAPACITY}\s*", re.IGNORECASE)
# llama.cpp takes no more (LLAMA_MAX_DEVICES).
_MAX_GPUS = 16


@cache
def load_hardware() -> dict[str, Any]:
    """The GPU table and the defaults, with their sources (``data/hardware.json``)."""
    text = files("quantplan").joinpath("data/hardware.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def gpu_presets() -> tuple[str, ...]:
    """Names of GPUs and of memory classes that `Machine.parse` knows."""
    return (*load_hardware()["gpus"], *load_hardware()["classes"])


def cpu_presets() -> tuple[str, ...]:
    """Names of CPUs that `Machine.parse` knows."""
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
    found = [name for name in cpu_presets() if _key(name) in _key(text)]
    return cpu_rates(max(found, key=len)) if found else None


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
        bandwidth_bytes_per_s: Memory bandwidth: a GPU's nominal one, and the RAM's as all cores
            measure it.
        flops_per_s: Half-precision matrix rate, for prefill; of a CPU the rate of its vector units.
        vector_flops_per_s: Single-precision rate of the ordinary units, which unpack quantized
            weights while decoding.
        link_bytes_per_s: Rate at which a GPU reads host memory; 0 for the CPU.
        decode_slowdown: Time that this device takes to decode, as measured here, over the time that
            the speed model predicts; 1 where nothing was measured.
        prefill_slowdown: The same for prefill.

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
    vector_flops_per_s: float = Field(gt=0, allow_inf_nan=False)
    link_bytes_per_s: float = Field(ge=0, allow_inf_nan=False)
    decode_slowdown: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    prefill_slowdown: float = Field(default=1.0, gt=0, allow_inf_nan=False)

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
        vector_flops_per_s: float | None = None,
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
            vector_flops_per_s: Single-precision rate; by default a quarter of the matrix rate,
                as on GeForce cards.
            link_bytes_per_s: Host-to-device rate; by default PCIe 4.0 x16.
            margin_bytes: Memory to leave free; by default 10 %, at most 1 GiB.

        Raises:
            MachineError: A number is out of range; all of them are named.
        """
        defaults = load_hardware()["defaults"]
        flops = flops_per_s or bandwidth_bytes_per_s * defaults["gpu_flops_per_byte"]
        return cls(
            name=f"GPU{index}",
            kind="gpu",
            model=model,
            capacity_bytes=capacity_bytes,
            margin_bytes=_margin(capacity_bytes, "gpu") if margin_bytes is None else margin_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            flops_per_s=flops,
            vector_flops_per_s=vector_flops_per_s or flops * defaults["gpu_single_share"],
            link_bytes_per_s=link_bytes_per_s or defaults["link_gb_s"] * 1e9,
        )

    @classmethod
    def ram(
        cls,
        capacity_bytes: int,
        bandwidth_bytes_per_s: float,
        *,
        model: str = "RAM",
        cores: int | None = None,
        margin_bytes: int | None = None,
    ) -> Self:
        """The CPU with its RAM.

        Args:
            capacity_bytes: Memory in total.
            bandwidth_bytes_per_s: Rate at which all cores read, as `quantplan machine` measures it;
                about four fifths of what the memory's channels offer on paper.
            model: What it is, for people.
            cores: Physical cores; by default as many as usually go with the bandwidth.
            margin_bytes: Memory to leave free; by default 5 %, at most 4 GiB.

        Raises:
            MachineError: A number is out of range; all of them are named.
        """
        defaults = load_hardware()["defaults"]
        flops = bandwidth_bytes_per_s * defaults["cpu_flops_per_byte"]
        if cores is not None:
            flops = cores * defaults["cpu_gflops_per_core"] * 1e9
        return cls(
            name="CPU",
            kind="cpu",
            model=model,
            capacity_bytes=capacity_bytes,
            margin_bytes=_margin(capacity_bytes, "ram") if margin_bytes is None else margin_bytes,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            flops_per_s=flops,
            vector_flops_per_s=flops,
            link_bytes_per_s=0.0,
        )


def _margin(capacity_bytes: int, kind: Literal["gpu", "ram"]) -> int:
    defaults = load_hardware()["defaults"]
    share = max(0.0, capacity_bytes * float(defaults[f"{kind}_margin_share"]))
    return round(min(share, float(defaults[f"{kind}_margin_max_mib"]) * 2**20))


class Machine(_Described):
    """One or more GPUs, or none, and the RAM.

    Attributes:
        gpus: GPUs in the order in which llama.cpp numbers them.
        ram: The CPU with its RAM.
        measured: What was measured on the machine, one sentence each.
        speed_log_sd: Standard deviation of the logarithm of measured over predicted decode speed
            that remains after calibration; None where nothing was measured.

    Raises:
        MachineError: The GPUs are not GPU0, GPU1, ... in this order, they are more than 16, or the
            RAM is not the CPU's. All faults are gathered.
    """

    gpus: tuple[Device, ...]
    ram: Device
    measured: tuple[str, ...] = ()
    speed_log_sd: float | None = Field(default=None, gt=0, allow_inf_nan=False)

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
        machine without a GPU. A capacity may also stand with a name: ``M2 Max 64GiB`` as a GPU,
        ``96GiB Ryzen 9 9950X`` as the RAM. A text that ends in ``.json`` is the path of a profile.

        Args:
            text: For example ``RTX 4090 + 64GiB@80GB/s`` or ``2x RTX 3090 + 128GiB@200GB/s``.
            margin_bytes: Memory to leave free on every GPU, for the driver, its workspaces and
                whatever else runs there; by default 10 %, at most 1 GiB, which a desktop exceeds.

        Raises:
            MachineError: The text is not understood, or has more than 16 GPUs. All faults are
                gathered; unknown GPUs come with similar names.
        """
        if text.endswith(".json"):
            return cls.load(Path(text))
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

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a profile that `save` wrote.

        Raises:
            MachineError: The file cannot be read, or is no profile; every fault is named.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise MachineError(f"the machine profile {path} cannot be read: {error}") from error
        except ValidationError as error:
            raise MachineError(f"{path}: {_fault(fault)}" for fault in error.errors()) from error

    def save(self, path: Path) -> None:
        """Writes the machine as a profile, which ``--machine`` accepts.

        Raises:
            MachineError: The file cannot be written.
        """
        try:
            path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise MachineError(f"the machine profile {path} cannot be written: {error}") from error

    def summary(self) -> str:
        """The devices, what was measured, and what that changed, in a few lines."""
        slowed = [_slowdowns(device) for device in self.devices]
        said = [f"  measured: {text}" for text in self.measured]
        return "\n".join([self.describe(), *said, *(text for text in slowed if text)])

    def describe(self) -> str:
        """One line for people."""
        gpus = [f"{g.model} ({gib(g.capacity_bytes)})" for g in self.gpus]
        rate = gb_per_s(self.ram.bandwidth_bytes_per_s)
        return " + ".join([*gpus, f"RAM {gib(self.ram.capacity_bytes)} at {rate}"])

    def _table(self) -> Table:
        devices = self.devices
        return Table(
            "Devices",
            {
                "device": [d.name for d in devices],
                "model": [d.model for d in devices],
                "capacity_gib": [d.capacity_bytes / 2**30 for d in devices],
                "margin_gib": [d.margin_bytes / 2**30 for d in devices],
                "bandwidth_gb_per_s": [d.bandwidth_bytes_per_s / 1e9 for d in devices],
                "matrix_tflop_per_s": [d.flops_per_s / 1e12 for d in devices],
                "link_gb_per_s": [d.link_bytes_per_s / 1e9 for d in devices],
            },
        )

    def to_frame(self) -> Any:
        """The devices as a pandas data frame (or polars where only that is installed).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return self._table().to_frame()

    def _repr_html_(self) -> str:
        return html_card(self.describe(), {}, self._table()._repr_html_(), notes=self.measured)


def _slowdowns(device: Device) -> str:
    """What calibration found, for people; empty where it found nothing."""
    parts = [
        f"{what} takes {factor:.2f} times as long as predicted"
        for what, factor in (
            ("decoding", device.decode_slowdown),
            ("prefill", device.prefill_slowdown),
        )
        if factor != 1.0
    ]
    return f"  {device.name}: {', '.join(parts)}" if parts else ""


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
    name, preset = _gpu_preset(match["what"])
    return [
        Device.gpu(
            i,
            preset["capacity_mib"] * 2**20,
            preset["bandwidth_gb_s"] * 1e9,
            model=name,
            flops_per_s=preset["half_tflops"] * 1e12,
            vector_flops_per_s=preset["single_tflops"] * 1e12,
            link_bytes_per_s=preset["link_gb_s"] * 1e9,
            margin_bytes=margin_bytes,
        )
        for i in indices
    ]


def _parse_ram(term: str) -> Device:
    match = _TERM.fullmatch(term)
    if match is not None and match["rate"] and not match["count"]:
        return Device.ram(*_capacity_and_rate(match))
    named = _CAPACITY_FIRST.fullmatch(term)
    if named is None or (match is not None and match["rate"]):
        raise MachineError(
            f"the RAM is missing: the last term {term.strip()!r} is not a capacity with a "
            "bandwidth or a CPU. Write for example RTX 4090 + 64GiB@80GB/s (dual-channel DDR5-5600 "
            "reads about 70 to 80 GB/s), or 96GiB Ryzen 9 9950X"
        )
    name = _known("CPU", named["name"], cpu_presets(), "96GiB@80GB/s")
    cores, rate = cpu_rates(name)
    return Device.ram(_amount(named["capacity"]), rate, model=name, cores=cores)


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
    text = re.sub(r"\b(nvidia|geforce|amd|radeon|intel|apple)\b", "", name.lower())
    return re.sub(r"[\s\-_+]+", "", text)


def _gpu_preset(text: str) -> tuple[str, dict[str, Any]]:
    """A GPU by name, or by name and capacity where the name alone is another size."""
    presets = {**load_hardware()["gpus"], **load_hardware()["classes"]}
    sized = _CAPACITY_LAST.fullmatch(text)
    names = {_key(name) for name in presets}
    if sized is not None and _key(text) not in names and _key(sized["name"]) in names:
        name, preset = _gpu_preset(sized["name"])
        return name, {**preset, "capacity_mib": _amount(sized["capacity"]) // 2**20}
    name = _known("GPU", text, tuple(presets), "24GiB@936GB/s")
    return name, presets[name]


def _known(what: str, text: str, names: tuple[str, ...], numbers: str) -> str:
    """The name that is meant by a text.

    Args:
        what: Kind of thing, for the message.
        text: As a person wrote it.
        names: Known names.
        numbers: How to give it by numbers instead.

    Raises:
        MachineError: There is no such name; similar ones are named.
    """
    by_key = {_key(n): n for n in names}
    by_key.update({k.replace("gib", "gb"): n for k, n in by_key.items() if n.endswith("GiB")})
    known = by_key.get(_key(text))
    if known is None:
        near = difflib.get_close_matches(_key(text), by_key, n=3, cutoff=0.6)
        similar = " or ".join(dict.fromkeys(by_key[k] for k in near))
        hint = f"did you mean {similar}?" if near else f"known are {', '.join(names)}."
        raise MachineError(f"unknown {what} {text!r}: {hint} Or give numbers: {numbers}")
    return known


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
