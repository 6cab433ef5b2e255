"""Measures a model's own losses with the real llama.cpp: a few runs that tell the most.

Each run quantizes the model with some tensors at a low type, measures the KLD from the source on
the person's own text, and removes the file. First comes the curve over types, with the whole model
at each; then groups of tensors, one at a time, in the order of the uncertainty that they remove.
What was measured is evidence for `quantplan.plan`.
"""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from quantplan.costs.evidence import ByChunk, Evidence, Measurement
from quantplan.costs.families import quantized
from quantplan.costs.resampling import mean_nats, standard_error_nats
from quantplan.errors import InputError
from quantplan.formats.sensitivity_tables import (
    SensitivityTable,
    append_measurement,
    read_sensitivity_table,
)
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.measure_groups import WHOLE, Job, curve_jobs, next_group
from quantplan.qtypes import qtype
from quantplan.quantize.apply import quantize
from quantplan.recipe import Provenance, Recipe, RecipeTensor
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.perplexity import chunk_faults, fingerprint, measure_divergence
from quantplan.schema import Frozen, write_saved
from quantplan.version import __version__

_EMPTY = SensitivityTable(singles=(), curve={}, n_unmeasured=0)


@dataclass(frozen=True)
class Setup:
    """What every run has in common. It can be sent to another process or host.

    Attributes:
        source: The F32, F16 or BF16 GGUF, or any shard of it.
        texts: What to measure on; several count alike.
        llama_cpp: What runs the models.
        cache: Folder for log probabilities and for the quantized file of a run.
        chunks: Chunks of each text to measure on; at least 4 to hold half of them out.
        chunk_tokens: Tokens per chunk.
        imatrix: An importance matrix to quantize with.
        threads: Of the CPU, per run; all by default.
        gpu_layers: Layers on GPUs; as llama.cpp decides by default.
    """

    source: Path
    texts: tuple[str, ...]
    llama_cpp: LlamaCpp
    cache: Path
    chunks: int = 16
    chunk_tokens: int = 512
    imatrix: Path | None = None
    threads: int | None = None
    gpu_layers: int | None = None


class Outcome(Frozen):
    """What one run gave.

    Attributes:
        job: What was measured.
        by_chunk: KLD of every chunk in nats per token, text by text.
        duration_s: Time that the run took.
    """

    job: Job
    by_chunk: ByChunk
    duration_s: float

    @property
    def kld_nats(self) -> float:
        """Mean KLD in nats per token; texts count alike."""
        return mean_nats(self.by_chunk)

    @property
    def standard_error_nats(self) -> float:
        """Its standard error over chunks."""
        return standard_error_nats(self.by_chunk)

    @property
    def measurement(self) -> Measurement:
        """The run as evidence."""
        return Measurement(
            self.job.tensors, self.job.qtype, self.kld_nats, self.standard_error_nats, self.by_chunk
        )


