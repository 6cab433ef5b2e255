"""Carries a recipe out: writes the quantized file, whole or not at all."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantplan.errors import InputError, QuantizeError, SourceError
from quantplan.inventory.header import read_header
from quantplan.inventory.sources import read_headers
from quantplan.quantize.check import checked_layout
from quantplan.quantize.convert import Chunk, Shards, Workspace, chunks
from quantplan.quantize.ggml import ggml
from quantplan.quantize.layout import Layout
from quantplan.quantize.partial import PartialFile
from quantplan.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a file has been written.

    Attributes:
        tensor: Tensor being written.
        done_bytes: Bytes written, header included.
        total_bytes: Bytes of the whole file.
    """

    tensor: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """The file that was written.

    Attributes:
        path: The file.
        n_bytes: Its size.
        duration_s: Wall time that it took.
    """

    path: Path
    n_bytes: int
    duration_s: float


def quantize(
    recipe: Recipe,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Writes a model with the types of a recipe.

    The data are those that llama-quantize writes for the same types on the same kind of processor,
    whatever the number of threads. Memory does not grow with the model: about 6 MB per thread. The
    target appears under its name only when it is complete and its header has been read back; until
    then an existing file of that name stays as it is.

    Args:
        recipe: Type of every tensor; a tensor whose type does not change is copied as it is.
        source: A GGUF file with F32, F16 or BF16 weights, or any shard of a split one.
        target: File to write, one file in any case. Where it is a symbolic link, the file that it
            points to is written.
        threads: Threads that convert; by default one per processor that may be used.
        progress: Called after each part of a tensor that was written, in the calling thread.
            An exception that it raises ends the work and is passed on.

    Raises:
        InputError: ``threads`` is less than 1.
        SourceError: The source is missing, damaged, big-endian, or changes while it is read.
        RecipeError: The recipe does not fit the source, or there is no place for the target; all
            faults are named, and nothing has been written.
        QuantizeError: The bundled library cannot be used, a weight is not finite or too large, or
            writing failed.
    """
    started = time.perf_counter()
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1")
    source, target = Path(source), Path(target)
    real_target = Path(os.path.realpath(target))
    layout = checked_layout(recipe, read_headers(source), real_target)
    library = ggml()
    for move in layout.moves:
        if not move.is_copy:
            library.prepare(move.target.qtype)
    with PartialFile(real_target) as file:
        _write(layout, file, threads or _n_processors(), progress)
        file.sync()
        _verify(layout, file.path)
        file.commit()
    return QuantizeResult(target, layout.n_bytes, time.perf_counter() - started)


def _n_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write(
    layout: Layout,
    file: PartialFile,
    threads: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Writes the header and then every tensor, in order."""
    file.write(layout.header)
    done = n_header = len(layout.header)
    with (
        Shards({move.path for move in layout.moves}) as shards,
        contextlib.closing(_converted(layout, shards, threads)) as converted,
    ):
        for chunk, data in converted:
            file.write(bytes(n_header + chunk.target_begin - done))
            file.write(data)
            done = n_header + chunk.target_begin + len(data)
            if progress:
                progress(Progress(chunk.move.target.name, done, layout.n_bytes))
    file.write(bytes(layout.n_bytes - done))


def _converted(
    layout: Layout, shards: Shards, threads: int
) -> Generator[tuple[Chunk, memoryview], None, None]:
    """Converts the chunks in threads and yields them in order, a bounded number in flight."""
    library = ggml()
    free = [Workspace(layout.moves) for _ in range(4 * threads)]
    flying: deque[tuple[Chunk, Workspace, Future[memoryview]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for chunk in (chunk for move in layout.moves for chunk in chunks(move)):
            if not free:
                first, workspace, future = flying.popleft()
                yield first, future.result()
                free.append(workspace)
            workspace = free.pop()
            future = pool.submit(workspace.convert, chunk, shards, library)
            flying.append((chunk, workspace, future))
        for chunk, _, future in flying:
            yield chunk, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _verify(layout: Layout, path: Path) -> None:
    """Reads the header of the written file back and compares it with the layout."""
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
