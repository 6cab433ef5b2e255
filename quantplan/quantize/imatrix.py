"""Reads llama.cpp's importance matrices: the mean square of each column's activations.

Two formats: GGUF, with sums of squares (``TENSOR.in_sum2``) and counts (``TENSOR.counts``) per
expert, and the older ``.dat``, with sums times calls.
"""

import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import SourceError
from quantplan.inventory.header import Header, TensorEntry, read_header

Importance = dict[str, NDArray[np.float32]]
"""By tensor name, an array of shape (experts or 1, columns)."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1024
# Mean squares of activations stay below 1e11; in ggml, sums with larger ones overflow.
_MAX_IMPORTANCE = 1e15


def read_imatrix(path: str | os.PathLike[str]) -> Importance:
    """Reads an importance matrix in either format.

    Columns that no token reached count as 1, as in llama-quantize. The older format does not tell
    experts apart: their columns follow each other in one row.

    Raises:
        SourceError: The file cannot be read, is no importance matrix, or holds values that are
            negative or not finite.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_dat(path.read_bytes(), path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    wrong = [n for n, v in found.items() if not ((v >= 0) & (v <= _MAX_IMPORTANCE)).all()]
    if wrong:
        raise SourceError(
            f"{path}: {name} has values below 0, above {_MAX_IMPORTANCE:.0e} or not finite"
            for name in wrong
        )
    if not found:
        raise SourceError(f"{path} holds no importance matrix of any tensor")
    return found


def importance_fault(
    name: str, shape_ne: tuple[int, ...], importance: NDArray[np.float32]
) -> str | None:
    """Why an importance cannot be that of a tensor; None where it can."""
    n_columns, _, n_experts, *_ = *shape_ne, 1, 1
    if importance.size == n_columns * n_experts:
        return None
    return (
        f"{name} has {n_columns} columns in {n_experts} experts, but the importance "
        f"matrix has {importance.size} values for it; it is of another model"
    )


def _read_gguf(path: Path) -> Importance:
    header = read_header(path)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    stored = {entry.name: _floats(header, content, entry) for entry in header.tensors}
    found = {}
    for name, sums in stored.items():
        if name.endswith(_SUMS):
            tensor = name.removesuffix(_SUMS)
            counts = stored.get(tensor + _COUNTS)
            if counts is None or counts.size != sums.shape[0]:
                raise SourceError(f"{path}: {tensor} has sums but no matching counts")
            counts = counts.reshape(-1, 1)
            mean = sums / np.maximum(counts, 1)
            found[tensor] = np.where(counts > 0, mean, 1).astype(np.float32)
    return found


def _floats(header: Header, content: NDArray[np.uint8], entry: TensorEntry) -> NDArray[np.float32]:
    if entry.qtype.name != "F32":
        raise SourceError(f"{entry.name} of an importance matrix is {entry.qtype.name}, not F32")
    begin = header.data_offset + entry.offset
    values = np.array(content[begin : begin + entry.n_bytes]).view("<f4")
    return values.reshape(-1, entry.shape_ne[0]).astype(np.float32)


def _read_dat(content: bytes, path: Path) -> Importance:
    found: Importance = {}
    try:
        (n_entries,) = struct.unpack_from("<i", content, 0)
        at = 4
        for _ in range(n_entries):
            (length,) = struct.unpack_from("<i", content, at)
            if not 0 < length <= _LONGEST_NAME:
                raise ValueError(f"a name of {length} bytes")
            name = content[at + 4 : at + 4 + length].decode("utf-8")
            n_calls, n_values = struct.unpack_from("<ii", content, at + 4 + length)
            at += 12 + length
            values = np.frombuffer(content, "<f4", n_values, at).astype(np.float32)
            at += 4 * n_values
            found[name] = (values / max(n_calls, 1)).reshape(1, -1)
    except (struct.error, ValueError) as error:
        raise SourceError(f"{path} is no importance matrix of llama.cpp: {error}") from error
    return found
