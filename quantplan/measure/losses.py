"""Measures a model's own losses with the real llama.cpp: a few runs that tell the most.

Each run quantizes the model with some tensors at a low type, measures the KLD from the source on
the person's own text, and removes the file. First comes the curve over types, with the whole model
at each; then groups of tensors, one at a time, in the order of the uncertainty that they remove.
What was measured is evidence for `quantplan.plan`.
"""

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from quantplan.costs.evidence import Evidence, Measurement
from quantplan.errors import InputError
from quantplan.formats.sensitivity_tables import (
    SensitivityTable,
    append_measurement,
    read_sensitivity_table,
)
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.measure.conditions import Conditions, check_conditions
from quantplan.measure.groups import WHOLE, Job, curve_jobs, measurable, next_group
from quantplan.measure.runs import Outcome, Setup, run_job, text_faults
from quantplan.measure.threads import EndingThreads
from quantplan.runtime.perplexity import chunk_faults

_EMPTY = SensitivityTable(singles=(), curve={}, n_unmeasured=0)

Progress = Callable[[Job, Outcome | None], None]
"""Is called when a run begins, without an outcome, and when it ends."""


def measure_losses(
    setup: Setup,
    table: Path,
    *,
    curve: bool = False,
    runs: int | None = None,
    limit_s: float | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    parallel: int = 1,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Measures the curve over types, then groups of tensors, until the budget is spent.

    Each result is in the table as soon as it is there, so a run that is ended loses at most the
    present jobs.

    Args:
        setup: The model, the text and what runs it.
        table: Where to write the KLDs (``tensor,qtype,kld,standard_error,group,chunks``); beside
            it goes a JSON file with what they were measured with.
        curve: Measure the curve over types only.
        runs: How many runs at most, those of an earlier call not counted.
        limit_s: No run begins after so many seconds.
        resume: Go on with a table that is there.
        executor: Where runs go, such as a ``ThreadPoolExecutor``, a ``ProcessPoolExecutor`` or that
            of a dask.distributed client; it must see the same files. By default threads of this
            process; what they run ends with this call, also where that is interrupted.
        parallel: Runs at the same time.
        progress: Is called in this thread when a run begins and when it ends.

    Returns:
        All that is in the table.

    Raises:
        InputError: There is no budget or no text, a text is too short, chunks are too few or too
            short, the table exists or was measured differently, or the source is quantized already.
        SourceError: The source or the table cannot be read.
        LlamaCppError: llama.cpp failed; what was measured before is kept.
        QuantizeError: A quantized file could not be written.
    """
    inventory = read_inventory(setup.source)
    _check(
        setup, inventory, table,
        curve=curve, runs=runs, limit_s=limit_s, resume=resume, parallel=parallel,
    )  # fmt: skip
    check_conditions(Conditions.of(setup), table)
    campaign = _Campaign(inventory, table, curve)
    budget = _Budget(runs, math.inf if limit_s is None else time.monotonic() + limit_s)
    with nullcontext(executor) if executor else EndingThreads(parallel) as pool:
        # A run would come to the last text only after hours on the others.
        if faults := pool.submit(text_faults, setup).result():
            raise InputError(faults)
        _run(campaign, budget, lambda job: pool.submit(run_job, setup, job), parallel, progress)
    return read_sensitivity_table(table) if table.exists() else _EMPTY


class _Campaign:
    """What was measured, and what to measure next."""

    def __init__(self, inventory: Inventory, table: Path, curve_only: bool) -> None:
        self._inventory, self._table, self._curve_only = inventory, table, curve_only
        self._curve: dict[str, float] = {}
        self._singles: list[Measurement] = []
        if table.exists():
            found = read_sensitivity_table(table)
            self._curve, self._singles = dict(found.curve), list(found.singles)

    def next(self, pending: Iterable[Job]) -> Job | None:
        """The next job; None where nothing is left."""
        begun = list(pending)
        for job in curve_jobs(self._inventory):
            if job.qtype not in self._curve and job not in begun:
                return job
        if self._curve_only:
            return None
        evidence = Evidence(curve=self._curve, singles=tuple(self._singles))
        return next_group(self._inventory, evidence, begun)

    def add(self, outcome: Outcome) -> None:
        """Writes down what a run gave."""
        job = outcome.job
        found = outcome.measurement
        append_measurement(self._table, found, job.name)
        if job.name == WHOLE:
            self._curve[job.qtype] = outcome.kld_nats
        else:
            self._singles.append(found)


@dataclass(frozen=True)
class _Budget:
    """At most so many runs, and none that begins after a time of `time.monotonic`."""

    runs: int | None
    ends_s: float

    def allows(self, n_begun: int) -> bool:
        """Whether another run may begin."""
        return (self.runs is None or n_begun < self.runs) and time.monotonic() < self.ends_s


def _run(
    campaign: _Campaign,
    budget: _Budget,
    submit: Callable[[Job], Future[Outcome]],
    parallel: int,
    progress: Progress | None,
) -> None:
    """Runs jobs, so many at a time, until the budget is spent or nothing is left to measure."""
    pending: dict[Future[Outcome], Job] = {}
    n_begun, width = 0, 1  # the first run leaves the base's log probabilities for the others
    try:
        while True:
            while len(pending) < width and budget.allows(n_begun):
                job = campaign.next(pending.values())
                if job is None:
                    break
                if progress is not None:
                    progress(job, None)
                pending[submit(job)] = job
                n_begun += 1
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                del pending[future]
                campaign.add(outcome)
                width = parallel
                if progress is not None:
                    progress(outcome.job, outcome)
    finally:
        # Beside a run that failed, others may have ended well.
        for future in pending:
            if not future.cancel() and future.done() and future.exception() is None:
                campaign.add(future.result())


def _check(
    setup: Setup,
    inventory: Inventory,
    table: Path,
    *,
    curve: bool,
    runs: int | None,
    limit_s: float | None,
    resume: bool,
    parallel: int,
) -> None:
    faults = chunk_faults(setup.chunks, setup.chunk_tokens)
    if not setup.texts:
        faults.append("no text to measure on")
    if not curve and runs is None and limit_s is None:
        faults.append("no budget: say how many runs or minutes, or measure the curve only")
    if runs is not None and runs < 1:
        faults.append(f"{runs} runs; there must be at least 1")
    if limit_s is not None and not (math.isfinite(limit_s) and limit_s > 0):
        faults.append(f"a limit of {limit_s} s; it must be above 0")
    if parallel < 1:
        faults.append(f"{parallel} runs at the same time; there must be at least 1")
    if not measurable(inventory):
        faults.append(
            f"{inventory.name} is quantized already: give the F32, F16 or BF16 model, whose losses "
            "are to be measured"
        )
    if table.exists() and not resume:
        faults.append(f"{table} is there already: go on with it (--resume), or name another file")
    if faults:
        raise InputError(faults)
