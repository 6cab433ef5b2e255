"""Catalog entries of the user's own, in a folder beside what ships with the package."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from quantplan.errors import SourceError
from quantplan.folders import ENTRY_SUFFIX, catalog_folder, own_names
from quantplan.inventory import Inventory

_NAME = re.compile(r"\w[\w .+-]*")


def read_own(name: str) -> dict[str, Any]:
    """The content of an entry.

    Raises:
        SourceError: It cannot be read.
    """
    path = _path(name)
    try:
        entry: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise SourceError(f"the catalog entry {path} cannot be read: {error}") from error
    return entry


def write_own(inventory: Inventory, name: str) -> None:
    """Writes an entry, whole or not at all.

    Raises:
        SourceError: The name cannot be that of a file, or the folder cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise SourceError(
            f"{name!r} is no name for a model: use letters, digits, spaces and . _ + - with --name"
        )
    entry = {
        "name": name,
        "source": inventory.source,
        "header_sha256": inventory.header_sha256,
        "metadata": inventory.metadata,
        "array_lengths": inventory.array_lengths,
        "tensors": [[t.name, t.shape_ne, t.qtype] for t in inventory.tensors],
    }
    path = _path(name)
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(gzip.compress(json.dumps(entry).encode(), mtime=0))
        temporary.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error


def remove_own(name: str) -> None:
    """Removes an entry.

    Raises:
        SourceError: The user has no such entry, or it cannot be removed.
    """
    if name not in own_names():
        known = ", ".join(sorted(own_names())) or "none"
        raise SourceError(f"{name!r} is no catalog entry of yours; yours are: {known}")
    try:
        _path(name).unlink()
    except OSError as error:
        raise SourceError(f"{_path(name)} cannot be removed: {error}") from error


def _path(name: str) -> Path:
    return catalog_folder() / f"{name}{ENTRY_SUFFIX}"
