"""Measures the relative squared error of every tensor type on Gaussian rows.

Usage: python scripts/measure_type_error.py

Quantizes and dequantizes rows of independent standard normal weights with ggml's own kernels and
writes mean |W' - W|^2 / |W|^2 per type to quantplan/costs/data/type_error.json, with a uniform
importance matrix and, for types that do not need one, without: quantizers try harder with a matrix,
as published runs of whole models have one.
"""

import datetime
import importlib.metadata
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantplan.qtypes import QTYPES, QType
from quantplan.quantize.ggml import Ggml, ggml

TARGET = Path(__file__).parent.parent / "quantplan" / "costs" / "data" / "type_error.json"
N_ROWS, N_COLUMNS, SEED = 256, 4096, 20261123


def relative_error(
    library: Ggml, weights: NDArray[np.float32], qtype: QType, *, has_imatrix: bool
) -> float:
    """Mean squared error of one type relative to the mean square of the weights."""
    library.prepare(qtype, has_imatrix=has_imatrix)
    uniform = np.ones(N_COLUMNS, dtype=np.float32) if has_imatrix else None
    restored = library.round_trip(qtype, weights, uniform)
    return round(float(np.mean((restored - weights) ** 2) / np.mean(weights**2)), 9)


def by_size(errors: dict[str, float]) -> dict[str, float]:
    """The same, least first."""
    return dict(sorted(errors.items(), key=lambda item: item[1]))


def main() -> None:
    """Measures every type that the bundled library can write."""
    library = ggml()
    weights = np.random.default_rng(SEED).standard_normal((N_ROWS, N_COLUMNS), dtype=np.float32)
    skipped = {"F32", "F16", "BF16", "NVFP4", "Q1_0", "Q2_0"}
    measured = {
        name: qtype
        for name, qtype in QTYPES.items()
        if qtype.is_file_target and "llama.cpp" in qtype.runtimes and name not in skipped
    }
    errors = {
        name: relative_error(library, weights, qtype, has_imatrix=True)
        for name, qtype in measured.items()
    }
    without = {
        name: relative_error(library, weights, qtype, has_imatrix=False)
        for name, qtype in measured.items()
        if not qtype.needs_imatrix
    }
    # Rounding to 11 and to 8 significant bits: error uniform in half a unit in the last place.
    errors["F16"] = float(np.mean((weights.astype(np.float16) - weights) ** 2))
    bits = weights.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    errors["BF16"] = float(np.mean((rounded.view(np.float32) - weights) ** 2))
    document = {
        "about": "Relative squared error |W' - W|^2 / |W|^2 per type on Gaussian rows, with a "
        "uniform importance matrix and without one.",
        "script": "scripts/measure_type_error.py",
        "library": f"libggml-python {importlib.metadata.version('libggml-python')}",
        "rows": [N_ROWS, N_COLUMNS],
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
        "relative_squared_error": by_size(errors),
        "without_imatrix": by_size(without),
    }
    TARGET.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
