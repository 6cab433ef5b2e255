"""Options that several commands have, and what they mean."""

import contextlib
import os
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantplan.cli.progress import working
from quantplan.errors import InputError
from quantplan.llama_cpp import KVType

if TYPE_CHECKING:
    from quantplan.hardware.machine import Machine
    from quantplan.inventory import Inventory
    from quantplan.policy import Policy
    from quantplan.recipe import Recipe
    from quantplan.schema import Frozen

_WIDEST, _NARROWEST = 80, 40


def complete_model(incomplete: str) -> list[str]:
    """Catalog names that start so, for the shell."""
    from quantplan.folders import catalog_names  # noqa: PLC0415

    return [name for name in catalog_names() if name.lower().startswith(incomplete.lower())]


EngineName = Literal["llama.cpp", "ik_llama.cpp", "ik"]
MachineOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="GPUs and RAM: 'RTX 4090 + 64GiB@80GB/s', '2x 24GiB + 128GiB@200GB/s', "
        "'M3 Max + 64GiB', or the path of a profile; without, this machine.",
    ),
]
LlamaBuildOption = Annotated[
    int, typer.Option(help="Build number of the llama.cpp that will run the model.")
]
ContextOption = Annotated[int, typer.Option(help="Tokens of context, all slots together.")]
CacheTypeOption = Annotated[KVType, typer.Option(help="Type of the KV cache.")]
MarginOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory to leave free on every GPU, such as 2GiB for a desktop; 10 %, at most 1 GiB.",
    ),
]
PolicyOption = Annotated[
    str, typer.Option(help="Rules about types and places: quality, compact, free or hq4k.")
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX=TYPE,...", help="Types for the tensors whose names match; repeatable."
    ),
]
PinOption = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=TYPE", help="One type, ahead of --allow; repeatable."),
]
MeasuredOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV", help="Measured KLDs of this model, as GGUF-Tool-Suite or `tensor,qtype,kld`."
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="JSON", help="Errors that `quantplan measure-weights` saved."),
]
RobustOption = Annotated[
    bool,
    typer.Option("--robust", help="Plan against the upper end (90 %) of what the losses may be."),
]
FtypeOption = Annotated[
    str | None,
    typer.Option(metavar="MIX", help="Take the model as llama-quantize would make it: 'Q4_K_M'."),
]
ImatrixOption = Annotated[
    bool,
    typer.Option("--imatrix", help="The mix with an importance matrix, which changes some types."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, any shard of one, or a catalog name.",
        autocompletion=complete_model,
    ),
]


def json_option(*schemas: str) -> Any:
    """The option that prints JSON instead of text.

    Args:
        schemas: Names of the JSON Schemas (`quantplan.schemas`) one of which it then follows.
    """
    return typer.Option("--json", help=f"Print it as JSON (schema {' or '.join(schemas)}).")


def read_model(source: str) -> "Inventory":
    """Reads a model's header; one that is not on this machine may take a while."""
    import quantplan as qp  # noqa: PLC0415

    wanted = "a GGUF file, its URL, hf:OWNER/REPOSITORY/FILE.gguf, or a name of `quantplan models`"
    if not source:
        raise InputError(f"the model is an empty text: give {wanted}")
    if is_recipe(source) and Path(source).is_file():
        raise InputError(
            f"{source} is JSON, such as a recipe or a profile, no model: give {wanted}"
        )
    if "://" not in source and not source.startswith("hf:"):
        return qp.read_inventory(source)
    with working(f"reading the header of {source.rpartition('/')[2]}"):
        return qp.read_inventory(source)


def in_mix(inventory: "Inventory", ftype: str | None, *, has_imatrix: bool) -> "Inventory":
    """The model in the types of a stock mix; as it is where none is named.

    A mix that nobody can write without an importance matrix is told to be so on standard error.

    Raises:
        InputError: There is an importance matrix and no mix that it could change.
    """
    from quantplan.ftypes.mixes import needs_imatrix, stock_mix  # noqa: PLC0415

    if ftype is None:
        if has_imatrix:
            raise InputError("--imatrix changes the types of a mix; name one with --ftype")
        return inventory
    mix = stock_mix(inventory, ftype, has_imatrix=has_imatrix)
    if needs_imatrix(ftype, mix) and not has_imatrix:
        typer.echo(
            f"note: llama-quantize refuses {ftype.upper()} without an importance matrix, and these "
            "are the types that it would have then; --imatrix gives those with one",
            err=True,
        )
    return inventory.with_qtypes(mix)


def check_targets(*paths: Path | None, read: Iterable[str | Path | None] = ()) -> None:
    """Refuses files that cannot be written or would be lost, before anything is computed for them.

    Args:
        paths: Files to write.
        read: Files that the command reads.
    """
    faults = []
    kept = [Path(path) for path in read if path is not None]
    for path in filter(None, paths):
        try:
            faults += _target_faults(path, kept)
        except OSError as error:
            faults.append(f"{path} cannot be written: {error.strerror or error}")
    if faults:
        raise InputError(faults)


