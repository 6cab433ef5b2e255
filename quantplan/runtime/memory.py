"""Asks llama.cpp what memory a model takes with given flags."""

import shlex
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from quantplan.errors import LlamaCppError
from quantplan.inventory import Inventory
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.log import MIB, Buffers, Row, place_of, read_devices, read_table
from quantplan.runtime.process import HOST, free_port, running
from quantplan.runtime.sparse import write_sparse
from quantplan.schema import Frozen

_TIME_LIMIT_S = 600.0
_ATTEMPTS = 3
# Flags that this module sets itself, that would load another model, or that would hide the log or
# lose lines of it, with the number of their values.
_DROPPED = {
    **dict.fromkeys(["-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo"], 1),
    **dict.fromkeys(["-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hft", "--hf-token"], 1),
    **dict.fromkeys(["--host", "--port", "--ssl-key-file", "--ssl-cert-file"], 1),
    **dict.fromkeys(["-lv", "--verbosity", "--log-verbosity", "--log-file"], 1),
    **dict.fromkeys(["-v", "--verbose", "--log-verbose", "--log-disable", "--log-jsonl"], 0),
    **dict.fromkeys(["-fit", "--fit", "-fitt", "--fit-target", "-fitc", "--fit-ctx"], 1),
}


class MeasuredDevice(Frozen):
    """What llama.cpp said of one device.

    Attributes:
        name: As llama.cpp prints it, such as ``CUDA0``; ``Host`` for RAM.
        weights_bytes: Model buffers.
        cache_bytes: KV cache and recurrent state.
        compute_bytes: Compute buffers.
    """

    name: str
    weights_bytes: int
    cache_bytes: int
    compute_bytes: int


class MemoryMeasurement(Frozen):
    """Memory of a model under given flags, in llama.cpp's own words.

    Attributes:
        llama_cpp: The llama.cpp that was asked.
        flags: Its flags.
        devices: In order, RAM last.
        is_dry_run: Whether nothing was allocated. Weights and caches are then whole MiB, rounded
            down; everything else is rounded to 0.01 MiB.
    """

    llama_cpp: LlamaCpp
    flags: tuple[str, ...]
    devices: tuple[MeasuredDevice, ...]
    is_dry_run: bool


def measure_memory(
    llama_cpp: LlamaCpp, inventory: Inventory, flags: str | Sequence[str]
) -> MemoryMeasurement:
    """Has llama.cpp lay a model out in memory, without loading it.

    ``--fit`` makes llama-server lay out the model, its caches and its graphs before it allocates
    anything; it is ended as soon as it has printed the result. What it is given is a file with the
    model's metadata and dimensions but without weights, so a model of any size takes a second and
    a few MB, on the disk and in memory.

    Args:
        llama_cpp: Which llama.cpp.
        inventory: The model, in the types to ask for.
        flags: Flags of llama-server, as a command line or as arguments. Those that name a model,
            a port or a log are left out, and so is ``--fit``.

    Raises:
        LlamaCppError: It knows no ``--fit`` (before December 2025, and ik_llama.cpp), or it failed;
            the message ends with its last lines.
    """
    if not llama_cpp.has_fit:
        raise LlamaCppError(
            f"{llama_cpp.server} cannot lay out a model without loading it: that takes llama.cpp "
            "from December 2025 or later. Load the model with measure_loaded instead"
        )
    arguments = _kept(flags)
    for _ in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="quantplan-") as folder:
            path = write_sparse(inventory, Path(folder, "model.gguf"))
            command = [*_command(llama_cpp, path, arguments), "--fit", "on", "-lv", "5"]
            with running(command) as process:
                process.wait_until(lambda: bool(read_table(process.log)), _TIME_LIMIT_S)
                log = process.log
        if devices := _laid_out(log):
            return MemoryMeasurement(
                llama_cpp=llama_cpp, flags=arguments, devices=devices, is_dry_run=True
            )
    raise LlamaCppError(
        f"{llama_cpp.server}: {_ATTEMPTS} logs in a row contradict themselves about the compute "
        "buffers; its log may have changed in a way that quantplan does not know"
    )


def _kept(flags: str | Sequence[str]) -> tuple[str, ...]:
    arguments = shlex.split(flags) if isinstance(flags, str) else list(flags)
    if arguments and not arguments[0].startswith("-"):
        arguments = arguments[1:]
    kept, position = [], 0
    while position < len(arguments):
        n_values = _DROPPED.get(arguments[position])
        if n_values is None:
            kept.append(arguments[position])
        position += 1 + (n_values or 0)
    return tuple(kept)


def _command(llama_cpp: LlamaCpp, path: Path, arguments: Sequence[str]) -> list[str]:
    own = ["-m", str(path.resolve()), "--host", HOST, "--port", str(free_port()), "--no-warmup"]
    return [str(llama_cpp.server), *arguments, *own]


def _laid_out(log: str) -> tuple[MeasuredDevice, ...]:
    """Joins the table, which has whole MiB, with the compute buffers, which have two decimals.

    Returns:
        Nothing where the two disagree: lines of the log are sometimes lost.
    """
    rows = read_table(log)
    devices = read_devices(log)
    compute_mib = dict.fromkeys((row.name for row in rows), 0.0)
    for buffer, mib in Buffers.parse(log.partition("memory_breakdown_print")[0]).compute.items():
        place = place_of(buffer, devices)
        compute_mib[place] = compute_mib.get(place, 0.0) + mib
    if set(compute_mib) != {row.name for row in rows}:
        return ()
    if any(abs(compute_mib[row.name] - row.compute_mib - 0.5) > 0.52 for row in rows):
        return ()
    return tuple(_device(row, compute_mib[row.name]) for row in rows)


def _device(row: Row, compute_mib: float) -> MeasuredDevice:
    return MeasuredDevice(
        name=row.name,
        weights_bytes=row.model_mib * MIB,
        cache_bytes=row.context_mib * MIB,
        compute_bytes=round(compute_mib * MIB),
    )
