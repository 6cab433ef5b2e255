"""Reads a written file back, weight by weight, and compares it with the source."""

import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import QuantizeError, SourceError
from quantplan.inventory.header import read_header
from quantplan.inventory.ranges import LocalFile, Location, Ranges
from quantplan.inventory.roles import split_layer
from quantplan.qtypes import QType
from quantplan.quantize.backend import Backend
from quantplan.quantize.convert import Chunk, chunks
from quantplan.quantize.layout import Layout, TensorMove
from quantplan.quantize.workers import in_order

_READ_BYTES = 1 << 20
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verification:
    """What a written file holds.

    Attributes:
        sha256: Hash of every file, by its name.
        relative_squared_error: ``|W' - W|^2 / |W|^2`` of every tensor whose type has changed, by
            its name. In the layers columns count by their importance, where there is a matrix:
            it is then about the share of the tensor's output that is lost, which few rows and
            columns may carry.
    """

    sha256: dict[str, str]
    relative_squared_error: dict[str, float]

    def summary(self) -> str:
        """Hashes, and the tensors with the largest errors."""
        lines = [f"{digest}  {name}" for name, digest in self.sha256.items()]
        errors = self.relative_squared_error
        worst = sorted(errors, key=lambda name: -errors[name])[:_SHOWN]
        if worst:
            lines.append(f"relative squared error of {len(errors)} converted tensors, worst first:")
        return "\n".join([*lines, *(f"  {errors[name]:.3g}  {name}" for name in worst)])


def verify_header(layout: Layout, path: Path) -> None:
    """Reads the header of a written file back and compares it with the layout.

    Raises:
        QuantizeError: They differ.
    """
    try:
        header = read_header(path)
    except SourceError as error:
        raise QuantizeError(f"the written file cannot be read back: {error}") from error
    n_bytes = path.stat().st_size
    expected = tuple(move.target for move in layout.moves)
    if (header.tensors, header.data_offset, n_bytes) != (
        expected,
        len(layout.header),
        layout.n_bytes,
    ):
        raise QuantizeError(
            f"{path} reads back with {len(header.tensors)} tensors in {n_bytes} bytes instead of "
            f"{len(expected)} in {layout.n_bytes}; this is a fault of quantplan, please report it"
        )


def file_hash(path: Path, crc: int | None = None) -> str:
    """The SHA-256 of a file that has just been written.

    Args:
        path: The file.
        crc: CRC-32 of what was written, where it is known.

    Raises:
        QuantizeError: The file holds something else.
    """
    digest, found = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            found = zlib.crc32(data, found)
    if crc is not None and found != crc:
        raise QuantizeError(f"{path} does not hold what was written to it; the disk is faulty")
    return digest.hexdigest()


def squared_errors(
    layout: Layout, path: Path, sources: Mapping[Location, Ranges], backend: Backend, threads: int
) -> dict[str, float]:
    """Relative squared error of every tensor whose type has changed, to one of llama.cpp's.

    Args:
        layout: What was written.
        path: Where.
        sources: The source's files.
        backend: Converts both to single precision.
        threads: How many to use.

    Raises:
        SourceError: The source cannot be read.
        QuantizeError: A weight of the written file is not finite.
    """
    sums: dict[str, tuple[float, float]] = {}
    with LocalFile(path) as written:

        def compare(_: int, chunk: Chunk) -> tuple[float, float]:
            move = chunk.move
            begin = len(layout.header) + chunk.target_begin
            before = _floats(sources[move.location], chunk.begin, chunk.n_bytes,
                             move.source.qtype, backend)  # fmt: skip
            after = _floats(written, begin, chunk.target_n_bytes, move.target.qtype, backend)
            lost = np.subtract(after, before, dtype=np.float64)
            wide = before.astype(np.float64)
            return _squared_norm(lost, chunk), _squared_norm(wide, chunk)

        changed = (c for move in layout.moves if _is_comparable(move) for c in chunks(move))
        for chunk, found in in_order(compare, changed, range(2 * threads), threads):
            name = chunk.move.target.name
            lost, total = sums.get(name, (0.0, 0.0))
            sums[name] = (lost + found[0], total + found[1])
    errors = {name: lost / total if total else lost for name, (lost, total) in sums.items()}
    wrong = [name for name, error in errors.items() if not math.isfinite(error)]
    if wrong:
        raise QuantizeError(f"{path} holds weights that are not finite in {', '.join(wrong)}")
    return errors


def _squared_norm(weights: NDArray[np.float64], chunk: Chunk) -> float:
    """Sum of squares, by the importance of the columns where it is known and tells of the output.

    Outside the layers it does not: embeddings are looked up, and what all logits share is nothing.
    """
    source, importance = chunk.move.source, chunk.importance
    if importance is None or split_layer(source.name)[0] is None:
        return float(weights @ weights)
    return float((weights.reshape(-1, source.shape_ne[0]) ** 2 @ importance).sum())


def _is_comparable(move: TensorMove) -> bool:
    """Whether the type has changed, to one that ggml can read."""
    qtypes = (move.source.qtype, move.target.qtype)
    return not move.is_copy and all("llama.cpp" in qtype.runtimes for qtype in qtypes)


def _floats(
    file: Ranges, begin: int, n_bytes: int, qtype: QType, backend: Backend
) -> NDArray[np.float32]:
    raw = np.empty(n_bytes, np.uint8)
    file.read_into(begin, raw.data)
    floats = np.empty(n_bytes // qtype.block_bytes * qtype.block, np.float32)
    return backend.to_float32(qtype, raw, floats)
