"""What was predicted beside what was measured, number by number."""

import datetime
import math
import os
from pathlib import Path
from typing import Literal, Self

from quantplan.runtime.divergence import Divergence
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.speed import SpeedMeasurement
from quantplan.schema import Frozen, read_saved, write_saved
from quantplan.units import MIB
from quantplan.version import __version__

What = Literal["weights", "KV", "compute", "decode", "prefill", "KLD"]
_UNITS: dict[What, str] = {
    "weights": "MiB", "KV": "MiB", "compute": "MiB",
    "decode": "tokens/s", "prefill": "tokens/s", "KLD": "nats/token",
}  # fmt: skip


class Check(Frozen):
    """One number that was predicted, and what it turned out to be.

    Attributes:
        what: ``weights``, ``KV`` and ``compute`` in bytes, ``decode`` and ``prefill`` in tokens per
            second, ``KLD`` in nats per token.
        where: The device, or the depth.
        predicted: The prediction.
        low: Least value that keeps the promise; None where nothing is promised.
        high: Largest value that keeps it.
        measured: What was measured.
    """

    what: What
    where: str
    predicted: float
    low: float | None
    high: float | None
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else None

    @property
    def held(self) -> bool:
        """Whether the promise was kept."""
        above = self.low is None or self.low <= self.measured
        return above and (self.high is None or self.measured <= self.high)

    def line(self) -> str:
        """One row of a table."""
        unit = _UNITS[self.what]
        scale = MIB if unit == "MiB" else 1
        digits = {"MiB": 2, "tokens/s": 1, "nats/token": 4}[unit]
        numbers = [f"{value / scale:12.{digits}f}" for value in (self.predicted, self.measured)]
        ratio = "      -" if self.ratio is None else f"{self.ratio:7.3f}"
        broken = ""
        if not self.held:
            bounds = [f"{(x or 0) / scale:.{digits}f}" for x in (self.low, self.high)]
            broken = f"  BROKEN: promised {' to '.join(bounds)}"
        return f"  {self.what:8}{self.where:12}{numbers[0]}{numbers[1]} {ratio} {unit}{broken}"


class Loss(Frozen):
    """What a text shows of the quantized model beside the unquantized one.

    Attributes:
        base: The unquantized model.
        n_chunks: Chunks of the text that were judged.
        kld_nats: Mean KL divergence, nats per token.
        kld_error_nats: Its standard error over chunks.
        kld_p99_nats: 99th percentile over tokens.
        same_top_share: Share of tokens whose most likely token is the same.
        ppl: Perplexity of the quantized model.
        ppl_ratio: That over the unquantized model's.
        ppl_ratio_error: Its standard error.
    """

    base: str
    n_chunks: int
    kld_nats: float
    kld_error_nats: float
    kld_p99_nats: float
    same_top_share: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_error: float

    @classmethod
    def of(cls, base: Path, found: Divergence) -> Self:
        """The figures of a measured divergence."""
        ratio = math.exp(found.ln_ppl_ratio.value)
        return cls(
            base=str(base),
            n_chunks=len(found.kld_nats),
            kld_nats=found.kld.value,
            kld_error_nats=found.kld.standard_error,
            kld_p99_nats=found.kld_p99.value,
            same_top_share=found.same_top_share.value,
            ppl=math.exp(found.ln_ppl.value),
            ppl_ratio=ratio,
            ppl_ratio_error=ratio * found.ln_ppl_ratio.standard_error,
        )

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"  KLD {self.kld_nats:.5f} ± {self.kld_error_nats:.5f} nats/token, 99th percentile "
            f"{self.kld_p99_nats:.4f}, same top token {self.same_top_share:.2%}, PPL "
            f"{self.ppl:.4f}, ratio {self.ppl_ratio:.5f} ± {self.ppl_ratio_error:.5f} "
            f"({self.n_chunks} chunks)"
        )


class Verification(Frozen):
    """What a recipe promised, and what the real runtime did.

    Attributes:
        schema_version: Version of this format.
        quantplan_version: Version that compared.
        time: When, in UTC.
        model: Name of the model.
        gguf: The file that was run.
        header_sha256: Hash of its header.
        llama_cpp: What ran it.
        flags: Flags that were checked, as quantplan says them.
        command: The command that was run, in the build's words.
        devices: What llama.cpp called the GPUs of the machine, in order.
        checks: Everything that was compared.
        speed: The speeds as they were measured; None where they were not.
        loss: KLD and perplexity; None where no unquantized model was given.
        completion: How the model went on after "The capital of France is", greedily.
        notes: What a person should know about it.
    """

    schema_version: Literal[1] = 1
    quantplan_version: str = __version__
    time: datetime.datetime
    model: str
    gguf: str
    header_sha256: str
    llama_cpp: LlamaCpp
    flags: tuple[str, ...]
    command: tuple[str, ...]
    devices: tuple[str, ...]
    checks: tuple[Check, ...]
    speed: SpeedMeasurement | None = None
    loss: Loss | None = None
    completion: str
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether all that was promised and checked is true."""
        return all(check.held for check in self.checks)

    def summary(self) -> str:
        """A table: predicted, measured, ratio."""
        broken = sum(not check.held for check in self.checks)
        said = f"{broken} of {len(self.checks)} promises are BROKEN" if broken else "as promised"
        head = f"  {'':20}{'predicted':>12}{'measured':>12} {'ratio':>7}"
        rows = [f"{self.model} on {self.llama_cpp}: {said}", head]
        rows += [check.line() for check in self.checks]
        rows += [self.loss.line()] if self.loss else []
        rows += [f"  note: {text}" for text in self.notes]
        return "\n".join(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all.

        Raises:
            InputError: The file cannot be written.
        """
        write_saved(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
            InputError: The file cannot be read, or is no verification of a known version.
        """
        return read_saved(cls, path, "verification")
