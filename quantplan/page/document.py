"""The page as one HTML file that asks nothing of any network."""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from quantplan.page.content import Content

_TEMPLATE = files(__package__).joinpath("template")
# In this order they make one script.
_SCRIPTS = ("build.js", "draw.js", "tables.js", "page.js")
_LIVE_SCRIPTS = ("live.js",)


def report_html(content: Content) -> str:
    """The page of one plan, as a file that works without a network.

    Its Content-Security-Policy forbids every request, and any script but its own.
    """
    return _render(content, {}, _SCRIPTS, connects="'none'")


def live_html(options: dict[str, object]) -> str:
    """The page that asks this machine for plans.

    Args:
        options: What the form offers; JSON for the script, by name.
    """
    return _render(None, options, (*_SCRIPTS, *_LIVE_SCRIPTS), connects="'self'")


def _render(
    content: Content | None,
    options: dict[str, object],
    scripts: tuple[str, ...],
    *,
    connects: str,
) -> str:
    script = "'use strict';\n" + "\n".join(_text(name) for name in scripts)
    style = _text("page.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    data = None if content is None else content.model_dump(mode="json")
    return environment.from_string(_text("page.html")).render(
        content=content,
        live=content is None,
        data=_json(data),
        options=_json(options),
        script=script,
        style=style,
        policy=(
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
            f"connect-src {connects}; img-src data:; base-uri 'none'; form-action 'none'"
        ),
    )


@cache
def _text(name: str) -> str:
    return _TEMPLATE.joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
