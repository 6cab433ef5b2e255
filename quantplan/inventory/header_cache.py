"""Headers of remote files, kept on the disk: a plan asks for the same ones again and again.

Each is a file named after the hash of its key, which changes when the remote file does, and starts
with the hash of its content. What cannot be written or does not match is left out.
"""

import contextlib
import hashlib
from pathlib import Path

from quantplan.files import replace_whole
from quantplan.folders import cache_folder

_HASH_BYTES = hashlib.sha256().digest_size


def kept_header(key: str) -> bytes | None:
    """The bytes of a header, or None where they are not kept."""
    try:
        raw = _path(key).read_bytes()
    except OSError:
        return None
    digest, header = raw[:_HASH_BYTES], raw[_HASH_BYTES:]
    return header if hashlib.sha256(header).digest() == digest else None


def keep_header(key: str, header: bytes) -> None:
    """Keeps the bytes of a header, where the folder can be written."""
    path = _path(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_whole(path, hashlib.sha256(header).digest() + header)


def _path(key: str) -> Path:
    return cache_folder() / "headers" / hashlib.sha256(key.encode()).hexdigest()
