"""The only place that parses or prints bytes and rates."""

import math
import re

MIB, GIB = 2**20, 2**30
"""Bytes in a MiB and in a GiB, which memory is counted in."""

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_BYTE_FACTORS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": MIB, "gib": GIB, "tib": 2**40,
    "g": GIB, "m": MIB, "t": 2**40,
}  # fmt: skip
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGT])bit/s\s*", re.IGNORECASE)
_BIT_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECOND_FACTORS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def parse_bytes(text: str) -> int:
    """Parses an amount of memory.

    Args:
        text: A number with its unit: ``24GiB``, ``64 GB``, ``512MiB``; ``G`` means GiB, as on
            memory modules. Only 0 needs none: who leaves it out rarely means bytes.

    Returns:
        Bytes, rounded to the nearest integer.

    Raises:
        ValueError: The text is not such an amount, or has no unit.
    """
    match = _QUANTITY.fullmatch(text)
    if match and not match[2]:
        if float(match[1]) == 0:
            return 0
        raise ValueError(f"{text.strip()!r} has no unit: write {match[1]}GiB")
    factor = _BYTE_FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not an amount of memory such as 24GiB or 512MiB")
    amount = float(match[1]) * factor
    if not math.isfinite(amount):
        raise ValueError(f"{text!r} is not an amount of memory: the number is too large")
    return round(amount)


def parse_seconds(text: str) -> float:
    """Parses a duration such as ``0.2ms``, ``150us`` or ``1s``.

    Raises:
        ValueError: The text is not such a duration.
    """
    match = _QUANTITY.fullmatch(text)
    factor = _SECOND_FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a duration such as 0.2ms")
    return float(match[1]) * factor


def parse_bytes_per_s(text: str) -> float:
    """Parses a bandwidth such as ``80GB/s``, ``74.5 GiB/s`` or ``10Gbit/s``.

    Returns:
        Bytes per second.

    Raises:
        ValueError: The text does not end in ``/s`` or its amount is not understood.
    """
    if bits := _BITS.fullmatch(text):
        return float(bits[1]) * _BIT_FACTORS[bits[2].lower()] / 8
    amount, slash, second = text.strip().rpartition("/")
    if not slash or second.strip().lower() != "s" or amount.strip()[-1:].isdecimal():
        raise ValueError(f"{text!r} is not a bandwidth such as 80GB/s")
    return float(parse_bytes(amount))


def gib(n_bytes: float) -> str:
    """Prints bytes as GiB with two decimals."""
    return f"{n_bytes / GIB:.2f} GiB"


def mib(n_bytes: float) -> str:
    """Prints bytes as MiB with two decimals, as llama.cpp's log does."""
    return f"{n_bytes / MIB:.2f} MiB"


def gb_per_s(bytes_per_s: float) -> str:
    """Prints a bandwidth in GB/s (decimal, as vendors state it)."""
    return f"{bytes_per_s / 1e9:g} GB/s"
