"""Commands about the catalog of models."""

from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli.options import json_option, read_model, say, tell

if TYPE_CHECKING:
    from quantplan.inventory import Inventory
    from quantplan.printed import ListedModel

catalog = typer.Typer(
    name="catalog",
    help="Add models to the catalog, or remove your own.",
    no_args_is_help=True,
)


def models(json_output: Annotated[bool, json_option("models")] = False) -> None:
    """List the models of the catalog: those that ship with quantplan, and your own."""
    import json  # noqa: PLC0415

    from quantplan.folders import catalog_names, own_names  # noqa: PLC0415
    from quantplan.inventory.sources import read_inventory  # noqa: PLC0415

    own = set(own_names())
    found = [_listed(read_inventory(name), is_own=name in own) for name in catalog_names()]
    if json_output:
        typer.echo(json.dumps([model.model_dump(mode="json") for model in found], indent=1))
        return
    width = max(len(model.name) for model in found)
    say(f"{'model':{width}}  {'architecture':12} {'params':>7} {'active':>7} {'layers':>6}")
    for model in found:
        say(
            f"{model.name:{width}}  {model.architecture:12} {_billions(model.n_params):>7} "
            f"{_billions(model.n_active_params):>7} {model.n_layers:>6}"
            f"{'  yours' if model.is_own else ''}"
        )


def _listed(inventory: "Inventory", *, is_own: bool) -> "ListedModel":
    from quantplan.inventory.summary import summarize  # noqa: PLC0415
    from quantplan.printed import ListedModel  # noqa: PLC0415

    return ListedModel(**summarize(inventory).model_dump(), is_own=is_own)


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B"


@catalog.command()
def add(
    source: Annotated[
        str, typer.Argument(help="A GGUF: a file, an HTTP URL, or hf:OWNER/REPOSITORY/FILE.gguf.")
    ],
    name: Annotated[str | None, typer.Option(help="What to call it; the name in the file.")] = None,
    json_output: Annotated[bool, json_option("model")] = False,
) -> None:
    """Add a model to your own catalog; its header alone is read, and kept."""
    from quantplan.inventory.catalog import add_to_catalog  # noqa: PLC0415

    inventory = read_model(source)
    found = add_to_catalog(inventory, name)
    listed = _listed(inventory.model_copy(update={"name": found}), is_own=True)
    tell(listed, f"{found}: {len(inventory.tensors)} tensors from {inventory.source}", json_output)


@catalog.command()
def remove(name: Annotated[str, typer.Argument(help="One of your own models.")]) -> None:
    """Remove a model from your own catalog."""
    from quantplan.inventory.catalog import remove_from_catalog  # noqa: PLC0415

    typer.echo(f"{remove_from_catalog(name)}: removed")
