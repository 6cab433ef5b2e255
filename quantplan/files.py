"""Files that people keep: written whole or not at all."""

import contextlib
import os
from pathlib import Path

from quantplan.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, never a part.

    Raises:
        InputError: The file cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"  # folders such as . have no name
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
