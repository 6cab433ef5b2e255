"""A real Chromium, driven by Playwright; tests that want one are skipped without it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_LIMIT_MS = 120_000
SIZES = {"phone": (400, 800), "desk": (1600, 1000)}


def chromium_path() -> str | None:
    """Where the system's Chromium is."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    expect.set_options(timeout=_LIMIT_MS)
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, which containers run as.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=_LIMIT_MS
        )
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page whose complaints and requests are written down."""

    def __init__(self, browser: Browser, size: str = "desk", scheme: Any = "light") -> None:
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
            accept_downloads=True,
        )
        context.set_default_timeout(_LIMIT_MS)
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))

    def close(self) -> None:
        self.page.context.close()

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def width(self) -> int:
        """Width of what the page wants to show, in CSS pixels."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def violations(self) -> list[str]:
        """What axe-core finds wrong, from serious upwards, as it names it."""
        source = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
        self.page.evaluate(source)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert found["passes"], "axe-core looked at nothing"
        return [
            f"{v['id']}: {node['html']}"
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
            for node in v["nodes"]
        ]


def file_url(path: Path) -> str:
    """The address of a local file."""
    return path.resolve().as_uri()
