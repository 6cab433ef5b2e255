"""What differs between two recipes of a model."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from quantplan.given import check_given
from quantplan.inventory.roles import split_name
from quantplan.recipe import MemoryUse, Prediction, Recipe
from quantplan.schema import Frozen
from quantplan.units import gib


class Change(Frozen):
    """Tensors of one role that differ in the same way.

    Attributes:
        role: Their role.
        layers: Their layers, in order; empty outside the layers.
        qtypes: Type in the first recipe and in the second.
        devices: Device in the first recipe and in the second.
        n_bytes: Bytes of all of them in the first recipe and in the second.
    """

    role: str
    layers: tuple[int, ...]
    qtypes: tuple[str, str]
    devices: tuple[str | None, str | None]
    n_bytes: tuple[int, int]


class RecipeDifference(Frozen):
    """What differs between two recipes.

    Attributes:
        schema_version: Version of this format.
        models: Names of the two models.
        is_same_source: Whether both were made for the same header.
        changes: Tensors that both have, with another type or device; by role and layer.
        only_in: Names of the tensors that only the first, and only the second, recipe has.
        n_bytes: Bytes of all tensors.
        predicted: Predictions, where there are any.
        memory: Predicted memory of every device, where there is any.
        flags: Flags for llama.cpp.
    """

    schema_version: Literal[1] = 1
    models: tuple[str, str]
    is_same_source: bool
    changes: tuple[Change, ...]
    only_in: tuple[tuple[str, ...], tuple[str, ...]]
    n_bytes: tuple[int, int]
    predicted: tuple[Prediction | None, Prediction | None]
    memory: tuple[tuple[MemoryUse, ...], tuple[MemoryUse, ...]]
    flags: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def is_empty(self) -> bool:
        """Whether types, places and flags are the same."""
        return not (self.changes or any(self.only_in) or self.flags[0] != self.flags[1])

    def summary(self) -> str:
        """The difference in a few lines of text."""
        first, second = self.models
        rows = [first if first == second else f"{first} -> {second}"]
        if not self.is_same_source:
            rows.append("  made for different files")
        rows.append(f"  tensors {gib(self.n_bytes[0])} -> {gib(self.n_bytes[1])}")
        rows += _prediction_lines(*self.predicted) + _memory_lines(*self.memory)
        for names, which in zip(self.only_in, ("first", "second"), strict=True):
            if names:
                rows.append(f"  {len(names)} tensors only in the {which}, such as {names[0]}")
        rows += [f"  {line}" for line in map(_change_line, self.changes)]
        if self.flags[0] != self.flags[1]:
            rows += [f"  flags {' '.join(flags)}" for flags in self.flags]
        if self.is_empty:
            rows.append("  the same types, places and flags")
        return "\n".join(rows)


def diff_recipes(first: Recipe, second: Recipe) -> RecipeDifference:
    """Compares two recipes, tensor by tensor.

    Args:
        first: The one that differences start from.
        second: The other one; it may be for another file or another model.

    Raises:
        InputError: One of them is no recipe.
    """
    check_given(("first recipe", first, Recipe), ("second recipe", second, Recipe))
    theirs = {t.tensor: t for t in second.tensors}
    sizes = [{t.name: t.n_bytes for t in recipe.inventory_tensors} for recipe in (first, second)]
    groups: defaultdict[tuple[str, tuple[str, str], tuple[str | None, str | None]], list[str]] = (
        defaultdict(list)
    )
    for ours in first.tensors:
        other = theirs.get(ours.tensor)
        if other is not None and (ours.qtype, ours.device) != (other.qtype, other.device):
            role = split_name(ours.tensor)[1]
            qtypes, devices = (ours.qtype, other.qtype), (ours.device, other.device)
            groups[role, qtypes, devices].append(ours.tensor)
    changes = [
        Change(
            role=role,
            layers=tuple(sorted(layer for name in names for layer in _layer(name))),
            qtypes=qtypes,
            devices=devices,
            n_bytes=(sum(sizes[0][n] for n in names), sum(sizes[1][n] for n in names)),
        )
        for (role, qtypes, devices), names in groups.items()
    ]
    return RecipeDifference(
        models=(first.model, second.model),
        is_same_source=first.provenance.header_sha256 == second.provenance.header_sha256,
        changes=tuple(sorted(changes, key=lambda change: (change.role, change.layers))),
        only_in=(
            tuple(name for name in sizes[0] if name not in sizes[1]),
            tuple(name for name in sizes[1] if name not in sizes[0]),
        ),
        n_bytes=(sum(sizes[0].values()), sum(sizes[1].values())),
        predicted=(first.predicted, second.predicted),
        memory=(first.memory, second.memory),
        flags=(first.flags, second.flags),
    )


def _layer(name: str) -> list[int]:
    layer = split_name(name)[0]
    return [] if layer is None else [layer]


def ranges_text(numbers: Iterable[int]) -> str:
    """Numbers in order with runs joined: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _change_line(change: Change) -> str:
    (qtype, new_qtype), (device, new_device) = change.qtypes, change.devices
    parts = [f"{qtype} -> {new_qtype}"] if qtype != new_qtype else [qtype]
    if device != new_device:
        parts.append(f"{device or 'nowhere'} -> {new_device or 'nowhere'}")
    where = f"layers {ranges_text(change.layers)}" if change.layers else ""
    grown = change.n_bytes[1] - change.n_bytes[0]
    sizes = f"  {'+' if grown > 0 else '-'}{gib(abs(grown))}" if grown else ""
    return f"{change.role:20} {', '.join(parts)}  {where}{sizes}".rstrip()


def _prediction_lines(first: Prediction | None, second: Prediction | None) -> list[str]:
    if first is None or second is None:
        return []
    return [
        f"  loss {first.loss_nats:.4f} -> {second.loss_nats:.4f} nats/token, "
        f"decode {first.decode_tps:.1f} -> {second.decode_tps:.1f} tokens/s, "
        f"prefill {first.prefill_tps:.0f} -> {second.prefill_tps:.0f} tokens/s"
    ]


def _memory_lines(first: Iterable[MemoryUse], second: Iterable[MemoryUse]) -> list[str]:
    theirs = {use.device: use for use in second}
    return [
        f"  {use.device:5} free {gib(use.free_bytes)} -> {gib(theirs[use.device].free_bytes)}"
        for use in first
        if use.device in theirs
    ]
