"""The recipe: which type every tensor gets and where it lives, with provenance."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator

from quantplan.display import Table, html_card, html_table
from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import tensor_type_file
from quantplan.hardware.machine import Machine
from quantplan.inventory import Tensor
from quantplan.planner.goal import Status
from quantplan.policy import Policy, TensorRule, policy
from quantplan.qtypes import QTYPES
from quantplan.schema import Frozen, read_saved, write_saved
from quantplan.units import GIB
from quantplan.workload import Workload


class Assignment(Frozen):
    """The decision for one tensor.

    Attributes:
        tensor: Full tensor name.
        qtype: Type to write, row fallbacks already applied.
        device: ``GPU0``, ..., ``CPU``, or None where the runtime does not load the tensor
            (next-token-prediction blocks), or nobody decided.
    """

    tensor: str
    qtype: str
    device: str | None


class Prediction(Frozen):
    """What to expect of a plan.

    Attributes:
        decode_tps: Tokens per second of one request, with the context full.
        prefill_tps: Prompt tokens per second in whole ubatches, at an empty context.
        turn_s: Seconds for the workload's prompt and answer, from an empty context; None where
            both do not fit into the context.
        loss_nats: Mean KL divergence from the unquantized model, nats per token.
        upper_loss_nats: Upper end of the loss, where the plan was made against that.
        file_bytes: Tensor data of the quantized file.
        bpw: Bits per weight of the file.
    """

    decode_tps: float
    prefill_tps: float
    turn_s: float | None = None
    loss_nats: float
    upper_loss_nats: float | None = None
    file_bytes: int
    bpw: float


class MemoryUse(Frozen):
    """Memory that a plan takes on one device.

    Attributes:
        device: ``GPU0``, ..., ``CPU``.
        weights_bytes: Weights.
        kv_bytes: KV cache and recurrent state.
        compute_bytes: Compute buffer, expected.
        free_bytes: What is left then, with the compute buffer at its high end.
    """

    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    free_bytes: int


class Provenance(Frozen):
    """Where the types, places and numbers of a recipe come from.

    A recipe that was imported has an ``origin``; one that was planned has all the rest.

    Attributes:
        quantplan_version: Version that made the recipe.
        source: Path or catalog name of the inventory.
        header_sha256: Hash of the header that the inventory was read from.
        origin: Where types were imported from, and in which format; None for a plan.
        evidence: What was measured of the model's losses, from which files, and how it counted;
            None for metadata alone.
        cost_data: SHA-256 of every data file that the cost models read, by file name.
        policy: Name of the policy.
        tensor_rules: What a person added to it.
        runtime: Runtime whose types and flags were used.
        machine: The machine that was planned for.
        workload: The workload that was planned for.
        min_decode_tps: The speed that was asked for, in tokens per second.
        max_turn_s: The longest turn that was asked for, in seconds.
        max_loss_nats: The largest loss that was allowed, in nats per token.
        solver: Name and version of the solver.
        solver_options: Options that it was given.
        status: ``optimal``, ``within_gap`` (of the gap asked for), ``gap_left`` (no better split of
            the layers was found, and no proof closed the gap), or ``time_limit`` (the time was up).
        objective_nats: What was minimised, recomputed outside the solver: predicted loss in nats
            per token, and the price of time where nothing was asked for; the price of time alone
            where the fastest plan was asked for.
        bound_nats: Proven lower bound of the objective under the same constraints.
        gap: ``(objective - bound) / objective``.
    """

    quantplan_version: str
    source: str
    header_sha256: str
    origin: str | None = None
    evidence: str | None = None
    cost_data: dict[str, str] = Field(default_factory=dict)
    policy: str | None = None
    tensor_rules: tuple[TensorRule, ...] = ()
    runtime: str
    machine: Machine | None = None
    workload: Workload | None = None
    min_decode_tps: float | None = None
    max_turn_s: float | None = None
    max_loss_nats: float | None = None
    solver: str | None = None
    solver_options: dict[str, str] = Field(default_factory=dict)
    status: Status | None = None
    objective_nats: float | None = None
    bound_nats: float | None = None
    gap: float | None = None

    @property
    def rules(self) -> Policy:
        """The policy with what was added to it.

        Raises:
            InputError: There is no such policy, as in recipes that were not planned.
        """
        preset = policy(self.policy or "")
        return preset.model_copy(update={"tensor_rules": self.tensor_rules})

    @property
    def policy_text(self) -> str:
        """Name of the policy, and what was added to it; ``none`` where nothing was planned."""
        return ", ".join([self.policy or "none", *(rule.text for rule in self.tensor_rules)])


class RecipeTensor(Assignment):
    """An assignment with the shape that it was decided for.

    Attributes:
        shape_ne: Shape in GGUF order, row length first.
    """

    shape_ne: tuple[int, ...]

    @property
    def written(self) -> Tensor:
        """The tensor as an inventory of the quantized file has it."""
        return Tensor(name=self.tensor, shape_ne=self.shape_ne, qtype=self.qtype)


class Recipe(Frozen):
    """What a quantizer and a runtime need to carry a plan out.

    Attributes:
        schema_version: Version of this format.
        model: Name of the model.
        tensors: One entry for every tensor of the model.
        flags: Placement flags for llama.cpp, one argument each; empty where none were imported.
        predicted: What to expect; None where nothing was predicted.
        memory: Predicted memory of every device.
        provenance: Where the decisions come from.
    """

    schema_version: Literal[1] = 1
    model: str
    tensors: tuple[RecipeTensor, ...]
    flags: tuple[str, ...]
    predicted: Prediction | None = None
    memory: tuple[MemoryUse, ...] = ()
    provenance: Provenance

    @field_validator("tensors")
    @classmethod
    def _types_exist(cls, tensors: tuple[RecipeTensor, ...]) -> tuple[RecipeTensor, ...]:
        faults = [
            f"{t.tensor}: there is no type {t.qtype!r}"
            for t in tensors
            if t.qtype.upper() not in QTYPES
        ]
        if faults:
            raise RecipeError(faults)
        return tensors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as JSON, whole or not at all.

        Raises:
            InputError: The file cannot be written; one of that name stays as it was.
        """
        write_saved(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a recipe.

        Raises:
            RecipeError: The file cannot be read, or is no recipe of a known version.
        """
        return read_saved(cls, path, "recipe", RecipeError)

    def tensor_type_file(self) -> str:
        """The text of a file for ``llama-quantize --pure --tensor-type-file``.

        The first pattern that matches a tensor names its type; every tensor is matched.

        Raises:
            RecipeError: llama-quantize cannot write a type, or cannot match a name.
        """
        return tensor_type_file(self.quantizable_types)

    @cached_property
    def inventory_tensors(self) -> tuple[Tensor, ...]:
        """The tensors as an inventory of the quantized file has them."""
        return tuple(t.written for t in self.tensors)

    def to_frame(self) -> Any:
        """Type and device of every tensor as a pandas data frame (or polars).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return assignment_table(self.tensors).to_frame()

    def _repr_html_(self) -> str:
        made = self.provenance
        origin = made.origin or f"planned by quantplan {made.quantplan_version}"
        facts = {"from": f"{origin} for {made.source}", "flags": shlex.join(self.flags)}
        return html_card(self.model, facts, types_html(self.tensors))

    @property
    def quantizable_types(self) -> dict[str, str]:
        """Types of the tensors that a quantizer may change, by name."""
        return {t.name: t.qtype for t in self.inventory_tensors if t.is_quantizable}

    @property
    def matrix_types(self) -> dict[str, str]:
        """Types of all matrices, by name; among them is all that ik_llama.cpp may change."""
        tensors = self.inventory_tensors
        return {t.name: t.qtype for t in tensors if sum(n > 1 for n in t.shape_ne) > 1}


def assignment_table(tensors: Sequence[RecipeTensor]) -> Table:
    """Type and device of every tensor, with what its name says."""
    known = [t.written for t in tensors]
    return Table(
        "Types and devices",
        {
            "tensor": [t.name for t in known],
            "layer": [t.layer for t in known],
            "role": [t.role for t in known],
            "shape_ne": [list(t.shape_ne) for t in known],
            "qtype": [t.qtype for t in known],
            "n_bytes": [t.n_bytes for t in known],
            "device": [t.device for t in tensors],
        },
    )


def are_placed(tensors: Sequence[RecipeTensor]) -> bool:
    """Whether the tensors have devices, so that one without is not loaded."""
    return any(tensor.device for tensor in tensors)


def type_lines(tensors: Sequence[RecipeTensor]) -> list[str]:
    """One line per role of the matrices: how many tensors have which type, where."""
    counts: dict[str, Counter[str]] = {}
    is_placed = are_placed(tensors)
    for entry in tensors:
        tensor = entry.written
        if tensor.is_quantizable:
            where = f" on {entry.device}" if entry.device else " not loaded" if is_placed else ""
            counts.setdefault(tensor.role, Counter())[f"{entry.qtype}{where}"] += 1
    return [
        f"{role:18} " + ", ".join(f"{n}x {what}" for what, n in counter.most_common())
        for role, counter in sorted(counts.items())
    ]


def types_html(tensors: Sequence[RecipeTensor]) -> str:
    """How many matrices of each role have which type, where, as a table in HTML."""
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    nowhere = "not loaded" if are_placed(tensors) else ""
    for entry in tensors:
        tensor = entry.written
        if tensor.is_quantizable:
            key = (tensor.role, entry.qtype, entry.device or nowhere)
            counts[key] += 1
            sizes[key] += tensor.n_bytes
    rows = [(*key, counts[key], sizes[key] / GIB) for key in sorted(counts)]
    header = ("role", "qtype", "device", "tensors", "GiB")
    return html_table("Types and devices", header, rows)
