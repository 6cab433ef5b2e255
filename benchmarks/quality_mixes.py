"""KLD of quantplan's recipes against llama.cpp's own mixes of the same size, on real models.

Usage: python benchmarks/quality_mixes.py [MODEL] [--chunks N] [--tokens T] [--seeds 0 1]
    [--folder DIR]

MODEL is SmolLM2-135M or another one of `benchmarks.small_models`; only gemma-3-270m is in a fit.
It is quantized by llama.cpp itself into five of its mixes, and into quantplan's recipes of the same
size (within 0.5 %), in two ways: without any measurement of the model, and with errors on its
weights and an importance matrix. For the latter there are also llama.cpp's mix and the recipe
without any measurement, quantized with the same matrix. The real llama.cpp then measures the KLD
from the F16 source on text that no choice was made with: every other topic of Python's manual; the
matrix is made with the topics between. A recipe wins where the paired bootstrap over chunks puts
the 95 % interval of the ratio of mean KLDs below one.

The F16 source is dithered (see `blurred_f16`), so types are compared on weights that lie on no
grid; each seed is another dither, to see that nothing hangs on it. Only the first seed has the
importance matrix. Rows of SmolLM2 are 576 wide, those of gemma-3-270m 640: types with blocks of 256
are possible in ``ffn_down`` only, and in gemma's ``attn_output``. Those of Qwen2.5 take all types.
"""

import argparse
import contextlib
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import quantplan as qp
from benchmarks.small_models import MODELS
from quantplan.costs.evidence import Evidence
from quantplan.policy import Policy, policy
from quantplan.quantize.imatrix import read_imatrix
from quantplan.quantize.weights import measure_weights
from quantplan.runtime import Divergence, LlamaCpp, find_llama_cpp, measure_divergence
from tests.support.llama_cpp import packaged_folder, portable_cpu
from tests.support.quantizer import llama_quantize, llama_quantize_mix

ROOT = Path(__file__).parents[1]
MIXES = ("Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
CANDIDATES = (
    "SOURCE", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_0",
    "Q3_K", "IQ3_S", "Q2_K",
)  # fmt: skip
RESAMPLES, SEED = 10_000, 20261123
SAME_SIZE = 0.005


def texts() -> tuple[str, str]:
    """English text to tune with, and to judge with; no topic is in both."""
    topics = pydoc_data.topics.topics
    names = sorted(topics)
    tuning, judging = ("\n\n".join(topics[name] for name in names[i::2]) for i in (0, 1))
    return tuning, judging


def free_policy() -> Policy:
    """The quality policy without floors: stock mixes have none either."""
    rules = tuple(rule.model_copy(update={"floor": None}) for rule in policy("quality").rules)
    return policy("quality").model_copy(
        update={"rules": rules, "candidates": CANDIDATES, "decode_price_nats_per_s": 0.0}
    )


def plan_of_size(
    inventory: qp.Inventory, n_bytes: int, evidence: Evidence | None, resamples: int = 0
) -> qp.Plan:
    """The plan with the least predicted loss whose weights take at most some bytes."""
    roomy = qp.Machine.parse("4GiB@50GB/s")
    task = qp.Workload(context=512)
    device = qp.plan(inventory, roomy, task, policy=free_policy(), baselines=False).devices[0]
    other = device.kv_bytes + device.compute_high_bytes + device.margin_bytes
    ram = roomy.ram.model_copy(update={"capacity_bytes": other + n_bytes})
    return qp.plan(
        inventory, qp.Machine(gpus=(), ram=ram), task, policy=free_policy(), evidence=evidence,
        gap=1e-6, baselines=False, resamples=resamples,
    )  # fmt: skip


def write_imatrix(llama_cpp: LlamaCpp, source: Path, text: str, chunks: int, target: Path) -> None:
    """Makes an importance matrix with llama.cpp's library."""
    tuning, job = target.with_suffix(".txt"), target.with_suffix(".json")
    tuning.write_text(text, encoding="utf-8")
    values = {
        "library": str(llama_cpp.server.with_name("libllama.so")),
        "model": str(source),
        "text": str(tuning),
        "chunk_tokens": 512,
        "chunks": chunks,
        "threads": 1,
        "gpu_layers": None,
        "target": str(target),
    }
    job.write_text(json.dumps(values), encoding="utf-8")
    subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "imatrix_worker.py", job],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )


