"""Carries a recipe out: writes the quantized file, whole or not at all."""

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantplan.errors import InputError, QuantizeError, WeightError
from quantplan.given import check_given
from quantplan.inventory.ranges import Location, Ranges, located, open_ranges
from quantplan.inventory.sources import headers_sha256, read_headers
from quantplan.qtypes import QType
from quantplan.quantize.backend import Backend
from quantplan.quantize.check import checked_layouts
from quantplan.quantize.convert import Chunk, Workspace, chunks
from quantplan.quantize.external import (
    ExternalJob,
    LlamaQuantize,
    as_written,
    run_llama_quantize,
)
from quantplan.quantize.ggml import ggml
from quantplan.quantize.imatrix import read_imatrix
from quantplan.quantize.layout import Files, Layout
from quantplan.quantize.partial import PartialFile
from quantplan.quantize.verify import Verification, file_hash, squared_errors, verify_header
from quantplan.quantize.workers import in_order
from quantplan.recipe import Recipe
from quantplan.threads import usable_threads
from quantplan.version import __version__

# At most so much of a large tensor is lost when a run ends.
_MARKED_BYTES = 16 << 20
# Blocks of 4 MiB of a remote source to fetch while earlier ones are converted.
_READ_AHEAD = 4


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
        path: The file, or the first of its shards.
        n_bytes: Its size, that of all shards.
        duration_s: Wall time that it took.
        verification: What was found where everything was read back.
    """

    path: Path
    n_bytes: int
    duration_s: float
    verification: Verification | None = None


def quantize(
    recipe: Recipe,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    imatrix: str | os.PathLike[str] | None = None,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
    resume: bool = False,
    verify: bool = False,
    backend: Backend | LlamaQuantize | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Writes a model with the types of a recipe.

    The data are those that llama-quantize writes for the same types on the same kind of processor,
    whatever the number of threads. Memory does not grow with the model: about 6 MB per thread, and
    about 50 MB for a remote source. The target appears under its name only when it is complete and
    its header has been read back; until then an existing file of that name stays as it is.

    A run that is killed, interrupted or fails leaves ``.TARGET.partial`` with the tensors that are
    done and ``.TARGET.journal`` with their checksums. ``resume`` continues there and writes the
    identical file; without it a new run starts again. Where a weight cannot be converted nothing
    is left.

    Args:
        recipe: Type of every tensor; a tensor whose type does not change is copied as it is.
        source: A GGUF file with F32, F16 or BF16 weights, or any shard of a split one; a path or
            an HTTP URL, which is read tensor by tensor.
        target: File to write. Where it is a symbolic link, the file that it points to is written.
        imatrix: An importance matrix of llama.cpp, GGUF or ``.dat``. Tensors that it does not
            cover are quantized without.
        allow_requantize: Convert quantized tensors as well.
        split_max_bytes: Write shards ``TARGET-00001-of-00003.gguf`` with at most so many bytes of
            tensor data each; a larger tensor has a shard to itself.
        resume: Continue what an earlier run has left.
        verify: Read everything back: compare the bytes with those written, hash them, and compare
            the weights with the source's (but for ik_llama.cpp's types).
        backend: What quantizes; the bundled ggml by default. A
            `quantplan.quantize.external.LlamaQuantize` runs that program, which can write
            ik_llama.cpp's types, but no shards, and reads local files only.
        threads: Threads that convert; by default one per processor that may be used.
        progress: Called after each part of a tensor that was written, in the calling thread.
            An exception that it raises ends the work and is passed on.

    Raises:
        InputError: ``threads`` or ``split_max_bytes`` is less than 1, or an option that the backend
            does not have.
        SourceError: The source or the importance matrix is missing, damaged, big-endian, or changes
            while it is read; a server fails.
        RecipeError: The recipe does not fit the source, there is no place for the target, or what
            is to be continued is another job; all faults are named, and nothing has been written.
        WeightError: A weight is not finite or too large.
        QuantizeError: The backend cannot be used, writing failed, or what was written reads back as
            something else.
        LlamaCppError: llama-quantize does not run, fails, or is silent for too long.
    """
    started = time.perf_counter()
    check_given(("recipe", recipe, Recipe))
    _check_options(source, threads, split_max_bytes, resume, backend)
    threads = threads or usable_threads()
    files, importance = read_headers(source), read_imatrix(imatrix) if imatrix else None
    backend = backend or ggml()
    metadata = _provenance(files, imatrix, backend)
    layouts = checked_layouts(
        recipe,
        files,
        Path(os.path.realpath(target)),
        importance=importance,
        allow_requantize=allow_requantize,
        metadata=metadata,
        split_max_bytes=split_max_bytes,
        program=backend.runtime if isinstance(backend, LlamaQuantize) else None,
    )
    total_bytes = sum(layout.n_bytes for layout in layouts)

    def report(tensor: str, done_bytes: int) -> None:
        if progress:
            progress(Progress(tensor, done_bytes, total_bytes))

    if isinstance(backend, LlamaQuantize):
        job = ExternalJob(
            recipe, files[0][0], imatrix, importance, allow_requantize, threads, metadata
        )
        checked = _run_program(backend, job, layouts[0], report, verify=verify)
    else:
        _prepare(backend, layouts)
        tools = _Tools(backend, threads, verify)
        checked = _convert(layouts, [place for place, _ in files], tools, resume, report)
    path = layouts[0].path if split_max_bytes else Path(target)
    return QuantizeResult(
        path=path,
        n_bytes=total_bytes if split_max_bytes else path.stat().st_size,
        duration_s=time.perf_counter() - started,
        verification=checked,
    )


