"""Own measurements: a curve over types, then the groups that tell the most, on a budget."""

import csv
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import app
from quantplan.costs.evidence import Evidence, Measurement
from quantplan.costs.quality import LossTable, link
from quantplan.errors import InputError, LlamaCppError
from quantplan.formats.sensitivity_tables import (
    SensitivityTable,
    append_measurement,
    read_sensitivity_table,
)
from quantplan.inventory.catalog import read_catalog
from quantplan.measure.conditions import Conditions, check_conditions
from quantplan.measure.groups import Job, curve_jobs, groups, next_group
from quantplan.measure.halves import survival
from quantplan.measure.losses import measure_losses
from quantplan.measure.runs import Setup
from quantplan.quantize.weights import measure_weights
from quantplan.runtime import find_llama_cpp
from quantplan.runtime.sparse import write_sparse
from quantplan.schema import write_saved
from tests.support.llama_cpp import needs_llama_cpp, packaged_folder, portable_cpu
from tests.support.models import toy_moe

TEXT = "The quick brown fox jumps over the lazy dog; 1234 others see it. " * 4


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """A toy model, and the llama.cpp of the Python package, computing on any processor."""
    folder = tmp_path_factory.mktemp("measure")
    with pytest.MonkeyPatch.context() as patch:
        for key, text in portable_cpu(folder).items():
            patch.setenv(key, text)
        yield Setup(
            source=toy_moe(folder / "F16.gguf", "qwen3moe", layers=2),
            texts=(TEXT,),
            llama_cpp=find_llama_cpp(packaged_folder()),
            cache=folder / "cache",
            chunks=2,
            chunk_tokens=32,
            threads=1,
        )


def inventory(name: str) -> qp.Inventory:
    """A model of the catalog."""
    found = read_catalog(name)
    assert found is not None
    return found


