"""Quantizes where that was not done yet, then serves the model in the foreground."""

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType
from urllib.parse import urlsplit

from quantplan.errors import InputError, LlamaCppError, RecipeError
from quantplan.inventory.ranges import located
from quantplan.inventory.sources import read_headers, read_inventory, shard_paths
from quantplan.quantize.check import checked_layouts
from quantplan.quantize.imatrix import read_imatrix
from quantplan.recipe import Recipe
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.flags import flags_for
from quantplan.runtime.process import ADDRESS, guarded, is_free, isolated_environment
from quantplan.verification.verify import differences, missing_rpc_flags

PORT = 8080
"""llama-server's own."""

LAST_PORT = 2**16 - 1
# What a terminal or a service manager sends; the server ends by itself then.
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True)
class Service:
    """What is to be served.

    Attributes:
        gguf: The quantized file.
        is_written: Whether it is there already; else it has to be quantized first.
        command: The command that serves it.
    """

    gguf: Path
    is_written: bool
    command: tuple[str, ...]

    def __str__(self) -> str:
        """The command, for a POSIX shell."""
        return shlex.join(self.command)


def prepare(
    recipe: Recipe,
    source: str,
    llama_cpp: LlamaCpp,
    *,
    output: Path | None = None,
    imatrix: Path | None = None,
    host: str = ADDRESS,
    port: int = PORT,
    extra_flags: Sequence[str] = (),
) -> Service:
    """Says which file to serve with which command.

    Args:
        recipe: The recipe, with flags.
        source: The quantized file, or what to quantize.
        llama_cpp: What serves it.
        output: Where the quantized file is, or is to be written; by default beside the source.
        imatrix: The importance matrix that it is to be quantized with.
        host: The address to listen on.
        port: The port to listen on.
        extra_flags: Further flags for llama-server; they come first.

    Raises:
        InputError: There is no such port, the recipe has no flags or cannot be carried out with the
            source, or a file of another recipe is where the quantized one should be.
        LlamaCppError: llama.cpp has no such flags.
    """
    if not 0 <= port <= LAST_PORT:
        raise InputError(f"there is no port {port}: give one from 0 (any free one) to {LAST_PORT}")
    if not recipe.flags:
        raise RecipeError("the recipe has no flags to serve with: plan, or import a command")
    place = located(source)
    # llama-server cannot serve what is elsewhere; the quantized file goes into this folder.
    path = place if isinstance(place, Path) else Path(PurePosixPath(urlsplit(place).path).name)
    is_here = path is place and path.exists()
    is_written = is_here and not differences(recipe, read_inventory(path))
    if not is_written:
        path = output or path.with_name(f"{path.stem}-quantplan.gguf")
        faults = differences(recipe, read_inventory(path)) if path.exists() else []
        is_written = path.exists() and not faults
        if not is_written:
            importance = read_imatrix(imatrix) if imatrix else None
            checked_layouts(
                recipe, read_headers(source), Path(os.path.realpath(path)), importance=importance
            )
        if faults:
            raise RecipeError([*faults, f"remove {path}, or name another file (--output)"])
    rpc = missing_rpc_flags(recipe.flags, recipe.provenance.machine)
    words = flags_for(llama_cpp, (*rpc, *extra_flags, *recipe.flags))
    model = shard_paths(path)[0] if is_written else path
    command = (str(llama_cpp.server), *words, "-m", str(model), "--host", host, "--port", str(port))
    return Service(gguf=path, is_written=is_written, command=command)


def serve(service: Service, host: str = ADDRESS, port: int = PORT) -> int:
    """Runs the server until it ends; signals are passed on to it.

    The user's configuration of llama.cpp plays no part.

    Args:
        service: What to serve.
        host: The address of its command.
        port: The port of its command.

    Returns:
        Its exit code; 128 and the number of the signal that ended it.

    Raises:
        LlamaCppError: The port is taken, or the program cannot be started.
    """
    if not is_free(host, port):
        raise LlamaCppError(f"port {port} of {host} is taken by another program: choose --port")
    with tempfile.TemporaryDirectory(prefix="quantplan-") as folder:
        environment = isolated_environment(Path(folder))
        with guarded(service.command, environment) as popen, _passing_signals(popen):
            code = popen.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _passing_signals(popen: subprocess.Popen[bytes]) -> Iterator[None]:
    """Passes signals on to a program until the block ends."""

    def pass_on(number: int, _: FrameType | None) -> None:
        popen.send_signal(number)

    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
