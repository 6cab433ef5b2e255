"""A plan at a glance, for notebooks."""

from collections.abc import Sequence

from quantplan.costs.speed import SpeedPrediction
from quantplan.display import Table, html_card
from quantplan.planner.baselines import Baseline
from quantplan.predict import DeviceUse, device_table, speed_facts
from quantplan.recipe import Prediction, RecipeTensor, types_html
from quantplan.units import gib

# Plain answers that a notebook shows; the table has all of them.
_SHOWN = 8


def baselines_table(baselines: Sequence[Baseline]) -> Table:
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


def plan_html(
    title: str,
    *,
    command: str,
    gap: float,
    predicted: Prediction,
    speed: SpeedPrediction,
    devices: Sequence[DeviceUse],
    baselines: Sequence[Baseline],
    tensors: Sequence[RecipeTensor],
    notes: Sequence[str],
) -> str:
    """A plan as HTML: what to expect, memory, the best plain answers, types, remarks."""
    facts = {
        "command": command,
        "file": f"{gib(predicted.file_bytes)} ({predicted.bpw:.2f} bpw)",
        "loss": f"{predicted.loss_nats:.4f} nats/token",
        **speed_facts(speed),
        "proven gap": f"{gap:.3%}",
    }
    tables = [device_table(devices)._repr_html_()]
    if baselines:
        tables.append(baselines_table(baselines[:_SHOWN])._repr_html_())
    return html_card(title, facts, *tables, types_html(tensors), notes=notes)
