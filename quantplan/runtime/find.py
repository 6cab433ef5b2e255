"""Finds a llama.cpp on this machine and asks it what it is."""

import re
import shlex
import subprocess
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

from quantplan.errors import LlamaCppError
from quantplan.qtypes import Runtime
from quantplan.runtime.locate import (
    FOLDERS,
    PACKAGES,
    VARIABLE,
    candidates,
    in_folder,
    library_beside,
    named_folder,
    tool_beside,
)
from quantplan.runtime.process import ending, failure, running
from quantplan.schema import Frozen
from quantplan.units import MIB

_PROGRAM = "llama-server"
TOOLS = ("llama-bench", "llama-perplexity", "llama-quantize", "llama-fit-params", "ggml-rpc-server")
"""Programs of llama.cpp that stand beside llama-server in most builds."""

_LISTS = "--list-devices"
_TIME_LIMIT_S = 120.0  # the first start may compile shaders
_TRIES = 3
# version: 6500 (0123abc) / version: 0.1.0-dev (build 6500, commit 0123abc); 1 or 0 is unknown
_BUILD = re.compile(r"version: (?:\S+ \(build )?(\d+)[ ,]")
_COMMIT = re.compile(r"version: .*?\b([0-9a-f]{7,40})\)")
_COMPILER = re.compile(r"built with (.+)")
#   Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 23900 MiB free)
_DEVICE = re.compile(r"^  (\w+): (.*) \((\d+) MiB, \d+ MiB free\)", re.MULTILINE)
# -fa, --flash-attn [on|off|auto]; ik_llama.cpp writes (auto|on|off|0|1)
_FLASH_VALUE = re.compile(r"--flash-attn\s+[\[({<A-Z]")
_OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
# system_info: n_threads = 2 / 2 | CPU : AVX = 1 | REPACK = 1 | CUDA : ARCHS = 890 |
_SYSTEM_INFO = re.compile(r"system_info: [^|]*\|\s*(.*\S)\s*\|")


class ListedGpu(Frozen):
    """A GPU as llama.cpp lists it.

    Attributes:
        name: Its name for flags, such as ``CUDA0``.
        description: What its driver calls it.
        capacity_bytes: Memory in total.
    """

    name: str
    description: str
    capacity_bytes: int


class LlamaCpp(Frozen):
    """A llama.cpp on this machine.

    Attributes:
        server: Its llama-server.
        runtime: ``llama.cpp``, or the fork ``ik_llama.cpp``.
        build: Number of the build; None where it does not know it.
        devices: Names of its GPUs, such as ``CUDA0``, in order.
        has_load_mode: Whether ``-lm`` has taken the place of ``--no-mmap``.
        has_unified_cache: Whether it knows ``-kvu``.
        has_fit: Whether ``--fit`` lays a model out before it is loaded.
        has_flash_value: Whether ``-fa`` takes a value, as it does since August 2025.
        commit: Of its sources; None where it does not know it.
        compiler: What it was built with.
    """

    server: Path
    runtime: Runtime
    build: int | None
    devices: tuple[str, ...]
    has_load_mode: bool
    has_unified_cache: bool
    has_fit: bool
    has_flash_value: bool = True
    commit: str | None = None
    compiler: str | None = None

    def tool(self, name: str) -> Path | None:
        """Another program of the same llama.cpp; None where it was not built.

        Args:
            name: For example ``llama-bench``; ``TOOLS`` lists the usual ones.
        """
        return tool_beside(self.server, name)

    @property
    def library(self) -> Path | None:
        """The shared library of the same llama.cpp; None where it is linked into the programs."""
        return library_beside(self.server)

    def __str__(self) -> str:
        """Runtime and build in words."""
        return f"{self.runtime} {f'b{self.build}' if self.build else 'of unknown build'}"


