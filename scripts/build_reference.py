"""Writes what is generated under docs/reference: the help pages and the JSON Schemas.

python -m scripts.build_reference [--check]
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from quantplan.cli import WITHOUT_JSON, app
from quantplan.cli.exits import MEANINGS
from quantplan.schemas import SCHEMAS, json_schema

FOLDER = Path(__file__).parent.parent / "docs" / "reference"


def reference() -> dict[str, str]:
    """Texts of all generated files, by name."""
    files = {
        f"{name}.schema.json": json.dumps(json_schema(name), indent=1) + "\n" for name in SCHEMAS
    }
    return {"cli.md": command_line_page(), "schemas.md": schemas_page(), **files}


def schemas_page() -> str:
    """Which schemas there are, each beside what it is of."""
    rows = [f"| [{name}]({name}.schema.json) | {_first_line(SCHEMAS[name])} |" for name in SCHEMAS]
    parts = [
        "# Schemas",
        "Made by `python -m scripts.build_reference`. JSON Schemas (draft 2020-12) of everything "
        "that `--json` prints and that files hold; `quantplan schema NAME` prints one. Sizes are "
        "bytes, times seconds and losses nats per token, as the end of a field's name says.",
        "\n".join(["| schema | what it is of |", "|---|---|", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def _first_line(value: type) -> str:
    """The first line of a docstring."""
    return inspect.getdoc(value).partition("\n")[0]  # type: ignore[union-attr]


def command_line_page() -> str:
    """The help of every command, in the order of the help page.

    Taken from the signatures: the layout of the printed help depends on typer's version.
    """
    parts = [
        "# The command line",
        "Made by `python -m scripts.build_reference`.",
        *_conventions(),
        *_commands(app, "quantplan"),
    ]
    return "\n\n".join(parts) + "\n"


def _conventions() -> Iterator[str]:
    """What holds for all commands."""
    yield "## Exit codes"
    yield "\n".join(f"- {code}: {meaning}" for code, meaning in MEANINGS.items())
    yield "`quantplan run` ends with the exit code of llama-server where it started that."
    yield "## What is printed where"
    yield (
        "Answers go to standard output; progress, remarks and errors go to standard error. With "
        "`--json`, standard output has one JSON document and nothing else. Its schema is the one "
        "that the option names: it is in this folder, and `quantplan schema NAME` prints it. "
        "These commands have no `--json`:"
    )
    yield "\n".join(f"- `quantplan {name}`: {reason}." for name, reason in WITHOUT_JSON.items())
    yield (
        "Progress is shown on a terminal only. Colour is for terminals too; `NO_COLOR` and "
        "`TERM=dumb` switch it off. Text is folded at the width of the terminal, and at 80 "
        "columns at most."
    )


def _commands(group: typer.Typer, prefix: str) -> Iterator[str]:
    """Sections of the commands of an app, and of the apps inside."""
    for entry in group.registered_commands:
        if entry.callback is None or entry.hidden:
            continue
        name = f"{prefix} {entry.name or entry.callback.__name__.replace('_', '-')}"
        yield from _command(name, entry.callback)
    for inner in group.registered_groups:
        if inner.typer_instance is not None and isinstance(inner.name, str):
            yield from _commands(inner.typer_instance, f"{prefix} {inner.name}")


def _command(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Usage, what the command does, its arguments and options."""
    hints = get_type_hints(function, include_extras=True)
    values, lines = [], []
    for parameter in inspect.signature(function).parameters.values():
        kind, *extras = get_args(hints[parameter.name])
        info = next(extra for extra in extras if isinstance(extra, ArgumentInfo | OptionInfo))
        value = info.metavar or _choices(kind) or _placeholder(kind)
        is_required = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            values.append(value if is_required else f"[{value}]")
            names = value
        else:
            names = _option_names(parameter.name, info, kind is bool)
            names += "" if kind is bool else f" {value}"
        lines.append(f"- `{names}`: {info.help}{_default(parameter.default, kind)}")
    yield f"## {name}"
    yield f"`{' '.join([name, '[OPTIONS]', *values])}`"
    yield from (" ".join(text.split()) for text in (function.__doc__ or "").split("\n\n"))
    yield "\n".join(lines)


def _choices(kind: Any) -> str | None:
    """The values of a type that has few, without None."""
    inside = [_choices(part) for part in get_args(kind)] if get_origin(kind) is not Literal else []
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return next((text for text in inside if text), None)


def _placeholder(kind: Any) -> str:
    words = {int: "N", float: "NUMBER", Path: "FILE"}
    return next((words[k] for k in (kind, *get_args(kind)) if k in words), "TEXT")


def _option_names(name: str, info: OptionInfo, is_flag: bool) -> str:
    # Inside Annotated, typer takes the first name for a default until it reads the signature.
    given = (info.default, *(info.param_decls or ()))
    declared = [text for text in given if isinstance(text, str) and text.startswith("-")]
    if declared:
        return ", ".join(declared)
    long = f"--{name.replace('_', '-')}"
    return f"{long}/--no{long[1:]}" if is_flag else long


def _default(default: object, kind: object) -> str:
    if default is inspect.Parameter.empty:
        return " (required)"
    if default is None or default is False:
        return ""
    return f" (default: {'on' if kind is bool else default})"


def main() -> None:
    """Writes the files, or with --check says which are not up to date."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, text in reference().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'stale' if '--check' in sys.argv[1:] else 'written'}: {', '.join(stale)}")
    sys.exit(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    main()
