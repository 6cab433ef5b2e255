"""Halves and resamples of measured chunks: what a plan owes to the text that chose it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import app
from quantplan.costs.evidence import Evidence, Measurement
from quantplan.costs.quality import LossTable, kld_nats
from quantplan.costs.resampling import on_half, resamples, standard_error_nats
from quantplan.formats.sensitivity_tables import (
    SensitivityTable,
    append_measurement,
    read_sensitivity_table,
)
from quantplan.measure.groups import groups
from tests.support.models import toy_moe

MODEL = qp.read_inventory("Qwen3.5-0.8B")
PRIOR = LossTable(MODEL)
MACHINE = qp.Machine.parse("480MiB@50GB/s")
WORK = qp.Workload(context=512, ubatch=128)


def measured(luck: float = 0.0, n_chunks: int = 16, seed: int = 0) -> Evidence:
    """Every group of tensors, with chunks that scatter by a tenth around a true loss.

    Args:
        luck: By so much, in ln, the fit half shows every other group lower than the held-out half
            does, and the others higher.
        n_chunks: Of the text.
        seed: Of the scatter.
    """
    rng = np.random.default_rng(seed)
    is_fit = np.arange(n_chunks) % 2 == 0
    singles = []
    for i, tensors in enumerate(groups(MODEL).values()):
        true = kld_nats(sum(PRIOR.loss_nats(t, "Q4_K") for t in tensors))
        shift = luck * (1 if i % 2 else -1) * np.where(is_fit, 1, -1)
        chunks = tuple((true * np.exp(shift + 0.1 * rng.standard_normal(n_chunks))).tolist())
        names = tuple(t.name for t in tensors)
        singles.append(Measurement(names, "Q4_K", float(np.mean(chunks)), 0.0, (chunks,)))
    return SensitivityTable(tuple(singles), {}, 0).evidence


def planned(evidence: Evidence, resamples: int = 0) -> qp.Plan:
    """A plan without floors, limited by memory alone."""
    return qp.plan(MODEL, MACHINE, WORK, policy="free", evidence=evidence, resamples=resamples)


def test_a_standard_error_is_that_of_the_resamples() -> None:
    """The scatter of resamples is the standard error of a stratified mean, few chunks or many."""
    rng = np.random.default_rng(1)
    for sizes in ((4, 4), (16, 8), (40, 6, 20)):
        chunks = tuple(tuple(rng.lognormal(-3, 0.3, n).tolist()) for n in sizes)
        whole = Evidence(singles=(Measurement(("blk.0.attn_q.weight",), "Q4_K", 0.1, 0, chunks),))
        drawn = [one.singles[0].kld_nats for one in resamples(whole, "fit", 4000)]
        fit = tuple(text[::2] for text in chunks)
        assert np.std(drawn) == pytest.approx(standard_error_nats(fit), rel=0.06)
        assert on_half(whole, "fit").singles[0].standard_error_nats == pytest.approx(
            standard_error_nats(fit), rel=0.1
        )


def test_measurements_are_resampled_together() -> None:
    """Two measurements on the same chunks are resampled with the same chunks."""
    chunks = tuple(np.random.default_rng(2).lognormal(-3, 0.3, 12).tolist())
    twice = tuple(2 * n for n in chunks)
    evidence = Evidence(
        curve={"Q4_K": 0.1}, curve_by_chunk={"Q4_K": (twice,)},
        singles=(Measurement(("blk.0.attn_q.weight",), "Q4_K", 0.1, 0, (chunks,)),),
    )  # fmt: skip
    for half in ("fit", "held out"):
        for one in resamples(evidence, half, 20):
            assert one.curve["Q4_K"] == pytest.approx(2 * one.singles[0].kld_nats)
    means = {one.curve["Q4_K"] for one in resamples(evidence, "fit", 20)}
    assert len(means) > 15


def test_texts_count_alike_however_long() -> None:
    """A text of many chunks weighs as much as one of few."""
    long, short = (0.1,) * 40, (0.3,) * 4
    one = Measurement(("blk.0.attn_q.weight",), "Q4_K", 0.1, 0, (long, short))
    assert on_half(Evidence(singles=(one,)), "fit").singles[0].kld_nats == pytest.approx(0.2)


def test_few_chunks_are_not_halved() -> None:
    """Fewer than four chunks count whole, with the standard error that was written down."""
    one = Measurement(("blk.0.attn_q.weight",), "Q4_K", 0.1, 0.01, ((0.1, 0.2, 0.3),))
    evidence = Evidence(singles=(one,))
    assert not evidence.holds_out
    assert on_half(evidence, "fit").singles == (one,)
    assert list(resamples(evidence, "fit", 5)) == []


def test_noise_of_the_text_is_part_of_the_uncertainty() -> None:
    """A noisier text leaves sensitivities and the height of the curve less sure."""
    table = [LossTable(MODEL, evidence) for evidence in (measured(), measured(n_chunks=4))]
    tensor = MODEL.by_name["blk.4.ffn_down.weight"]
    assert table[0].own_ln_sd(tensor) < table[1].own_ln_sd(tensor)
    rng = np.random.default_rng(3)
    sds = []
    for scatter in (0.05, 0.5):
        chunks = tuple(rng.lognormal(-3, scatter, 16).tolist())
        found = SensitivityTable((), {"Q4_K": float(np.mean(chunks))}, 0, {"Q4_K": (chunks,)})
        sds.append(LossTable(MODEL, found.evidence).ln_sd(tensor, "Q4_K"))
    assert sds[0] < sds[1]


def test_a_gain_that_both_halves_show_survives() -> None:
    """Where both halves say the same, the gain remains whole; the plan says so."""
    plan = planned(measured())
    assert plan.held_out is not None
    assert plan.held_out.share == pytest.approx(1, abs=0.15)
    assert plan.held_out.low_nats <= plan.held_out.held_out_nats <= plan.held_out.high_nats
    assert "on the held-out half of the text" in plan.summary()
    assert f"remains ({plan.held_out.low_nats / plan.held_out.gain_nats:.0%} to" in plan.summary()


def test_a_gain_that_was_luck_does_not_survive() -> None:
    """What only the half that chose the types shows is gone on the other half."""
    kept, lost = planned(measured()).held_out, planned(measured(luck=0.8)).held_out
    assert kept is not None
    assert lost is not None
    assert lost.share < 0.6 < kept.share


def test_published_tables_say_nothing_of_halves() -> None:
    """Without chunks there is no held-out half, and the plan does not speak of one."""
    bare = tuple(replace(one, by_chunk=()) for one in measured().singles)
    plan = planned(Evidence(singles=bare), resamples=3)
    assert plan.held_out is None
    assert plan.type_changes is None
    assert "held-out" not in plan.summary()


def test_a_robust_plan_counts_what_resamples_scatter_by() -> None:
    """Against the upper end a group whose chunks scatter costs more than one whose do not."""
    quiet, loud = "blk.4.ffn_up.weight", "blk.4.ffn_down.weight"
    rng = np.random.default_rng(4)
    singles = []
    for name, scatter in ((quiet, 0.02), (loud, 0.6)):
        true = kld_nats(PRIOR.loss_nats(MODEL.by_name[name], "Q4_K"))
        chunks = tuple((true * rng.lognormal(0, scatter, 16)).tolist())
        singles.append(Measurement((name,), "Q4_K", float(np.mean(chunks)), 0, (chunks,)))
    evidence = on_half(Evidence(singles=tuple(singles)), "fit")
    median, upper = (LossTable(MODEL, replace(evidence, upper_sds=sds)) for sds in (0.0, 1.28))

    def factor(name: str) -> float:
        tensor = MODEL.by_name[name]
        return upper.loss_nats(tensor, "Q4_K") / median.loss_nats(tensor, "Q4_K")

    assert 1 < factor(quiet) < 1.2
    assert factor(loud) > factor(quiet) + 0.1
    # What was not measured keeps the interval of the model.
    assert factor("blk.4.ffn_gate.weight") > 1.25


def test_a_robust_plan_says_what_it_expects_too() -> None:
    """The expected loss stands beside the upper end, and plain answers show what they expect."""
    plan = planned(replace(measured(), upper_sds=1.28))
    upper = plan.predicted.upper_loss_nats
    assert upper is not None
    types = {a.tensor: a.qtype for a in plan.assignments}
    expected = LossTable(MODEL, measured()).model_kld_nats(types)
    assert plan.predicted.loss_nats == pytest.approx(expected)
    assert upper > 1.02 * expected
    assert f"{expected:.4f} (upper end {upper:.4f})" in plan.summary()
    plain = next(b for b in plan.baselines if b.types == "Q4_K_M")
    mix = LossTable(MODEL, measured()).model_kld_nats(qp.stock_mix(MODEL, "Q4_K_M"))
    assert plain.loss_nats == pytest.approx(mix)


def test_noisier_texts_make_plans_that_cost_more() -> None:
    """Plans for resamples differ, which is counted, and cost the more the fewer chunks there are.

    How many types differ says less: like tensors change places for next to nothing.
    """
    few, many = (planned(measured(n_chunks=n, seed=5), resamples=4).type_changes for n in (4, 64))
    assert few is not None
    assert many is not None
    for found in (few, many):
        assert 0 < found.n_changed <= found.n_unsettled <= found.n_decisions
    assert 0 <= many.excess < few.excess < 0.2


def said_of(folder: Path, n_chunks: int) -> str:
    """What `plan --measured --robust` says with a table of so many chunks; of none where 0."""
    source = toy_moe(folder / "F16.gguf", "qwen3moe", layers=4)
    model = qp.read_inventory(source)
    prior, rng = LossTable(model), np.random.default_rng(6)
    path = folder / "kld.csv"
    for name, tensors in groups(model).items():
        true = kld_nats(sum(prior.loss_nats(t, "Q4_K") for t in tensors))
        chunks = tuple((true * rng.lognormal(0, 0.2, n_chunks)).tolist())
        names = tuple(t.name for t in tensors)
        found = Measurement(names, "Q4_K", float(np.mean(chunks or true)), 0.001)
        append_measurement(path, replace(found, by_chunk=(chunks,) if chunks else ()), name)
    assert read_sensitivity_table(path).evidence.holds_out == (n_chunks > 0)
    command = ["plan", str(source), "--machine", "12MiB@20GB/s", "--policy", "free"]
    command += ["--ctx", "256", "--ubatch", "32", "--measured", str(path), "--robust"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_command_reports_on_the_held_out_half(tmp_path: Path) -> None:
    """`quantplan plan --measured` and `--robust` say what hangs on the text."""
    said = said_of(tmp_path, 12)
    assert "with half of the chunks held out" in said
    assert "on the held-out half of the text" in said
    assert "change between resamples of the text" in said
    assert "upper end" in said


def test_the_command_does_not_speak_of_chunks_that_are_not_there(tmp_path: Path) -> None:
    """With a table of means alone nothing is said of halves or resamples, only of the upper end."""
    said = said_of(tmp_path, 0)
    assert "measurements of tensors" in said
    assert "upper end" in said
    assert "held out" not in said
    assert "held-out" not in said
    assert "resamples" not in said
