"""Folders of quantplan's files, and names of catalog entries.

Kept apart from what reads the entries, because the shell's completion waits for the names.
"""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

ENTRY_SUFFIX = ".json.gz"


def cache_folder() -> Path:
    """Where headers of remote files are kept; ``$XDG_CACHE_HOME/quantplan`` on Linux."""
    from platformdirs import user_cache_path  # noqa: PLC0415 (local files go without)

    return user_cache_path("quantplan", appauthor=False)


def catalog_folder() -> Path:
    """Where the user's own catalog entries are; ``$XDG_DATA_HOME/quantplan`` on Linux."""
    from platformdirs import user_data_path  # noqa: PLC0415

    return user_data_path("quantplan", appauthor=False) / "catalog"


def catalog_names() -> tuple[str, ...]:
    """Names of the models in the catalog, the user's own entries included, sorted."""
    return tuple(sorted({*shipped_names(), *own_names()}))


@cache
def shipped_names() -> tuple[str, ...]:
    """Names of the entries that ship with the package."""
    # As a folder: naming the package inventory.catalog would import it.
    folder = files("quantplan").joinpath("inventory", "catalog")
    return _entry_names(entry.name for entry in folder.iterdir())


def own_names() -> tuple[str, ...]:
    """Names of the user's own entries."""
    try:
        return _entry_names(path.name for path in catalog_folder().iterdir())
    except OSError:
        return ()


def _entry_names(file_names: Iterable[str]) -> tuple[str, ...]:
    return tuple(n.removesuffix(ENTRY_SUFFIX) for n in file_names if n.endswith(ENTRY_SUFFIX))
