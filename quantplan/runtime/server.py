"""A llama-server that runs a model, alone on a port of the loopback interface."""

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

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
    ending,
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
_END_LIMIT_S = 2.0  # a program that died and left its connections may not be gone yet
_PIECE_BYTES = 2**16
_MAX_ANSWER_BYTES = 2**26
_SHOWN_BYTES = 200
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

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, limit_s: float
    ) -> dict[str, Any]:
        """The JSON object that it answers.

        Args:
            path: What is asked, such as ``/props``.
            body: What is sent along; None sends nothing.
            limit_s: Seconds to wait.

        Raises:
            LlamaCppError: It died, refused, took longer, or answered something else; the message
                has the end of its log.
        """
        try:
            status, content = self._request(path, body, limit_s)
        except urllib3.exceptions.TimeoutError as error:
            raise self._failure(
                f"has not answered {path} within {limit_s:.0f} s: allow more time, or ask for less"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._failure(self._fate(path, error)) from error
        shown = content[:_SHOWN_BYTES].decode(errors="replace").strip()
        if status != HTTPStatus.OK:
            raise self._failure(f"refused {path} ({status}): {shown}")
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._failure(f"answered {path} with no JSON object: {shown!r}")
        return found

    def _request(
        self, path: str, body: Mapping[str, Any] | None, limit_s: float
    ) -> tuple[int, bytes]:
        """Status and content of an answer; content that has no end is cut off."""
        deadline, content = time.monotonic() + limit_s, bytearray()
        answer = self.pool.request(
            "GET" if body is None else "POST",
            path,
            json=body,
            timeout=limit_s,
            retries=False,
            preload_content=False,
        )
        with contextlib.closing(answer):
            while len(content) < _MAX_ANSWER_BYTES and (piece := answer.read1(_PIECE_BYTES)):
                content += piece
                if time.monotonic() > deadline:
                    raise urllib3.exceptions.TimeoutError
        return answer.status, bytes(content)

    def complete(self, prompt: str, n_tokens: int, limit_s: float) -> str:
        """The most probable continuation of a text.

        Args:
            prompt: The text.
            n_tokens: Tokens at most.
            limit_s: Seconds to wait.

        Raises:
            LlamaCppError: See `ask`.
        """
        body = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "cache_prompt": False}
        text = self.ask("/completion", body, limit_s=limit_s).get("content")
        if not isinstance(text, str):
            raise self._failure("answered /completion without a text")
        return text

    def _fate(self, path: str, error: Exception) -> str:
        """What became of a server that broke a connection."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"{ending(self.process.popen.wait(_END_LIMIT_S))} when it was asked {path}"
        return f"gave no answer to {path} ({type(error).__name__})"

    def _failure(self, fate: str) -> LlamaCppError:
        return failure(self.process.name, fate, self.process.log)


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
        answer = pool.request(
            "GET", "/health", timeout=_HEALTH_LIMIT_S, retries=False, preload_content=False
        )
    except urllib3.exceptions.HTTPError:  # refused while it starts
        return False
    answer.close()  # whoever answers may have no end
    # 503 while it loads
    return answer.status == HTTPStatus.OK and process.popen.poll() is None
