"""Commands that compare recipes and speak other programs' formats."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli.options import (
    EngineName,
    ModelArgument,
    check_targets,
    json_option,
    read_model,
    read_recipe,
    tell,
    unchecked,
)
from quantplan.errors import InputError
from quantplan.units import gib
from quantplan.words import listed

if TYPE_CHECKING:
    from quantplan.recipe import Recipe


def diff(
    first: Annotated[Path, typer.Argument(help="A recipe, or a plan as JSON.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    json_output: Annotated[bool, json_option("difference")] = False,
) -> None:
    """Show what differs between two recipes: types, places, bytes, predictions."""
    import quantplan as qp  # noqa: PLC0415

    found = qp.diff_recipes(read_recipe(first), read_recipe(second))
    tell(found, found.summary(), json_output)


def export(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a plan as JSON.")],
    target: Annotated[
        str, typer.Argument(metavar="FORMAT", help="For which program; --help names all formats.")
    ],
    gguf_name: Annotated[
        str, typer.Option(metavar="FILE", help="The quantized GGUF, in commands.")
    ] = "model.gguf",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; to the terminal.")
    ] = None,
) -> None:
    """Write a recipe in the words of another program.

    FORMAT is llama-quantize (a tensor-type file), llama-quantize-command, ik-custom-q,
    ik-quantize-command, gguf-tool-suite, llama-server, llama-cli, llama-bench, ik-server,
    koboldcpp, lm-studio, shell, systemd or docker-compose. LM Studio reads lm-studio's output as
    ~/.lmstudio/.internal/user-concrete-model-default-config/PUBLISHER/MODEL/FILE.gguf.json; only
    versions that take llama.cpp arguments place the tensors as planned.
    """
    import quantplan as qp  # noqa: PLC0415
    from quantplan.files import write_whole  # noqa: PLC0415

    check_targets(output, read=(recipe,))
    made = read_recipe(recipe)
    text = qp.export_recipe(made, unchecked(target), model_path=gguf_name)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_whole(output, text)
    if target == "ik-server":
        _say_whether_ik_fits(made, text)


def _say_whether_ik_fits(made: "Recipe", command: str) -> None:
    """Warns where ik_llama.cpp, whose caches and buffers differ, takes more than was planned."""
    import quantplan as qp  # noqa: PLC0415

    asked = made.provenance
    if asked.machine is None:
        return
    try:
        inventory = read_model(asked.source.removeprefix("catalog:"))
    except InputError:
        inventory = None
    if inventory is None or inventory.header_sha256 != asked.header_sha256:
        typer.echo(
            f"note: {asked.source} is not there to predict ik_llama.cpp's memory from", err=True
        )
        return
    types = {t.tensor: t.qtype for t in made.tensors}
    written = inventory.with_qtypes(types)
    found = qp.predict(written, command, asked.machine, engine="ik_llama.cpp")
    short = [
        f"{device.name} by {gib(device.margin_bytes - device.free_bytes)}"
        for device in found.devices
        if device.free_bytes < device.margin_bytes
    ]
    if short:
        typer.echo(
            f"warning: ik_llama.cpp needs more memory than was planned for llama.cpp, "
            f"{listed(short)} (margins kept): plan with less context or a larger --margin",
            err=True,
        )


def import_(
    model: ModelArgument,
    source: Annotated[Path, typer.Argument(help="The file to read.")],
    recipe: Annotated[Path, typer.Option(metavar="FILE", help="Where to save the recipe.")],
    source_format: Annotated[
        str | None,
        typer.Option("--format", help="Of the file; told from its suffix where that is clear."),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Whose commands they are.")] = "llama.cpp",
    machine: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Whose devices imported flags put tensors on."),
    ] = None,
    json_output: Annotated[bool, json_option("recipe")] = False,
) -> None:
    """Make a recipe from a quantized GGUF, or from rules or commands of other programs.

    --format is gguf, llama-quantize (a tensor-type file), rules (the same with # comments),
    ik-custom-q, gguf-tool-suite, or command (a command line, script, systemd unit, compose file).
    """
    import quantplan as qp  # noqa: PLC0415
    from quantplan.report import recipe_text  # noqa: PLC0415

    check_targets(recipe, read=(model, source))
    found = qp.import_recipe(
        read_model(model),
        source,
        source_format=unchecked(source_format),
        engine="llama.cpp" if engine == "llama.cpp" else "ik_llama.cpp",
        machine=None if machine is None else qp.Machine.parse(machine),
    )
    found.save(recipe)
    tell(found, recipe_text(found), json_output)
