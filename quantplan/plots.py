"""Pictures of plans, for people who decide: every one is readable in greyscale.

Needs matplotlib (``pip install 'quantplan[plots]'``). Figures are drawn without pyplot, so nothing
global changes and nothing has to be closed. Colours are matplotlib's *cividis*, whose lightness
rises evenly and which people with colour-blindness see alike; hatches, markers and labels repeat
what colours say.
"""

import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantplan.costs.speed import SpeedEstimate, SpeedPrediction
from quantplan.errors import InputError, MissingPackageError
from quantplan.hardware.machine import Machine
from quantplan.inventory import Tensor
from quantplan.planner.baselines import Baseline
from quantplan.plans.frontier import Frontier
from quantplan.plans.result import Plan
from quantplan.qtypes import qtype
from quantplan.units import GIB, gib
from quantplan.usage import PARTS, memory_maps

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise MissingPackageError("drawing", "matplotlib", "plots") from error

_DARK, _MIDDLE, _LIGHT = (colormaps["cividis"](share) for share in (0.05, 0.5, 0.85))
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "oo", "---", "|||")
# As many plain answers are marked.
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
_FILE_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Comparison:
    """A prediction beside what was measured.

    Attributes:
        label: What was measured.
        predicted: The prediction with its interval.
        measured: The measurement, in the same unit.
    """

    label: str
    predicted: SpeedEstimate
    measured: float


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as SVG or PNG, whichever the suffix says.

    Args:
        figure: What one of the functions of this module drew.
        path: The file; its suffix is ``.svg`` or ``.png``.

    Raises:
        InputError: The suffix is another one, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in _FILE_SUFFIXES:
        raise InputError(f"{target}: a figure is saved as {' or '.join(_FILE_SUFFIXES)}")
    try:
        figure.savefig(target, bbox_inches="tight")
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


def plot_frontier(
    found: Frontier,
    machine: Machine,
    baselines: Sequence[Baseline] = (),
    *,
    plan: Plan | None = None,
    date: datetime.date | None = None,
) -> Figure:
    """Loss against what was traded for it, with plain answers and the plan marked.

    Args:
        found: The frontier.
        machine: The machine that it is for.
        baselines: Plain answers; those that do not fit are left out; of the ten best mixes the best
            placement is drawn. Over the context none is drawn, since all have the same.
        plan: A plan to mark.
        date: Date in the title; today by default.
    """
    figure, axes = _figure(found.model, machine.describe(), date)
    xs = {
        "speed": [point.decode_tps for point in found.points],
        "size": [point.file_bytes / GIB for point in found.points],
        "context": [float(point.context) for point in found.points],
    }[found.over]
    label = "frontier" + ("" if all(p.gap <= 0.01 for p in found.points) else " (gaps above 1 %)")
    losses = [point.loss_nats for point in found.points]
    axes.plot(xs, losses, "o-", color=_DARK, markersize=4, label=label)
    if found.over != "context":
        for marker, baseline in zip(_MARKERS, _best_of_each(baselines), strict=False):
            x = baseline.decode_tps.expected
            x = baseline.file_bytes / GIB if found.over == "size" else x
            axes.plot(
                x, baseline.loss_nats, marker, color=_LIGHT, markeredgecolor="black",
                linestyle="none", label=baseline.describe(),
            )  # fmt: skip
    if plan is not None:
        x = {
            "speed": plan.predicted.decode_tps,
            "size": plan.predicted.file_bytes / GIB,
            "context": float(plan.workload.context),
        }[found.over]
        axes.plot(
            x, plan.predicted.loss_nats, "o", color="none", markeredgecolor="black",
            markersize=13, markeredgewidth=1.5, label="this plan",
        )  # fmt: skip
    axes.set_xlabel(
        {
            "speed": "decode tokens/s, context full",
            "size": "file (GiB)",
            "context": "tokens of context",
        }[found.over]
    )
    axes.set_ylabel("predicted loss (nats/token), lower is better")
    if all(loss > 0 for loss in losses):
        axes.set_yscale("log")
        _plain_ticks(axes, "y")
    _legend_below(axes)
    return figure


