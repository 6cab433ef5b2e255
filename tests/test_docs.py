"""Every command and code block that the documentation shows works as shown."""

import re
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import quantplan as qp
from quantplan.runtime.sparse import write_sparse
from tests.support.http_server import serve
from tests.support.llama_cpp import available, packaged_folder, portable_cpu
from tests.support.models import smollm2_path, toy_moe
from tests.support.pages import (
    ROOT,
    RUN,
    Session,
    blocks,
    check_install,
    hub_files,
    missing,
    needs_llama_cpp,
    session_environment,
    untested,
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_THAT_RUN = [p for p in PAGES if any(b.language in RUN for b in blocks(p.read_text("utf-8")))]
SMOLLM2 = "smollm2-f16.gguf"
DOWNLOAD = "GLM-4.5-Air-Q4_K_M.gguf"
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#]+)\)")
_TEXT = re.compile(r"--text ([\w.-]+)")
_INSTALL = re.compile(r"`((?:\S+/)?pip install [^`]+)`")


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def hub(folder: Path, names: set[str], smollm2: Path) -> Path:
    """A folder with the files that a page reads from Hugging Face: SmolLM2, in F16 or quantized."""
    folder.mkdir()
    quantized = smollm2_path()
    assert quantized is not None, "the fixture has found it"
    for name in names:
        (folder / name).symlink_to(smollm2 if "f16" in name.lower() else quantized)
    return folder


def files(folder: Path, text: str, smollm2: Path | None) -> None:
    """Put there what a page takes for granted: models, a download without its weights, texts."""
    toy_moe(folder / "model-f16.gguf")
    if smollm2 is not None and f"-o {SMOLLM2}" not in text:
        (folder / SMOLLM2).symlink_to(smollm2)
    if DOWNLOAD in text:
        air = qp.read_inventory("GLM-4.5-Air")
        write_sparse(air.with_qtypes(qp.stock_mix(air, "Q4_K_M")), folder / DOWNLOAD)
    for name in _TEXT.findall(text):
        (folder / name).write_text(topics["objects"] + topics["naming"] + topics["types"], "utf-8")


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=title)
def test_blocks_run_in_order_and_print_what_is_shown(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """What a page says to type works from top to bottom, with real models and a real llama.cpp, and
    prints what the page shows.
    """
    text = page.read_text("utf-8")
    if needs_llama_cpp(text) and not available():
        pytest.skip(
            "the page runs llama.cpp, which is not here: make test installs it where it can"
        )
    programs, here = tmp_path / "programs", tmp_path / "here"
    programs.mkdir()
    here.mkdir()
    needs_smollm2 = SMOLLM2 in text or hub_files(text)
    smollm2: Path | None = request.getfixturevalue("smollm2") if needs_smollm2 else None
    files(here, text, smollm2)
    monkeypatch.chdir(here)
    folders, more = [programs], dict[str, str]()
    if available():
        folders, more = [programs, packaged_folder()], portable_cpu(programs)
    with ExitStack() as stack:
        address = ""
        if smollm2 is not None:
            stored = hub(tmp_path / "hub", hub_files(text), smollm2)
            address, _ = stack.enter_context(serve(stored))
        session = stack.enter_context(Session(session_environment(folders, more), address))
        for block in blocks(text):
            if block.language in RUN:
                session.run(block)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_nothing_is_shown_that_is_not_tested(page: Path) -> None:
    """Blocks are of kinds that are run, read, or built by the site; no command hides elsewhere; and
    lines that install name packages and extras that there are.
    """
    text = page.read_text("utf-8")
    two_commands = ["sh"] if page.name == "README.md" else []  # they have a test of their own
    assert untested(text) == two_commands
    for command in _INSTALL.findall(text):
        check_install(command)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    """No page links to a file that is not there."""
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize(
    ("shown", "printed", "measured", "agrees"),
    [
        ("loss 0.0018, Q5_K_M", "loss  0.0019,  Q5_K_M", False, True),
        ("loss 0.0018, Q5_K_M", "loss 0.0021, Q5_K_M", False, False),
        ("loss 0.0018, Q5_K_M", "loss 0.0021, Q5_K_M", True, True),
        ("loss 0.0018, Q5_K_M", "loss 0.0018, Q4_K_M", True, False),
        ("98.5 GiB", "100.1 GiB", False, True),
        ("98.5 GiB", "102.1 GiB", False, False),
        ("a ...", "a b", False, True),
        ("b\na", "a\nb", False, False),
        ("a\n...\nc", "a\nb\nc", False, True),
    ],
)
def test_what_is_shown_is_compared(shown: str, printed: str, measured: bool, agrees: bool) -> None:
    """Words and their order must be the same, and numbers close, unless they were measured."""
    assert (missing(shown.split("\n"), printed, measured=measured) == []) is agrees


@pytest.mark.parametrize("command", ["pip install 'quantplan[uu]'", "pip install quantplans"])
def test_an_install_that_cannot_work_is_noticed(command: str) -> None:
    """A line that installs an extra or a package that there is not fails."""
    with pytest.raises(AssertionError):
        check_install(command)


def test_the_two_commands_of_the_readme_are_what_ci_runs() -> None:
    """CI runs exactly the commands that the README gives to a newcomer."""
    found = blocks((ROOT / "README.md").read_text("utf-8"))
    shown = [block.text.strip() for block in found if block.language == "sh"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert shown == ["make plan", "make test"]
    assert set(shown) <= set(script)
