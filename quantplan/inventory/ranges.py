"""Reading at any place of a file, on the disk or behind HTTP."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from quantplan.errors import SourceError
from quantplan.inventory.hub import file_url

Location = Path | str
"""A file on the disk, or an HTTP URL as text."""


class Ranges(contextlib.AbstractContextManager["Ranges"], Protocol):
    """A file that several threads may read at any place at once.

    Attributes:
        name: How messages call it.
        size: Its bytes.
        identity: Text that changes when the file does.
        cache_key: Text that stands for the file and its content; None where it is not to be cached.
    """

    name: str
    size: int
    identity: str
    cache_key: str | None

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Reads bytes; fewer come back at the end of the file.

        Raises:
            SourceError: The file cannot be read.
        """
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from one place of the file.

        Raises:
            SourceError: The file cannot be read, or ends before.
        """
        ...


class LocalFile(contextlib.AbstractContextManager["LocalFile"]):
    """A file on the disk.

    Attributes:
        name: Its path.
        size: Its bytes when it was opened.
        identity: Its size and the time of its last change.
        cache_key: None, since it is here already.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file.

        Raises:
            SourceError: It cannot be opened.
        """
        self.name = os.fspath(path)
        self._lock = threading.Lock()
        with self._explained():
            self._file = open(path, "rb", buffering=0)  # noqa: PTH123, SIM115 (closed by __exit__)
            status = os.fstat(self._file.fileno())
        self.size = status.st_size
        self.cache_key: str | None = None
        self.identity = f"{status.st_size} {status.st_mtime_ns}"

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self._file.close()

    def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Reads bytes; fewer come back at the end of the file.

        Raises:
            SourceError: The file cannot be read.
        """
        with self._explained(), self._lock:
            self._file.seek(offset)
            return self._file.read(n_bytes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from one place of the file.

        Raises:
            SourceError: The file cannot be read, or has become shorter since it was opened.
        """
        while buffer:
            with self._explained():
                n_bytes = self._read(offset, buffer)
            if not n_bytes:
                raise SourceError(
                    f"{self.name} ended at byte {offset} while it was read; another program has "
                    "changed it, so start again"
                )
            offset, buffer = offset + n_bytes, buffer[n_bytes:]

    def _read(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SourceError(f"{self.name}: {error.strerror or error}") from error


def located(source: str | os.PathLike[str]) -> Location:
    """A source as the caller names it, as a URL or a path.

    Raises:
        SourceError: It starts with ``hf:``, but names no file.
    """
    url = file_url(source) if isinstance(source, str) else None
    return url or Path(source)


def open_ranges(source: str | os.PathLike[str], *, read_ahead: int = 0) -> Ranges:
    """Opens a file on the disk, or behind HTTP where the source is a URL.

    Args:
        source: The file.
        read_ahead: Blocks of a remote file to fetch before they are needed.

    Raises:
        SourceError: It cannot be opened.
    """
    place = located(source)
    if isinstance(place, str):
        from quantplan.inventory.remote import HttpFile  # noqa: PLC0415 (local files go without)

        return HttpFile(place, read_ahead=read_ahead)
    return LocalFile(place)
