"""The recipe: which type every tensor gets and where it lives, with provenance."""

import contextlib
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from quantplan.errors import InputError, RecipeError
from quantplan.formats.llama_cpp import tensor_type_file
from quantplan.hardware import Machine
from quantplan.inventory import Tensor
from quantplan.planner.solve import Status
from quantplan.schema import Frozen
from quantplan.workload import Workload


class Assignment(Frozen):
    """The decision for one tensor.

    Attributes:
        tensor: Full tensor name.
        qtype: Type to write, row fallbacks already applied.
        device: ``GPU0``, ..., ``CPU``, or None where the runtime does not load the tensor
            (next-token-prediction blocks).
    """

    tensor: str
    qtype: str
    device: str | None


class Provenance(Frozen):
    """Where the numbers of a plan come from.

    Attributes:
        quantplan_version: Version that made the plan.
        source: Path or catalog name of the inventory.
        header_sha256: Hash of the header that the inventory was read from.
        cost_data: SHA-256 of every data file that the cost models read, by file name.
        policy: Name of the policy.
        runtime: Runtime whose types and flags were used.
        machine: The machine that was planned for.
        workload: The workload that was planned for.
        min_decode_tps: The speed that was asked for, in tokens per second.
        solver: Name and version of the solver.
        solver_options: Options that it was given.
        status: ``optimal``, ``within_gap`` (of the gap asked for), or ``time_limit``: the search
            ended, by time or for want of a better split of the layers, with a larger gap.
        objective_nats: What was minimised: predicted loss in nats per token, and the price of time
            where no speed was asked for; recomputed outside the solver.
        bound_nats: Proven lower bound of the objective under the same constraints.
        gap: ``(objective - bound) / objective``.
    """

    quantplan_version: str
    source: str
    header_sha256: str
    cost_data: dict[str, str]
    policy: str
    runtime: str
    machine: Machine | None = None
    workload: Workload | None = None
    min_decode_tps: float | None = None
    solver: str
    solver_options: dict[str, str]
    status: Status
    objective_nats: float
    bound_nats: float
    gap: float


class RecipeTensor(Assignment):
    """An assignment with the shape that it was decided for.

    Attributes:
        shape_ne: Shape in GGUF order, row length first.
    """

    shape_ne: tuple[int, ...]


class Recipe(Frozen):
    """What a quantizer and a runtime need to carry a plan out.

    Attributes:
        schema_version: Version of this format.
        model: Name of the model.
        tensors: One entry for every tensor of the model.
        flags: Placement flags for llama.cpp, one argument each.
        provenance: Where the decisions come from.
    """

    schema_version: Literal[1] = 1
    model: str
    tensors: tuple[RecipeTensor, ...]
    flags: tuple[str, ...]
    provenance: Provenance

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as JSON, whole or not at all.

        Raises:
            RecipeError: The file cannot be written; one of that name stays as it was.
        """
        write_whole(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a recipe.

        Raises:
            RecipeError: The file cannot be read, or is no recipe of a known version.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise RecipeError(f"{os.fspath(path)}: {error.strerror or error}") from error
        except InputError as error:  # the machine or the workload inside
            raise RecipeError(f"{os.fspath(path)}: {fault}" for fault in error.faults) from error
        except ValidationError as error:
            raise RecipeError(
                f"{os.fspath(path)} is no recipe that this version reads: "
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                for fault in error.errors()
            ) from error

    def tensor_type_file(self) -> str:
        """The text of a file for ``llama-quantize --pure --tensor-type-file``.

        Every tensor that the recipe changes is matched by exactly one anchored pattern.
        """
        return tensor_type_file({t.tensor: t.qtype for t in self._quantizable()})

    def _quantizable(self) -> list[RecipeTensor]:
        return [
            t
            for t in self.tensors
            if Tensor(name=t.tensor, shape_ne=t.shape_ne, qtype=t.qtype).is_quantizable
        ]


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, never a part.

    Raises:
        RecipeError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
