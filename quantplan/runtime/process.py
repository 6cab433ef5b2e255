"""Runs a program of llama.cpp until it has said what is asked, and always ends it."""

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quantplan.errors import LlamaCppError
from quantplan.runtime.locate import VARIABLE
from quantplan.units import MIB

ADDRESS = "127.0.0.1"
_STOP_LIMIT_S = 10.0
_POLL_S = 0.05
_SHOWN_LINES = 12
# Lines of level E, and what says so in words.
_TELLING = re.compile(r"^[\d.]+ E |error|fail|invalid|unable|abort|assert", re.IGNORECASE)
Watch = Callable[[], None]
"""Is called many times a second while work goes on; an exception that it raises ends the work."""
PORT_TAKEN = "another program listens on the port"
"""The likely cause that is told where a server cannot have its port."""

# A program that prints more than this, in bytes, has gone wrong.
_MAX_LOG_BYTES = 64 * MIB
_DEVICE_FULL = (
    "a device is full: shorten the context (-c), put fewer weights there, or plan again with a "
    "larger --margin"
)
_RAM_FULL = (
    "the RAM that it may take is full, for which ulimit -v and the limits of a container count "
    "too: shorten the context (-c), or plan for less RAM"
)
# What a program's last lines mean; the first that is found is told.
_CAUSES = {
    "unknown model architecture": "this llama.cpp is too old for the model",
    "unknown argument": "this llama.cpp does not know one of the flags",
    "invalid argument": "this llama.cpp does not know one of the flags",
    "couldn't bind": PORT_TAKEN,
    "failed to open GGUF file": "the model's file cannot be opened; was it moved or deleted?",
    "not within the file bounds": "the model's file is incomplete: copy or quantize it again",
    "invalid magic": "the model's file is no GGUF",
    "invalid ggml type": "this llama.cpp does not know a type of the model's tensors",
    "failed to map segment from shared object": _RAM_FULL,
    "error while loading shared libraries": "a library that it needs is missing",
    "insufficient memory": _RAM_FULL,
    "bad_alloc": _RAM_FULL,
    "Cannot allocate memory": _RAM_FULL,
    "out of memory": _DEVICE_FULL,
    "unable to allocate": _DEVICE_FULL,
    "failed to allocate": _DEVICE_FULL,
}
_FOREIGN = (
    "it is compiled for instructions that this processor does not have, quantplan doctor names "
    "them; use a llama.cpp that is built on this machine, or whose CPU backend comes in variants "
    f"(libggml-cpu-*), and name its folder by {VARIABLE}"
)
_SIGNALS: dict[int, str] = {
    signal.SIGILL: _FOREIGN,
}
# What Windows ends a program with, which has no signals.
_CODES = {0xC000001D: _FOREIGN, 0xC0000135: "a library that it needs is missing"}
# Leads the group of a program, and ends all of the group when the pipe to it closes: also when
# quantplan is killed and can do nothing more.
_GUARD = ("/bin/sh", "-c", "read _; kill -KILL 0")
_HAS_GUARD = hasattr(os, "killpg") and Path(_GUARD[0]).exists()
if os.name == "posix":
    _SIGNALS[signal.SIGKILL] = "the system ended it, most likely for want of memory"
    _SIGNALS[signal.SIGBUS] = "the model's file became shorter while it was read, or a disk failed"


@dataclass(frozen=True, slots=True)
class Process:
    """A running program whose output goes to a file.

    Attributes:
        name: Of the program.
        popen: The child process.
        log_path: Where its output goes, standard error included.
        watch: Is called while it is waited for.
    """

    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path
    watch: Watch | None = None

    @property
    def log(self) -> str:
        """Everything that it has printed so far."""
        with self.log_path.open("rb") as file:
            return file.read(_MAX_LOG_BYTES).decode(errors="replace")

    def wait_until(self, ready: Callable[[], bool], limit_s: float) -> None:
        """Returns when ``ready`` says so.

        Args:
            ready: Is called many times a second.
            limit_s: Seconds to wait.

        Raises:
            LlamaCppError: The program ended before, or the time was up.
        """
        deadline = time.monotonic() + limit_s
        while True:
            if self.watch is not None:
                self.watch()
            code = self.popen.poll()
            if ready():  # also after its end: the last lines may have what is asked
                return
            if code is not None:
                raise failure(self.name, ending(code), self.log)
            if self.log_path.stat().st_size > _MAX_LOG_BYTES:
                fate = f"prints without end: more than {_MAX_LOG_BYTES // MIB} MiB"
                raise failure(self.name, fate, self.log)
            if time.monotonic() > deadline:
                raise failure(self.name, f"is not ready after {limit_s:.0f} s", self.log)
            time.sleep(_POLL_S)


