"""The command line as a shell sees it: widths, colours, JSON, completion, generated pages."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

import quantplan as qp
from quantplan.inventory.catalog import add_to_catalog, remove_from_catalog
from quantplan.schemas import SCHEMAS, json_schema
from scripts.build_reference import FOLDER, reference
from tests.support.models import toy_moe

MODEL, MACHINE = "Qwen3-4B-Instruct-2507", "2x 4GiB + 16GiB@60GB/s"
_COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:[39][0-7]|4[0-8]|38)(?:;\d+)*m")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "quantplan.cli", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "recipe.json"
    inventory = qp.read_inventory(MODEL)
    qp.plan(inventory, qp.Machine.parse(MACHINE), baselines=False).recipe.save(path)
    return path


def test_generated_pages_are_up_to_date() -> None:
    """Help pages and schemas in the documentation are those of this code."""
    stale = [
        name
        for name, text in reference().items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run: python -m scripts.build_reference"
    assert {path.name for path in FOLDER.glob("*.schema.json")} <= set(reference())


def test_every_option_of_every_command_is_on_its_help_page() -> None:
    """The page is made from signatures; what --help shows must not be more."""
    page = (FOLDER / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## quantplan ([\w -]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    commands = re.findall(r"^\W*([a-z]+(?:-[a-z]+)*) {2,}\S", run("--help", COLUMNS="120"), re.M)
    assert {"plan", "report", "ui", "schema"} <= set(commands)
    for command in ("plan", "predict", "report", "import"):
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run(command, "--help", COLUMNS="200")))
        missing = {name for name in shown - {"--help"} if name not in sections[command]}
        assert missing == set(), command


def test_the_profile_of_a_machine_follows_its_schema() -> None:
    """Profiles can be written by other programs."""
    profile = json.loads(qp.Machine.parse(MACHINE).model_dump_json())
    jsonschema.validate(profile, json_schema("machine"))
    profile["ram"]["capacity_bytes"] = "64GiB"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(profile, json_schema("machine"))


def test_the_schema_command_prints_what_is_documented() -> None:
    """A schema can be had from the program alone; a wrong name gets the right ones."""
    assert json.loads(run("schema", "recipe")) == json_schema("recipe")
    with pytest.raises(qp.InputError, match=", ".join(SCHEMAS)):
        json_schema("recipes")


NARROW = {
    "plan": ["plan", "LONG", "--machine", "MANY", "--ctx", "1024"],
    "frontier": ["frontier", "LONG", "--machine", "MANY", "--points", "2", "--ctx", "1024"],
    "prices": ["prices", "LONG", "--machine", "MANY", "--ctx", "1024"],
    "predict": ["predict", "LONG", "--machine", "MANY", "--", "-ngl", "99", "-c", "1024"],
    "show recipe": ["show", "RECIPE"],
    "show model": ["show", "LONG"],
    "diff": ["diff", "RECIPE", "RECIPE"],
    "explain": ["explain", "LONG", "blk.1.ffn_down_exps.weight"],
    "machine": ["machine"],
    "models": ["models"],
    "doctor": ["doctor"],
}
LONG = "A-Mixture-of-Experts-with-a-Name-this-Long"
MANY = "8x RTX PRO 6000 Blackwell + 1TiB@400GB/s"
# People copy these as they are.
_PASTED = ("llama-server ", "  flags: ", "  flags -")


@pytest.fixture(scope="module")
def long_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small model of the user's own catalog whose name is long."""
    source = toy_moe(tmp_path_factory.mktemp("long") / "toy.gguf")
    add_to_catalog(qp.read_inventory(source), LONG)
    yield LONG
    remove_from_catalog(LONG)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("name", NARROW)
