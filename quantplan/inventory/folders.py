"""Folders of the user's own: the cache of headers, and catalog entries."""

from pathlib import Path


def cache_folder() -> Path:
    """Where headers of remote files are kept; ``$XDG_CACHE_HOME/quantplan`` on Linux."""
    from platformdirs import user_cache_path  # noqa: PLC0415 (local files go without)

    return user_cache_path("quantplan", appauthor=False)


def catalog_folder() -> Path:
    """Where the user's own catalog entries are; ``$XDG_DATA_HOME/quantplan`` on Linux."""
    from platformdirs import user_data_path  # noqa: PLC0415

    return user_data_path("quantplan", appauthor=False) / "catalog"
