"""Turns one chunk of a tensor into the target's bytes; threads share nothing but the source."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import WeightError
from quantplan.inventory.ranges import Ranges
from quantplan.quantize.backend import Backend
from quantplan.quantize.layout import TensorMove

# Small enough that converted numbers are still in the processor's cache when they are quantized,
# and that a slow type, 10 ms per chunk, does not leave the other threads without work.
_CHUNK_WEIGHTS = 1 << 17
_COPIED_BYTES = 1 << 20
# ggml sums squares in single precision: larger weights overflow, which ends the process.
MAX_MAGNITUDE = 1e9


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor that is converted at once: whole rows of one expert.

    Attributes:
        move: The tensor.
        begin: Where the part starts in the source file, in bytes.
        n_bytes: Bytes of the part in the source.
        target_begin: Where it starts in the target's data section, in bytes.
        target_n_bytes: Bytes of the part in the target.
        expert: Which expert it belongs to.
    """

    move: TensorMove
    begin: int
    n_bytes: int
    target_begin: int
    target_n_bytes: int
    expert: int = 0

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        target = self.move.target
        return self.target_begin + self.target_n_bytes == target.offset + target.n_bytes

    @property
    def n_weights(self) -> int:
        """Weights to convert, whole rows; of tensors that are copied only some may be whole."""
        source = self.move.source
        return self.n_bytes // source.qtype.block_bytes * source.qtype.block

    @property
    def importance(self) -> NDArray[np.float32] | None:
        """Weights of the columns, where they are known."""
        importance = self.move.importance
        return None if importance is None else importance[min(self.expert, len(importance) - 1)]


def chunks(move: TensorMove) -> Iterator[Chunk]:
    """Cuts a tensor into chunks, in file order."""
    source, target = move.source, move.target
    if move.is_copy:
        for begin in range(0, source.n_bytes, _COPIED_BYTES):
            n_bytes = min(_COPIED_BYTES, source.n_bytes - begin)
            yield Chunk(move, move.begin + begin, n_bytes, target.offset + begin, n_bytes)
        return
    n_columns, n_rows, *more = *source.shape_ne, 1
    source_row, target_row = source.qtype.row_bytes(n_columns), target.qtype.row_bytes(n_columns)
    step = max(1, _CHUNK_WEIGHTS // n_columns)
    for index in range(prod(more)):
        first = index * n_rows
        for row in range(first, first + n_rows, step):
            n = min(step, first + n_rows - row)
            yield Chunk(
                move,
                move.begin + row * source_row,
                n * source_row,
                target.offset + row * target_row,
                n * target_row,
                index % more[0],  # the importance matrix knows the third axis alone
            )


class Workspace:
    """Memory for one chunk in flight, used again and again."""

    def __init__(self, chunk_bytes: int, target_bytes: int, n_weights: int) -> None:
        """Reserves memory; pages that are never touched cost nothing."""
        self._raw = np.empty(chunk_bytes, np.uint8)
        self._out = np.empty(target_bytes, np.uint8)
        self._floats = np.empty(n_weights, np.float32)

    @classmethod
    def several(cls, count: int, moves: Iterable[TensorMove]) -> list[Self]:
        """Workspaces that hold the largest chunk of any of the tensors."""
        firsts = [next(chunks(move)) for move in moves]  # no later chunk of a tensor is larger
        converted = [chunk for chunk in firsts if not chunk.move.is_copy]
        sizes = (
            max(chunk.n_bytes for chunk in firsts),
            max((chunk.target_n_bytes for chunk in converted), default=0),
            max((chunk.n_weights for chunk in converted), default=0),
        )
        return [cls(*sizes) for _ in range(count)]

    def convert(self, chunk: Chunk, source: Ranges, backend: Backend) -> memoryview:
        """Reads a chunk and converts it.

        Args:
            chunk: What to convert.
            source: The chunk's file.
            backend: The quantizer, prepared for the chunk's type.

        Returns:
            The chunk's bytes in the target; they are valid until the workspace is used again.

        Raises:
            SourceError: The source cannot be read.
            WeightError: A weight is not finite or too large for the type.
        """
        entry, qtype = chunk.move.source, chunk.move.target.qtype
        raw = self._raw[: chunk.n_bytes]
        source.read_into(chunk.begin, raw.data)
        if chunk.move.is_copy:
            return raw.data
        out = self._out[: chunk.target_n_bytes]
        floats = backend.to_float32(entry.qtype, raw, self._floats)
        _check_magnitudes(floats, entry.name)
        rows = floats.reshape(-1, entry.shape_ne[0])
        if not backend.quantize(qtype, rows, out, chunk.importance):
            raise WeightError(
                f"{entry.name}: weights up to {np.abs(floats).max():.3g} are too large for "
                f"{qtype.name}; choose BF16 or F32 for it, or repair the source"
            )
        return out.data


def _check_magnitudes(floats: NDArray[np.float32], name: str) -> None:
    low, high = floats.min(), floats.max()
    if low >= -MAX_MAGNITUDE and high <= MAX_MAGNITUDE:
        return
    worst = low if abs(low) > abs(high) else high
    raise WeightError(
        f"{name}: it holds the weight {worst:.3g}; weights must be finite and within "
        f"{MAX_MAGNITUDE:.0e} to be converted. The source is damaged; convert or download it again"
    )
