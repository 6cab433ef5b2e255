"""A file that appears under its name only when it is complete."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from quantplan.errors import QuantizeError


class PartialFile:
    """A temporary file beside a target; it takes the target's name or vanishes.

    Attributes:
        path: The temporary file.
    """

    def __init__(self, target: Path) -> None:
        """Creates the temporary file.

        Raises:
            QuantizeError: It cannot be created.
        """
        self._target = target
        self.path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        with self._explained():
            self._file = self.path.open("xb")

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes the temporary file, unless `commit` has renamed it."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes.

        Raises:
            QuantizeError: The disk is full or fails.
        """
        with self._explained():
            self._file.write(data)

    def sync(self) -> None:
        """Waits until everything written is on the disk.

        Raises:
            QuantizeError: The disk is full or fails.
        """
        with self._explained():
            self._file.flush()
            os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Gives the file its name; a file that had it is replaced and leaves it its mode.

        Raises:
            QuantizeError: The file cannot be renamed.
        """
        with self._explained():
            self._file.close()
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(self._target, self.path)
            self.path.replace(self._target)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise QuantizeError(
                f"{self._target} could not be written: {error.strerror or error}. No part of it is "
                "left, and a file that was there before is unchanged"
            ) from error
