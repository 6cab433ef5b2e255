"""Every command that a program may want to read speaks JSON, by a schema that is documented."""

import contextlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import WITHOUT_JSON, app
from quantplan.inventory.catalog import remove_from_catalog
from quantplan.quantize.weights import WeightErrors
from quantplan.schemas import SCHEMAS, json_schema, schema_of
from quantplan.verification.result import Verification
from scripts.build_reference import FOLDER
from tests.support.llama_cpp import needs_llama_cpp, packaged_folder, portable_cpu
from tests.support.models import toy_moe

MACHINE = "2x 4GiB + 16GiB@60GB/s"
# What runs each command; {names} stand for files of the fixture below.
RUNS = {
    "plan": f"plan Qwen3-4B-Instruct-2507 --machine '{MACHINE}'",
    "frontier": f"frontier Qwen3-4B-Instruct-2507 --machine '{MACHINE}' --points 2",
    "prices": f"prices Qwen3-4B-Instruct-2507 --machine '{MACHINE}'",
    "predict": "predict {source} --machine {cpu} --recipe {recipe}",
    "machine": "machine",
    "calibrate": "calibrate {source} --machine {cpu} --save {out}.json --llama-cpp {llama} "
    "-- -t 1 -c 4096",
    "measure-weights": "measure-weights {source} {out}.json --types Q4_K,Q8_0 --rows 4",
    "measure": "measure {source} {out}.csv --text {text} --curve --runs 1 --chunks 2 "
    "--llama-cpp {llama}",
    "explain": "explain {source} blk.0.attn_q.weight",
    "show": "show {recipe}",
    "show model": "show {source}",
    "diff": "diff {recipe} {recipe}",
    "import": "import {source} {quantized} --recipe {out}.json",
    "quantize": "quantize {recipe} {source} {out}.gguf --verify",
    "doctor": "doctor --llama-cpp {llama}",
    "verify": "verify {recipe} {quantized} --llama-cpp {llama} --output {out}.json -- -t 1",
    "run": "run {recipe} {source} --dry-run --llama-cpp {llama}",
    "models": "models",
    "catalog add": "catalog add {source} --name {name}",
}
NEEDS_LLAMA_CPP = {"calibrate", "measure", "doctor", "verify", "run"}


def commands() -> dict[str, Any]:
    """Every command by its name, as ``catalog add``."""
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found.update({f"{name} {n}": c for n, c in inner.items()} if inner else {name: command})
    return found


def json_help(command: Any) -> str | None:
    """What the help of the option --json says; None where there is no such option."""
    return next((option.help for option in command.params if "--json" in option.opts), None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A toy model, its recipe, its quantized file, and a text; llama.cpp computes here."""
    folder = tmp_path_factory.mktemp("json")
    source, recipe, quantized = (folder / n for n in ("F16.gguf", "recipe.json", "quantized.gguf"))
    toy_moe(source, "qwen3moe")
    cpu = "16GiB@20GB/s"
    work = qp.Workload(context=512, ubatch=64)
    made = qp.plan(qp.read_inventory(source), qp.Machine.parse(cpu), work, baselines=False).recipe
    made.save(recipe)
    qp.quantize(made, source, quantized)
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; 1234 others see it. " * 200)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in portable_cpu(folder).items():
            patch.setenv(key, value)
        yield {
            "source": str(source), "recipe": str(recipe), "quantized": str(quantized), "cpu": cpu,
            "text": str(text), "folder": str(folder),
            "llama": str(packaged_folder()),
        }  # fmt: skip
    with contextlib.suppress(qp.SourceError):  # where that command was not run
        remove_from_catalog("toy-catalog-add")


def test_no_command_lacks_json_without_a_reason() -> None:
    """A command has --json and is run below, or is on the list of those that need none."""
    have = {name for name, command in commands().items() if json_help(command)}
    lack = commands().keys() - have
    assert lack == WITHOUT_JSON.keys()
    assert have == {name for name in RUNS if name in commands()}
    assert all(name.split()[0] in have for name in RUNS if name not in commands())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_llama_cpp) if n in NEEDS_LLAMA_CPP else n for n in RUNS]
)
def test_json_follows_the_schema_that_the_help_names(name: str, files: dict[str, str]) -> None:
    """Each command prints one JSON document, by a schema that the documentation has, and that it
    is told by.
    """
    stem = name.replace(" ", "-")
    places = {**files, "out": f"{files['folder']}/{stem}", "name": f"toy-{stem}"}
    words = [word.format(**places) for word in shlex.split(RUNS[name])]
    at = words.index("--") if "--" in words else len(words)
    done = CliRunner().invoke(app, [*words[:at], "--json", *words[at:]], catch_exceptions=False)
    assert done.exit_code in ((0, 3) if name == "verify" else (0,)), done.output
    command = commands().get(name) or commands()[name.split(maxsplit=1)[0]]
    said = re.search(r"\(schema ([\w -]+)\)", json_help(command) or "")
    assert said is not None
    schemas = [documented(one) for one in said[1].split(" or ")]
    jsonschema.validate(json.loads(done.stdout, parse_constant=refuse), {"anyOf": schemas})
    assert schema_of(done.stdout.encode()) in said[1].split(" or ")


def documented(name: str) -> dict[str, Any]:
    """The schema of that name under docs/reference."""
    text = (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8")
    # References inside a document are found from its own beginning.
    return {"$id": f"https://example.org/{name}", **json.loads(text)}


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def test_a_schema_forbids_what_it_does_not_name() -> None:
    """Every schema is a valid one, and closed, so that a misspelt field is found."""
    for name in SCHEMAS:
        schema = json_schema(name)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert (schema if schema["type"] == "object" else schema["$defs"]["ListedModel"])[
            "additionalProperties"
        ] is False


def test_an_answer_that_is_not_asked_for_has_no_json() -> None:
    """`run --json` without --dry-run is refused: a server prints its own log."""
    done = CliRunner().invoke(app, ["run", "recipe.json", "model.gguf", "--json"])
    assert isinstance(done.exception, qp.InputError)
    assert "--dry-run" in str(done.exception)


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (qp.Recipe.load, qp.RecipeError),
        (qp.Machine.load, qp.MachineError),
        (WeightErrors.load, qp.SourceError),
        (Verification.load, qp.InputError),
    ],
)
def test_a_file_that_is_something_else_is_named(
    load: Callable[[Path], Any], kind: type[qp.InputError], tmp_path: Path
) -> None:
    """Whatever is read, the error names the file, every fault of it, and is of its own kind."""
    path = tmp_path / "file.json"
    with pytest.raises(kind, match=r"file\.json cannot be read: No such file"):
        load(path)
    path.write_text('{"schema_version": 9, "surprise": 1}', encoding="utf-8")
    with pytest.raises(kind, match="surprise") as caught:
        load(path)
    assert type(caught.value) is kind
    assert len(caught.value.faults) > 1
    assert all(fault.startswith(str(path)) for fault in caught.value.faults)
