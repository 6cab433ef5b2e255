"""A file that appears under its name only when it is complete, and can be continued until then.

Beside the unfinished file lies a journal: a line for the job, then one for each place up to which
the file is good, with the CRC-32 of everything before. What a killed process or a power failure
left behind is read against it, so nothing has to be forced to the disk before the end.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

from quantplan.errors import QuantizeError, RecipeError

_READ_BYTES = 1 << 20


def begun_bytes(target: Path) -> int:
    """Space that the unfinished file of an earlier run takes on the disk."""
    with contextlib.suppress(OSError):
        status = _partial(target).stat()
        blocks: int | None = getattr(status, "st_blocks", None)  # Windows has none
        return status.st_size if blocks is None else 512 * blocks
    return 0


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


class PartialFile:
    """An unfinished file beside a target.

    Attributes:
        path: The unfinished file.
        n_bytes: Bytes written so far, those of an earlier run included.
        crc: CRC-32 of these bytes.
    """

    def __init__(self, target: Path, job: str, *, resume: bool) -> None:
        """Writes nothing yet.

        Args:
            target: File to write in the end.
            job: Identifies every byte that will be written.
            resume: Whether to continue; where there is nothing to continue, the file is started.
        """
        self._target = target
        self._job = job
        self._resume = resume
        self.path = _partial(target)
        self._journal_path = target.with_name(f".{target.name}.journal")
        self.n_bytes = self.crc = 0
        # What is there already stays, whatever happens before its last good place is found.
        self._is_worth_keeping = resume and self.path.exists()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Does nothing: a signal may come before the block is known to have begun."""
        return self

    def begin(self) -> None:
        """Starts the file, or continues that of an earlier run after its last good place.

        Raises:
            QuantizeError: The file cannot be written, or another process is writing it.
            RecipeError: The unfinished file belongs to another job.
        """
        self._opened.callback(self._tidy)
        with self._explained():
            self._open()

    def _open(self) -> None:
        self._journal: IO[bytes] = self._opened.enter_context(self._journal_path.open("a+b"))
        self._lock(self._journal)
        # A full disk refuses, when the file is closed, what is still buffered.
        self._opened.enter_context(contextlib.suppress(OSError))
        self._file: IO[bytes] = self._opened.enter_context(self.path.open("a+b"))
        if self._resume:
            self._find_last_good_place()
        self._is_worth_keeping = self.n_bytes > 0
        self._file.truncate(self.n_bytes)
        if not self.n_bytes:
            self._journal.truncate(0)
            self._note({"job": self._job})

    def _lock(self, journal: IO[bytes]) -> None:
        """Refuses to write what another process is writing, where the system can tell."""
        with contextlib.suppress(ImportError):
            import fcntl  # noqa: PLC0415 (Windows has none)

            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise QuantizeError(f"{self._target} is being written by another process") from None

    def _find_last_good_place(self) -> None:
        """Reads the unfinished file up to the last place where it is what the journal says."""
        self._journal.seek(0)
        notes = []
        for line in self._journal:
            with contextlib.suppress(ValueError):  # the last line may be torn
                notes.append(json.loads(line))
        if not notes:
            return
        if notes[0].get("job") != self._job:
            raise RecipeError(
                f"{self.path} was begun with another recipe, source, importance matrix or version; "
                "give the same ones to continue, or do without resuming to start again"
            )
        self._file.seek(0)
        n_bytes = crc = 0
        for note in notes[1:]:
            while n_bytes < note["n_bytes"]:
                data = self._file.read(min(_READ_BYTES, note["n_bytes"] - n_bytes))
                if not data:
                    break
                n_bytes, crc = n_bytes + len(data), zlib.crc32(data, crc)
            if (n_bytes, crc) != (note["n_bytes"], note["crc"]):
                break
            self.n_bytes, self.crc = n_bytes, crc

    def _note(self, note: dict[str, Any]) -> None:
        # A line break first: the line before may be torn.
        self._journal.write(b"\n" + json.dumps(note).encode())
        self._journal.flush()

    def __exit__(self, *_: object) -> None:
        """Closes the file; unless `commit` has renamed it, it stays if it can be continued."""
        self._opened.close()

    def _tidy(self) -> None:
        """Removes what cannot be continued, unless it is another process's by now."""
        if self._is_worth_keeping:
            return
        with (
            contextlib.suppress(OSError, QuantizeError),
            self._journal_path.open("a+b") as journal,
        ):
            self._lock(journal)
            if os.name == "nt":  # where an open file cannot be removed; elsewhere the lock holds
                journal.close()
            self.path.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes.

        Raises:
            QuantizeError: The disk is full or fails.
        """
        with self._explained():
            self._file.write(data)
        self.n_bytes += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def mark(self) -> None:
        """Notes that a later run may continue from here.

        Raises:
            QuantizeError: The disk is full or fails.
        """
        with self._explained():
            self._file.flush()
            self._note({"n_bytes": self.n_bytes, "crc": self.crc})
        self._is_worth_keeping = True

    def discard(self) -> None:
        """Makes sure that nothing is kept, because it could never be completed."""
        self._is_worth_keeping = False

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
        self._is_worth_keeping = False

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = "No part of it is left"
            if self._is_worth_keeping:
                left = f"{self.path.name} has what is done, to be continued by resuming"
            raise QuantizeError(
                f"{self._target} could not be written: {error.strerror or error}. {left}, and a "
                "file that was there before is unchanged"
            ) from error