def test_text_fits_the_terminal(name: str, columns: int, recipe: Path, long_name: str) -> None:
    """Whatever the names and however many GPUs, only commands and single words are wider."""
    words = {"RECIPE": str(recipe), "LONG": long_name, "MANY": MANY}
    shown = on_terminal([words.get(word, word) for word in NARROW[name]], columns)
    lines = [line for line in shown.splitlines() if not line.startswith(_PASTED)]
    assert lines
    assert [line for line in lines if len(line) > columns and " " in line.strip()] == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(
    "machine", [MANY, "8x RTX PRO 6000 Blackwell + 2TiB@400GB/s", "4GiB@9GB/s"]
)
def test_rows_of_tables_are_not_folded_at_80_columns(machine: str, long_name: str) -> None:
    """Every device and every plain answer has one line, whatever the sizes."""
    shown = on_terminal(["plan", long_name, "--machine", machine, "--ctx", "1024"])
    head, _, rest = shown.partition("beside plain answers")
    devices = re.findall(r"^  (?:GPU\d|CPU) .*GiB\r$", head, re.M)
    assert len(devices) == machine.startswith("8x") * 8 + 1
    table = rest.partition("types and places")[0].splitlines()[1:]
    rows = [line for line in table if not re.match(r"  note:|      \w", line)]
    assert rows[0].split()[-1] == "loss"
    assert [row for row in rows if row.strip() and len(row.split()) < 6] == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_colour_is_for_terminals_that_want_it() -> None:
    """Help is coloured on a terminal, not in a pipe, not with NO_COLOR, not on a dumb one."""
    asked = ["plan", "--help"]
    assert not _COLOUR.search(run(*asked))
    assert _COLOUR.search(on_terminal(asked))
    assert not _COLOUR.search(on_terminal(asked, NO_COLOR="1"))
    assert not _COLOUR.search(on_terminal(asked, TERM="dumb"))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_progress_is_for_terminals_that_can_move_their_cursor() -> None:
    """While a plan is made a terminal says so; pipes, files and dumb terminals stay clean."""
    asked = ["plan", MODEL, "--machine", MACHINE, "--json"]
    shown = on_terminal(asked, stream="stderr")
    assert "planning" in shown
    assert _COLOUR.search(shown)
    plain = on_terminal(asked, stream="stderr", NO_COLOR="1")
    assert "planning" in plain
    assert not _COLOUR.search(plain)
    assert on_terminal(asked, stream="stderr", TERM="dumb") == ""
    done = start(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, said = done.communicate()
    assert said == b""
    assert json.loads(printed)["model"] == MODEL


def test_planning_in_a_thread_swallows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """What other threads print while the solver runs arrives, whatever that does to its banner."""
    inventory, machine = qp.read_inventory(MODEL), qp.Machine.parse(MACHINE)
    qp.plan(inventory, machine, baselines=False)  # the banner of the first run
    planning = threading.Thread(target=lambda: qp.plan(inventory, machine, baselines=False))
    planning.start()
    n_lines = 0
    while planning.is_alive():
        print("a line", flush=True)
        n_lines += 1
        time.sleep(0.001)
    assert capfd.readouterr().out.splitlines() == ["a line"] * n_lines


def start(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, **streams: Any
) -> subprocess.Popen[bytes]:
    """A command that has begun."""
    command = [sys.executable, "-m", "quantplan.cli", *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **streams)


def on_terminal(
    arguments: Sequence[str],
    columns: int = 80,
    stream: Literal["stdout", "stderr"] = "stdout",
    **environment: str,
) -> str:
    """What a command writes to a terminal that is one of its two streams."""
    import fcntl  # noqa: PLC0415 (not on Windows)
    import pty  # noqa: PLC0415
    import termios  # noqa: PLC0415

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    unwanted = {"NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS", "TERM"}
    kept = {k: v for k, v in os.environ.items() if k not in unwanted}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs}
    parts = []
    with start(arguments, {**kept, "TERM": "xterm-256color", **environment}, **streams):
        os.close(theirs)
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("quantplan pl", "plan"),
        ("quantplan plan --min-t", "--min-tps"),
        ("quantplan plan GLM-4.5-A", "GLM-4.5-Air"),
    ],
)
def test_the_shell_completes_commands_options_and_models(words: str, wanted: str) -> None:
    """What bash asks when Tab is pressed is answered with the words that fit."""
    count = str(len(words.split()) - 1)
    script = Path(sys.executable).with_name("quantplan")
    asked = {"_QUANTPLAN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    said = subprocess.run(
        [script], capture_output=True, text=True, check=True, env={**os.environ, **asked}
    )
    assert wanted in said.stdout.split()
