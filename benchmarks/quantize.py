"""Times `quantplan.quantize` beside llama.cpp's own quantizer, and compares every byte of data.

Both run in turn on the same source with the same number of threads; each pair gives one ratio of
wall times, and the median is printed. llama.cpp's time is that of `llama_model_quantize` alone,
without the start of its process; quantplan's is that of `quantize`, which also waits until the
file is on the disk and reads its header back.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.quantize import quantize
from tests.support.models import smollm2_f16
from tests.support.quantizer import llama_quantize, recipe_for, spread, stored

_ATTENTION = ("attn_", "token_embd", "output")

RECIPES: dict[str, Callable[[str], str]] = {
    "Q8_0": lambda _: "Q8_0",
    "Q4_0": lambda _: "Q4_0",
    "Q5_0": lambda _: "Q5_0",
    "Q6_K attention, Q4_K else": lambda n: "Q6_K" if any(p in n for p in _ATTENTION) else "Q4_K",
    "Q3_K": lambda _: "Q3_K",
    "IQ4_XS": lambda _: "IQ4_XS",
}
"""Type wanted for a tensor by its name; rows that it does not fit fall back as in llama.cpp."""


def compare(source: Path, folder: Path, name: str, threads: int, repeats: int) -> None:
    """Runs both quantizers in turn on one recipe and prints the result."""
    qtypes = {tensor: RECIPES[name](tensor) for tensor in spread(source, ["Q8_0"])}
    recipe = recipe_for(source, qtypes)
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    pairs = []
    for _ in range(repeats):
        theirs_s = llama_quantize(source, theirs, qtypes, threads)
        pairs.append((quantize(recipe, source, ours, threads=threads).duration_s, theirs_s))
    same = stored(ours) == stored(theirs)
    ratios = sorted(ours_s / theirs_s for ours_s, theirs_s in pairs)
    print(
        f"{name:26} quantplan {median(p[0] for p in pairs):6.2f} s  "
        f"llama.cpp {median(p[1] for p in pairs):6.2f} s  "
        f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
        f"data {'identical' if same else 'DIFFERENT'}",
        flush=True,
    )


def main() -> None:
    """Parses the command line and compares every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="F32, F16 or BF16 GGUF; default SmolLM2-135M")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.source or smollm2_f16(folder)
        for recipe in options.recipes:
            compare(source, folder, recipe, options.threads, options.repeats)


if __name__ == "__main__":
    main()
