"""A llama-server that runs a model, alone on a port of the loopback interface."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from quantplan.errors import LlamaCppError
from quantplan.inventory.sources import shard_paths
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.flags import flags_for
from quantplan.runtime.log import has_reserved
from quantplan.runtime.memory import kept_flags
from quantplan.runtime.process import (
    ADDRESS,
    PORT_TAKEN,
    Process,
    failure,
    free_port,
    is_free,
    running,
)

LOAD_LIMIT_S = 600.0
"""Seconds that a model may take to load."""

_ATTEMPTS = 3
_HEALTH_LIMIT_S = 1.0  # what listens there may be another program, which never answers
_LOG_LIMIT_S = 10.0  # from the answer that it is ready to the last line of the log about buffers
_DEPRECATED = re.compile(r"^.*\b(?:deprecated|DEPRECATED)\b.*$", re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """A llama-server that has loaded its model.

    Attributes:
        process: The program.
        pool: Connections to it.
        command: The command that it was started with.
    """

    process: Process
    pool: urllib3.HTTPConnectionPool
    command: tuple[str, ...]

    @property
    def deprecated(self) -> tuple[str, ...]:
        """Lines of its log that call a flag deprecated."""
        return tuple(line.strip() for line in _DEPRECATED.findall(self.process.log))

    def complete(self, prompt: str, n_tokens: int, limit_s: float) -> str:
        """The most probable continuation of a text.

        Args:
            prompt: The text.
            n_tokens: Tokens at most.
            limit_s: Seconds to wait.

        Raises:
            LlamaCppError: It died, refused, or took longer; the message has the end of its log.
        """
        body = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "cache_prompt": False}
        try:
            answer = self.pool.request(
                "POST", "/completion", json=body, timeout=limit_s, retries=False
            )
            text = answer.json().get("content") if answer.status == 200 else None
        except urllib3.exceptions.TimeoutError as error:
            raise self._failure(f"gave no answer within {limit_s:.0f} s") from error
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise self._failure(f"gave no answer ({type(error).__name__})") from error
        if not isinstance(text, str):
            said = answer.data[:_SHOWN_BYTES].decode(errors="replace")
            raise self._failure(f"refused to complete a text ({answer.status} {said!r})")
        return text

    def _failure(self, fate: str) -> LlamaCppError:
        return failure(self.process.name, fate, self.process.log)


_SHOWN_BYTES = 200


@contextmanager
def serving(
    llama_cpp: LlamaCpp,
    gguf: Path,
    flags: Sequence[str],
    *,
    limit_s: float = LOAD_LIMIT_S,
    log: Path | None = None,
) -> Iterator[Server]:
    """Runs llama-server on a model until the block ends.

    The user's configuration plays no part. Flags are said in the build's words; those that name a
    model, a port or a log are replaced by its own, and ``--fit`` by ``off``.

    Args:
        llama_cpp: Which llama.cpp.
        gguf: The model, or any shard of it.
        flags: Flags of llama-server.
        limit_s: Seconds to load the model.
        log: Where to keep what it printed; the folder must exist.

    Yields:
        The server, once it answers and has said what memory it takes.

    Raises:
        LlamaCppError: It does not start, refuses the flags or the model, takes too long, or prints
            nothing that a llama.cpp prints.
    """
    arguments = [*kept_flags(flags), "--fit", "off"]
    command = [str(llama_cpp.server), *flags_for(llama_cpp, arguments)]
    command += ["-m", str(shard_paths(gguf)[0].resolve()), "--host", ADDRESS, "--no-warmup"]
    if llama_cpp.runtime == "llama.cpp":
        command += ["-lv", "4"]
    for attempt in range(_ATTEMPTS):
        try:
            with _started([*command, "--port", str(port := free_port())], port, limit_s, log) as it:
                yield it
            return
        except _PortTakenError as error:
            if attempt == _ATTEMPTS - 1:
                raise LlamaCppError(str(error)) from error


class _PortTakenError(Exception):
    """Another program took the port between the choice of it and the start."""


@contextmanager
def _started(
    command: Sequence[str], port: int, limit_s: float, log: Path | None
) -> Iterator[Server]:
    pool = urllib3.HTTPConnectionPool(ADDRESS, port)
    with running(command) as process, pool:
        try:
            try:
                process.wait_until(lambda: _is_healthy(process, pool), limit_s)
                process.wait_until(lambda: has_reserved(process.log), _LOG_LIMIT_S)
            except LlamaCppError as error:
                # A server that ends at once may lose what it had to say.
                if process.popen.poll() is None or is_free(ADDRESS, port):
                    raise
                raise _PortTakenError(f"{PORT_TAKEN} {port}. {error}") from error
            yield Server(process, pool, tuple(command))
        finally:
            if log is not None:
                shutil.copyfile(process.log_path, log)


def _is_healthy(process: Process, pool: urllib3.HTTPConnectionPool) -> bool:
    """Whether the program runs, and what listens on its port says that the model is loaded."""
    if process.popen.poll() is not None:
        return False
    try:
        answer = pool.request("GET", "/health", timeout=_HEALTH_LIMIT_S, retries=False)
    except urllib3.exceptions.HTTPError:  # refused while it starts
        return False
    return answer.status == 200 and process.popen.poll() is None  # 503 while it loads
