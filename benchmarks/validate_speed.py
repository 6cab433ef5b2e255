"""How wrong the speed model is on published measurements.

Usage: python benchmarks/validate_speed.py --cases FILE [--cross-validate]

Predicts every case with the shipped constants; with --cross-validate with constants fitted without
the case's thread (the type table stays as shipped). Prints each case, totals by kind of case, and
as the last line one JSON object. A case that cannot be used is listed with its reason.

Errors are |predicted / measured speed - 1| of the speed that a case states; the speeds at other
depths of its sweep are summed up apart. Doubtful cases (paging, outliers in the words of those who
collected them) count like all others.
"""

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed_cases import Case, Measured, read_cases, read_rows
from quantplan.costs import load_data
from quantplan.costs.calibration import Measurement, calibrate, for_model
from quantplan.costs.decode import decode_s
from quantplan.costs.factors import Factors, shipped
from quantplan.costs.prefill import prefill_s
from quantplan.costs.speed import Z80, interval
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine

Array = NDArray[np.float64]
Choose = Callable[[Case], Factors]
_MIN_ALTERNATIVES = 4


def predicted_tps(
    case: Case, m: Measured, factors: Factors, machine: Machine | None = None
) -> float:
    """Predicted tokens per second of one measurement."""
    devices = machine or case.machine
    if m.n_tokens == 1:
        return 1 / decode_s(case.traffic, devices, case.workload, m.depth, factors)
    seconds = prefill_s(
        case.traffic,
        devices,
        case.workload,
        m.depth,
        n_tokens=m.n_tokens,
        op_offload=case.op_offload,
        factors=factors,
    )
    return m.n_tokens / seconds


def logs(case: Case, measured: Sequence[Measured], factors: Factors) -> list[float]:
    """ln(predicted / measured) of some of a case's speeds."""
    return [math.log(predicted_tps(case, m, factors) / m.tps) for m in measured]


def ranks(values: Sequence[float]) -> Array:
    """Ranks from 0; equal values share their mean rank."""
    array = np.asarray(values)
    return np.array([((array < v).sum() + (array <= v).sum() - 1) / 2 for v in array])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; nan where one side is constant or shorter than two."""
    x, y = ranks(a), ranks(b)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def relative(errors: Sequence[float]) -> Array:
    """|predicted / measured - 1| from logarithms."""
    found: Array = np.abs(np.exp(np.asarray(errors, dtype=float)) - 1)
    return found


def print_cases(cases: Sequence[Case], choose: Choose) -> None:
    """One line per case: predicted and measured, at the depth that is stated."""
    ratio = f"{'measured':>9}{'ratio':>7}"
    header = f"{'case':<6}{'kind':<8}{'model and quant':<44}{'depth':>7}{'decode':>9}"
    print(f"{header}{ratio}  in{'prefill':>9}{ratio}")
    for case in cases:
        factors = choose(case)
        line = f"{case.id:<6}{case.where:<8}{case.model + ' ' + case.quant:<44.43}"
        if case.decode:
            m = case.decode[0]
            tps = predicted_tps(case, m, factors)
            inside = "yes" if is_inside(case, tps) else "no"
            line += f"{m.depth:>7.0f}{tps:>9.2f}{m.tps:>9.2f}{tps / m.tps:>7.2f} {inside:>3}"
        else:
            line += f"{'':>36}"
        if case.prefill:
            m = case.prefill[0]
            tps = predicted_tps(case, m, factors)
            line += f"{tps:>9.1f}{m.tps:>9.1f}{tps / m.tps:>7.2f}"
        print(line + (f"  ({case.doubt})" if case.doubt else ""))


def is_inside(case: Case, tps: float) -> bool:
    """Whether the measured decode speed is inside the stated interval of a prediction."""
    ends = interval("decode", case.where, case.machine, tps)
    return ends.low <= case.decode[0].tps <= ends.high


def totals(cases: Sequence[Case], choose: Choose) -> dict[str, float | None]:
    """The figures of the last line, for some cases."""
    decode = [c for c in cases if c.decode]
    predicted = [predicted_tps(c, c.decode[0], choose(c)) for c in decode]
    measured = [c.decode[0].tps for c in decode]
    errors = [math.log(p / m) for p, m in zip(predicted, measured, strict=True)]
    prompts = [logs(c, c.prefill[:1], choose(c))[0] for c in cases if c.prefill]
    inside = [is_inside(c, p) for c, p in zip(decode, predicted, strict=True)]
    return {
        "n_decode": len(decode),
        "decode_median_err": _rounded(float(np.median(relative(errors))) if errors else math.nan),
        "decode_p90_err": _rounded(
            float(np.quantile(relative(errors), 0.9)) if errors else math.nan
        ),
        "decode_bias": _rounded(math.exp(np.median(errors)) - 1 if errors else math.nan),
        "decode_coverage80": _rounded(float(np.mean(inside)) if inside else math.nan),
        "decode_spearman": _rounded(spearman(predicted, measured)),
        "n_prefill": len(prompts),
        "prefill_median_err": _rounded(
            float(np.median(relative(prompts))) if prompts else math.nan
        ),
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def print_curves(cases: Sequence[Case], choose: Choose) -> None:
    """Errors at all depths, and of the slowdown from the first depth to the last."""
    for what in ("decode", "prefill"):
        every = [x for c in cases for x in logs(c, getattr(c, what), choose(c))]
        slowing = [
            found[-1] - found[0]
            for c in cases
            for found in [logs(c, getattr(c, what), choose(c))]
            if len(found) > 1
        ]
        if every:
            print(
                f"{what} at all depths: {len(every)} speeds, median error "
                f"{np.median(relative(every)):.3f}; last over first depth: {len(slowing)} curves, "
                f"median error {np.median(relative(slowing)) if slowing else math.nan:.3f}"
            )


def alternatives(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases by what a person chooses between: model, types, places and program.

    Runs that differ in threads, ubatch, cache type or date are repetitions of one alternative.
    """
    found: dict[tuple[str, str, str], list[Case]] = defaultdict(list)
    for case in cases:
        found[case.model, case.runtime, repr(case.traffic.reads)].append(case)
    return list(found.values())


