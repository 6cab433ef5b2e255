"""What there is of llama.cpp on this machine, what each part is for, and what is missing."""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from pydantic import Field

from quantplan.errors import LlamaCppError
from quantplan.runtime.find import (
    TOOLS,
    ListedGpu,
    LlamaCpp,
    build_options,
    find_llama_cpp,
    list_gpus,
)
from quantplan.runtime.locate import LIBRARIES, PACKAGES, VARIABLE, candidates
from quantplan.schema import Frozen
from quantplan.units import gib

_PROGRAM = "llama-server"
# Python packages with llama.cpp's library inside, and what can be done with it.
_LIBRARY_PACKAGES = {
    "llama-cpp-python": "its library computes logits; it has no llama-server, so it places nothing",
    "xllamacpp": "an extension module without llama-server or RPC: it cannot run a recipe's flags",
}
_LIBRARY_NAMES = (*LIBRARIES, "xllamacpp.abi3.so")
_PURPOSES = {
    "llama-bench": "speeds are measured by requests to llama-server instead",
    "llama-perplexity": "perplexity and KLD are measured through llama-server or the library",
    "llama-quantize": "quantplan quantizes itself; only types that need it cannot be written",
    "llama-fit-params": "llama-server's own --fit is asked instead",
    "ggml-rpc-server": "this machine cannot lend its devices to others",
}
_USER_FILES = ("/etc/llama.cpp/config.ini",)
_CPU_INFO = Path("/proc/cpuinfo")
# What llama.cpp calls the instructions that its CPU backend is compiled for, and what Linux does.
_INSTRUCTIONS = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma",
    "BMI2": "bmi2", "AVX_VNNI": "avx_vnni", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
}  # fmt: skip


class Installation(Frozen):
    """One llama-server, and what stands beside it.

    Attributes:
        server: Its path.
        fault: Why it does not run; None where it does.
        llama_cpp: What it said of itself; None where it does not run.
        gpus: The GPUs that it would use.
        build_options: What it was compiled for, in its own words.
        foreign: Instructions among them that this processor does not have, as far as the system
            says what it has.
        tools: Paths of its other programs by name; None where they were not built.
        library: Its shared library; None where it is linked into the programs.
    """

    server: Path
    fault: str | None = None
    llama_cpp: LlamaCpp | None = None
    gpus: tuple[ListedGpu, ...] = ()
    build_options: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    tools: dict[str, Path | None] = Field(default_factory=dict)
    library: Path | None = None

    @classmethod
    def examine(cls, server: Path) -> "Installation":
        """Asks a llama-server what it is; that it does not run is an answer."""
        try:
            found = find_llama_cpp(server.parent)
            options = build_options(found.server)
            return cls(
                server=found.server,
                llama_cpp=found,
                gpus=list_gpus(found.server) if found.devices else (),
                build_options=options,
                foreign=foreign_instructions(options),
                tools={name: found.tool(name) for name in TOOLS},
                library=found.library,
            )
        except LlamaCppError as error:
            return cls(server=server, fault=str(error))

    def lines(self) -> list[str]:
        """It in a few lines of text."""
        if self.llama_cpp is None:
            return [str(self.server), f"  does not run: {self.fault}"]
        found = self.llama_cpp
        gpus = [f"{g.name} {g.description} ({gib(g.capacity_bytes)})" for g in self.gpus]
        load_mode = "-lm none" if found.has_load_mode else "--no-mmap"
        known = [
            f"reads weights into memory with {load_mode}",
            "lays models out without loading them (--fit)" if found.has_fit else "has no --fit",
            "has -kvu" if found.has_unified_cache else "has no -kvu",
            "-fa takes a value" if found.has_flash_value else "-fa takes no value",
        ]
        commit = f", commit {found.commit}" if found.commit else ""
        built = f", built with {found.compiler}" if found.compiler else ""
        tools = [name for name, path in self.tools.items() if path]
        return [
            str(self.server),
            f"  {found}{commit}{built}",
            f"  GPUs: {', '.join(gpus) or 'none; RPC devices are named with --rpc'}",
            f"  flags: {'; '.join(known)}",
            f"  compiled for: {', '.join(self.build_options) or 'it does not say'}",
            f"  beside it: {', '.join(tools) or 'no other program'}; "
            f"library {self.library or 'none'}",
        ]