def plot_memory(plan: Plan, *, date: datetime.date | None = None) -> Figure:
    """What holds the memory of each device: weights by role, KV cache, compute buffer, free.

    Shares of the capacity, in percent; labels in GiB.

    Args:
        plan: What to draw.
        date: Date in the title; today by default.
    """
    maps = memory_maps(plan.devices, plan.assignments)
    figure, axes = _figure(plan.model, plan.machine.describe(), date, height=1.8 + 0.6 * len(maps))
    present = [part for part in PARTS if any(part in m.parts for m in maps)]
    filled = [part for part in present if part != "free"]
    shades = colormaps["cividis"]
    colours = {part: shades(i / max(1, len(filled) - 1)) for i, part in enumerate(filled)}
    for row, device in enumerate(maps):
        left = 0.0
        for part, n_bytes in device.parts.items():
            share, index = n_bytes / device.capacity_bytes * 100, present.index(part)
            axes.barh(
                row, share, left=left, height=0.7, linewidth=0.6,
                color=colours.get(part, "white"), edgecolor="black",
                hatch=_HATCHES[index % len(_HATCHES)] if part in filled else "",
            )  # fmt: skip
            left += share
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(
        range(len(maps)), [f"{m.name} {m.model}\n{gib(m.capacity_bytes)}" for m in maps]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, max(100.5, *(m.used_bytes / m.capacity_bytes * 100 + 0.5 for m in maps)))
    axes.set_xlabel("share of the device's memory (%)")
    handles = [
        Patch(
            facecolor=colours.get(part, "white"), edgecolor="black", linewidth=0.6,
            hatch=_HATCHES[i % len(_HATCHES)] if part in filled else "",
            label=f"{PARTS[part]}, {gib(sum(m.parts.get(part, 0) for m in maps))}",
        )
        for i, part in enumerate(present)
    ]  # fmt: skip
    _legend_below(axes, handles)
    return figure


def plot_types(plan: Plan, *, date: datetime.date | None = None) -> Figure:
    """Which matrix got which type, where: layers from left to right, one row per role.

    Lighter cells have more bits per weight. Hatches tell devices apart; the first one has none.

    Args:
        plan: What to draw.
        date: Date in the title; today by default.

    Raises:
        InputError: No matrix of a layer has a place.
    """
    tensors = [
        (Tensor(name=a.tensor, shape_ne=a.shape_ne, qtype=a.qtype), a.device)
        for a in plan.assignments
    ]
    cells = [
        (t.layer, t.role, t.qtype, device)
        for t, device in tensors
        if t.is_quantizable and t.layer is not None and device is not None
    ]
    if not cells:
        raise InputError(f"the plan for {plan.model} has no matrices in layers to draw")
    roles = list(dict.fromkeys(role for _, role, _, _ in cells))
    layers = sorted({layer for layer, _, _, _ in cells})
    types = sorted({name for _, _, name, _ in cells}, key=lambda name: (qtype(name).bpw, name))
    devices = [use.name for use in plan.devices if any(use.name == cell[3] for cell in cells)]
    shades = colormaps["cividis"]
    colours = {name: shades((i + 0.5) / len(types)) for i, name in enumerate(types)}
    hatches = dict(zip(devices, _HATCHES * 2, strict=False))
    figure, axes = _figure(
        plan.model, plan.machine.describe(), date,
        width=max(7.0, 2 + 0.16 * len(layers)), height=1.8 + 0.3 * len(roles),
    )  # fmt: skip
    for layer, role, name, device in cells:
        pixel = Patch(facecolor=colours[name], edgecolor=_ink(colours[name]), linewidth=0)
        axes.bar(
            layer, 0.9, bottom=roles.index(role) - 0.45, width=0.9, color=pixel.get_facecolor(),
            edgecolor=pixel.get_edgecolor(), linewidth=0, hatch=hatches[device],
        )  # fmt: skip
    axes.set_yticks(range(len(roles)), roles)
    axes.set_ylim(len(roles) - 0.4, -0.6)
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.set_xlabel("layer")
    handles = [
        Patch(facecolor=colours[name], edgecolor="black", linewidth=0.6,
              label=f"{name} ({qtype(name).bpw:.2f} bpw)")
        for name in types
    ] + [
        Patch(facecolor="white", edgecolor="black", linewidth=0.6, hatch=hatches[device],
              label=f"on {device}")
        for device in devices
    ]  # fmt: skip
    _legend_below(axes, handles)
    return figure


