"""Plain answers beside a plan: lines of text, and a table for notebooks."""

from collections.abc import Sequence

from quantplan.display import Table
from quantplan.planner.baselines import Baseline
from quantplan.units import gib

_HEADER = ("types", "placement", "file", "VRAM", "RAM", "tokens/s", "loss")
_WIDTHS = (12, 18, 8, 7, 7, 8, 8)


def baseline_lines(plan_row: tuple[str, ...], found: Sequence[Baseline], n_rows: int) -> list[str]:
    """The plan beside the best plain answers, one of each mix, in lines of at most 80 columns.

    Args:
        plan_row: What the columns say of the plan; see `baseline_row`.
        found: All baselines, the best first.
        n_rows: How many to show.
    """
    best: dict[str, Baseline] = {}
    for baseline in found:
        if baseline.is_answer:
            best.setdefault(baseline.types, baseline)
    rows = [_HEADER, plan_row]
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
    lines = []
    for row in rows:
        cells = [
            f"{cell:{'<' if i < 2 else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(row, _WIDTHS, strict=True))
        ]
        lines.append(" ".join(cells))
    if not best:
        lines.append("no plain answer fits and is fast enough")
    return lines


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
