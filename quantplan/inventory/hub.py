"""Hugging Face: which file an address means, and the token that reads it.

The token comes from the environment, goes to huggingface.co alone, and never into a message.
"""

import os
import re
from urllib.parse import quote, urlsplit, urlunsplit

from quantplan.errors import SourceError

ORIGIN = "https://huggingface.co"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_PREFIX = "hf:"
_FILE = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[^?#]+)", re.ASCII)
_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_PAGE = re.compile(r"(/[^/]+/[^/]+)/blob/(.+)")
_TOKEN = re.compile(r"[\x21-\x7e]+")


def file_url(source: str) -> str | None:
    """The URL of a file: HTTP URLs, those of Hugging Face's pages too, and ``hf:owner/repo/file``.

    Args:
        source: What a user names.

    Returns:
        The URL, or None for anything else, such as a path.

    Raises:
        SourceError: It starts with ``hf:``, but names no file.
    """
    if source.startswith(_PREFIX):
        match = _FILE.fullmatch(source)
        if match is None:
            raise SourceError(f"{source} names no file; write hf:OWNER/REPOSITORY/FILE.gguf")
        return f"{ORIGIN}/{match['repository']}/resolve/main/{quote(match['file'])}"
    parts = urlsplit(source)
    if parts.scheme.lower() not in ("http", "https"):
        return None
    page = _PAGE.fullmatch(parts.path)
    if page is None or parts.netloc.lower() not in _HOSTS:
        return source
    origin = urlsplit(ORIGIN)
    path = f"{page[1]}/resolve/{page[2]}"
    return urlunsplit((origin.scheme, origin.netloc, path, parts.query, ""))


def authorization(url: str) -> dict[str, str]:
    """The headers that prove who asks; none for other hosts than Hugging Face.

    Raises:
        SourceError: The token cannot be one.
    """
    parts = urlsplit(url)
    if f"{parts.scheme}://{parts.netloc}".lower() != ORIGIN:
        return {}
    for name in TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if token and not _TOKEN.fullmatch(token):
            raise SourceError(f"{name} holds characters that no token has; set it again")
        if token:
            return {"Authorization": f"Bearer {token}"}
    return {}


def refusal(url: str, *, has_token: bool) -> str:
    """What to do where the server does not let the file be read; empty for other hosts."""
    if not url.lower().startswith(f"{ORIGIN}/"):
        return ""
    if has_token:
        return (
            f". The token in {TOKEN_VARIABLES[0]} may not read it: accept the model's terms on its "
            "page, or use another token"
        )
    return (
        f". It is private, gated or not there: set {TOKEN_VARIABLES[0]} to a token that may read it"
    )
