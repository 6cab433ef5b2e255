"""Commands about the catalog of models."""

from typing import Annotated

import typer

from quantplan.cli.options import JsonOption

catalog = typer.Typer(
    name="catalog",
    help="Add models to the catalog, or remove your own.",
    no_args_is_help=True,
)


def models(json_output: JsonOption = False) -> None:
    """List the models of the catalog: those that ship with quantplan, and your own."""
    import json  # noqa: PLC0415

    from quantplan.folders import catalog_names, own_names  # noqa: PLC0415
    from quantplan.inventory.sources import read_inventory  # noqa: PLC0415
    from quantplan.inventory.summary import summarize  # noqa: PLC0415

    own = set(own_names())
    found = [summarize(read_inventory(name)) for name in catalog_names()]
    if json_output:
        rows = [{**model.model_dump(), "is_own": model.name in own} for model in found]
        typer.echo(json.dumps(rows, indent=1))
        return
    width = max(len(model.name) for model in found)
    typer.echo(f"{'model':{width}}  {'architecture':12} {'params':>7} {'active':>7} {'layers':>6}")
    for model in found:
        typer.echo(
            f"{model.name:{width}}  {model.architecture:12} {_billions(model.n_params):>7} "
            f"{_billions(model.n_active_params):>7} {model.n_layers:>6}"
            f"{'  yours' if model.name in own else ''}"
        )


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B"


@catalog.command()
def add(
    source: Annotated[
        str, typer.Argument(help="A GGUF: a file, an HTTP URL, or hf:OWNER/REPOSITORY/FILE.gguf.")
    ],
    name: Annotated[str | None, typer.Option(help="What to call it; the name in the file.")] = None,
) -> None:
    """Add a model to your own catalog; its header alone is read, and kept."""
    from quantplan.inventory.catalog import add_to_catalog  # noqa: PLC0415
    from quantplan.inventory.sources import read_inventory  # noqa: PLC0415

    inventory = read_inventory(source)
    found = add_to_catalog(inventory, name)
    typer.echo(f"{found}: {len(inventory.tensors)} tensors from {inventory.source}")


@catalog.command()
def remove(name: Annotated[str, typer.Argument(help="One of your own models.")]) -> None:
    """Remove a model from your own catalog."""
    from quantplan.inventory.catalog import remove_from_catalog  # noqa: PLC0415

    typer.echo(f"{remove_from_catalog(name)}: removed")
