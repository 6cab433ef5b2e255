"""Machines as people write them: ``2x RTX 3090 + 128GiB@200GB/s``."""

import difflib
import re
from dataclasses import dataclass, replace

from quantplan.errors import MachineError
from quantplan.hardware_table import (
    GpuSpec,
    cpu_presets,
    cpu_rates,
    gpu_presets,
    gpu_spec,
    key,
)
from quantplan.network import split_network
from quantplan.units import gib, parse_bytes, parse_bytes_per_s

_TERM = re.compile(
    r"\s*(?:(?P<count>\d{1,3})\s*[xX](?:\s+|(?=[^\s@]{2})))?"  # 24XB is a misspelt unit
    r"(?P<what>[^@]+?)\s*(?:@\s*(?P<rate>.+?)\s*)?"
)
_CAPACITY = r"(?P<capacity>\d+(?:\.\d+)?\s*[GMT]i?B)"
_CAPACITY_FIRST = re.compile(rf"\s*{_CAPACITY}\s+(?P<name>[^@]*?[A-Za-z][^@]*?)\s*", re.IGNORECASE)
_CAPACITY_LAST = re.compile(rf"\s*(?P<name>[^@]+?)\s+{_CAPACITY}\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RamSpec:
    """The RAM and the CPU of a text.

    Attributes:
        capacity_bytes: Memory in total.
        bandwidth_bytes_per_s: Rate at which all cores read.
        model: What it is, for people.
        cores: Physical cores, where the CPU is known.
    """

    capacity_bytes: int
    bandwidth_bytes_per_s: float
    model: str = "RAM"
    cores: int | None = None


def parse_text(text: str) -> tuple[list[GpuSpec], RamSpec]:
    """Reads GPUs and RAM from a line of text; see `Machine.parse` for what it may say.

    Raises:
        MachineError: The text is not understood. All faults are gathered.
    """
    *gpu_terms, ram_term = text.split("+")
    faults: list[str] = []
    gpus: list[GpuSpec] = []
    for term in gpu_terms:
        try:
            gpus += _parse_gpus(term)
        except MachineError as error:
            faults += error.faults
    ram: RamSpec | None = None
    try:
        ram = _parse_ram(ram_term)
    except MachineError as error:
        faults += error.faults
    if faults or ram is None:
        raise MachineError(faults)
    # llama.cpp has the devices of other hosts before its own, those of one host together.
    return sorted(gpus, key=lambda gpu: gpu.network is None), ram


def _parse_gpus(term: str) -> list[GpuSpec]:
    own, network = split_network(term)
    return [replace(gpu, network=network) for gpu in _parse_own_gpus(own)]


def _parse_own_gpus(term: str) -> list[GpuSpec]:
    match = _TERM.fullmatch(term)
    if match is None:
        raise MachineError(f"{term.strip()!r} is no GPU: write for example 2x RTX 3090")
    count = int(match["count"] or 1)
    if count == 0:
        raise MachineError(f"{term.strip()!r} is no GPU: leave it out, or write a count above 0")
    if match["rate"]:
        capacity, rate = _capacity_and_rate(match)
        return [GpuSpec(f"{gib(capacity)} GPU", capacity, rate)] * count
    return [_named_gpu(match["what"])] * count


def _parse_ram(term: str) -> RamSpec:
    match = _TERM.fullmatch(term)
    if match is not None and match["rate"] and not match["count"]:
        return RamSpec(*_capacity_and_rate(match))
    named = _CAPACITY_FIRST.fullmatch(term)
    if named is None or (match is not None and match["rate"]):
        raise MachineError(
            f"the RAM is missing: the last term {term.strip()!r} is not a capacity with a "
            "bandwidth or a CPU. Write for example RTX 4090 + 64GiB@80GB/s (dual-channel DDR5-5600 "
            "reads about 70 to 80 GB/s), or 96GiB Ryzen 9 9950X"
        )
    name = _known("CPU", named["name"], cpu_presets(), "96GiB@80GB/s")
    cores, rate = cpu_rates(name)
    return RamSpec(_amount(named["capacity"]), rate, name, cores)


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


def _named_gpu(text: str) -> GpuSpec:
    """A GPU by name, or by name and capacity where the name alone is another size."""
    sized = _CAPACITY_LAST.fullmatch(text)
    names = {key(name) for name in gpu_presets()}
    if sized is not None and key(text) not in names and key(sized["name"]) in names:
        return _named_gpu(sized["name"]).with_capacity(_amount(sized["capacity"]))
    return gpu_spec(_known("GPU", text, gpu_presets(), "24GiB@936GB/s"))


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
    by_key = {key(n): n for n in names}
    by_key.update({k.replace("gib", "gb"): n for k, n in by_key.items() if n.endswith("GiB")})
    known = by_key.get(key(text))
    if text.lstrip().startswith("-"):  # which names are compared without
        raise MachineError(f"{text.strip()!r} is below 0, or has a '-' too many: leave it out")
    if known is None:
        near = difflib.get_close_matches(key(text), by_key, n=3, cutoff=0.6)
        similar = " or ".join(dict.fromkeys(by_key[k] for k in near))
        hint = f"did you mean {similar}?" if near else f"known are {', '.join(names)}."
        raise MachineError(f"unknown {what} {text!r}: {hint} Or give numbers: {numbers}")
    return known


def _amount(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise MachineError(str(error)) from error


def _rate(text: str) -> float:
    try:
        rate = parse_bytes_per_s(text)
    except ValueError as error:
        raise MachineError(str(error)) from error
    if rate <= 0:
        raise MachineError(f"the bandwidth {text!r} must be above 0")
    return rate
