"""Asks llama.cpp what memory a model takes with given flags."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantplan.errors import LlamaCppError
from quantplan.formats.llama_cpp import flag_words
from quantplan.inventory import Inventory
from quantplan.inventory.sources import shard_paths
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.log import (
    HOST,
    PRINTED_MIB,
    Buffers,
    Devices,
    has_laid_out,
    has_reserved,
    is_idle,
    read_table,
)
from quantplan.runtime.process import ADDRESS, failure, free_port, running
from quantplan.runtime.sparse import write_sparse
from quantplan.schema import Frozen
from quantplan.units import MIB

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
        compute_bytes: Compute buffers, and the output buffer.
        rounding_bytes: By how much weights and caches together may differ from what was allocated,
            since every printed number is rounded; in a dry run they are never larger than that. 0
            where it was not counted.
    """

    name: str
    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    rounding_bytes: int = 0


class MemoryMeasurement(Frozen):
    """Memory of a model under given flags, in llama.cpp's own words.

    Attributes:
        model: Name of the model.
        header_sha256: Of the inventory that was measured.
        llama_cpp: The llama.cpp that was asked.
        flags: Its flags.
        devices: In order, RAM last.
        is_dry_run: Whether nothing was allocated. Weights and caches are then whole MiB, rounded
            down; everything else is rounded to 0.01 MiB.
    """

    model: str
    header_sha256: str
    llama_cpp: LlamaCpp
    flags: tuple[str, ...]
    devices: tuple[MeasuredDevice, ...]
    is_dry_run: bool


def measure_memory(
    llama_cpp: LlamaCpp, inventory: Inventory, flags: str | Sequence[str]
) -> MemoryMeasurement:
    """Asks llama.cpp what memory a model takes.

    Where it knows ``--fit``, this is a dry run: llama-server then lays out the model, its caches
    and its graphs before it allocates anything, and is ended as soon as it has printed the result.
    It is given a file with the model's metadata and dimensions but without weights, so a model of
    any size takes a second and next to no space, on the disk and in memory. Otherwise the model is
    loaded.

    Args:
        llama_cpp: Which llama.cpp.
        inventory: The model, in the types to ask for.
        flags: Flags of llama-server, as a command line or as arguments. Those that name a model,
            a port or a log are left out, and so is ``--fit``.

    Raises:
        LlamaCppError: It failed, and the message ends with its last lines; or it knows no
            ``--fit`` (before December 2025, and ik_llama.cpp) and the inventory is of no file.
    """
    arguments = kept_flags(flags)
    if llama_cpp.has_fit:
        is_dry_run, devices = True, _dry_run(llama_cpp, inventory, arguments)
    elif (path := Path(inventory.source)).is_file():
        is_dry_run, devices = False, _loaded(llama_cpp, shard_paths(path)[0], arguments)
    else:
        raise LlamaCppError(
            f"{llama_cpp.server} ({llama_cpp}) cannot lay out a model without loading it: give the "
            f"GGUF file instead of {inventory.source!r}, or use llama.cpp from December 2025 on"
        )
    return MemoryMeasurement(
        model=inventory.name,
        header_sha256=inventory.header_sha256,
        llama_cpp=llama_cpp,
        flags=arguments,
        devices=devices,
        is_dry_run=is_dry_run,
    )


def kept_flags(flags: str | Sequence[str]) -> tuple[str, ...]:
    """Flags of llama-server without those that `quantplan.runtime` sets itself."""
    arguments = flag_words(flags)
    kept, position = [], 0
    while position < len(arguments):
        n_values = _DROPPED.get(arguments[position])
        if n_values is None:
            kept.append(arguments[position])
        position += 1 + (n_values or 0)
    return tuple(kept)


def _command(llama_cpp: LlamaCpp, path: Path, arguments: Sequence[str]) -> list[str]:
    own = ["-m", str(path.resolve()), "--host", ADDRESS, "--port", str(free_port()), "--no-warmup"]
    return [str(llama_cpp.server), *arguments, *own]


def _dry_run(
    llama_cpp: LlamaCpp, inventory: Inventory, arguments: Sequence[str]
) -> tuple[MeasuredDevice, ...]:
    for _ in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="quantplan-") as folder:
            path = write_sparse(inventory, Path(folder, "model.gguf"))
            command = _command(llama_cpp, path, arguments)
            with running([*command, "--fit", "on", "-lv", "5"]) as process:
                process.wait_until(lambda: has_laid_out(process.log), _TIME_LIMIT_S)
                log = process.log
        if devices := _laid_out(log):
            return devices
    raise failure(str(llama_cpp.server), "could not lay the model out", log)


def _laid_out(log: str) -> tuple[MeasuredDevice, ...]:
    """Joins the table, which has whole MiB, with the compute buffers, which have two decimals.

    Returns:
        Nothing where the two disagree: lines of the log are sometimes lost.
    """
    rows = {row.name: row for row in read_table(log)}
    before = log.partition("memory_breakdown_print")[0]
    buffers, devices = Buffers.parse(before), Devices.parse(before)
    compute_mib = _by_device(devices, buffers.compute)
    if not compute_mib.keys() <= rows.keys() or any(
        abs(int(compute_mib[name]) - row.compute_mib) > 1 for name, row in rows.items()
    ):
        return ()
    output_mib = _by_device(devices, buffers.output)
    return tuple(
        MeasuredDevice(
            name=name,
            weights_bytes=row.model_mib * MIB,
            cache_bytes=row.context_mib * MIB,
            compute_bytes=round((compute_mib[name] + output_mib[name]) * MIB),
            rounding_bytes=row.n_lines * MIB,
        )
        for name, row in rows.items()
    )


def _loaded(
    llama_cpp: LlamaCpp, path: Path, arguments: Sequence[str]
) -> tuple[MeasuredDevice, ...]:
    command = _command(llama_cpp, path, arguments)
    if llama_cpp.runtime == "llama.cpp":
        command += ["-lv", "4", *(["--fit", "off"] if llama_cpp.has_fit else [])]
    # An RPC server dies of a client that ends while it computes for it.
    is_ready = is_idle if "--rpc" in arguments else has_reserved
    with running(command) as process:
        process.wait_until(lambda: is_ready(process.log), _TIME_LIMIT_S)
        return read_loaded(process.log)


def read_loaded(log: str) -> tuple[MeasuredDevice, ...]:
    """What a llama-server that has loaded its model said of each device, RAM last.

    Args:
        log: Everything that it printed, as ``-lv 4`` makes it.
    """
    buffers, devices = Buffers.parse(log), Devices.parse(log)
    weights = _by_device(devices, buffers.model)
    caches = _by_device(devices, buffers.kv, buffers.recurrent)
    compute = _by_device(devices, buffers.compute, buffers.output)
    n_lines = _by_device(devices, buffers.n_lines)
    return tuple(
        MeasuredDevice(
            name=name,
            weights_bytes=round(weights[name] * MIB),
            cache_bytes=round(caches[name] * MIB),
            compute_bytes=round(compute[name] * MIB),
            rounding_bytes=math.ceil(n_lines[name] * PRINTED_MIB / 2 * MIB),
        )
        for name in (*devices.names, HOST)
    )


def _by_device(devices: Devices, *buffers: Mapping[str, float]) -> defaultdict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for sizes in buffers:
        for name, mib in sizes.items():
            sums[devices.holding(name)] += mib
    return sums
