"""Every command and code block that the documentation shows works as shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import toy_moe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


PAGES_WITH_BLOCKS = [p for p in PAGES if blocks(p, "python") or blocks(p, "console")]


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=lambda p: p.name)
def test_code_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of a page, then its Python blocks, run in a directory with a model."""
    toy_moe(tmp_path / "model-f16.gguf")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "console"):
        for line in re.findall(r"^\$ quantplan (.+)$", block, re.MULTILINE):
            command = [sys.executable, "-m", "quantplan.cli", *shlex.split(line)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    program = "\n".join(blocks(page, "python"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    """No page links to a file that is not there."""
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_the_two_commands_of_the_readme_are_what_ci_runs() -> None:
    """CI runs exactly the commands that the README gives to a newcomer."""
    shown = [block.strip() for block in blocks(ROOT / "README.md", "sh")]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert shown == ["make plan", "make test"]
    assert set(shown) <= set(script)
