"""Files that people keep: written whole or not at all."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from quantplan.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, never a part.

    A link stays one, and what is no file, such as ``/dev/stdout``, is written to directly.

    Raises:
        InputError: The file cannot be written.
    """
    content = text.encode()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            replace_whole(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def replace_whole(path: Path, content: bytes) -> None:
    """Puts a file in the place of another one, which leaves it its permissions.

    Raises:
        OSError: The file cannot be written; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
