"""The plan: what to quantize how, where to put it, what to expect, and how sure that is."""

import contextlib
import math
import os
from typing import Any, Literal, Self

from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable
from quantplan.costs.speed import SpeedPrediction
from quantplan.display import Table, html_card
from quantplan.errors import InputError
from quantplan.formats.llama_cpp import server_command
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.planner.baseline_tables import baseline_lines, baseline_row, baseline_table
from quantplan.planner.baselines import Baseline
from quantplan.planner.goal import Status
from quantplan.planner.held_out import HeldOutGain
from quantplan.planner.resampled import TypeChanges
from quantplan.predict import DeviceUse, device_line, device_table, speed_facts, speed_lines
from quantplan.recipe import (
    MemoryUse,
    Prediction,
    Provenance,
    Recipe,
    RecipeTensor,
    assignment_table,
    type_lines,
    types_html,
)
from quantplan.schema import Frozen, read_saved, write_saved
from quantplan.units import gib
from quantplan.workload import Workload

# Plain answers that a summary shows, and those that a notebook does; the table has all of them.
_SHOWN_BASELINES = 3
_TABLED_BASELINES = 8
# Relative difference of two predictions of one loss that rounding explains.
_ROUNDING = 1e-6


class Plan(Frozen):
    """The answer to "which types, where".

    Attributes:
        schema_version: Version of this format.
        model: Name of the model.
        machine: The machine that it is for.
        workload: The workload that it is for.
        status: ``optimal``, ``within_gap``, ``gap_left`` or ``time_limit``.
        gap: Proven relative gap of the objective.
        devices: What is on each device.
        predicted: Speed, loss and size.
        speed: Decode and prefill speed over the depth of the context, with 80 % intervals.
        assignments: Type and device of every tensor, in file order.
        flags: Flags for llama.cpp, one argument each.
        baselines: What plain answers come to, the best first.
        held_out: How much of the gain over the best plain answer remains on the chunks that were
            held out; None where nothing was measured chunk by chunk.
        type_changes: How plans for resampled chunks differ; None where none were asked for.
        notes: What a person should know about this plan.
        provenance: Where the numbers come from.
    """

    schema_version: Literal[1] = 1
    model: str
    machine: Machine
    workload: Workload
    status: Status
    gap: float
    devices: tuple[DeviceUse, ...]
    predicted: Prediction
    speed: SpeedPrediction
    assignments: tuple[RecipeTensor, ...]
    flags: tuple[str, ...]
    baselines: tuple[Baseline, ...] = ()
    held_out: HeldOutGain | None = None
    type_changes: TypeChanges | None = None
    notes: tuple[str, ...]
    provenance: Provenance

    @property
    def plain_answer(self) -> Baseline | None:
        """The plain answer to prefer, because the plan is better by no more than its uncertainty.

        None where the plan is better than every plain answer that fits and is fast enough.
        """
        return next((baseline for baseline in self.baselines if baseline.is_as_good), None)

    @property
    def recipe(self) -> Recipe:
        """What a quantizer and a runtime need to carry the plan out."""
        return Recipe(
            model=self.model,
            tensors=self.assignments,
            flags=self.flags,
            predicted=self.predicted,
            memory=tuple(
                MemoryUse(
                    device=use.name,
                    weights_bytes=use.weights_bytes,
                    kv_bytes=use.kv_bytes,
                    compute_bytes=use.compute_bytes,
                    free_bytes=use.free_bytes,
                )
                for use in self.devices
            ),
            provenance=self.provenance,
        )

    def was_made_with(self, inventory: Inventory, evidence: Evidence | None) -> bool:
        """Whether the model's losses are predicted as the plan was made with.

        Args:
            inventory: The model.
            evidence: What was measured of its losses, as it is given now.
        """
        said = self.predicted
        promised = said.loss_nats if said.upper_loss_nats is None else said.upper_loss_nats
        types = {a.tensor: a.qtype for a in self.assignments}
        now = LossTable(inventory, evidence).model_kld_nats(types)
        return math.isclose(now, promised, rel_tol=_ROUNDING, abs_tol=1e-12)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all.

        Raises:
            InputError: The file cannot be written.
        """
        write_saved(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a plan that was saved, or that ``quantplan plan --json`` printed.

        Raises:
            InputError: The file cannot be read, is a recipe, or is no plan of this version.
        """
        again = "write one with: quantplan plan MODEL --machine TEXT --json > plan.json"
        try:
            return read_saved(cls, path, "plan")
        except InputError as error:
            faults = [f"{fault}; {again}" for fault in error.faults[:3]]
        with contextlib.suppress(InputError):
            Recipe.load(path)
            faults = [
                f"{os.fspath(path)} is a recipe: it lacks the speed over the context, the plain "
                f"answers and the sizes of the devices; {again}"
            ]
        raise InputError(faults)

    def llama_server_command(self, model_path: str) -> str:
        """A ``llama-server`` command line, ready to paste into a POSIX shell.

        Args:
            model_path: The quantized GGUF.
        """
        return server_command(model_path, self.flags)

    def summary(self, width: int = 80) -> str:
        """The plan in a few lines of text: memory, speed, loss, types.

        Args:
            width: Columns of the text, which tables keep to.
        """
        rows = [
            f"{self.model} on {self.machine.describe()}",
            f"  {self.status}, proven gap {self.gap:.3%}",
            f"  loss {self._loss()} nats/token, "
            f"file {gib(self.predicted.file_bytes)} ({self.predicted.bpw:.2f} bpw)",
            *speed_lines(self.speed),
            *self._turn_lines(),
        ]
        rows += [device_line(device) for device in self.devices]
        if self.baselines:
            rows.append("  beside plain answers, with the same memory and predictions (GiB):")
            indent = " " * 4
            rows += [f"{indent}{line}" for line in self._baseline_lines(width - len(indent))]
        rows += [f"  note: {note}" for note in self.notes]
        rows.append("  types and places:")
        rows += [f"    {line}" for line in type_lines(self.assignments)]
        return "\n".join(rows)

    @property
    def baseline_table(self) -> Table:
        """The plain answers as a table, which notebooks show and ``to_frame`` converts."""
        return baseline_table(self.baselines)

    def to_frame(self) -> Any:
        """Type and device of every tensor as a pandas data frame (or polars).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return assignment_table(self.assignments).to_frame()

    def _repr_html_(self) -> str:
        facts = {
            "command": self.llama_server_command("model.gguf"),
            "file": f"{gib(self.predicted.file_bytes)} ({self.predicted.bpw:.2f} bpw)",
            "loss": f"{self.predicted.loss_nats:.4f} nats/token",
            **speed_facts(self.speed),
            "proven gap": f"{self.gap:.3%}",
        }
        tables = [device_table(self.devices)._repr_html_()]
        if self.baselines:
            shown = baseline_table(self.baselines[:_TABLED_BASELINES])
            tables.append(shown._repr_html_())
        title = f"{self.model} on {self.machine.describe()}"
        return html_card(title, facts, *tables, types_html(self.assignments), notes=self.notes)

    def _loss(self) -> str:
        expected, upper = self.predicted.loss_nats, self.predicted.upper_loss_nats
        return f"{expected:.4f}" if upper is None else f"{expected:.4f} (upper end {upper:.4f})"

    def _turn_lines(self) -> list[str]:
        work, seconds = self.workload, self.predicted.turn_s
        if seconds is None:
            return []
        return [
            f"  turn: {work.prompt_tokens} tokens of prompt and {work.answer_tokens} of answer in "
            f"{seconds:.0f} s"
        ]

    def _baseline_lines(self, width: int) -> list[str]:
        used = [use.capacity_bytes - use.free_bytes for use in self.devices]
        row = baseline_row(
            types="this plan",
            placement="",
            file_bytes=self.predicted.file_bytes,
            vram_bytes=sum(used[:-1]),
            ram_bytes=used[-1],
            decode_tps=self.predicted.decode_tps,
            loss_nats=self.predicted.loss_nats,
        )
        return baseline_lines(row, self.baselines, _SHOWN_BASELINES, width)