@needs_llama_cpp
def test_measurements_become_evidence(setup: Setup, tmp_path: Path) -> None:
    """The curve comes first, then groups; the plan and explain use what the table holds."""
    table = tmp_path / "kld.csv"
    found = measure_losses(setup, table, runs=7)
    assert sorted(found.curve) == ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    klds = [found.curve[q] for q in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
    assert klds == sorted(klds, reverse=True)
    assert len(found.singles) == 2
    assert all(one.standard_error_nats > 0 for one in found.singles)
    own = qp.read_inventory(setup.source)
    before, after = LossTable(own), LossTable(own, found.evidence)
    (first, *_), *_ = (one.tensors for one in found.singles)
    tensor = own.by_name[first]
    assert after.own_ln_sd(tensor) < before.own_ln_sd(tensor) / 2
    assert "measured" in after.explain(tensor, "Q4_K").estimates[1].source
    evidence = qp.read_evidence(table)
    assert evidence is not None
    sibling = toy_moe(tmp_path / "glm.gguf", "glm4moe", layers=2)
    with pytest.raises(qp.InputError, match="is of another model than toy glm4moe"):
        LossTable(qp.read_inventory(sibling), evidence)
    types = {t.name: "Q3_K" for t in own.tensors if t.is_quantizable}
    assert after.model_kld_nats(types) == pytest.approx(found.curve["Q3_K"], rel=0.5)


@needs_llama_cpp
def test_texts_are_measured_side_by_side(setup: Setup, tmp_path: Path) -> None:
    """Each text has its own chunks in the table, and its mean counts alike."""
    other = "Numbers: 3 1 4 1 5 9 2 6; words are for other texts. " * 8
    found = measure_losses(
        replace(setup, texts=(TEXT, other), chunks=4), tmp_path / "kld.csv", runs=2
    )
    assert {len(chunks) for chunks in found.curve_by_chunk["Q4_K"]} == {4}
    means = [sum(chunks) / 4 for chunks in found.curve_by_chunk["Q4_K"]]
    assert found.curve["Q4_K"] == pytest.approx(sum(means) / 2, rel=1e-4)
    assert means[0] != pytest.approx(means[1], rel=0.01)
    fit_half = sum(sum(chunks[::2]) / 2 for chunks in found.curve_by_chunk["Q4_K"]) / 2
    assert found.evidence.curve["Q4_K"] == pytest.approx(fit_half)
    with pytest.raises(InputError, match="no text"):
        measure_losses(replace(setup, texts=()), tmp_path / "none.csv", runs=1)


@needs_llama_cpp
def test_short_texts_are_refused_before_the_first_run(setup: Setup, tmp_path: Path) -> None:
    """Every text that is too short is named before anything is quantized."""
    begun: list[Job] = []
    with pytest.raises(InputError, match="fewer than 2 chunks of 32 tokens") as caught:
        measure_losses(
            replace(setup, texts=(TEXT, "Too short.", "So is this.")), tmp_path / "kld.csv", runs=1,
            progress=lambda job, _: begun.append(job),
        )  # fmt: skip
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["text 2 of 3", "text 3 of 3"]
    assert not begun


@needs_llama_cpp
def test_no_run_begins_after_its_time(setup: Setup, tmp_path: Path) -> None:
    """Where the time is up before the first run, nothing is measured."""
    found = measure_losses(setup, tmp_path / "kld.csv", limit_s=1e-9)
    assert (found.curve, found.singles) == ({}, ())


@needs_llama_cpp
def test_goes_on_with_the_table(setup: Setup, tmp_path: Path) -> None:
    """A table is never overwritten, is gone on with, and takes no other text's results."""
    table = tmp_path / "kld.csv"
    measure_losses(setup, table, curve=True, runs=2)
    before = table.read_text()
    with pytest.raises(InputError, match="is there already"):
        measure_losses(setup, table, curve=True)
    with pytest.raises(InputError, match="was measured with text_sha256"):
        measure_losses(replace(setup, texts=(TEXT[1:],)), table, curve=True, resume=True)
    jobs: list[Job] = []
    measure_losses(
        setup, table, curve=True, resume=True,
        progress=lambda job, outcome: jobs.append(job) if outcome else None,
    )  # fmt: skip
    assert table.read_text().startswith(before)
    assert len(jobs) == 3
    assert len(read_sensitivity_table(table).curve) == 5


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_runs_in_any_executor(setup: Setup, tmp_path: Path, kind: str) -> None:
    """Two runs at a time, in threads or in other processes, give what one at a time gives."""
    pools: dict[str, type[Executor]] = {
        "threads": ThreadPoolExecutor,
        "processes": ProcessPoolExecutor,
    }
    with pools[kind](2) as pool:  # type: ignore[call-arg]
        found = measure_losses(
            setup, tmp_path / "many.csv", curve=True, runs=3, executor=pool, parallel=2
        )
    alone = measure_losses(setup, tmp_path / "alone.csv", curve=True, runs=3)
    assert found.curve == alone.curve


@needs_llama_cpp
def test_runs_on_a_cluster(setup: Setup, tmp_path: Path) -> None:
    """The executor of a dask cluster does the runs."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = measure_losses(
            setup, tmp_path / "kld.csv", curve=True, runs=2, parallel=2,
            executor=client.get_executor(),
        )  # fmt: skip
    assert len(found.curve) == 2


@needs_llama_cpp
def test_the_command_measures(setup: Setup, tmp_path: Path) -> None:
    """`quantplan measure` writes a table that `quantplan explain` reads."""
    text, table = tmp_path / "text", tmp_path / "kld.csv"
    text.write_text(TEXT * 12)
    done = CliRunner().invoke(
        app,
        ["measure", str(setup.source), str(table), "--text", str(text), "--runs", "1", "--curve",
         "--chunks", "2", "--llama-cpp", str(packaged_folder())],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "the KLD of 1 types" in " ".join(done.output.split())
    explained = CliRunner().invoke(
        app, ["explain", str(setup.source), "blk.0.attn_q.weight", "--measured", str(table)]
    )
    assert "scaled to the model's own curve" in explained.output


@needs_llama_cpp
def test_an_interrupt_ends_parallel_runs(setup: Setup, tmp_path: Path) -> None:
    """A real SIGINT, as Ctrl-C sends it, ends llama.cpp and the command, with a hint; no quantized
    file stays.
    """
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.write_text(TEXT * 6000)  # minutes of work
    words: list[object] = ["measure", setup.source, tmp_path / "kld.csv", "--text", text]
    words += ["--cache", cache, "--curve", "--chunks", 3000, "--parallel", 2]
    words += ["--llama-cpp", packaged_folder()]
    with subprocess.Popen(
        [sys.executable, "-m", "quantplan.cli", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore SIGINT, and what they start would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        deadline = time.monotonic() + 60
        while not list(cache.glob("*/*.npy")):  # of the first chunk
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try:
            _, printed = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume goes on" in printed
    assert not list(cache.glob("run-*"))


def test_a_budget_is_needed(setup: Setup, tmp_path: Path) -> None:
    """Without a budget, with too few chunks, or for a quantized model nothing is begun."""
    with pytest.raises(InputError, match="no budget"):
        measure_losses(setup, tmp_path / "kld.csv")
    with pytest.raises(InputError, match="0 runs"):
        measure_losses(setup, tmp_path / "kld.csv", runs=0)
    with pytest.raises(InputError, match=r"(?s)1 chunks; at least 2.*chunks of 4 tokens") as caught:
        measure_losses(replace(setup, chunks=1, chunk_tokens=4), tmp_path / "kld.csv")
    assert "no budget" in str(caught.value)
    quantized = qp.read_inventory(setup.source)
    quantized = quantized.with_qtypes(
        {t.name: "Q8_0" for t in quantized.tensors if t.is_quantizable}
    )
    write_sparse(quantized, tmp_path / "Q8_0.gguf")
    with pytest.raises(InputError, match="quantized already"):
        measure_losses(replace(setup, source=tmp_path / "Q8_0.gguf"), tmp_path / "kld.csv", runs=1)
    assert not list(tmp_path.glob("kld*"))


def test_the_curve_has_types_that_fit() -> None:
    """A curve is measured at types that fit the model's rows: of 256 weights, or of 32."""
    assert {job.qtype for job in curve_jobs(inventory("Qwen3-32B"))} == {
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"
    }  # fmt: skip
    narrow = inventory("gpt-oss-20b")  # rows of 2880
    assert {job.qtype for job in curve_jobs(narrow)} == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


def test_groups_cover_every_matrix_once() -> None:
    """Every tensor that can be quantized is in one group, of one role."""
    model = inventory("GLM-4.5-Air")
    names = [t.name for tensors in groups(model).values() for t in tensors]
    assert len(names) == len(set(names))
    assert set(names) == set(LossTable(model)._prior_s)
    assert all(len({t.role for t in tensors}) == 1 for tensors in groups(model).values())


def test_the_next_group_removes_the_most_uncertainty() -> None:
    """Groups come in the order of their loss times what is not known of it, and none twice."""
    model = inventory("Qwen3-4B-Instruct-2507")
    evidence, seen, shares = Evidence(), [], []
    table = LossTable(model)
    total = sum(table.loss_nats(t, "Q4_K") for t in model.tensors if t.is_quantizable)
    for _ in range(6):
        job = next_group(model, evidence, ())
        assert job is not None
        seen.append(job.tensors)
        losses = sum(table.loss_nats(model.by_name[n], "Q4_K") for n in job.tensors)
        shares.append(losses / total)
        kld = sum(table.loss_nats(model.by_name[n], job.qtype) for n in job.tensors)
        evidence = Evidence(singles=(*evidence.singles, Measurement(job.tensors, job.qtype, kld)))
    assert len(set(seen)) == 6
    assert shares == sorted(shares, reverse=True)
    every = Evidence(
        singles=tuple(
            Measurement(tuple(t.name for t in tensors), "Q4_K", 0.01)
            for tensors in groups(model).values()
        )
    )
    assert next_group(model, every, ()) is None


def test_a_table_keeps_what_was_appended(tmp_path: Path) -> None:
    """Groups over layers, standard errors, chunks and the curve come back as they were written."""
    path = tmp_path / "kld.csv"
    chunks = ((0.01, 0.014), (0.012, 0.013, 0.0125))
    group = Measurement(
        ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight"), "Q3_K", 0.0123, 0.0004, chunks
    )
    append_measurement(path, Measurement((), "Q4_K", 0.05, 0.001, ((0.04, 0.06),)), "all")
    append_measurement(path, group, "ffn_up 0-1")
    found = read_sensitivity_table(path)
    (single,) = found.singles
    assert (single.tensors, single.qtype) == (group.tensors, group.qtype)
    assert (single.kld_nats, single.standard_error_nats) == pytest.approx((0.0123, 0.0004))
    assert single.by_chunk == chunks
    assert found.curve == {"Q4_K": pytest.approx(0.05)}
    assert found.curve_by_chunk == {"Q4_K": ((0.04, 0.06),)}
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == 3


def test_a_noisy_measurement_counts_less() -> None:
    """The standard error of a measurement is part of its uncertainty."""
    model = inventory("Qwen3-4B-Instruct-2507")
    name = "blk.3.attn_v.weight"
    sds = [
        LossTable(model, Evidence(singles=(Measurement((name,), "Q4_K", 0.01, error),))).own_ln_sd(
            model.by_name[name]
        )
        for error in (0.0, 0.001, 0.01)
    ]
    assert sds == sorted(sds)
    assert sds[0] < 0.5 * sds[2]


def test_survival_is_the_share_that_both_halves_show() -> None:
    """What two halves show alike survives whole, what they do not show alike does not."""
    model = inventory("Qwen3-4B-Instruct-2507")
    table = LossTable(model)

    def table_of(deviations: Iterable[tuple[float, float]]) -> SensitivityTable:
        """Groups whose halves are so much, in ln, above what the prior says."""
        singles = []
        for tensors, halves in zip(groups(model).values(), deviations, strict=False):
            names = tuple(t.name for t in tensors)
            loss = sum(table.loss_nats(model.by_name[n], "Q4_K") for n in names)
            klds = tuple(link().kld(loss * math.exp(d)) for d in halves)
            singles.append(Measurement(names, "Q4_K", sum(klds) / 2, by_chunk=(2 * klds,)))
        return SensitivityTable(singles=tuple(singles), curve={}, n_unmeasured=0)

    same = [(d, d + 0.1) for d in (0.5, -0.3, 0.2, -0.4)]
    assert survival(model, table_of(same)) == pytest.approx(1)
    swapped = [(d, -d) for d, _ in same]
    assert survival(model, table_of(swapped)) == pytest.approx(-1)
    half = [(0.5, 0.5), (-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5)]
    assert survival(model, table_of(half)) == pytest.approx(0)
    assert survival(model, table_of(same[:2])) is None


def test_what_a_source_has_quantized_is_not_measured() -> None:
    """Matrices that are quantized in the source stay, in the curve as in groups of tensors."""
    model = inventory("GLM-4.5-Air")
    kept = {t.name: "Q8_0" for t in model.tensors if t.role in {"token_embd", "attn_k"}}
    mixed = model.with_qtypes(kept)
    for job in curve_jobs(mixed):
        assert kept.keys().isdisjoint(job.tensors)
    assert {t.role for t in model.tensors} > {"attn_k", "token_embd"}
    assert not {t.role for group in groups(mixed).values() for t in group} & {
        "attn_k",
        "token_embd",
    }
    found = next_group(mixed, Evidence(), [])
    assert found is not None
    assert kept.keys().isdisjoint(found.tensors)


@pytest.mark.parametrize("matrix", ["0" * 64, None])
def test_evidence_with_and_without_an_importance_matrix_is_told_apart(
    setup: Setup, tmp_path: Path, matrix: str | None
) -> None:
    """The plan notes KLDs with a matrix beside errors on weights without one, and no like pair."""
    table, weights = tmp_path / "kld.csv", tmp_path / "errors.json"
    check_conditions(Conditions.of(setup).model_copy(update={"imatrix_sha256": matrix}), table)
    append_measurement(table, Measurement((), "Q4_K", 0.05), "all")
    write_saved(measure_weights(setup.source, ["Q4_K"]), weights)
    made = qp.plan(
        qp.read_inventory(setup.source),
        qp.Machine.parse("64MiB@20GB/s"),
        qp.Workload(context=256),
        evidence=qp.read_evidence(table, weights),
        baselines=False,
    )
    said = "KLDs with an importance matrix beside errors without one"
    assert any(said in note for note in made.notes) == (matrix is not None)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    """Where the table cannot be written nothing is measured, and the message says why."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["measure", "model.gguf", str(tmp_path), "--text", str(text), "--runs", "1"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code != 0
    assert isinstance(found.exception, InputError)
    assert "it is a directory; name a file" in str(found.exception)


class _FailsOnce(Executor):
    """Works at once; the second run fails, as where a host of a cluster is lost."""

    def __init__(self) -> None:
        self._n_begun = 0

    def submit(self, function: Any, /, *arguments: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._n_begun += 1
        if self._n_begun == 3:  # the texts are checked first
            future.set_exception(LlamaCppError("the host is gone"))
        else:
            future.set_result(function(*arguments, **more))
        return future


@needs_llama_cpp
def test_runs_beside_one_that_failed_are_kept(setup: Setup, tmp_path: Path) -> None:
    """Of runs at the same time, those that ended well are in the table when another has failed."""
    table = tmp_path / "kld.csv"
    with pytest.raises(LlamaCppError, match="the host is gone"):
        measure_losses(setup, table, runs=3, executor=_FailsOnce(), parallel=2)
    assert len(read_sensitivity_table(table).curve) == 2
