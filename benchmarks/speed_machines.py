"""Hardware as people describe it in posts -> a machine."""

import re
from typing import Any

from quantplan import Device, Machine
from quantplan.errors import MachineError
from quantplan.hardware.table import cpu_presets, cpu_rates, load_hardware

_GIB = 2**30
_ENOUGH_RAM = 4096 * _GIB
_NOISE = r"\([^)]*\)|@.*|\bgeneration\b|\bx\d+\b"


def machine_of(
    hardware: dict[str, Any], *, needs_ram: bool, n_threads: int | None = None
) -> Machine | str:
    """The machine, or why it is not known.

    Args:
        hardware: ``cpu``, ``ram``, ``ram_bw_gbs`` and ``gpus``, each text or number or None.
        needs_ram: Whether the CPU multiplies weights, so that its rates matter.
        n_threads: Threads that were used, where that was said.
    """
    gpus: list[Device] = []
    for term in re.split(r",|\+", str(hardware.get("gpus") or "")):
        if term.strip():
            found = _gpus(term, len(gpus))
            if found is None:
                return f"unknown GPU {term.strip()!r}"
            gpus += found
    ram = _ram(hardware, n_threads)
    if ram is None:
        if needs_ram:
            said = f"{hardware.get('cpu')!r}, {hardware.get('ram')!r}"
            return f"the RAM's bandwidth is not known: {said}"
        ram = Device.ram(_ENOUGH_RAM, 60e9)
    return Machine(gpus=tuple(gpus), ram=ram)


def _gpus(term: str, first: int) -> list[Device] | None:
    text = re.sub(_NOISE, "", term, flags=re.IGNORECASE).strip()
    count = re.match(r"(\d+)\s*x\s+", text, re.IGNORECASE)
    name = text[count.end() :] if count else text
    for candidate in (
        name,
        re.sub(r"\s*\d+ ?GB\b", "", name),
        re.sub(r"s$", "", name),
        _short(name),
    ):
        try:
            found = Machine.parse(f"{candidate} + 1TiB@1GB/s").gpus
        except MachineError:
            continue
        devices = list(found) * (int(count[1]) if count else 1)
        return [d.model_copy(update={"name": f"GPU{first + i}"}) for i, d in enumerate(devices)]
    return None


def _short(name: str) -> str:
    """The longest known GPU name that a text contains."""
    plain = _plain(name)
    known = [n for n in load_hardware()["gpus"] if _plain(n) in plain]
    return max(known, key=len, default="?")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _ram(hardware: dict[str, Any], n_threads: int | None) -> Device | None:
    cpu, ram = str(hardware.get("cpu") or ""), str(hardware.get("ram") or "")
    sockets = 2 if re.search(r"\b2x\b|\bdual\b", cpu, re.IGNORECASE) else 1
    defaults = load_hardware()["defaults"]
    known = [n for n in cpu_presets() if _plain(n) in _plain(cpu)] or [
        n for n in cpu_presets() if _model_number(n) and _model_number(n) in _plain(cpu)
    ]
    name = max(known, key=len, default=None)
    cores, rate = cpu_rates(name) if name else (None, None)
    stated = re.search(r"(\d+)(?:c\b|-core)", cpu)
    cores = int(stated[1]) // sockets if stated else cores
    nominal = _nominal(ram, name)
    if nominal and not (name and load_hardware()["cpus"][name]["measured_gb_s"]):
        rate = nominal * defaults["ram_measured_share"]
    if hardware.get("ram_bw_gbs"):
        rate = float(hardware["ram_bw_gbs"]) * 1e9
    elif rate and sockets == 2:
        rate *= 1 + defaults["second_socket_gain"]
    if rate is None:
        return None
    used = min((n for n in (cores and cores * sockets, n_threads) if n), default=None)
    return Device.ram(_ENOUGH_RAM, rate, model=name or "RAM", cores=used)


def _model_number(name: str) -> str:
    """The part of a CPU's name that people always write, such as ``7965wx``."""
    numbers = re.findall(r"[a-z]*\d{4,}[a-z]*\d?[a-z]*", _plain(name.rsplit(maxsplit=1)[-1]))
    return numbers[-1] if numbers else ""


def _nominal(ram: str, name: str | None) -> float | None:
    """Bytes per second of the memory's channels, where the text tells type and channels."""
    speed = re.search(r"DDR[45]X?-(\d{4})", ram)
    channels = re.search(r"(\d+)\s*(?:ch|-channel)", ram)
    n_channels = int(channels[1]) if channels else None
    if n_channels is None and name:
        n_channels = load_hardware()["cpus"][name]["channels"]
    if speed and n_channels:
        return int(speed[1]) * 1e6 * 8 * n_channels
    return None
