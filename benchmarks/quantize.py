"""Times `quantplan.quantize` beside llama.cpp's own quantizer, and compares every byte of data.

Both run in turn on the same source with the same number of threads; each pair gives one ratio of
wall times, and the median is printed. llama.cpp's time is that of `llama_model_quantize` alone,
without the start of its process; quantplan's is that of `quantize`, which also waits until the
file is on the disk and reads its header back. Types whose blocks do not fit SmolLM2's rows are
timed on random experts with rows of 256.

Q8_0 takes hardly more than copying, so it is also compared with reading the source and writing as
many bytes as the target has.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.qtypes import QTYPES
from quantplan.quantize import quantize
from tests.support.models import smollm2_f16, toy_moe
from tests.support.quantizer import (
    imatrix_gguf,
    llama_quantize,
    random_imatrix,
    recipe_for,
    spread,
    stored,
)

_ATTENTION = ("attn_", "token_embd", "output")
_BLOCK_BYTES = 1 << 20

RECIPES: dict[str, Callable[[str], str]] = {
    "Q6_K attention, Q4_K else": lambda n: "Q6_K" if any(p in n for p in _ATTENTION) else "Q4_K",
    **{
        name: lambda _, name=name: name  # type: ignore[misc]
        for name in (
            "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
            "IQ4_NL", "IQ4_XS", "IQ3_S", "MXFP4", "TQ1_0", "TQ2_0", "BF16",
            "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
        )
    },
}  # fmt: skip
"""Type wanted for a tensor by its name; rows that it does not fit fall back as in llama.cpp."""

_OF_SMOLLM2 = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "Q6_K attention, Q4_K else"}


def compare(
    source: Path, folder: Path, name: str, threads: int, repeats: int, *, has_imatrix: bool
) -> None:
    """Runs both quantizers in turn on one recipe and prints the result."""
    importance = random_imatrix(source) if has_imatrix else None
    imatrix = imatrix_gguf(folder / "imatrix.gguf", importance) if importance else None
    qtypes = {tensor: RECIPES[name](tensor) for tensor in spread(source, ["Q8_0"])}
    recipe = recipe_for(source, qtypes)
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    pairs, copies = [], []
    for _ in range(repeats):
        theirs_s = llama_quantize(source, theirs, qtypes, threads, imatrix=importance)
        result = quantize(recipe, source, ours, imatrix=imatrix, threads=threads)
        pairs.append((result.duration_s, theirs_s))
        if name == "Q8_0":
            copies.append(pairs[-1][0] / _copy_s(source, folder / "copy", ours.stat().st_size))
    same = stored(ours) == stored(theirs)
    ratios = sorted(ours_s / theirs_s for ours_s, theirs_s in pairs)
    print(
        f"{name:26} quantplan {median(p[0] for p in pairs):6.2f} s  "
        f"llama.cpp {median(p[1] for p in pairs):6.2f} s  "
        f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
        f"data {'identical' if same else 'DIFFERENT'}"
        + (f"  {median(copies):.1f} times as long as copying" if copies else ""),
        flush=True,
    )


def _copy_s(source: Path, target: Path, n_bytes: int) -> float:
    """Seconds to read a file and to write so many bytes of it, until they are on the disk."""
    began = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(_BLOCK_BYTES):
            writer.write(data[: max(0, n_bytes - writer.tell())])
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - began


def main() -> None:
    """Parses the command line and compares every recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="F32, F16 or BF16 GGUF for all recipes")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--imatrix", action="store_true", help="with a random importance matrix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = options.source or smollm2_f16(folder)
        wide = options.source or toy_moe(folder / "wide.gguf", "qwen3moe", layers=12)
        for recipe in options.recipes:
            source = real if recipe in _OF_SMOLLM2 else wide
            if options.imatrix or not (recipe in QTYPES and QTYPES[recipe].needs_imatrix):
                compare(
                    source, folder, recipe, options.threads, options.repeats,
                    has_imatrix=options.imatrix,
                )  # fmt: skip


if __name__ == "__main__":
    main()