def print_ranking(cases: Sequence[Case], choose: Choose) -> None:
    """Spearman within each source and rig that lists at least four alternatives.

    Of the runs of one alternative the mean logarithm counts.
    """
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        if case.decode:
            groups[case.thread, case.rig].append(case)
    found = []
    for (thread, rig), some in groups.items():
        choices = alternatives(some)
        if len(choices) >= _MIN_ALTERNATIVES:
            measured = [fmean(math.log(c.decode[0].tps) for c in runs) for runs in choices]
            predicted = [
                fmean(math.log(predicted_tps(c, c.decode[0], choose(c))) for c in runs)
                for runs in choices
            ]
            rho = spearman(predicted, measured)
            found.append((rho, len(choices)))
            print(
                f"ranking {rho:6.2f} of {len(choices):>2} alternatives ({len(some)} runs): "
                f"{thread}, {rig[:60]}"
            )
    if found:
        weighted = np.average([r for r, _ in found], weights=[n for _, n in found])
        print(
            f"ranking within {len(found)} sources: median Spearman "
            f"{np.median([r for r, _ in found]):.3f}, mean by alternatives {weighted:.3f}"
        )
    print_pairs([p for some in groups.values() for p in itertools.combinations(some, 2)], choose)


def print_pairs(pairs: Sequence[tuple[Case, Case]], choose: Choose) -> None:
    """Pairs of alternatives that are ranked right, of those that were measured to differ.

    Runs of the same model on the same rig scatter (``speed.json``); a smaller difference between
    two runs says nothing. Pairs that are the same to the model, with other threads for example, are
    counted apart.
    """
    scatter = Z80 * 2**0.5 * load_data("speed.json")["calibration"]["decode"]["noise"]
    n_right = n_same = n_judged = 0
    for a, b in pairs:
        measured = math.log(a.decode[0].tps / b.decode[0].tps)
        predicted = math.log(
            predicted_tps(a, a.decode[0], choose(a)) / predicted_tps(b, b.decode[0], choose(b))
        )
        if abs(measured) > scatter:
            n_judged += predicted != 0
            n_same += predicted == 0
            n_right += predicted * measured > 0
    share = n_right / n_judged if n_judged else math.nan
    print(
        f"pairs of one source and rig whose speeds differ by more than {math.exp(scatter) - 1:.1%}:"
        f" {share:.3f} of {n_judged} ranked right, {n_same} more are the same to the model"
    )


