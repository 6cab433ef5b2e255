"""Pictures say what the plan says, and look alike in greyscale and in colour."""

import datetime
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import quantplan as qp
from quantplan.costs.speed import SpeedEstimate
from quantplan.plans.frontier import Frontier, FrontierPoint
from quantplan.plots import (
    Comparison,
    plot_frontier,
    plot_measured,
    plot_memory,
    plot_speed,
    plot_types,
    save_figure,
)
from quantplan.usage import memory_maps

DAY = datetime.date(2026, 11, 23)


@pytest.fixture(scope="module")
def plan() -> qp.Plan:
    inventory = qp.read_inventory("Qwen3-30B-A3B")
    machine = qp.Machine.parse("2x 8GiB + 32GiB@60GB/s")
    return qp.plan(inventory, machine, qp.Workload(context=8192), min_decode_tps=10)


def frontier_of(plan: qp.Plan) -> Frontier:
    points = tuple(
        FrontierPoint(
            limit=tps, loss_nats=loss, decode_tps=tps, file_bytes=plan.predicted.file_bytes,
            context=8192, status="within_gap", gap=0.005,
        )
        for tps, loss in ((10.0, 0.01), (20.0, 0.03), (30.0, 0.1))
    )  # fmt: skip
    return Frontier(model=plan.model, over="speed", points=points)


def pictures(plan: qp.Plan) -> dict[str, Figure]:
    pairs = [Comparison("a", SpeedEstimate(low=8, expected=10, high=12), 11)]
    return {
        "frontier": plot_frontier(
            frontier_of(plan), plan.machine, plan.baselines, plan=plan, date=DAY
        ),
        "memory": plot_memory(plan, date=DAY),
        "types": plot_types(plan, date=DAY),
        "speed": plot_speed(plan.speed, model=plan.model, machine=plan.machine, date=DAY),
        "measured": plot_measured(
            pairs, unit="tokens/s", model=plan.model, machine=plan.machine.describe(), date=DAY
        ),
    }


def test_every_picture_names_model_machine_and_date_and_can_be_saved(
    plan: qp.Plan, tmp_path: Path
) -> None:
    """A picture that is passed on says by itself what it is of."""
    for name, figure in pictures(plan).items():
        title = figure.axes[0].get_title()
        assert plan.model in title
        assert "2026-11-23" in title
        assert plan.machine.describe() in title
        save_figure(figure, tmp_path / f"{name}.svg")
        save_figure(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_other_formats_are_refused(plan: qp.Plan, tmp_path: Path) -> None:
    """A suffix that promises another format is an error that names those there are."""
    with pytest.raises(qp.InputError, match=r"\.svg or \.png"):
        save_figure(plot_memory(plan), tmp_path / "plan.jpeg")


def test_memory_maps_add_up_to_the_devices(plan: qp.Plan) -> None:
    """Every byte of a device is in one part of its map, and weights are those of the plan."""
    for found, use in zip(memory_maps(plan.devices, plan.assignments), plan.devices, strict=True):
        assert sum(found.parts.values()) == use.capacity_bytes
        weights = found.used_bytes - found.parts.get("kv", 0) - found.parts["compute"]
        assert weights == use.weights_bytes + use.padding_bytes
        # What is not a weight of the plan is padding: far below 1 %.
        assert found.parts.get("other", 0) < 0.02 * use.capacity_bytes


def test_the_copy_of_a_tied_output_matrix_is_the_output() -> None:
    """A model without an output matrix still shows what its output takes on the GPU."""
    inventory = qp.read_inventory("Qwen3-4B-Instruct-2507")
    assert inventory.has_tied_output
    found = qp.plan(inventory, qp.Machine.parse("8GiB + 16GiB@60GB/s"), baselines=False)
    embedding = next(t for t in found.recipe.inventory_tensors if t.name == "token_embd.weight")
    gpu = memory_maps(found.devices, found.assignments)[0]
    assert gpu.parts["output"] == embedding.n_bytes


def test_the_heat_map_has_a_cell_for_every_loaded_matrix_of_the_layers(plan: qp.Plan) -> None:
    """Nothing is left out or drawn twice, and a cell on another device is hatched otherwise."""
    axes = plot_types(plan).axes[0]
    expected = {
        (tensor.layer, tensor.role)
        for tensor, entry in zip(plan.recipe.inventory_tensors, plan.assignments, strict=True)
        if tensor.is_quantizable and tensor.layer is not None and entry.device
    }
    roles = [label.get_text() for label in axes.get_yticklabels()]
    drawn = [
        (round(p.get_x() + p.get_width() / 2), roles[round(p.get_y() + p.get_height() / 2)])
        for p in axes.patches
        if isinstance(p, Rectangle)
    ]
    assert sorted(drawn) == sorted(expected)
    devices = {entry.device for entry in plan.assignments if entry.device}
    assert len({patch.get_hatch() for patch in axes.patches}) == len(devices)


def test_lightness_rises_along_the_colour_map_also_without_colour() -> None:
    """The greyscale of the colours has the order of what they stand for, in even steps."""
    shades = np.array([colormaps["cividis"](x)[:3] for x in np.linspace(0, 1, 12)])
    grey = shades @ [0.2126, 0.7152, 0.0722]
    assert all(b - a > 0.03 for a, b in pairwise(grey))


def test_the_plan_and_the_best_plain_answers_are_marked_on_the_frontier(plan: qp.Plan) -> None:
    """The legend names the frontier, the plan, and plain answers with their placement."""
    figure = plot_frontier(frontier_of(plan), plan.machine, plan.baselines, plan=plan)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    fitting = next(b for b in plan.baselines if b.fits)
    assert "frontier" in said
    assert "this plan" in said
    assert fitting.describe() in said


def test_measurements_outside_their_interval_are_told_apart() -> None:
    """Hits and misses have markers of their own, and the legend counts them."""
    pairs = [
        Comparison("hit", SpeedEstimate(low=8, expected=10, high=12), 11),
        Comparison("miss", SpeedEstimate(low=8, expected=10, high=12), 20),
    ]
    figure = plot_measured(pairs, unit="tokens/s", model="m", machine="x")
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "measured inside the interval: 1 of 2" in said
    assert "measured outside the interval: 1 of 2" in said


def test_numbers_that_have_no_logarithm_are_refused() -> None:
    """A measurement of nothing is named instead of drawn at the edge."""
    pair = Comparison("broken run", SpeedEstimate(low=8, expected=10, high=12), 0)
    with pytest.raises(qp.InputError, match="broken run: measured 0"):
        plot_measured([pair], unit="tokens/s", model="m", machine="x")


def test_without_matplotlib_the_error_says_what_to_install() -> None:
    """Who lacks the extra reads its name, not a traceback of an import."""
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from quantplan.errors import MissingPackageError\n"
        "try:\n    import quantplan.plots\n"
        "except MissingPackageError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "pip install 'quantplan[plots]'" in done.stdout, done.stderr
