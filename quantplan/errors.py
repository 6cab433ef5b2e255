"""Every exception that quantplan raises on purpose.

QuantplanError
├── InputError              what the caller gave cannot be used (exit code 2)
│   ├── SourceError         a model file, shard or catalog name
│   ├── MachineError        a machine description
│   ├── WorkloadError       a workload that the model or runtime cannot serve
│   ├── UnsupportedModelError  metadata that the cost models do not know
│   └── RecipeError         a recipe that does not fit the model, or cannot be read
├── NoPlanError             the input is sound, but nothing satisfies the constraints (exit code 1)
├── SolverError             the solver failed or contradicted itself (exit code 1)
├── QuantizeError           writing the quantized file failed (exit code 1)
│   └── WeightError         a weight of the source cannot be converted
├── LlamaCppError           llama.cpp is missing, does not run, or failed (exit code 1)
└── MissingPackageError     an optional package is not installed (exit code 1)

A message says what failed, the value with its unit, the limit, and what to change.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


class QuantplanError(Exception):
    """Base of every error that quantplan raises on purpose."""


class InputError(QuantplanError):
    """The caller's input cannot be used.

    Attributes:
        faults: Every fault found, one sentence each; the message joins them.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        """Collects the faults so that a caller sees all of them at once."""
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class SourceError(InputError):
    """A model source (file, shard, catalog name) cannot be read."""


class MachineError(InputError):
    """A machine description cannot be understood."""


class WorkloadError(InputError):
    """A workload asks for something that the model or the runtime cannot do."""


class UnsupportedModelError(InputError):
    """The model's metadata describe something that the cost models do not know."""


class RecipeError(InputError):
    """A recipe cannot be read, or does not fit the model that it is applied to."""


@dataclass(frozen=True)
class Change:
    """The smallest change of one kind with which there is a plan.

    Attributes:
        kind: What to change.
        value: The new value: tokens of context, a KV type, a quant type (the highest floor), a rule
            about types (``regex=type,type``), bytes of RAM or of VRAM in total, bytes of a shared
            memory that the GPU has, a number of GPUs, tokens per second, seconds per turn, nats per
            token, bytes of the file.
        text: The change as a clause, ``Lower the context to 8192 tokens``.
    """

    kind: Literal[
        "context", "kv_type", "types", "ram", "vram", "gpu_part", "gpus", "floor",
        "speed", "turn", "loss", "size",
    ]  # fmt: skip
    value: float | str
    text: str


class NoPlanError(QuantplanError):
    """No assignment satisfies the constraints.

    Attributes:
        required_bytes: Least bytes needed on the device that is short, where bytes are the reason.
        available_bytes: Bytes that the device offers for it.
        changes: The smallest change of each kind with which there is a plan; a kind is left out
            where no change of it alone was found to do.
    """

    def __init__(
        self,
        message: str,
        *,
        required_bytes: int | None = None,
        available_bytes: int | None = None,
        changes: tuple[Change, ...] = (),
    ) -> None:
        """Keeps the numbers of the message as attributes."""
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        self.changes = changes
        super().__init__(message)


class SolverError(QuantplanError):
    """The solver failed, or its answer did not survive the check in integer arithmetic."""


class QuantizeError(QuantplanError):
    """The quantized file could not be written; the target was left as it was."""


class WeightError(QuantizeError):
    """A weight of the source is not finite, or too large for the type that it should get."""


class LlamaCppError(QuantplanError):
    """llama.cpp was not found, does not run on this machine, or gave no answer."""


class MissingPackageError(QuantplanError):
    """Something was asked for that needs an optional package."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        """Says what to install.

        Args:
            what: What was asked for.
            package: The package that is missing.
            extra: The extra of quantplan that brings it.
        """
        super().__init__(f"{what} needs {package}: pip install 'quantplan[{extra}]'")