def print_calibrated(cases: Sequence[Case], choose: Choose) -> None:
    """Errors where one other case of the same rig and program has calibrated the machine.

    Every ordered pair of cases counts; of the case that calibrates, the speed that it states. Pairs
    of one source are from one day or nearly, others may be from versions that are months apart.
    """
    rigs: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        if case.decode:
            rigs[case.rig, case.runtime].append(case)
    before: dict[str, list[float]] = defaultdict(list)
    after: dict[str, list[float]] = defaultdict(list)
    inside = []
    for known, other in (p for some in rigs.values() for p in itertools.permutations(some, 2)):
        stated = known.decode[0]
        run = Measurement(known.traffic, known.workload, stated.depth, stated.tps, 1, known.runtime)
        found = calibrate(known.machine, [run], factors=choose(known))
        machine = for_model(found, other.traffic.architecture)
        machine = _like(machine, other)
        m = other.decode[0]
        tps = predicted_tps(other, m, choose(other), machine)
        ends = interval("decode", other.where, machine, tps)
        inside.append(ends.low <= m.tps <= ends.high)
        for key in _kinds(known, other):
            before[key].append(logs(other, [m], choose(other))[0])
            after[key].append(math.log(tps / m.tps))
    for key, errors in before.items():
        print(
            f"one calibrating case on the same rig, {key}: {len(after[key])} pairs, median error "
            f"{np.median(relative(errors)):.3f} before, {np.median(relative(after[key])):.3f} "
            "after"
        )
    if inside:
        print(f"inside the calibrated 80 % interval: {np.mean(inside):.3f}")


def _kinds(known: Case, other: Case) -> Iterator[str]:
    """What a pair of cases counts for."""
    yield "all"
    yield "same model" if known.model == other.model else "other model"
    yield "same source" if known.thread == other.thread else "other source"
    yield "same kind" if known.where == other.where else "other kind"


def _like(machine: Machine, case: Case) -> Machine:
    """The case's machine, as slow as a calibrated one (whose run need not state its RAM)."""

    def slowed(device: Device, like: Device) -> Device:
        return device.model_copy(update={"decode_slowdown": like.decode_slowdown})

    gpus = case.machine.gpus
    return case.machine.model_copy(
        update={
            "gpus": tuple(slowed(g, machine.gpus[0]) for g in gpus) if machine.gpus else gpus,
            "ram": slowed(case.machine.ram, machine.ram),
            "speed_log_sd": machine.speed_log_sd,
        }
    )


def cross_validated(cases: Sequence[Case]) -> Choose:
    """Constants fitted without the thread of a case."""
    from scripts.fit_speed import (  # noqa: PLC0415 (only this mode fits)
        DECODE,
        PREFILL,
        Fit,
        decode_errors,
        factors_from,
        prefill_errors,
    )

    operations = load_data("speed.json")["operations_per_weight"]
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for errors, priors in ((decode_errors, DECODE), (prefill_errors, PREFILL)):
        fit = Fit(cases, errors, priors, operations)
        whole = fit.run(fit.means)
        for thread in dict.fromkeys(c.thread for c in cases):
            left_out = fit.run(whole, leave_out=thread, steps=3)
            for runtime, factors in factors_from(fit.names, left_out).items():
                found[thread][runtime] |= factors

    def choose(case: Case) -> Factors:
        overlap = shipped(case.runtime).overlap
        return Factors(
            operations=operations[case.runtime],
            overlap=overlap,
            **found[case.thread][case.runtime],
        )

    return choose


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--cross-validate", action="store_true")
    arguments = parser.parse_args()
    cases, unusable = read_cases(read_rows(arguments.cases))
    choose: Choose = lambda case: shipped(case.runtime)  # noqa: E731 (a name for either choice)
    if arguments.cross_validate:
        choose = cross_validated(cases)
    print_cases(cases, choose)
    for identity, reason in unusable:
        print(f"not used {identity}: {reason}")
    print(f"{len(cases)} cases used, {len(unusable)} not")
    for where in ("gpu", "hybrid", "cpu"):
        print(f"{where}: {json.dumps(totals([c for c in cases if c.where == where], choose))}")
    print_curves(cases, choose)
    print_ranking(cases, choose)
    print_calibrated(cases, choose)
    print(json.dumps(totals(cases, choose)))


if __name__ == "__main__":
    main()