def _check_options(
    source: str | os.PathLike[str],
    threads: int | None,
    split_max_bytes: int | None,
    resume: bool,
    backend: Backend | LlamaQuantize | None,
) -> None:
    """Refuses options that make no sense, or that the backend does not have."""
    faults = [
        f"{name} is {value}; it must be at least 1"
        for name, value in (("threads", threads), ("split_max_bytes", split_max_bytes))
        if value is not None and value < 1
    ]
    if isinstance(backend, LlamaQuantize):
        lacking = {
            "write shards": split_max_bytes is not None,
            "go on with what an interrupted run has left": resume,
            "read a source over HTTP": not isinstance(located(source), Path),
        }
        faults += [
            f"llama-quantize cannot {what}; use the default backend, or do without"
            for what, is_wanted in lacking.items()
            if is_wanted
        ]
    if faults:
        raise InputError(faults)


def _provenance(
    files: Files, imatrix: str | os.PathLike[str] | None, backend: Backend | LlamaQuantize
) -> dict[str, str]:
    """What the header says of how the file was made."""
    stated = {
        "quantplan.version": __version__,
        "quantplan.backend": f"{backend.name} {platform.machine()}",
        "quantplan.source_header_sha256": headers_sha256([header for _, header in files]),
    }
    if imatrix is not None:
        stated["quantplan.imatrix_sha256"] = hashlib.sha256(Path(imatrix).read_bytes()).hexdigest()
    return stated


def _prepare(backend: Backend, layouts: Sequence[Layout]) -> None:
    """Gets the backend ready before threads use it."""
    always: dict[QType, bool] = {}
    for move in (move for layout in layouts for move in layout.moves if not move.is_copy):
        qtype = move.target.qtype
        always[qtype] = always.get(qtype, True) and move.importance is not None
    for qtype, has_imatrix in always.items():
        backend.prepare(qtype, has_imatrix=has_imatrix)


