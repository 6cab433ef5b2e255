"""Fits the speed model's constants to published measurements, and says how wrong it is.

Usage: python scripts/fit_speed.py CASES TYPES_ABSOLUTE TYPES_RELATIVE

CASES are measured speeds of whole models (see ``benchmarks/speed_cases.py``), TYPES_ABSOLUTE and
TYPES_RELATIVE speeds of one model in many types on one machine. Writes
``quantplan/costs/data/speed.json``.

1. Operations per weight of each type (``scripts/fit_types.py``).
2. The factors of `Factors`, for decoding and for prefill apart: robust least squares on the
   logarithm of predicted over measured seconds, with normal priors on the logarithms of the factors
   at physically plausible values. A thread with many measurements counts less for each.
3. Cross-validation: every thread is predicted by constants fitted without it. Intervals are the
   quantiles of these residuals.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed_cases import Case, read_cases, read_rows
from quantplan.costs.decode import decode_s
from quantplan.costs.factors import Factors
from quantplan.costs.prefill import prefill_s
from quantplan.costs.speed import Z80
from scripts.fit_types import fit_operations
from scripts.robust import fit_logs

TARGET = Path(__file__).parent.parent / "quantplan" / "costs" / "data" / "speed.json"
OVERLAP = 6.0
RUNTIMES = ("llama.cpp", "ik_llama.cpp")
CREDIT = (
    "Measurements published by the users and authors of llama.cpp and ik_llama.cpp in the "
    "projects' public threads, and by Thireus and contributors (GGUF-Tool-Suite)"
)
# Name: (plausible value, standard deviation of its logarithm, of the runtimes' difference).
DECODE = {
    "gpu_read": (1.05, 0.15, 0.0),
    "cpu_read": (1.1, 0.15, 0.0),
    "cpu_read_growth": (0.25, 0.5, 0.0),
    "gpu_expert_read": (1.1, 0.2, 0.0),
    "cpu_expert_read": (1.1, 0.2, 0.0),
    "gpu_unpack": (1.0, 0.08, 0.0),
    "cpu_unpack": (1.0, 0.3, 0.0),
    "gpu_launch_s": (7e-6, 0.5, 0.2),
    "gpu_expert_launch_s": (5e-6, 1.0, 0.3),
    "cpu_launch_s": (8e-6, 0.5, 0.2),
    "cpu_expert_launch_s": (15e-6, 0.7, 0.3),
    "crossing_s": (50e-6, 0.3, 0.2),
    "fixed_s": (3e-4, 1.0, 0.0),
    "gpu_cache_read": (1.1, 0.3, 0.0),
    "cpu_cache_read": (1.3, 0.4, 0.0),
    "gpu_attention": (2.0, 1.0, 1.0),
    "gpu_quantized_attention": (6.0, 1.0, 1.0),
    "gpu_latent_attention": (1.0, 1.0, 1.0),
    "cpu_attention": (4.0, 1.0, 1.0),
}
PREFILL = {
    "gpu_matrix": (2.0, 0.5, 0.3),
    "gpu_expert_matrix": (1.3, 0.5, 0.5),
    "expert_rows": (16.0, 1.0, 0.0),
    "cpu_matrix": (1.0, 0.5, 0.5),
    "cpu_prompt_read": (1.2, 0.4, 0.0),
    "link": (1.2, 0.4, 0.3),
    "gpu_prompt_attention": (3.0, 1.0, 1.0),
    "cpu_prompt_attention": (4.0, 1.0, 1.0),
    "cpu_latent_prompt_attention": (4.0, 1.0, 1.0),
    "ubatch_launch_s": (1e-5, 1.0, 0.0),
}
Array = NDArray[np.float64]


def parameters(priors: dict[str, tuple[float, float, float]]) -> tuple[list[str], Array, Array]:
    """Names, prior means and standard deviations of the logarithms that are fitted.

    A name is a factor's, which both runtimes share, or ``ik:`` and a factor's: what ik_llama.cpp's
    differs by.
    """
    names = list(priors) + [f"ik:{name}" for name, prior in priors.items() if prior[2]]
    means = [np.log(prior[0]) for prior in priors.values()] + [0.0] * (len(names) - len(priors))
    sds = [prior[1] for prior in priors.values()] + [p[2] for p in priors.values() if p[2]]
    return names, np.array(means), np.array(sds)


def factors_from(names: Sequence[str], logs: Array) -> dict[str, dict[str, float]]:
    """Factors of each runtime from the fitted logarithms."""
    by_name = dict(zip(names, logs, strict=True))
    shared = {n: v for n, v in by_name.items() if not n.startswith("ik:")}
    return {
        "llama.cpp": {n: float(np.exp(v)) for n, v in shared.items()},
        "ik_llama.cpp": {
            n: float(np.exp(v + by_name.get(f"ik:{n}", 0.0))) for n, v in shared.items()
        },
    }


def decode_errors(case: Case, factors: Factors) -> list[float]:
    """ln(predicted / measured seconds) of a case's decode speeds, by depth."""
    return [
        float(np.log(decode_s(case.traffic, case.machine, case.workload, m.depth, factors) * m.tps))
        for m in case.decode
    ]


