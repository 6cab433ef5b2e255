"""Plans with losses measured on one text, judged on texts that chose nothing, on a real model.

Usage: python benchmarks/held_out_smollm2.py [--minutes M] [--chunks N] [--tokens T] [--folder DIR]

The losses of SmolLM2-135M are measured on every other topic of Python's manual: the curve over
types and as many groups of tensors as there is time for. Half of the chunks is held out. Recipes of
the size of llama.cpp's mixes (within 0.5 %) are then made without any measurement, with the
measured half, and with that against the upper end of losses (``--robust``). All of them, and the
mixes, are measured on two other texts: the topics between, and source code of the standard library.
Ratios of mean KLDs have 95 % intervals of the paired bootstrap over chunks.

Printed beside it is what each plan was predicted to gain over the mix, by the half that losses were
fitted on and by the held-out half, and how many of its types change between resamples of the
chunks.
"""

import argparse
import inspect
import os
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).parents[1]))

import quantplan as qp
from benchmarks.quality_mixes import (
    SAME_SIZE,
    plan_of_size,
    ratio_interval,
    texts,
    working_folder,
)
from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable
from quantplan.costs.resampling import Half, on_half, resamples
from quantplan.measure.halves import survival
from quantplan.measure.losses import measure_losses
from quantplan.measure.runs import Setup
from quantplan.runtime import Divergence, LlamaCpp, find_llama_cpp, measure_divergence
from tests.support.llama_cpp import packaged_folder, portable_cpu
from tests.support.models import smollm2_f16
from tests.support.quantizer import llama_quantize_mix

MIXES = ("Q3_K_M", "Q4_K_M")
ROBUST_SDS = NormalDist().inv_cdf(0.9)
RESAMPLED_PLANS = 12


def source_code() -> str:
    """Modules of the standard library, one after the other."""
    return "\n\n".join(inspect.getsource(module) for module in (textwrap, zipfile, argparse))


@dataclass
class Judge:
    """Texts that chose nothing, and what measures models on them."""

    llama_cpp: LlamaCpp
    folder: Path
    source: Path
    texts: Mapping[str, str]
    chunks: int
    chunk_tokens: int

    def measured(self, model: Path) -> dict[str, Divergence]:
        """Measures a model on every text, and removes it."""
        found = {
            name: measure_divergence(
                self.llama_cpp, model, text, base=self.source, cache=self.folder / "cache",
                chunks=self.chunks, chunk_tokens=self.chunk_tokens, threads=1,
            )
            for name, text in self.texts.items()
        }  # fmt: skip
        model.unlink()
        return found


def measure(setup: Setup, table: Path, minutes: float) -> Evidence:
    """Measures losses, and says how much of them both halves show."""
    found = measure_losses(
        setup, table, limit_s=60 * minutes, resume=table.exists(),
        progress=lambda job, outcome: print(
            f"  {job}: KLD {outcome.kld_nats:.5f} ± {outcome.standard_error_nats:.5f}, "
            f"{outcome.duration_s:.0f} s", flush=True,
        ) if outcome else None,
    )  # fmt: skip
    share = survival(qp.read_inventory(setup.source), found)
    print(f"{found.evidence.describe()}; both halves show {share or 0:.0%} of the differences")
    return found.evidence


def gains(
    inventory: qp.Inventory, evidence: Evidence, types: Mapping[str, str], mix: Mapping[str, str]
) -> Iterator[str]:
    """Predicted ratios of a plan's KLD to the mix's, by each half, with resamples' 95 %."""

    def ratio(found: Evidence) -> float:
        table = LossTable(inventory, found)
        return table.model_kld_nats(types) / table.model_kld_nats(mix)

    halves: tuple[Half, ...] = ("fit", "held out")
    for half in halves:
        drawn = sorted(ratio(one) for one in resamples(evidence, half, 200))
        yield f"{half} {ratio(on_half(evidence, half)):.3f} ({drawn[5]:.3f} to {drawn[-6]:.3f})"


def run_mix(judge: Judge, mix: str, evidence: Evidence) -> None:
    """Compares plans of one size."""
    inventory = qp.read_inventory(judge.source)
    target = judge.folder / "model.gguf"
    llama_quantize_mix(judge.source, target, mix)
    n_bytes = qp.read_inventory(target).n_bytes
    stock = judge.measured(target)
    print(f"{mix}: {n_bytes / 2**20:.1f} MiB")
    for name, found in stock.items():
        print(f"  llama.cpp on {name}: {found.summary()}")
    ways = {
        "metadata": None,
        "measured": evidence,
        "robust": replace(evidence, upper_sds=ROBUST_SDS),
    }
    results = {}
    mixed = qp.stock_mix(inventory, mix)
    for way, known in ways.items():
        made = plan_of_size(inventory, n_bytes, known, RESAMPLED_PLANS)
        qp.quantize(made.recipe, judge.source, target, threads=1)
        size = qp.read_inventory(target).n_bytes / n_bytes
        if not 1 - SAME_SIZE <= size <= 1 + SAME_SIZE:
            raise SystemExit(f"{way} is {size:.4f} of the stock mix: not the same size")
        results[way] = judge.measured(target)
        types = {a.tensor: a.qtype for a in made.assignments}
        print(f"  {way}: {size:.4f} of the size, predicted KLD {made.predicted.loss_nats:.4f}")
        predicted = ", ".join(gains(inventory, evidence, types, mixed))
        print(f"    predicted ratio to llama.cpp's KLD: {predicted}")
        if made.type_changes is not None:
            print(f"    {made.type_changes.describe()}")
        for name, found in results[way].items():
            print(f"    on {name}: {found.summary()}")
            for other, theirs in (("llama.cpp", stock), *results.items()):
                if other != way:
                    ratio, error, low, high = ratio_interval(found, theirs[name])
                    print(
                        f"      {ratio:.3f} ± {error:.3f} of {other}'s KLD, "
                        f"95 % {low:.3f} to {high:.3f}",
                        flush=True,
                    )


def main() -> None:
    """Measures, plans, and judges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="to measure losses for")
    parser.add_argument("--chunks", type=int, default=16, help="chunks of each text")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--mixes", nargs="*", default=MIXES)
    parser.add_argument("--folder", type=Path, help="keeps what is measured, to go on there")
    options = parser.parse_args()
    tuning, judging = texts()
    with working_folder(options.folder) as folder, tempfile.TemporaryDirectory() as portable:
        os.environ |= portable_cpu(Path(portable))
        llama_cpp = find_llama_cpp(packaged_folder())
        source = folder / "SmolLM2-135M-F16.gguf"
        if not source.exists():
            smollm2_f16(folder)
        setup = Setup(
            source=source, texts=(tuning,), llama_cpp=llama_cpp, cache=folder / "cache",
            chunks=options.chunks, chunk_tokens=options.tokens, threads=1,
        )  # fmt: skip
        evidence = measure(setup, folder / "kld.csv", options.minutes)
        other = {"other topics": judging, "source code": source_code()}
        judge = Judge(llama_cpp, folder, source, other, options.chunks, options.tokens)
        for mix in options.mixes:
            run_mix(judge, mix, evidence)


if __name__ == "__main__":
    main()