class PythonLibrary(Frozen):
    """A Python package with llama.cpp's library inside.

    Attributes:
        package: Its name.
        version: Its version.
        library: The library.
        use: What it is good for here.
    """

    package: str
    version: str
    library: Path | None
    use: str


class Diagnosis(Frozen):
    """What there is of llama.cpp here.

    Attributes:
        installations: Every llama-server that was found; the first one is used.
        libraries: Python packages with the library alone.
        missing: What is not here, and what to do about it, one sentence each.
    """

    installations: tuple[Installation, ...]
    libraries: tuple[PythonLibrary, ...]
    missing: tuple[str, ...]

    @property
    def is_usable(self) -> bool:
        """Whether the llama-server that would be used runs."""
        return bool(self.installations) and self.installations[0].llama_cpp is not None

    def summary(self) -> str:
        """All of it in lines of text."""
        rows = [line for found in self.installations for line in found.lines()]
        for library in self.libraries:
            rows.append(f"{library.package} {library.version}: {library.library or 'no library'}")
            rows.append(f"  {library.use}")
        return "\n".join([*rows, *(f"missing: {text}" for text in self.missing)])


def diagnose(folder: str | Path | None = None) -> Diagnosis:
    """Looks for everything of llama.cpp that quantplan can use.

    Args:
        folder: As for `find_llama_cpp`; None looks everywhere.
    """
    libraries = tuple(found for name in _LIBRARY_PACKAGES if (found := _python_library(name)))
    fault = None
    servers: dict[Path, None] = {}
    try:
        servers[find_llama_cpp(folder).server] = None
    except LlamaCppError as error:
        fault = str(error)
    if folder is None:
        servers.update(dict.fromkeys(path.absolute() for path in candidates(_PROGRAM)))
    installations = tuple(Installation.examine(server) for server in servers)
    return Diagnosis(
        installations=installations,
        libraries=libraries,
        missing=tuple(_missing(installations, fault)),
    )


def foreign_instructions(options: Sequence[str], cpu_info: Path = _CPU_INFO) -> tuple[str, ...]:
    """Instructions that a build uses and this processor does not have.

    Args:
        options: What it was compiled for, in its own words.
        cpu_info: Where Linux on x86 says what the processor has; nothing is known without it.
    """
    try:
        said = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    flags = re.search(r"^flags\s*:(.*)$", said, re.MULTILINE)
    if flags is None:
        return ()
    has = set(flags[1].split())
    # The first one stands behind the name of its backend: "CPU : SSE3 = 1".
    used = [text.rpartition(": ")[2].removesuffix(" = 1") for text in options]
    return tuple(name for name in used if name in _INSTRUCTIONS and _INSTRUCTIONS[name] not in has)


def _python_library(package: str) -> PythonLibrary | None:
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(f.locate())) for f in found.files or () if f.name in _LIBRARY_NAMES)
    return PythonLibrary(
        package=package,
        version=found.version,
        library=next((path for path in paths if path.is_file()), None),
        use=_LIBRARY_PACKAGES[package],
    )


def _foreign(installation: Installation) -> list[str]:
    """What to do about instructions that this processor does not have."""
    if not installation.foreign:
        return []
    return [
        f"a processor with {', '.join(installation.foreign)}: {installation.server} is compiled "
        "for it, and is ended by SIGILL here as soon as it computes with most types. Use one that "
        "is built on this machine, or whose CPU backend comes in variants (libggml-cpu-*), and set "
        f"{VARIABLE} to its folder"
    ]


def _missing(installations: tuple[Installation, ...], fault: str | None) -> list[str]:
    missing = []
    if fault and not (installations and installations[0].fault):
        missing.append(f"llama-server: {fault}")
    if not any(found.llama_cpp for found in installations):
        missing.append(
            f"a llama-server that runs here: pip install {PACKAGES[_PROGRAM]} (Linux x86-64, "
            f"Vulkan), or build llama.cpp for your GPU and set {VARIABLE} to its folder"
        )
    elif first := installations[0].llama_cpp:
        missing += _foreign(installations[0])
        missing += [f"{name}: {use}" for name, use in _PURPOSES.items() if first.tool(name) is None]
        if not first.devices:
            missing.append("a GPU that this llama.cpp can use: it computes on the CPU")
    missing += [
        f"isolation from {path}: quantplan cannot switch that file off, and it changes flags"
        for path in _USER_FILES
        if Path(path).exists()
    ]
    return missing