def find_llama_cpp(folder: str | Path | None = None) -> LlamaCpp:
    """Finds llama.cpp and asks it for version, devices and flags.

    Args:
        folder: Where it is: the folder of its programs, or of its source with a build in it. None
            looks at ``LLAMA_CPP_DIR``, ``PATH``, common folders and Python packages, in this order.

    Raises:
        LlamaCppError: There is none, or the first one that was found does not run here.
    """
    place = named_folder(folder)
    if place:
        server = in_folder(place, _PROGRAM)
        if server is None:
            raise LlamaCppError(f"{place}: no {_PROGRAM} in this folder, bin or build/bin")
        return examine(server.absolute())
    server = next(candidates(_PROGRAM), None)
    if server is None:
        raise LlamaCppError(
            f"No llama.cpp found: no {_PROGRAM} on PATH, in {', '.join(FOLDERS)}, nor in "
            f"a Python package ({PACKAGES[_PROGRAM]}). Name its folder, or set {VARIABLE}"
        )
    return examine(server.absolute())


def examine(server: Path) -> LlamaCpp:
    """Asks a llama-server what it is.

    Raises:
        LlamaCppError: It does not run here; the message says why.
    """
    version = _ask(server, "--version")
    usage = _ask(server, "--help")
    options = set(_OPTION.findall(usage))
    if not options:
        raise failure(f"{server} --help", "names no flags: this is no llama-server", usage)
    build = _BUILD.search(version)
    number = int(build[1]) if build else 0
    commit, compiler = _COMMIT.search(version), _COMPILER.search(version)
    return LlamaCpp(
        server=server,
        runtime="ik_llama.cpp" if "--run-time-repack" in options else "llama.cpp",
        build=number if number > 1 else _package_build(server),
        devices=tuple(gpu.name for gpu in list_gpus(server)) if _LISTS in options else (),
        has_load_mode="--load-mode" in options,
        has_unified_cache="--kv-unified" in options,
        has_fit="--fit" in options and "--run-time-repack" not in options,
        has_flash_value=_FLASH_VALUE.search(usage) is not None,
        commit=commit[1] if commit else None,
        compiler=compiler[1].strip() if compiler else None,
    )


@cache
def known_options(program: Path) -> frozenset[str]:
    """Every flag that the help of a program names, in all spellings.

    Raises:
        LlamaCppError: It does not run here.
    """
    return frozenset(_OPTION.findall(_ask(program, "--help")))


def build_options(server: Path) -> tuple[str, ...]:
    """What a llama-server was compiled for, in its own words: ``AVX2 = 1``, ``REPACK = 1``.

    It says so before it opens a model, so it is asked for one that does not exist. A thread of its
    own writes the log, and on a busy machine may not get to that before the program ends.
    """
    loud = ["-lv", "4"] if "-lv" in known_options(server) else []
    with tempfile.TemporaryDirectory(prefix="quantplan-") as folder:
        for _ in range(_TRIES):
            log = _run([str(server), "-m", str(Path(folder, "none.gguf")), *loud])[1]
            if found := _SYSTEM_INFO.search(log):
                return tuple(part.strip() for part in found[1].split("|"))
    return ()


def list_gpus(server: Path) -> tuple[ListedGpu, ...]:
    """The GPUs that a llama-server would use, once for each of its backends that knows them.

    Raises:
        LlamaCppError: It does not run here, or lists no devices.
    """
    found = _DEVICE.findall(_ask(server, _LISTS))
    return tuple(
        ListedGpu(name=name, description=description.strip(), capacity_bytes=int(mib) * MIB)
        for name, description, mib in found
        if int(mib)  # libraries such as Accelerate are listed, with no memory
    )


def _package_build(server: Path) -> int | None:
    """The build that the Python package states which a llama-server is part of."""
    site = str(server.parents[2]) if len(server.parents) > 2 else ""
    for found in metadata.distributions(name=PACKAGES[_PROGRAM], path=[site]):
        parts = found.version.split(".")  # the build is the second one
        return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None
    return None


def _ask(program: Path, option: str) -> str:
    """What a program prints, on either stream, when it is given one option."""
    code, text = _run([str(program), option])
    if code:
        raise failure(f"{program} {option}", ending(code), text)
    return text


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and all output of a program that ends by itself."""
    with running(command) as process:
        try:
            return process.popen.wait(_TIME_LIMIT_S), process.log
        except subprocess.TimeoutExpired as error:
            raise failure(
                shlex.join(command), f"has not ended within {_TIME_LIMIT_S:.0f} s", process.log
            ) from error
