"""Machines as people write them: ``2x RTX 3090 + 128GiB@200GB/s``."""

import re
from dataclasses import dataclass, replace

from quantplan.errors import MachineError
from quantplan.hardware.network import split_network
from quantplan.hardware.table import (
    GpuSpec,
    cpu_presets,
    cpu_rates,
    gpu_presets,
    gpu_spec,
    key,
    load_hardware,
    without_vendor,
)
from quantplan.hardware.unified import check_parts, share_ram, sharing
from quantplan.near import near_names
from quantplan.units import gb_per_s, gib, parse_bytes, parse_bytes_per_s
from quantplan.words import listed

_TERM = re.compile(
    r"\s*(?:(?P<count>\d{1,3})\s*[xX](?:\s+|(?=[^\s@]{2})))?"  # 24XB is a misspelt unit
    r"(?P<what>[^@]+?)\s*(?:@\s*(?P<rate>.+?)\s*)?"
)
_CAPACITY = r"(?P<capacity>\d+(?:\.\d+)?\s*[GMT]i?B)"
_CAPACITY_FIRST = re.compile(rf"\s*{_CAPACITY}\s+(?P<name>[^@]*?[A-Za-z][^@]*?)\s*", re.IGNORECASE)
_CAPACITY_LAST = re.compile(rf"\s*(?P<name>[^@]+?)\s+{_CAPACITY}\s*", re.IGNORECASE)
_CAPACITY_ALONE = re.compile(rf"\s*{_CAPACITY}\s*", re.IGNORECASE)
_MEMORY = re.compile(
    r"(?:LP)?DDR(?P<generation>[345])?X?(?:[-\s]*(?P<mt_s>\d{4,5}))?\b.*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class RamSpec:
    """The RAM and the CPU of a text.

    Attributes:
        capacity_bytes: Memory in total.
        bandwidth_bytes_per_s: Rate at which all cores read.
        model: What it is, for people.
        cores: Physical cores, where the CPU is known.
        shared_bytes: Part of the memory that is a GPU's.
        assumed: What is not known of it and was taken to be so, one sentence each.
    """

    capacity_bytes: int
    bandwidth_bytes_per_s: float
    model: str = "RAM"
    cores: int | None = None
    shared_bytes: int = 0
    assumed: tuple[str, ...] = ()


def parse_text(text: str) -> tuple[list[GpuSpec], RamSpec]:
    """Reads GPUs and RAM from a line of text; see `Machine.parse` for what it may say.

    Returns:
        The GPUs in the order in which llama.cpp has them, and the RAM.

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
        ram = _parse_ram(ram_term, sharing(gpus))
    except MachineError as error:
        faults += error.faults
    if faults or ram is None:
        raise MachineError(faults)
    check_parts(gpus, ram.capacity_bytes)
    gpus, shared_bytes, assumed = share_ram(gpus, ram.capacity_bytes)
    # llama.cpp has the devices of other hosts before its own, those of one host together.
    gpus.sort(key=lambda gpu: gpu.network is None)
    return gpus, replace(ram, shared_bytes=shared_bytes, assumed=(*assumed, *ram.assumed))


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
    spec = _gpu_in(match["what"])
    if spec is None:
        spec = gpu_spec(_known("GPU", match["what"], gpu_presets(), "24GiB@936GB/s"))
    return [spec] * count


def _parse_ram(term: str, sharing_it: list[GpuSpec]) -> RamSpec:
    """The RAM.

    Args:
        term: The last term.
        sharing_it: The GPUs whose memory it is too.
    """
    match = _TERM.fullmatch(term)
    if match is not None and match["rate"] and not match["count"]:
        return RamSpec(*_capacity_and_rate(match))
    if alone := _CAPACITY_ALONE.fullmatch(term):
        return _ram_at_usual_rate(alone["capacity"], sharing_it)
    named = _CAPACITY_FIRST.fullmatch(term)
    if named is None or (match is not None and match["rate"]) or _gpu_in(term):
        raise MachineError(_missing_ram(term))
    if memory := _MEMORY.fullmatch(named["name"]):
        raise MachineError(_only_memory(named["capacity"], memory))
    name = _known("CPU", named["name"], cpu_presets(), "96GiB@80GB/s")
    cores, rate = cpu_rates(name)
    return RamSpec(_amount(named["capacity"]), rate, name, cores)


def _ram_at_usual_rate(capacity: str, sharing_it: list[GpuSpec]) -> RamSpec:
    """RAM of which no rate is given: that of a GPU that shares it tells what the CPU reaches."""
    if not sharing_it:
        raise MachineError(
            f"the RAM's bandwidth is missing: write {capacity}@80GB/s (dual-channel DDR5-5600 "
            f"reads about 70 to 80 GB/s), or the CPU, such as {capacity} Ryzen 9 9950X; "
            "`quantplan machine` measures that of this machine"
        )
    gpu = sharing_it[0]
    rate = gpu.bandwidth_bytes_per_s * load_hardware()["defaults"]["ram_measured_share"]
    said = (
        f"the CPU reads the RAM at {gb_per_s(rate)}, where the {gpu.model} has "
        f"{gb_per_s(gpu.bandwidth_bytes_per_s)}; another rate is written {capacity}@...GB/s"
    )
    return RamSpec(_amount(capacity), rate, assumed=(said,))


def _missing_ram(term: str) -> str:
    """Says what to write as the last term."""
    gpu = _gpu_in(term)
    if gpu is not None and gpu.is_unified:
        capacity = gib(gpu.capacity_bytes) if gpu.is_sized else "64GiB"
        example = f"{gpu.model} + {capacity}, with all the memory of the machine behind the +"
    else:
        example = (
            f"{gpu.model if gpu else 'RTX 4090'} + 64GiB@80GB/s (dual-channel DDR5-5600 reads "
            "about 70 to 80 GB/s), or 96GiB Ryzen 9 9950X"
        )
    return (
        f"the RAM is missing: the last term {term.strip()!r} is not a capacity with a bandwidth or "
        f"a CPU. Write for example {example}"
    )


def _only_memory(capacity: str, memory: re.Match[str]) -> str:
    """Says how to give the rate of memory whose kind alone was given."""
    per_mt_s = 2 * 8 * load_hardware()["defaults"]["ram_measured_share"] / 1e3
    usual = load_hardware()["defaults"]["ram_mt_s"][memory["generation"] or "5"]
    rate = f"{int(memory['mt_s'] or usual) * per_mt_s:.0f}GB/s"
    channels = "two channels" if memory["mt_s"] else f"two channels of {usual}"
    return (
        f"{memory[0]!r} is a kind of memory, which does not say how many channels there are: give "
        f"the bandwidth, {capacity}@{rate} for {channels}"
    )


def _gpu_in(term: str) -> GpuSpec | None:
    """The known GPU that a term names, with a size before or behind it; None where it has none."""
    sized = _CAPACITY_FIRST.fullmatch(term) or _CAPACITY_LAST.fullmatch(term)
    for name, capacity in [(term, None), *([(sized["name"], sized["capacity"])] if sized else [])]:
        found = _look_up(name, gpu_presets())
        if found is not None:
            spec = gpu_spec(found)
            return spec if capacity is None else spec.with_capacity(_amount(capacity))
    return None


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
    known = _look_up(text, names)
    if text.lstrip().startswith("-"):
        raise MachineError(f"{text.strip()!r} is below 0, or has a '-' too many: leave it out")
    if known is None:
        near = near_names(without_vendor(text), names)
        hint = f"did you mean {listed(near, 'or')}? Or give" if near else "give"
        raise MachineError(f"unknown {what} {text!r}: {hint} numbers, such as {numbers}")
    return known


def _look_up(text: str, names: tuple[str, ...]) -> str | None:
    if text.lstrip().startswith("-"):  # which names are compared without
        return None
    by_key = {key(n): n for n in names}
    by_key.update({k.replace("gib", "gb"): n for k, n in by_key.items() if n.endswith("GiB")})
    return by_key.get(key(text))


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
