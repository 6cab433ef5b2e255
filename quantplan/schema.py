"""The base of every value that travels between the stages and can be saved as JSON."""

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from quantplan.errors import InputError
from quantplan.files import write_whole
from quantplan.units import MIB

# Characters of what was given that a message shows; whole documents have hundreds of thousands.
_SHOWN = 60
# No saved value is nearly as large; a model's file that is named by mistake is.
_MOST_BYTES = 256 * MIB


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def faults_of(error: ValidationError) -> list[str]:
    """What is wrong with a document, where the document itself would be too long to show.

    Returns:
        One text for each fault: the fields that lead to it, if any, and what is wrong there.
    """
    return [
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
        for fault in error.errors(include_url=False, include_input=False)
    ]


def shortened(text: str) -> str:
    """What a message shows of a text: all of a short one, else its start."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_Kind = TypeVar("_Kind", bound=Frozen)


def write_saved(value: Frozen, path: str | os.PathLike[str]) -> None:
    """Writes a value as JSON, whole or not at all.

    Raises:
        InputError: The file cannot be written; one of that name stays as it was.
    """
    write_whole(Path(path), value.model_dump_json(indent=1) + "\n")


def read_document(path: str | os.PathLike[str]) -> bytes:
    """Reads a file that may hold a saved value.

    Raises:
        InputError: It is too large for one.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InputError(f"it has more than {_MOST_BYTES // MIB} MiB")
    return content


def read_saved(
    kind: type[_Kind], path: str | os.PathLike[str], what: str, error: type[InputError] = InputError
) -> _Kind:
    """Reads a value that was saved as JSON.

    Args:
        kind: Its type.
        path: The file.
        what: What the file should be, as a message calls it, such as ``recipe``.
        error: What to raise.

    Raises:
        InputError: Of the type given: the file cannot be read, or is something else; every fault is
            named.
    """
    name = os.fspath(path)
    try:
        return kind.model_validate_json(read_document(path))
    except OSError as found:
        raise error(f"{name} cannot be read: {found.strerror or found}") from found
    except (InputError, ValidationError) as found:  # the first also of machines and in recipes
        faults = found.faults if isinstance(found, InputError) else faults_of(found)
        raise error(f"{name} is no {what} that this version reads: {f}" for f in faults) from found
