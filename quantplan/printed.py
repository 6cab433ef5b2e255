"""What commands print with ``--json`` where the Python API has no such value."""

from pathlib import Path
from typing import Self

from quantplan.inventory.summary import ModelSummary
from quantplan.measure.runs import Outcome
from quantplan.quantize import QuantizeResult
from quantplan.schema import Frozen
from quantplan.serve import Service


class ListedModel(ModelSummary):
    """A model of the catalog.

    Attributes:
        is_own: Whether this user added it.
    """

    is_own: bool


class WrittenFile(Frozen):
    """A quantized file that was written and checked.

    Attributes:
        path: The file, or the first of its shards.
        n_bytes: Its size, that of all shards.
        duration_s: Wall time that it took.
        sha256: Hash of every file, by its name; None where it was not read back.
        relative_squared_error: ``|W' - W|^2 / |W|^2`` of every tensor whose type has changed, by
            its name, with columns weighted as in `quantplan.quantize.Verification`; None where it
            was not read back.
    """

    path: Path
    n_bytes: int
    duration_s: float
    sha256: dict[str, str] | None
    relative_squared_error: dict[str, float] | None

    @classmethod
    def of(cls, result: QuantizeResult) -> Self:
        """What is printed of a result."""
        found = result.verification
        return cls(
            path=result.path,
            n_bytes=result.n_bytes,
            duration_s=result.duration_s,
            sha256=found.sha256 if found else None,
            relative_squared_error=found.relative_squared_error if found else None,
        )


class MeasuredLosses(Frozen):
    """What ``quantplan measure`` has measured.

    Attributes:
        table: The file with all KLDs.
        curve: KLD of the whole model by type, in nats per token, of this and of earlier calls.
        n_groups: Groups of tensors in the table.
        runs: The runs of this call, in the order in which they ended.
        surviving_share: How much of what the groups show on one half of the text is there on the
            other; None with fewer than 3 groups.
    """

    table: Path
    curve: dict[str, float]
    n_groups: int
    runs: tuple[Outcome, ...]
    surviving_share: float | None


class DryRun(Frozen):
    """What ``quantplan run`` would do.

    Attributes:
        gguf: The quantized file.
        quantize: The command that writes it; None where it is there already.
        serve: The command that serves it.
    """

    gguf: Path
    quantize: tuple[str, ...] | None
    serve: tuple[str, ...]

    @classmethod
    def of(cls, service: Service, recipe: Path, source: str, imatrix: Path | None = None) -> Self:
        """What is printed of a service.

        Args:
            service: What is to be served.
            recipe: The recipe.
            source: What is quantized, or was.
            imatrix: The importance matrix that it is quantized with.
        """
        weighted = () if imatrix is None else ("--imatrix", str(imatrix))
        write = ("quantplan", "quantize", str(recipe), source, str(service.gguf), *weighted)
        return cls(
            gguf=service.gguf,
            quantize=None if service.is_written else write,
            serve=service.command,
        )
