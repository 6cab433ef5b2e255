"""What measurements were made with; those of one table have it in common."""

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from quantplan.costs.families import quantized
from quantplan.errors import InputError
from quantplan.inventory.sources import read_inventory
from quantplan.measure.runs import Setup
from quantplan.runtime.perplexity import fingerprint
from quantplan.schema import Frozen, write_saved
from quantplan.version import __version__


class Conditions(Frozen):
    """What measurements of one table have in common; kept beside it, so that none are mixed.

    Attributes:
        schema_version: Version of this format.
        quantplan_version: Version of quantplan.
        source: The model that was quantized.
        source_sha256: Hash of samples of its file.
        text_sha256: Hash of the text; of several, joined by ``+``.
        imatrix_sha256: Hash of the importance matrix.
        llama_cpp: The runtime and its build.
        chunks: Chunks of each text.
        chunk_tokens: Tokens per chunk.
        shapes: Shapes of the tensors in GGUF order, by name; empty where they were not kept.
    """

    schema_version: Literal[1] = 1
    quantplan_version: str
    source: str
    source_sha256: str
    text_sha256: str
    imatrix_sha256: str | None
    llama_cpp: str
    chunks: int
    chunk_tokens: int
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @classmethod
    def beside(cls, table: Path) -> Self | None:
        """What a table was measured with; None where nothing beside it says so."""
        try:
            return cls.model_validate_json(_path_beside(table).read_bytes())
        except (OSError, ValueError):
            return None

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """The conditions of a setup."""
        return cls(
            quantplan_version=__version__,
            source=setup.source.name,
            source_sha256=fingerprint(setup.source),
            text_sha256="+".join(hashlib.sha256(t.encode()).hexdigest() for t in setup.texts),
            imatrix_sha256=fingerprint(setup.imatrix) if setup.imatrix else None,
            llama_cpp=str(setup.llama_cpp),
            chunks=setup.chunks,
            chunk_tokens=setup.chunk_tokens,
            shapes={t.name: t.shape_ne for t in quantized(read_inventory(setup.source))},
        )


def check_conditions(conditions: Conditions, table: Path) -> None:
    """Holds conditions against those of a table that is there; writes them for a new one.

    Args:
        conditions: Those of the present measurement.
        table: Where its results go.

    Raises:
        InputError: The table was measured differently, or nothing says how.
    """
    path = _path_beside(table)
    if not table.exists():
        write_saved(conditions, path)
        return
    try:
        known = Conditions.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} does not say how {table} was measured: {error}") from error
    own, other = (
        c.model_dump(exclude={"quantplan_version", "shapes"}) for c in (conditions, known)
    )
    faults = [
        f"{table} was measured with {name} {other[name]}, not {value}: name another file"
        for name, value in own.items()
        if other[name] != value
    ]
    if faults:
        raise InputError(faults)


def _path_beside(table: Path) -> Path:
    return table.with_name(f"{table.name}.json")