def prefill_errors(case: Case, factors: Factors) -> list[float]:
    """ln(predicted / measured seconds) of a case's prefill speeds, by depth."""
    return [
        float(
            np.log(
                prefill_s(
                    case.traffic,
                    case.machine,
                    case.workload,
                    m.depth,
                    n_tokens=m.n_tokens,
                    op_offload=case.op_offload,
                    factors=factors,
                )
                / m.n_tokens
                * m.tps
            )
        )
        for m in case.prefill
    ]


Errors = Callable[[Case, Factors], list[float]]
NEUTRAL = {name: value for name, (value, _, _) in {**DECODE, **PREFILL}.items()}


class Fit:
    """One of the two fits: its cases, priors and residuals."""

    def __init__(
        self,
        cases: Sequence[Case],
        errors: Errors,
        priors: dict[str, tuple[float, float, float]],
        operations: dict[str, Any],
    ) -> None:
        """Keeps the cases that are to be fitted."""
        self.cases = [c for c in cases if errors(c, self._factors(operations, c, NEUTRAL))]
        self.errors, self.operations = errors, operations
        self.names, self.means, self.sds = parameters(priors)
        per_thread = Counter(c.thread for c in self.cases)
        self.weights = np.array([
            0.0 if case.doubt else (per_thread[case.thread] ** -0.5 / n) ** 0.5
            for case in self.cases
            for n in [len(self.residuals_of(case, self.means))]
            for _ in range(n)
        ])  # fmt: skip
        self.owner = np.array([
            i for i, c in enumerate(self.cases) for _ in self.residuals_of(c, self.means)
        ])  # fmt: skip

    @staticmethod
    def _factors(operations: dict[str, Any], case: Case, values: dict[str, float]) -> Factors:
        return Factors(
            operations=operations[case.runtime], overlap=OVERLAP, **{**NEUTRAL, **values}
        )

    def residuals_of(self, case: Case, logs: Array) -> list[float]:
        """Residuals of one case."""
        values = factors_from(self.names, logs)[case.runtime]
        return self.errors(case, self._factors(self.operations, case, values))

    def residuals(self, logs: Array) -> Array:
        """Residuals of all cases, one after the other."""
        return np.array([r for case in self.cases for r in self.residuals_of(case, logs)])

    def run(self, start: Array, leave_out: str | None = None, steps: int = 12) -> Array:
        """Fits, without the cases of a thread if one is named."""
        weights = self.weights.copy()
        if leave_out is not None:
            left = np.array([c.thread == leave_out for c in self.cases])
            weights[left[self.owner]] = 0.0
        return fit_logs(self.residuals, start, self.means, self.sds, weights=weights, steps=steps)

    def cross_validated(self, fitted: Array) -> list[list[float]]:
        """Residuals of each case by constants that were fitted without its thread."""
        by_thread = {
            thread: self.run(fitted, leave_out=thread, steps=3)
            for thread in dict.fromkeys(c.thread for c in self.cases)
        }
        return [self.residuals_of(c, by_thread[c.thread]) for c in self.cases]


def quantiles(cases: Sequence[Case], residuals: Sequence[list[float]]) -> tuple[float, float]:
    """Measured over predicted speed that four fifths of the cases are within.

    Every case counts once, whatever its number of depths; the level is widened for the finite
    number of cases (conformal prediction).
    """
    pairs = [(r, 1 / len(rs)) for c, rs in zip(cases, residuals, strict=True) for r in rs]
    pairs.sort()
    values = np.array([p[0] for p in pairs])
    at = (np.cumsum([p[1] for p in pairs]) - 0.5 * np.array([p[1] for p in pairs])) / len(cases)
    tail = max(0.0, 0.1 - 0.1 / len(cases))
    low, high = np.interp([tail, 1 - tail], at, values)
    return float(f"{np.exp(low):.4g}"), float(f"{np.exp(high):.4g}")


def intervals(
    cases: Sequence[Case], residuals: Sequence[list[float]]
) -> dict[str, tuple[float, float]]:
    """`quantiles` of each kind of case."""
    found = {}
    for where in ("gpu", "hybrid", "cpu"):
        chosen = [i for i, case in enumerate(cases) if case.where == where and not case.doubt]
        found[where] = quantiles([cases[i] for i in chosen], [residuals[i] for i in chosen])
    return found