def plot_measured(
    pairs: Sequence[Comparison],
    *,
    unit: str,
    model: str,
    machine: str,
    date: datetime.date | None = None,
) -> Figure:
    """Predictions with their intervals against measurements; on the line they are equal.

    Args:
        pairs: What to compare; all numbers above 0.
        unit: Unit of the numbers, for the axes.
        model: What was run, for the title.
        machine: On what, for the title.
        date: Date in the title; today by default.

    Raises:
        InputError: There are no pairs, or a number is not above 0.
    """
    faults = [
        f"{p.label}: measured {p.measured:g}, predicted {p.predicted.low:g} to "
        f"{p.predicted.high:g} {unit}; all must be above 0 for logarithmic axes"
        for p in pairs
        if not (p.measured > 0 and p.predicted.low > 0)
    ]
    if faults or not pairs:
        raise InputError(faults or "there is nothing measured to compare with")
    figure, axes = _figure(model, machine, date, width=6, height=6)
    for inside, marker, colour in ((True, "o", _DARK), (False, "X", _LIGHT)):
        chosen = [p for p in pairs if (p.predicted.low <= p.measured <= p.predicted.high) == inside]
        if not chosen:
            continue
        expected = [p.predicted.expected for p in chosen]
        errors = (
            [p.predicted.expected - p.predicted.low for p in chosen],
            [p.predicted.high - p.predicted.expected for p in chosen],
        )
        where = "inside" if inside else "outside"
        axes.errorbar(
            [p.measured for p in chosen], expected, yerr=errors, fmt=marker, color=colour,
            ecolor="grey", markeredgecolor="black", capsize=2, linestyle="none",
            label=f"measured {where} the interval: {len(chosen)} of {len(pairs)}",
        )  # fmt: skip
        if len(pairs) <= 12:
            for pair in chosen:
                axes.annotate(
                    pair.label, (pair.measured, pair.predicted.expected), fontsize="x-small",
                    xytext=(5, -8), textcoords="offset points",
                )  # fmt: skip
    ends = [p.measured for p in pairs] + [
        x for p in pairs for x in (p.predicted.low, p.predicted.high)
    ]
    span = min(ends) / 1.15, max(ends) * 1.15
    axes.plot(span, span, "--", color="black", linewidth=1, label="equal")
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, aspect="equal")
    _plain_ticks(axes, "x")
    _plain_ticks(axes, "y")
    axes.set_xlabel(f"measured ({unit})")
    axes.set_ylabel(f"predicted ({unit}), with the interval")
    _legend_below(axes)
    return figure


def plot_speed(
    speed: SpeedPrediction,
    *,
    model: str,
    machine: Machine,
    date: datetime.date | None = None,
) -> Figure:
    """Decode and prefill speed over the depth of the context, with their 80 % intervals.

    Args:
        speed: The prediction, of a plan or of a configuration.
        model: Name of the model, for the title.
        machine: The machine that it is for.
        date: Date in the title; today by default.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    depths = [point.depth for point in speed.points]
    for axes, kind, marker in ((upper, "decode_tps", "o"), (lower, "prefill_tps", "s")):
        values: list[SpeedEstimate] = [getattr(point, kind) for point in speed.points]
        axes.fill_between(
            depths, [v.low for v in values], [v.high for v in values], color=_LIGHT, alpha=0.5,
            linewidth=0, label="80 % interval",
        )  # fmt: skip
        axes.plot(depths, [v.expected for v in values], f"{marker}-", color=_DARK, markersize=4,
                  label="expected")  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{kind.removesuffix('_tps')} tokens/s")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    lower.set_xlabel("tokens in the context")
    _title(upper, model, machine.describe(), date)
    return figure


def _best_of_each(baselines: Sequence[Baseline]) -> list[Baseline]:
    best: dict[str, Baseline] = {}
    for baseline in baselines:
        if baseline.fits and baseline.loss_nats > 0:
            best.setdefault(baseline.types, baseline)
    return list(best.values())


def _ink(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is seen on the colour (relative luminance of Rec. 709)."""
    red, green, blue, _ = colour
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"


def _figure(
    model: str,
    machine: str,
    date: datetime.date | None,
    *,
    width: float = 7.0,
    height: float = 4.5,
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _title(axes, model, machine, date)
    return figure, axes


def _title(axes: Axes, model: str, machine: str, date: datetime.date | None) -> None:
    day = (date or datetime.date.today()).isoformat()
    axes.set_title(f"{model}, {day}\n{machine}", fontsize="medium")


def _plain_ticks(axes: Axes, which: Literal["x", "y"]) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(axes: Axes, handles: Sequence[Patch] | None = None) -> None:
    found = handles or axes.get_legend_handles_labels()[0]
    figure = axes.get_figure(root=True)
    if figure is not None:
        columns = min(3, math.ceil(len(found) / 2))
        figure.legend(handles=list(found), loc="outside lower center", ncols=columns,
                      fontsize="small", frameon=False)  # fmt: skip