def failure(name: str, fate: str, log: str) -> LlamaCppError:
    """Says what happened to a program, why that may be, and what it printed last.

    Args:
        name: Of the program.
        fate: What happened to it.
        log: Everything that it printed.
    """
    cause = next((f": {text}" for sign, text in _CAUSES.items() if sign in log), "")
    lines = [line for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)][-_SHOWN_LINES:]
    shown = telling or lines[-_SHOWN_LINES:]
    said = "It printed nothing."
    if shown:
        said = "\n".join(["What it said of that:" if telling else "Its last lines:", *shown])
    if len(lines) > len(shown):
        said += f"\nAll that it printed: {_kept(log)}"
    return LlamaCppError(f"{name} {fate}{cause}. {said}")


def _kept(log: str) -> str:
    """Saves a log for the user to read; returns its path."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="quantplan-", suffix=".log", delete=False
    ) as file:
        file.write(log)
    return file.name


def ending(code: int) -> str:
    """Says how a program ended.

    Args:
        code: Its exit code; negative for a signal.
    """
    if code >= 0:
        reason, fate = _CODES.get(code), f"ended with code {code}"
    else:
        number = signal.Signals(-code)
        reason, fate = _SIGNALS.get(number), f"was ended by {number.name}"
    return f"{fate} ({reason})" if reason else fate


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    watch: Watch | None = None,
) -> Iterator[Process]:
    """Runs a program until the block ends, or quantplan does.

    Its output is gone afterwards; `failure` keeps it.

    Args:
        command: Program and arguments; no shell reads them.
        environment: Its whole environment; None is `isolated_environment`.
        watch: Is called while it is waited for.

    Raises:
        LlamaCppError: The program cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="quantplan-") as name:
        folder = Path(name)
        variables = isolated_environment(folder) if environment is None else dict(environment)
        with (folder / "log").open("wb") as log, guarded(command, variables, log) as popen:
            yield Process(Path(command[0]).name, popen, folder / "log", watch)


@contextmanager
def guarded(
    command: Sequence[str], environment: Mapping[str, str], output: BinaryIO | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a program that neither the block's end nor quantplan's survives, with its children.

    On POSIX it is in a process group of its own, which signals of the terminal do not reach.

    Args:
        command: Program and arguments; no shell reads them.
        environment: Its whole environment.
        output: Where it prints; None is where quantplan prints.

    Raises:
        LlamaCppError: The program cannot be started.
    """
    with _guard() as group:
        try:
            popen = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=group,
                # SIGPIPE stays ignored, as Python has it: ggml-rpc-server would die of a client
                # that ends while it answers.
                restore_signals=False,
            )
        except OSError as error:
            raise not_started(command[0], error) from error
        try:
            yield popen
        finally:
            popen.terminate()
            try:
                popen.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()


@contextmanager
def _guard() -> Iterator[int | None]:
    """Makes a process group that ends with the block, and whatever ends quantplan.

    Its leader is there for as long as the block, so that no other group can have its number.

    Yields:
        The number of the group; None where the system has no groups, or no shell.
    """
    if not _HAS_GUARD:
        yield None
        return
    guard = subprocess.Popen(
        _GUARD,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    with guard:
        try:
            yield guard.pid
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(guard.pid, signal.SIGKILL)


def not_started(program: str, error: OSError) -> LlamaCppError:
    """Says why a program could not be run at all.

    Args:
        program: Its path.
        error: What the system said.
    """
    hint = {
        errno.ENOENT: "there is no such file, or the loader that it names is not here",
        errno.EACCES: "the file is not executable: chmod +x it",
        errno.ENOEXEC: "it is no program for this system",
    }.get(error.errno or 0, "")
    return LlamaCppError(f"{program} does not run: {error}{f' ({hint})' if hint else ''}")


def isolated_environment(folder: Path) -> dict[str, str]:
    """The environment without what changes llama.cpp's flags behind the caller's back.

    Variables of drivers (``CUDA_VISIBLE_DEVICES``, ``GGML_VK_VISIBLE_DEVICES``) stay.

    Args:
        folder: Stands in for the folder of the user's configuration files.
    """
    kept = {key: text for key, text in os.environ.items() if not key.startswith("LLAMA_ARG_")}
    return kept | {"XDG_CONFIG_HOME": str(folder), "GGML_NO_BACKTRACE": "1"}


def free_port() -> int:
    """A port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    """Whether nothing listens on a port.

    Args:
        host: Address of the interface.
        port: The port.
    """
    with socket.socket() as probe:
        if os.name == "posix":  # what waits to be forgotten does not count, as for llama-server
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
