"""GGUF headers written by hand, however wrong."""

import struct
from collections.abc import Sequence

from gguf import GGUFValueType

Entry = tuple[str, bytes]
"""A key and its encoded type and value."""
Tensor = tuple[str, Sequence[int], int, int]
"""Name, shape in GGUF order, type number and offset."""


def text(value: str, order: str = "<") -> bytes:
    """Encodes a string as GGUF does."""
    raw = value.encode()
    return struct.pack(f"{order}Q", len(raw)) + raw


def u32(value: int) -> bytes:
    """Encodes an unsigned value with its type."""
    return struct.pack("<II", GGUFValueType.UINT32, value)


def strings(values: Sequence[str | int]) -> bytes:
    """Encodes an array of strings; a number stands for so many letters."""
    items = [text(v if isinstance(v, str) else "x" * v) for v in values]
    return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(items)) + b"".join(
        items
    )


def blob(
    entries: Sequence[Entry] = (),
    tensors: Sequence[Tensor] = (("a", (8,), 0, 0),),
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: bytes = bytes(64),
) -> bytes:
    """Writes a GGUF by hand, however wrong it may be."""
    n_tensors, n_keys = counts or (len(tensors), len(entries))
    raw = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    raw += b"".join(text(key) + value for key, value in entries)
    for name, shape_ne, kind, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(shape_ne)}Q", len(shape_ne), *shape_ne)
        raw += struct.pack("<IQ", kind, offset)
    return raw + bytes(-len(raw) % 32) + data
