"""How well the order of single tensors' losses is predicted, on small real models.

Usage: python benchmarks/order_matrices.py MODEL [--imatrix] [--chunks N] [--tokens T] [--minutes M]
    [--folder DIR] [--sensitivities DIR]

MODEL is one of `benchmarks.small_models`, which says what to install. Every matrix is quantized
alone, and the real llama.cpp measures the KLD from the F16 source: about an hour on a core, and a
folder that is kept goes on where it ended. The rank correlation (all matrices, and median within
roles of the layers) is printed of

- predictions from metadata alone;
- predictions with the errors on the real weights, all of them with an importance matrix that was
  made on other text where it is asked for (``--imatrix``);
- the other half of the chunks, the most that any prediction could reach.

Intervals are 95 % of resamples of the chunks. The shipped constants are fitted on the models of
scripts/measured, whose tables come from here, and on no other one of these. Given the published
tables (``--sensitivities``), constants are fitted without the model's family.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

import quantplan as qp
from benchmarks.quality_mixes import texts, working_folder, write_imatrix
from benchmarks.small_models import MODELS
from benchmarks.validate_quality import rank_correlations
from quantplan.costs.evidence import Evidence
from quantplan.costs.families import family, quantized
from quantplan.costs.quality import LossTable
from quantplan.formats.sensitivity_tables import append_measurement, read_sensitivity_table
from quantplan.inventory import Inventory, Tensor
from quantplan.measure.conditions import Conditions, check_conditions
from quantplan.measure.groups import Job
from quantplan.measure.runs import Setup, run_job
from quantplan.quantize.imatrix import read_imatrix
from quantplan.quantize.weights import measure_weights
from quantplan.runtime import find_llama_cpp
from scripts.quality_data import all_tables, read_models
from scripts.quality_fit import fit_without
from tests.support.llama_cpp import packaged_folder, portable_cpu

# The lowest type that fits the rows of all of these models.
QTYPE = "Q4_0"
RESAMPLES, SEED = 500, 20261123
IMATRIX_CHUNKS = 16
# From one layer to the next that is measured; it divides no number of layers here.
_STRIDE = 11

Array = NDArray[np.float64]


def in_turn(inventory: Inventory) -> list[Tensor]:
    """All matrices; wherever it ends, what was measured is spread over roles and layers."""
    n_layers = inventory.architecture.n_layers
    return sorted(quantized(inventory), key=lambda t: ((t.layer or 0) * _STRIDE % n_layers, t.name))


def measure(setup: Setup, table: Path, minutes: float) -> dict[str, Array]:
    """KLD of every chunk in nats, by tensor."""
    inventory, ends = qp.read_inventory(setup.source), time.monotonic() + 60 * minutes
    known = read_sensitivity_table(table).singles if table.exists() else ()
    found = {one.tensors[0]: np.array(one.by_chunk).ravel() for one in known}
    for tensor in in_turn(inventory):
        if tensor.name not in found and time.monotonic() < ends:
            outcome = run_job(setup, Job(name=tensor.name, tensors=(tensor.name,), qtype=QTYPE))
            append_measurement(table, outcome.measurement, tensor.name)
            found[tensor.name] = np.array(outcome.by_chunk).ravel()
            print(
                f"  {tensor.name}: KLD {outcome.kld_nats:.6f} ± "
                f"{outcome.standard_error_nats:.6f}, {outcome.duration_s:.0f} s", flush=True,
            )  # fmt: skip
    return found


def fitted_without(inventory: Inventory, directory: Path) -> dict[str, Any]:
    """Constants fitted on published tables and our own, those of a model's family left out."""
    models, _ = read_models(all_tables(directory))
    return fit_without(models, family(inventory.architecture.name))


def correlations(predicted: Array, measured: Array, roles: list[str]) -> tuple[float, float]:
    """Rank correlation over all, and the median within roles."""
    overall, within = rank_correlations(list(predicted), list(measured), roles)
    return overall, median(within)


def report(name: str, predicted: Array, by_chunk: Array, roles: list[str]) -> None:
    """Prints the correlations of a prediction with what chunks show, of shape (tensors, chunks)."""
    n = by_chunk.shape[1]
    draws = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    resampled = [correlations(predicted, by_chunk[:, d].mean(axis=1), roles) for d in draws]
    words = [
        f"{value:.3f} ({low:.3f} to {high:.3f})"
        for value, low, high in zip(
            correlations(predicted, by_chunk.mean(axis=1), roles),
            *np.percentile(resampled, [2.5, 97.5], axis=0), strict=True,
        )
    ]  # fmt: skip
    print(f"{name}: {words[0]} over all, {words[1]} within a role", flush=True)


def main() -> None:
    """Measures and prints one line per kind of evidence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--imatrix", action="store_true", help="quantize with a matrix")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="per chunk; half of them judge")
    parser.add_argument("--minutes", type=float, default=180.0, help="to measure for")
    parser.add_argument("--folder", type=Path, help="keeps what is measured, to go on there")
    parser.add_argument("--sensitivities", type=Path, help="fits without the model's family")
    options = parser.parse_args()
    tuning, judging = texts()
    with working_folder(options.folder) as folder, tempfile.TemporaryDirectory() as portable:
        os.environ |= portable_cpu(Path(portable))
        llama_cpp, source = find_llama_cpp(packaged_folder()), MODELS[options.model](folder)
        inventory, table, matrix = qp.read_inventory(source), folder / "kld.csv", None
        if options.imatrix:
            table, matrix = folder / "kld-imatrix.csv", folder / "imatrix.gguf"
            if not matrix.exists():
                write_imatrix(llama_cpp, source, tuning, IMATRIX_CHUNKS, matrix)
        setup = Setup(
            source=source, texts=(judging,), llama_cpp=llama_cpp, cache=folder / "cache",
            chunks=options.chunks, chunk_tokens=options.tokens, imatrix=matrix, threads=1,
        )  # fmt: skip
        check_conditions(Conditions.of(setup), table)
        found = measure(setup, table, options.minutes)
        measured = [t for t in quantized(inventory) if t.name in found]
        roles, by_chunk = [t.role for t in measured], np.array([found[t.name] for t in measured])
        print(f"{len(measured)} of {len(quantized(inventory))} matrices at {QTYPE}")
        importance = read_imatrix(matrix) if matrix else None
        ratios = measure_weights(source, [QTYPE], imatrix=importance).ratios()
        document = None
        if options.sensitivities:
            document = fitted_without(inventory, options.sensitivities)
        for name, evidence in (
            ("metadata alone", None),
            ("weights and matrix" if matrix else "weights", Evidence(weight_errors=ratios)),
        ):
            losses = LossTable(inventory, evidence, document)
            predicted = np.array([losses.loss_nats(t, QTYPE) for t in measured])
            report(name, predicted, by_chunk, roles)
        odd, even = by_chunk[:, 1::2], by_chunk[:, ::2]
        report("the other half of the chunks", odd.mean(axis=1), even, roles)


if __name__ == "__main__":
    main()
