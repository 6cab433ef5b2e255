"""KLD of quantplan's recipes against llama.cpp's own mixes of the same size, on a real model.

Usage: python benchmarks/quality_smollm2.py [--chunks N]

SmolLM2-135M is quantized by llama.cpp itself into five of its mixes, and by quantplan into recipes
that are no larger, chosen without any measurement of the model. The real llama.cpp then measures
the KLD from the F16 source, token by token, on text that no choice was made with: the topics of
Python's manual. A recipe wins where the paired bootstrap over chunks puts the 95 % interval of the
ratio of mean KLDs below one.

The F16 source is dithered (see `smollm2_f16`), so types are compared on weights that lie on no
grid. Its rows are 576 wide: types with blocks of 256 are possible in ``ffn_down`` only.
"""

import argparse
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import quantplan as qp
from quantplan.policy import Policy, policy
from tests.support.divergence import Divergence, measure, write_mix
from tests.support.models import smollm2_f16

MIXES = ("Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
CANDIDATES = (
    "SOURCE", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_0",
    "Q3_K", "IQ3_S", "Q2_K",
)  # fmt: skip
RESAMPLES, SEED = 10_000, 20261123


def free_policy() -> Policy:
    """The quality policy without floors: stock mixes have none either."""
    rules = tuple(rule.model_copy(update={"floor": None}) for rule in policy("quality").rules)
    return policy("quality").model_copy(
        update={"rules": rules, "candidates": CANDIDATES, "decode_price_nats_per_s": 0.0}
    )


def plan_of_size(inventory: qp.Inventory, n_bytes: int) -> qp.Plan:
    """The plan with the least predicted loss whose weights take at most some bytes."""
    roomy = qp.Machine.parse("4GiB@50GB/s")
    task = qp.Workload(context=512)
    device = qp.plan(inventory, roomy, task, policy=free_policy()).devices[0]
    other = device.kv_bytes + device.compute_bytes + device.margin_bytes
    ram = roomy.ram.model_copy(update={"capacity_bytes": other + n_bytes})
    return qp.plan(inventory, qp.Machine(gpus=(), ram=ram), task, policy=free_policy(), gap=1e-6)


def ratio_interval(ours: Divergence, theirs: Divergence) -> tuple[float, float, float]:
    """Ratio of mean KLDs, and its 95 % interval by resampling whole chunks in pairs."""
    a, b = ours.kld_nats.mean(axis=1), theirs.kld_nats.mean(axis=1)
    draws = np.random.default_rng(SEED).integers(len(a), size=(RESAMPLES, len(a)))
    low, high = np.percentile(a[draws].mean(axis=1) / b[draws].mean(axis=1), [2.5, 97.5])
    return float(a.mean() / b.mean()), float(low), float(high)


def describe(found: Divergence) -> str:
    """Mean KLD, its 99th percentile, top-token agreement, PPL ratio, each with a standard error."""
    root = np.sqrt(len(found.kld_nats))
    mean = found.kld_nats.mean(axis=1)
    top = found.same_top.mean(axis=1)
    high = np.percentile(found.kld_nats, 99, axis=1)
    ratio = found.ln_ppl - found.base_ln_ppl
    return (
        f"KLD {mean.mean():.4f}±{mean.std(ddof=1) / root:.4f}, "
        f"p99 {high.mean():.3f}±{high.std(ddof=1) / root:.3f}, "
        f"same top {top.mean():.3f}±{top.std(ddof=1) / root:.3f}, "
        f"PPL ratio {np.exp(ratio.mean()):.4f}±{ratio.std(ddof=1) / root:.4f}"
    )


def main() -> None:
    """Quantizes, measures and prints one block per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=24, help="chunks of 512 tokens to judge on")
    parser.add_argument("--mixes", nargs="*", default=MIXES)
    options = parser.parse_args()
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    n_won = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, base = smollm2_f16(folder), folder / "base"
        inventory = qp.read_inventory(source)
        chunks = (0, options.chunks)
        measure(source, text, base, chunks)
        for mix in options.mixes:
            theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
            write_mix(source, theirs, int(gguf.LlamaFileType[f"MOSTLY_{mix}"]))
            stock = qp.read_inventory(theirs)
            made = plan_of_size(inventory, stock.n_bytes)
            qp.quantize(made.recipe, source, ours)
            size = qp.read_inventory(ours).n_bytes / stock.n_bytes
            found = [measure(path, text, base, chunks) for path in (ours, theirs)]
            ratio, low, high = ratio_interval(*found)
            n_won += high < 1
            print(f"{mix}: {stock.n_bytes / 2**20:.1f} MiB, quantplan's is {size:.4f} of it")
            print(f"  llama.cpp {describe(found[1])}")
            print(f"  quantplan {describe(found[0])}, predicted {made.predicted.loss_nats:.3f}")
            print(f"  ratio of KLDs {ratio:.3f}, 95 % interval {low:.3f} to {high:.3f}", flush=True)
            for line in made.summary().splitlines()[6:]:
                print(f"    {line.strip()}")
            for path in (ours, theirs):
                path.unlink()
    print(f"quantplan wins at {n_won} of {len(options.mixes)} sizes")


if __name__ == "__main__":
    main()