def _target_faults(path: Path, kept: Iterable[Path]) -> list[str]:
    """Why a file cannot be written, or would be lost; nothing where it can.

    Raises:
        OSError: The system does not let anyone look.
    """
    if path.is_dir():
        return [f"{path} cannot be written: it is a directory; name a file"]
    if not path.absolute().parent.is_dir():
        return [f"{path} cannot be written: there is no directory {path.parent}"]
    if not _may_write(path):
        return [f"{path} cannot be written: its directory is read-only; name another one"]
    if path.is_file() and any(p.is_file() and p.samefile(path) for p in kept):
        return [f"{path} would be overwritten, but it is to be read; name another file"]
    return []


def _may_write(path: Path) -> bool:
    """Whether a file can be put in its place; what is no file, such as a pipe, stays there."""
    is_other = path.exists() and not path.is_file()
    place = path if is_other else Path(os.path.realpath(path)).parent
    return os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def read_text(path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error}") from error


def read_recipe(path: str | Path) -> "Recipe":
    """A saved recipe, or that of a plan; where there is none, what writes one is said too."""
    from quantplan.plans.result import Plan  # noqa: PLC0415
    from quantplan.recipe import Recipe  # noqa: PLC0415

    try:
        return Recipe.load(path)
    except InputError as error:
        with contextlib.suppress(InputError):
            return Plan.load(path).recipe
        advice = "A recipe is what `quantplan plan MODEL --recipe FILE.json` writes."
        raise InputError((*_unless_known(path, error), advice)) from error


def _unless_known(path: str | Path, error: InputError) -> tuple[str, ...]:
    """Faults of a file, or what it is instead, where it is something else that quantplan prints."""
    from quantplan.schema import read_document  # noqa: PLC0415
    from quantplan.schemas import schema_of  # noqa: PLC0415

    name = None
    with contextlib.suppress(OSError, InputError):
        name = schema_of(read_document(path))
    return error.faults if name is None else (f"{path} holds another output of quantplan: {name}.",)


def parse_machine(
    text: str | None, margin: str | None, inventory: "Inventory | None" = None
) -> "Machine":
    """The machine of the command line, as it is known for a model.

    Args:
        text: As `Machine.parse` reads it. Without it is the one that this runs on; what was found
            goes to standard error.
        margin: Memory to leave free on every GPU, in the words of the user.
        inventory: The model.
    """
    import quantplan as qp  # noqa: PLC0415

    margin_bytes = parse_size("--margin", margin)
    if text is not None:
        from quantplan.costs.calibration import for_model  # noqa: PLC0415
        from quantplan.hardware.machine import is_profile  # noqa: PLC0415

        saved = is_profile(text)
        try:
            given = qp.Machine.parse(text, margin_bytes=margin_bytes)
        except InputError as error:
            if not saved:
                raise
            advice = "A profile is what `quantplan machine --save FILE.json` writes."
            raise InputError((*_unless_known(text, error), advice)) from error
        for said in given.assumed if not saved else ():
            typer.echo(f"assumed: {said}", err=True)
        return given if inventory is None else for_model(given, inventory.architecture)
    from quantplan.hardware.detect import detect  # noqa: PLC0415

    with working("looking at this machine"):
        found = detect(margin_bytes=margin_bytes)
    typer.echo(
        f"No --machine, so this one: {found.summary()}\n"
        "To measure it only once: quantplan machine --save FILE.json, then --machine FILE.json\n",
        err=True,
    )
    return found


def parse_size(option: str, text: str | None) -> int | None:
    """The bytes that an option states."""
    from quantplan.units import parse_bytes  # noqa: PLC0415

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


def parse_policy(name: str, pins: list[str], allowed: list[str]) -> "Policy":
    """A preset with the rules of the command line; pins come first."""
    from quantplan.policy import parse_rule  # noqa: PLC0415
    from quantplan.policy import policy as preset  # noqa: PLC0415

    found = preset(name)
    faults: list[str] = []
    for text in (*pins, *allowed):
        try:
            pattern, types = parse_rule(text)
            if text in pins and len(types) > 1:
                raise InputError(f"--pin {text} has several types: use --allow")
            found = found.allow(pattern, *types)
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    return found


def tell(value: "Frozen", text: str, as_json: bool) -> None:
    """Prints what a command has found.

    Args:
        value: It.
        text: It, for people.
        as_json: Whether it goes to a program.
    """
    if as_json:
        typer.echo(value.model_dump_json(indent=1))
    else:
        say(text)


def text_width() -> int:
    """Columns of text for people: those of the terminal, or 80."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 0)).columns))


def say(text: str) -> None:
    """Prints text for people: lines wider than `text_width` are folded.

    Flags stay in one line, because people copy them; rows of tables are made to fit 80 columns.
    """
    width = text_width()
    for line in text.split("\n"):
        if line.lstrip().startswith(("flags -", "flags: -")):
            typer.echo(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        folded = textwrap.wrap(
            line.lstrip(),  # the indent would be there twice
            width,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        typer.echo("\n".join(folded))


def unchecked(text: str | None) -> Any:
    """A text that the API checks against the values that it knows."""
    return text


def is_recipe(source: str) -> bool:
    """Whether a source is meant as a recipe: by its suffix, or because it starts as JSON."""
    if source.endswith(".json"):
        return True
    path = Path(source)
    with contextlib.suppress(OSError):  # reading it as a model will say what is wrong
        if path.is_file():
            with path.open("rb") as file:
                return file.read(1) == b"{"
    return False
