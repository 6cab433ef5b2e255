"""The command line as a shell sees it: widths, colours, JSON, completion, generated pages."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest

import quantplan as qp
from quantplan.schemas import SCHEMAS, json_schema
from scripts.build_reference import FOLDER, reference

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


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", MODEL, "--machine", MACHINE],
        ["frontier", MODEL, "--machine", MACHINE, "--points", "2"],
        ["predict", MODEL, "--machine", MACHINE, "--recipe", "RECIPE"],
        ["show", "RECIPE"],
        ["show", "GLM-4.5-Air"],
        ["diff", "RECIPE", "RECIPE"],
        ["explain", MODEL, "blk.1.ffn_down.weight"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_text_fits_80_columns(arguments: Sequence[str], recipe: Path) -> None:
    """Nothing is wider than a terminal, except commands and flags to paste."""
    words = [str(recipe) if word == "RECIPE" else word for word in arguments]
    lines = run(*words).splitlines()
    pasted = ("llama-server ", "  flags: ", "  flags -")
    assert [line for line in lines if len(line) > 80 and not line.startswith(pasted)] == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_colour_is_for_terminals_that_want_it() -> None:
    """Help is coloured on a terminal, not in a pipe, and not with NO_COLOR."""
    assert not _COLOUR.search(run("plan", "--help"))
    assert _COLOUR.search(_on_terminal({"TERM": "xterm-256color"}))
    assert not _COLOUR.search(_on_terminal({"TERM": "xterm-256color", "NO_COLOR": "1"}))


def _on_terminal(environment: dict[str, str]) -> str:
    import pty  # noqa: PLC0415 (not on Windows)

    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    with subprocess.Popen(
        [sys.executable, "-m", "quantplan.cli", "plan", "--help"],
        stdout=theirs, stderr=theirs, stdin=theirs, env={**kept, **environment},
    ):  # fmt: skip
        os.close(theirs)
        parts = []
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