class Conditions(Frozen):
    """What measurements of one table have in common; kept beside it, so that none are mixed.

    Attributes:
        schema_version: Version of this format.
        quantplan_version: Version of quantplan.
        source: The model that was quantized.
        source_sha256: Hash of samples of its file.
        text_sha256: Hash of the text; of several, joined by ``+``.
        imatrix_sha256: Hash of the importance matrix.
        llama_cpp: The runtime and its build.
        chunks: Chunks of each text.
        chunk_tokens: Tokens per chunk.
        shapes: Shapes of the tensors in GGUF order, by name; empty where they were not kept.
    """

    schema_version: Literal[1] = 1
    quantplan_version: str
    source: str
    source_sha256: str
    text_sha256: str
    imatrix_sha256: str | None
    llama_cpp: str
    chunks: int
    chunk_tokens: int
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @classmethod
    def shapes_beside(cls, table: Path) -> dict[str, tuple[int, ...]]:
        """Shapes of the model that a table is of; empty where they are not known."""
        try:
            return cls.model_validate_json(_conditions_path(table).read_bytes()).shapes
        except (OSError, ValueError):
            return {}

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """The conditions of a setup."""
        return cls(
            quantplan_version=__version__,
            source=setup.source.name,
            source_sha256=fingerprint(setup.source),
            text_sha256="+".join(hashlib.sha256(t.encode()).hexdigest() for t in setup.texts),
            imatrix_sha256=fingerprint(setup.imatrix) if setup.imatrix else None,
            llama_cpp=str(setup.llama_cpp),
            chunks=setup.chunks,
            chunk_tokens=setup.chunk_tokens,
            shapes={t.name: t.shape_ne for t in quantized(read_inventory(setup.source))},
        )


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
            of a dask.distributed client; it must see the same files. This thread by default.
        parallel: Runs at the same time.
        progress: Is called in this thread when a run begins and when it ends.

    Returns:
        All that is in the table.

    Raises:
        InputError: There is no budget or no text, chunks are too few or too short, the table exists
            or was measured differently, or the source is quantized already.
        SourceError: The source or the table cannot be read.
        LlamaCppError: llama.cpp failed; what was measured before is kept.
        QuantizeError: A quantized file could not be written.
    """
    inventory = read_inventory(setup.source)
    _check(
        setup, inventory, table,
        curve=curve, runs=runs, limit_s=limit_s, resume=resume, parallel=parallel,
    )  # fmt: skip
    _check_conditions(Conditions.of(setup), _conditions_path(table), table)
    campaign = _Campaign(inventory, table, curve)
    pool = executor or _Inline()
    budget = _Budget(runs, math.inf if limit_s is None else time.monotonic() + limit_s)
    _run(campaign, budget, lambda job: pool.submit(run_job, setup, job), parallel, progress)
    return read_sensitivity_table(table) if table.exists() else _EMPTY


def run_job(setup: Setup, job: Job) -> Outcome:
    """Quantizes the tensors of a job and measures the KLD; the file is removed.

    Args:
        setup: The model, the text and what runs it.
        job: Tensors and their type; all others stay as they are.

    Raises:
        SourceError: The source cannot be read.
        QuantizeError: The quantized file could not be written.
        LlamaCppError: llama.cpp failed.
    """
    started = time.monotonic()
    setup.cache.mkdir(parents=True, exist_ok=True)
    inventory = read_inventory(setup.source)
    with tempfile.TemporaryDirectory(dir=setup.cache, prefix="run-") as name:
        target = Path(name) / "model.gguf"
        quantize(
            _recipe(inventory, job), setup.source, target, imatrix=setup.imatrix,
            threads=setup.threads,
        )  # fmt: skip
        by_chunk = tuple(
            tuple(
                measure_divergence(
                    setup.llama_cpp, target, text, base=setup.source, cache=setup.cache,
                    chunks=setup.chunks, chunk_tokens=setup.chunk_tokens, threads=setup.threads,
                    gpu_layers=setup.gpu_layers,
                ).kld_by_chunk.tolist()
            )
            for text in setup.texts
        )  # fmt: skip
    return Outcome(job=job, by_chunk=by_chunk, duration_s=time.monotonic() - started)


def _recipe(inventory: Inventory, job: Job) -> Recipe:
    low = set(job.tensors)
    return Recipe(
        model=inventory.name,
        tensors=tuple(
            RecipeTensor(
                tensor=t.name,
                qtype=job.qtype if t.name in low else t.qtype,
                device=None,
                shape_ne=t.shape_ne,
            )
            for t in inventory.tensors
        ),
        flags=(),
        provenance=Provenance(
            quantplan_version=__version__,
            source=inventory.source,
            header_sha256=inventory.header_sha256,
            origin=f"a measurement of {job}",
            runtime="llama.cpp",
        ),
    )


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
                campaign.add(outcome)
                del pending[future]
                width = parallel
                if progress is not None:
                    progress(outcome.job, outcome)
    finally:
        for future in pending:
            future.cancel()


class _Inline(Executor):
    """Runs jobs at once, in the calling thread, so that an interrupt ends them."""

    def submit(self, function: Any, /, *arguments: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **more))
        return future


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
    if not any(t.is_quantizable and qtype(t.qtype).is_float for t in inventory.tensors):
        faults.append(
            f"{inventory.name} is quantized already: give the F32, F16 or BF16 model, whose losses "
            "are to be measured"
        )
    if table.exists() and not resume:
        faults.append(f"{table} is there already: go on with it (--resume), or name another file")
    if faults:
        raise InputError(faults)


def _conditions_path(table: Path) -> Path:
    return table.with_name(f"{table.name}.json")


def _check_conditions(conditions: Conditions, path: Path, table: Path) -> None:
    """Holds conditions against those of a table that is there; writes them for a new one."""
    if not table.exists():
        write_saved(conditions, path)
        return
    try:
        known = Conditions.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} does not say how {table} was measured: {error}") from error
    own, other = (
        c.model_dump(exclude={"quantplan_version", "shapes"}) for c in (conditions, known)
    )
    faults = [
        f"{table} was measured with {name} {other[name]}, not {value}: name another file"
        for name, value in own.items()
        if other[name] != value
    ]
    if faults:
        raise InputError(faults)
