"""Turns one chunk of a tensor into the target's bytes; threads share nothing but the source."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import QuantizeError, SourceError
from quantplan.quantize.ggml import Ggml
from quantplan.quantize.layout import TensorMove

# Small enough that converted numbers are still in the processor's cache when they are quantized,
# and that a slow type, 10 ms per chunk, does not leave the other threads without work.
_CHUNK_WEIGHTS = 1 << 17
_COPIED_BYTES = 1 << 20
# ggml sums squares in single precision: larger weights overflow, which ends the process.
_MAX_MAGNITUDE = 1e9


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor that is converted at once: whole rows of one expert.

    Attributes:
        move: The tensor.
        begin: Where the part starts in the source file, in bytes.
        n_bytes: Bytes of the part in the source.
        target_begin: Where it starts in the target's data section, in bytes.
        target_n_bytes: Bytes of the part in the target.
    """

    move: TensorMove
    begin: int
    n_bytes: int
    target_begin: int
    target_n_bytes: int


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
    for first in range(0, n_rows * prod(more), n_rows):
        for row in range(first, first + n_rows, step):
            n = min(step, first + n_rows - row)
            yield Chunk(
                move,
                move.begin + row * source_row,
                n * source_row,
                target.offset + row * target_row,
                n * target_row,
            )


class Shards:
    """The source's files, open for reading at any place by several threads at once."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Opens the files.

        Raises:
            SourceError: A file cannot be opened.
        """
        self._lock = threading.Lock()
        self._files: dict[Path, FileIO] = {}
        with contextlib.ExitStack() as stack:
            for path in paths:
                with _explained(path):
                    self._files[path] = stack.enter_context(path.open("rb", buffering=0))
            self._closing = stack.pop_all()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files."""
        self._closing.close()

    def read_into(self, path: Path, begin: int, buffer: memoryview) -> None:
        """Fills a buffer from one place of a file.

        Raises:
            SourceError: The file cannot be read, or has become shorter since it was opened.
        """
        while buffer:
            with _explained(path):
                n_bytes = self._read(self._files[path], begin, buffer)
            if not n_bytes:
                raise SourceError(
                    f"{path} ended at byte {begin} while it was read; another program has changed "
                    "it, so start again"
                )
            begin, buffer = begin + n_bytes, buffer[n_bytes:]

    def _read(self, file: FileIO, begin: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [buffer], begin)
        with self._lock:
            file.seek(begin)
            return file.readinto(buffer) or 0


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


class Workspace:
    """Memory for one chunk in flight, used again and again."""

    def __init__(self, moves: Iterable[TensorMove]) -> None:
        """Reserves what the largest chunk takes; pages that are never touched cost nothing."""
        firsts = [next(chunks(move)) for move in moves]  # no later chunk of a tensor is larger
        self._raw = np.empty(max(chunk.n_bytes for chunk in firsts), np.uint8)
        self._out = np.empty(max(chunk.target_n_bytes for chunk in firsts), np.uint8)
        self._floats = np.empty(self._raw.size // 2, np.float32)  # F16 and BF16 take two bytes

    def convert(self, chunk: Chunk, shards: Shards, library: Ggml) -> memoryview:
        """Reads a chunk and converts it.

        Args:
            chunk: What to convert.
            shards: The source.
            library: The quantizer, prepared for the chunk's type.

        Returns:
            The chunk's bytes in the target; they are valid until the workspace is used again.

        Raises:
            SourceError: The source cannot be read.
            QuantizeError: A weight is not finite or too large for the type.
        """
        source, qtype = chunk.move.source, chunk.move.target.qtype
        raw = self._raw[: chunk.n_bytes]
        shards.read_into(chunk.move.path, chunk.begin, raw.data)
        if chunk.move.is_copy:
            return raw.data
        out = self._out[: chunk.target_n_bytes]
        floats = library.to_float32(source.qtype, raw, self._floats)
        _check_magnitudes(floats, source.name)
        if not library.quantize(qtype, floats, source.shape_ne[0], out):
            raise QuantizeError(
                f"{source.name}: weights up to {np.abs(floats).max():.3g} are too large for "
                f"{qtype.name}; choose BF16 or F32 for it, or repair the source"
            )
        return out.data


def _check_magnitudes(floats: NDArray[np.float32], name: str) -> None:
    low, high = floats.min(), floats.max()
    if low >= -_MAX_MAGNITUDE and high <= _MAX_MAGNITUDE:
        return
    worst = low if abs(low) > abs(high) else high
    raise QuantizeError(
        f"{name}: it holds the weight {worst:.3g}; weights must be finite and within "
        f"{_MAX_MAGNITUDE:.0e} to be converted. The source is damaged; convert or download it again"
    )
