"""Plain answers beside a plan: lines of text, and a table for notebooks."""

from collections.abc import Sequence
from io import StringIO

from quantplan.display import Table
from quantplan.planner.baselines import Baseline
from quantplan.units import gib

_TEXTS = ("types", "placement")
# Tokens per second as llama-bench heads them, which is as narrow as its numbers.
_NUMBERS = ("file", "VRAM", "RAM", "t/s", "loss")


def baseline_lines(
    plan_row: tuple[str, ...], found: Sequence[Baseline], n_rows: int, width: int
) -> list[str]:
    """The plan beside the best plain answers, one of each mix, as lines of text.

    Args:
        plan_row: What the columns say of the plan; see `baseline_row`.
        found: All baselines, the best first.
        n_rows: How many to show.
        width: Columns of the text; where they are few, texts are folded in their cells.
    """
    best: dict[str, Baseline] = {}
    for baseline in found:
        if baseline.is_answer:
            best.setdefault(baseline.types, baseline)
    rows = [plan_row]
    for baseline in list(best.values())[:n_rows]:
        row = baseline_row(
            types=baseline.types,
            placement=baseline.placement,
            file_bytes=baseline.file_bytes,
            vram_bytes=baseline.vram_bytes,
            ram_bytes=baseline.ram_bytes,
            decode_tps=baseline.decode_tps.expected,
            loss_nats=baseline.loss_nats,
        )
        rows.append(row)
    lines = _table_lines(rows, width)
    if not best:
        lines.append("no plain answer fits and is fast enough")
    return lines


def _table_lines(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    from rich.console import Console  # noqa: PLC0415 (slow to import, and not needed for JSON)
    from rich.table import Table as TextTable  # noqa: PLC0415

    table = TextTable(box=None, pad_edge=False, collapse_padding=True)
    for name in _TEXTS:
        table.add_column(name, overflow="fold")
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=width, force_jupyter=False, markup=False, emoji=False)
    with console.capture() as text:
        console.print(table, highlight=False)
    return [line.rstrip() for line in text.get().splitlines()]


def baseline_row(
    *,
    types: str,
    placement: str,
    file_bytes: int,
    vram_bytes: int,
    ram_bytes: int,
    decode_tps: float,
    loss_nats: float,
) -> tuple[str, ...]:
    """The cells of one row of `baseline_lines`."""
    sizes = (gib(n).split()[0] for n in (file_bytes, vram_bytes, ram_bytes))
    return (types, placement, *sizes, f"{decode_tps:.1f}", f"{loss_nats:.4f}")


def baseline_table(baselines: Sequence[Baseline]) -> Table:
    """Plain answers and what to expect of them, in the order given."""
    return Table(
        "Plain answers",
        {
            "types": [b.types for b in baselines],
            "placement": [b.placement for b in baselines],
            "fits": [b.fits for b in baselines],
            "reaches_speed": [b.reaches_speed for b in baselines],
            "is_as_good": [b.is_as_good for b in baselines],
            "file_gib": [b.file_bytes / 2**30 for b in baselines],
            "vram_gib": [b.vram_bytes / 2**30 for b in baselines],
            "ram_gib": [b.ram_bytes / 2**30 for b in baselines],
            "decode_tps_low": [b.decode_tps.low for b in baselines],
            "decode_tps": [b.decode_tps.expected for b in baselines],
            "decode_tps_high": [b.decode_tps.high for b in baselines],
            "loss_nats": [b.loss_nats for b in baselines],
        },
    )