def _job(layout: Layout, sources: Mapping[Location, Ranges]) -> str:
    """Identifies every byte of a file: its header, with its provenance, and the source's files."""
    digest = hashlib.sha256(layout.header)
    for place in dict.fromkeys(move.location for move in layout.moves):
        digest.update(f"\n{sources[place].identity}".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Tools:
    """What the bundled quantizers work with.

    Attributes:
        backend: Converts rows.
        threads: How many to use.
        verify: Whether to read everything back.
    """

    backend: Backend
    threads: int
    verify: bool


def _convert(
    layouts: Sequence[Layout],
    places: Sequence[Location],
    tools: _Tools,
    resume: bool,
    report: Callable[[str, int], None],
) -> Verification | None:
    """Writes all files, checks them, and gives them their names."""
    with contextlib.ExitStack() as stack:
        sources = {
            place: stack.enter_context(open_ranges(place, read_ahead=_READ_AHEAD))
            for place in places
        }
        parts = [
            stack.enter_context(PartialFile(layout.path, _job(layout, sources), resume=resume))
            for layout in layouts
        ]
        for part in parts:
            part.begin()
        for layout, part in zip(layouts, parts, strict=True):
            _write(layout, part, sources, tools, lambda n: report(n, sum(p.n_bytes for p in parts)))
        return _finish(layouts, parts, sources, tools)


def _write(
    layout: Layout,
    file: PartialFile,
    sources: Mapping[Location, Ranges],
    tools: _Tools,
    report: Callable[[str], None],
) -> None:
    """Writes the header and then every tensor, in order, from where the file ends."""
    n_header = len(layout.header)
    if not file.n_bytes:
        file.write(layout.header)
    begin = marked = file.n_bytes
    todo = (
        chunk
        for move in layout.moves
        for chunk in chunks(move)
        if n_header + chunk.target_begin >= begin
    )

    def convert(workspace: Workspace, chunk: Chunk) -> memoryview:
        return workspace.convert(chunk, sources[chunk.move.location], tools.backend)

    workspaces = Workspace.several(4 * tools.threads, layout.moves)
    with contextlib.closing(in_order(convert, todo, workspaces, tools.threads)) as converted:
        try:
            for chunk, data in converted:
                file.write(bytes(n_header + chunk.target_begin - file.n_bytes))
                file.write(data)
                if chunk.is_last or file.n_bytes - marked > _MARKED_BYTES:
                    file.mark()
                    marked = file.n_bytes
                report(chunk.move.target.name)
        except WeightError:
            file.discard()
            raise
    file.write(bytes(layout.n_bytes - file.n_bytes))


def _finish(
    layouts: Sequence[Layout],
    parts: Sequence[PartialFile],
    sources: Mapping[Location, Ranges],
    tools: _Tools,
) -> Verification | None:
    """Checks the files, their weights too if so wished, and gives them their names."""
    hashes: dict[str, str] = {}
    errors: dict[str, float] = {}
    for layout, part in zip(layouts, parts, strict=True):
        part.sync()
        try:
            verify_header(layout, part.path)
            if tools.verify:
                hashes[layout.path.name] = file_hash(part.path, part.crc)
                errors |= squared_errors(layout, part.path, sources, tools.backend, tools.threads)
        except QuantizeError:
            part.discard()
            raise
    for part in parts:
        part.commit()
    return Verification(hashes, errors) if tools.verify else None


def _run_program(
    backend: LlamaQuantize,
    job: ExternalJob,
    layout: Layout,
    report: Callable[[str, int], None],
    *,
    verify: bool,
) -> Verification | None:
    """Has llama-quantize write the file, checks it, and gives it its name."""
    with PartialFile(layout.path, backend.name, resume=False) as part:
        part.begin()
        run_llama_quantize(backend, job, part.path, report)
        part.sync()
        written = as_written(layout, part.path, backend.name)
        checked = None
        if verify:
            with contextlib.ExitStack() as stack:
                places = dict.fromkeys(move.location for move in written.moves)
                sources = {place: stack.enter_context(open_ranges(place)) for place in places}
                errors = squared_errors(written, part.path, sources, ggml(), job.threads)
            checked = Verification({layout.path.name: file_hash(part.path)}, errors)
        part.commit()
    return checked