def errors_of(cases: Sequence[Case], residuals: Sequence[list[float]]) -> dict[str, float]:
    """Errors of the stated speeds (not of the other depths), doubtful ones included."""
    stated = np.array([r[0] for r in residuals])
    relative = np.abs(np.exp(-stated) - 1)
    every = np.array([x for r in residuals for x in r])
    inside = []
    for i, case in enumerate(cases):
        others = [j for j, c in enumerate(cases) if c.thread != case.thread]
        ends = intervals([cases[j] for j in others], [residuals[j] for j in others])[case.where]
        inside.append(ends[0] <= np.exp(residuals[i][0]) <= ends[1])
    found = {
        "n": float(len(cases)),
        "median_error": np.median(relative),
        "p90_error": np.quantile(relative, 0.9),
        "bias": np.exp(-np.median(stated)) - 1,
        "median_error_all_depths": np.median(np.abs(np.exp(-every) - 1)),
        "coverage80": np.mean(inside),
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


# Half of a normal distribution is within so many standard deviations.
Z50 = 0.6745


def one_sigma(errors: Sequence[float]) -> float:
    """What 68 % of the absolute errors are below: the standard deviation if they are normal."""
    return float(np.quantile(np.abs(errors), 0.683))


def spread(cases: Sequence[Case], residuals: Sequence[list[float]]) -> dict[str, float]:
    """Standard deviations (ln): between runs of a model on a rig, for GPUs and CPUs, and within.

    Cases of one rig, model, program and thread, which is one day or nearly, are a group. Within:
    from the median difference between two cases of a group, over the square root of two; a third of
    the differences are several times as large, because a setting or a version is not stated, and
    these are no scatter. Between: what is left of the spread of all cases, and at least half of
    that within. Left: standard deviation, over that within, that remains after one measurement.
    Noise of a rig: the same as within for cases of one rig and program, whatever their model and
    thread.
    """
    known = [(c, rs[0]) for c, rs in zip(cases, residuals, strict=True) if not c.doubt]
    of_rig = [
        (a, b, s - r)
        for (a, r), (b, s) in itertools.combinations(known, 2)
        if (a.rig, a.runtime) == (b.rig, b.runtime)
    ]
    of_model = [(a, b, d) for a, b, d in of_rig if a.model == b.model]
    alike = [abs(d) for a, b, d in of_model if a.thread == b.thread]
    within = float(np.median(alike)) / Z50 / 2**0.5
    found = {"noise": within, "rig_noise": one_sigma([d for _, _, d in of_rig]) / 2**0.5}
    for kind, where in (("gpu", ("gpu",)), ("cpu", ("cpu", "hybrid"))):
        some = [rs[0] for c, rs in zip(cases, residuals, strict=True) if c.where in where]
        found[kind] = max(one_sigma(some) ** 2 - within**2, (within / 2) ** 2) ** 0.5
    # A program changes with time, so that threads differ: four fifths of all pairs are within.
    apart = float(np.quantile([abs(d) for _, _, d in of_model], 0.8))
    found["left"] = apart / (Z80 * within)
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def fit(
    cases: Sequence[Case], errors: Errors, priors: dict[str, Any], operations: dict[str, Any]
) -> tuple[Fit, dict[str, dict[str, float]], list[list[float]]]:
    """Fits and cross-validates; returns the fit, the factors by runtime and the residuals."""
    found = Fit(cases, errors, priors, operations)
    logs = found.run(found.means)
    return found, factors_from(found.names, logs), found.cross_validated(logs)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def main() -> None:
    """Fits, prints and writes the constants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("types_absolute", type=Path)
    parser.add_argument("types_relative", type=Path)
    arguments = parser.parse_args()
    files = (arguments.cases, arguments.types_absolute, arguments.types_relative)
    operations, type_errors = fit_operations(files[1], files[2], OVERLAP)
    cases, unusable = read_cases(read_rows(files[0]))
    decode, decode_factors, decode_left = fit(cases, decode_errors, DECODE, operations)
    prefill, prefill_factors, prefill_left = fit(cases, prefill_errors, PREFILL, operations)
    data = {
        "about": "Constants of the speed model; quantplan/costs/factors.py says what each is.",
        "date": datetime.date.today().isoformat(),
        "made_by": "scripts/fit_speed.py",
        "credit": CREDIT,
        "data_sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
        "cross_validation": {
            "how": "each thread predicted by constants fitted without it; errors of the speed",
            "unusable": len(unusable),
            "decode": errors_of(decode.cases, decode_left),
            "prefill": errors_of(prefill.cases, prefill_left),
            "types_median_error": rounded(type_errors),
        },
        "measured_over_predicted": {
            "decode": intervals(decode.cases, decode_left),
            "prefill": intervals(prefill.cases, prefill_left),
        },
        "calibration": {
            "decode": spread(decode.cases, decode_left),
            "prefill": spread(prefill.cases, prefill_left),
        },
        "factors": {
            runtime: {
                "overlap": OVERLAP,
                **rounded(decode_factors[runtime]),
                **rounded(prefill_factors[runtime]),
            }
            for runtime in RUNTIMES
        },
        "operations_per_weight": operations,
    }
    print(json.dumps({k: data[k] for k in list(data)[5:9]}, indent=1))
    TARGET.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