def ratio_interval(ours: Divergence, theirs: Divergence) -> tuple[float, float, float, float]:
    """Ratio of mean KLDs, its standard error and 95 % interval, resampling chunks in pairs."""
    a, b = ours.kld_by_chunk, theirs.kld_by_chunk
    draws = np.random.default_rng(SEED).integers(len(a), size=(RESAMPLES, len(a)))
    ratios = a[draws].mean(axis=1) / b[draws].mean(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(a.mean() / b.mean()), float(ratios.std()), float(low), float(high)


@dataclass
class Bench:
    """One dithered source, and what to measure it with."""

    llama_cpp: LlamaCpp
    folder: Path
    source: Path
    text: str
    chunks: int
    chunk_tokens: int

    def measured(self, model: Path) -> Divergence:
        """Measures a model and removes it."""
        found = measure_divergence(
            self.llama_cpp, model, self.text, base=self.source, cache=self.folder / "cache",
            chunks=self.chunks, chunk_tokens=self.chunk_tokens, threads=1,
        )  # fmt: skip
        model.unlink()
        return found

    def of_recipe(
        self, name: str, n_bytes: int, evidence: Evidence | None = None, imatrix: Path | None = None
    ) -> Divergence:
        """Plans, quantizes and measures a recipe of some size."""
        made = plan_of_size(qp.read_inventory(self.source), n_bytes, evidence)
        target = self.folder / "ours.gguf"
        qp.quantize(made.recipe, self.source, target, imatrix=imatrix, threads=1)
        size = qp.read_inventory(target).n_bytes / n_bytes
        found = self.measured(target)
        print(f"  {name}: {size:.4f} of the size, {found.summary()}")
        print(f"    predicted KLD {made.predicted.loss_nats:.4f}", flush=True)
        if not 1 - SAME_SIZE <= size <= 1 + SAME_SIZE:
            raise SystemExit(f"{name} is {size:.4f} of the stock mix: not the same size")
        return found


def compare(name: str, ours: Divergence, theirs: Divergence) -> bool:
    """Prints a ratio; tells whether ours is surely better."""
    ratio, error, low, high = ratio_interval(ours, theirs)
    print(f"  {name}: ratio of KLDs {ratio:.3f} ± {error:.3f}, 95 % {low:.3f} to {high:.3f}")
    return high < 1


def run_mix(bench: Bench, mix: str, evidence: Evidence | None, imatrix: Path | None) -> list[bool]:
    """Compares one size; returns whether recipes win without and with measurement."""
    theirs = bench.folder / "theirs.gguf"
    llama_quantize_mix(bench.source, theirs, mix)
    n_bytes = qp.read_inventory(theirs).n_bytes
    stock = bench.measured(theirs)
    print(f"{mix}: {n_bytes / 2**20:.1f} MiB")
    print(f"  llama.cpp: {stock.summary()}")
    ours = bench.of_recipe("quantplan", n_bytes)
    won = [compare("quantplan against llama.cpp", ours, stock)]
    if imatrix is not None:
        inventory = qp.read_inventory(bench.source)
        types = qp.stock_mix(inventory, mix, has_imatrix=True)
        weights = {name: values.mean(axis=0) for name, values in read_imatrix(imatrix).items()}
        llama_quantize(bench.source, theirs, types, threads=1, imatrix=weights)
        size = qp.read_inventory(theirs).n_bytes
        stock_imatrix = bench.measured(theirs)
        print(f"  llama.cpp, imatrix: {size / n_bytes:.4f} of the size, {stock_imatrix.summary()}")
        tuned = bench.of_recipe("quantplan, weights and imatrix", n_bytes, evidence, imatrix)
        won.append(compare("quantplan, weights and imatrix against llama.cpp", tuned, stock))
        won.append(compare("the same against quantplan without", tuned, ours))
        matrix_alone = bench.of_recipe("quantplan, imatrix alone", n_bytes, imatrix=imatrix)
        won.append(compare("weights and imatrix against imatrix alone", tuned, matrix_alone))
        if abs(size / n_bytes - 1) <= SAME_SIZE:
            name = "the same against llama.cpp with imatrix"
            won.append(compare(name, tuned, stock_imatrix))
    sys.stdout.flush()
    return won


@contextlib.contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """A folder that is kept, or a temporary one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def main() -> None:
    """Quantizes, measures and prints one block per size and dither."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--chunks", type=int, default=24, help="to judge on")
    parser.add_argument("--tokens", type=int, default=512, help="per chunk; half of them judge")
    parser.add_argument("--mixes", nargs="*", default=MIXES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="of the dither")
    parser.add_argument("--folder", type=Path, help="keeps what is measured, to go on there")
    options = parser.parse_args()
    tuning, judging = texts()
    with working_folder(options.folder) as folder, tempfile.TemporaryDirectory() as portable:
        os.environ |= portable_cpu(Path(portable))
        llama_cpp = find_llama_cpp(packaged_folder())
        for seed in options.seeds:
            own = folder / str(seed)
            own.mkdir(exist_ok=True)
            source = MODELS[options.model](own, seed)
            bench = Bench(llama_cpp, own, source, judging, options.chunks, options.tokens)
            evidence, imatrix = None, None
            if seed == options.seeds[0]:
                imatrix = own / "imatrix.gguf"
                if not imatrix.exists():
                    write_imatrix(llama_cpp, source, tuning, options.chunks, imatrix)
                errors = measure_weights(source, CANDIDATES[1:], imatrix=read_imatrix(imatrix))
                evidence = Evidence(weight_errors=errors.ratios())
            won = [run_mix(bench, mix, evidence, imatrix) for mix in options.mixes]
            print(f"dither {seed}: quantplan is surely better than llama.cpp's mixes")
            print(f"  without any measurement at {sum(w[0] for w in won)} of {len(won)} sizes")
            if imatrix is not None:
                print(f"  with weights and imatrix at {sum(w[1] for w in won)}", flush=True)


if __name__ == "__main__":
    main()
