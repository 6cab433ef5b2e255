"""Catalog entries of the user's own, in a folder beside what ships with the package."""

import gzip
import re
import zlib
from pathlib import Path

from pydantic import ValidationError

from quantplan.errors import SourceError
from quantplan.files import replace_whole
from quantplan.folders import ENTRY_SUFFIX, catalog_folder, own_names
from quantplan.inventory import Inventory
from quantplan.schema import faults_of

_NAME = re.compile(r"\w[\w .+-]*")


def read_own(name: str) -> Inventory:
    """An entry.

    Raises:
        SourceError: It cannot be read.
    """
    path = _path(name)
    try:
        return Inventory.model_validate_json(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"the catalog entry {path} cannot be read: {error}") from error
    except ValidationError as error:
        raise SourceError(
            f"the catalog entry {path} is none that this version reads ({fault}); remove it, and "
            "add the model again"
            for fault in faults_of(error)[:1]
        ) from error


def write_own(inventory: Inventory, name: str) -> None:
    """Writes an entry, whole or not at all.

    Raises:
        SourceError: The name cannot be that of a file, or the folder cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise SourceError(
            f"{name!r} is no name for a model: use letters, digits, spaces and . _ + - with --name"
        )
    entry = inventory.model_copy(update={"name": name}).model_dump_json()
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, gzip.compress(entry.encode(), mtime=0))
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
