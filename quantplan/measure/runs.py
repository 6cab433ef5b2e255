"""One run: quantizes the tensors of a job and measures the KLD from the source."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from quantplan.costs.evidence import ByChunk, Measurement
from quantplan.costs.resampling import mean_nats, standard_error_nats
from quantplan.errors import InputError
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.measure.groups import Job
from quantplan.quantize.apply import quantize
from quantplan.recipe import Provenance, Recipe, RecipeTensor
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.perplexity import check_length, measure_divergence
from quantplan.runtime.process import Watch
from quantplan.schema import Frozen
from quantplan.version import __version__


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


def text_faults(setup: Setup, watch: Watch | None = None) -> list[str]:
    """Which texts are too short to measure on, one sentence each.

    Args:
        setup: The model, the texts and what runs it.
        watch: Is called many times a second; an exception that it raises ends the work.

    Raises:
        SourceError: The source cannot be read.
        LlamaCppError: llama.cpp failed.
    """
    faults = []
    for number, text in enumerate(setup.texts, 1):
        try:
            check_length(
                setup.llama_cpp, text, base=setup.source, cache=setup.cache,
                chunk_tokens=setup.chunk_tokens, threads=setup.threads,
                gpu_layers=setup.gpu_layers, watch=watch,
            )  # fmt: skip
        except InputError as error:
            faults += [f"text {number} of {len(setup.texts)}: {f}" for f in error.faults]
    return faults


def run_job(setup: Setup, job: Job, watch: Watch | None = None) -> Outcome:
    """Quantizes the tensors of a job and measures the KLD; the file is removed.

    Args:
        setup: The model, the text and what runs it.
        job: Tensors and their type; all others stay as they are.
        watch: Is called many times a second; an exception that it raises ends the run.

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
            threads=setup.threads, progress=None if watch is None else lambda _: watch(),
        )  # fmt: skip
        by_chunk = tuple(
            tuple(
                measure_divergence(
                    setup.llama_cpp, target, text, base=setup.source, cache=setup.cache,
                    chunks=setup.chunks, chunk_tokens=setup.chunk_tokens, threads=setup.threads,
                    gpu_layers=setup.gpu_layers, watch=watch,
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
