"""Values look well in notebooks, and their tables become data frames."""

import sys
from html.parser import HTMLParser
from typing import Any

import pytest

import quantplan as qp
from quantplan.display import Table, html_card, html_table
from quantplan.errors import MissingPackageError

EMPTY = {"br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Checks that tags are closed in order, and keeps the cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        if tag not in EMPTY:
            self.open.append(tag)
        self.rows += tag == "tr"
        if tag in ("td", "dd"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "dd"):
            self.cells[-1] += data


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def plan() -> qp.Plan:
    inventory = qp.read_inventory("Llama-3.1-8B-Instruct")
    return qp.plan(inventory, qp.Machine.parse("8GiB + 16GiB@60GB/s"))


def test_every_value_that_people_look_at_has_a_sound_rich_form(plan: qp.Plan) -> None:
    """Well-formed HTML that holds the figures which the text has."""
    inventory = qp.read_inventory(plan.model)
    predicted = qp.predict(inventory, plan, plan.machine)
    traced = qp.frontier(inventory, plan.machine, points=3)
    values = (plan, plan.recipe, plan.baseline_table, plan.machine, inventory, predicted, traced)
    assert list(traced.to_frame()["loss_nats"]) == [p.loss_nats for p in traced.points]
    for value in values:
        found = outline(value._repr_html_())
        assert found.cells, type(value)
    cells = outline(plan._repr_html_()).cells
    assert f"{plan.predicted.loss_nats:.4f} nats/token" in cells
    assert plan.llama_server_command("model.gguf") in cells
    assert f"{plan.devices[0].weights_bytes / 2**30:.4g}" in cells


def test_names_are_text() -> None:
    """Whatever a file calls its tensors, a notebook shows it and does not run it."""
    for html in (
        html_table("<b>", ["<i>"], [["<script>"]]),
        html_card("<b>", {"<i>": "<script>"}, notes=["<u>"]),
    ):
        assert not any(tag in html for tag in ("<b>", "<i>", "<u>", "<script>"))
        assert "<script>" in outline(html).cells


def test_frames_have_a_row_for_each_tensor(plan: qp.Plan) -> None:
    """What a frame sums up is what the plan says."""
    frame = plan.to_frame()
    assert len(frame) == len(plan.assignments)
    assert list(frame["qtype"]) == [a.qtype for a in plan.assignments]
    on_gpu = frame[frame["device"] == "GPU0"]["n_bytes"].sum()
    assert on_gpu == plan.devices[0].weights_bytes
    assert plan.recipe.to_frame().equals(frame)
    inventory = qp.read_inventory(plan.model)
    assert inventory.to_frame()["n_weights"].sum() == inventory.n_weights
    assert list(plan.machine.to_frame()["device"]) == ["GPU0", "CPU"]
    assert len(plan.baseline_table.to_frame()) == len(plan.baselines)


def test_polars_serves_where_pandas_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either library will do, and with neither the error says what to install."""

    class FakePolars:
        @staticmethod
        def DataFrame(columns: Any) -> Any:  # noqa: N802 (its name)
            return ("polars", columns)

    table = Table("t", {"a": (1, 2)})
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "polars", FakePolars)
    assert table.to_frame() == ("polars", {"a": [1, 2]})
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(MissingPackageError, match=r"quantplan\[frames\]"):
        table.to_frame()
