"""Ranks the tensor types of one model on one machine by predicted and by measured decode speed.

Usage: python benchmarks/rank_types.py TYPES_ABSOLUTE [--leave-out TYPES_RELATIVE]

Prints Spearman's rank correlation and the median error of the ratio to Q4_K for every machine and
program of the table. Tables that `scripts/fit_types.py` fitted operations to are marked; with
``--leave-out`` each is predicted by operations that were fitted without its machine.
"""

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed_recipes import types_in
from benchmarks.validate_speed import spearman
from quantplan import Device, Machine
from quantplan.costs.decode import read_s
from quantplan.costs.factors import Factors, shipped
from quantplan.costs.traffic import Read
from quantplan.errors import MachineError
from quantplan.hardware.table import find_cpu
from quantplan.qtypes import Runtime
from scripts.fit_types import fit_operations, is_fitted

_MIN_ALTERNATIVES = 4
# A dense model of about 8e9 weights, of which the embedding's are not read, in 225 matrices.
_READ_SHARE, _MATRICES = 0.935, 225
_GIB = 2**30


def device_of(hardware: str, backend: str, note: str) -> Device | None:
    """The device that a table names; None where it is not known."""
    name = re.sub(r"\d+W\b|\(.*?\)|\d+-core", "", hardware).strip()
    if backend.startswith("CPU"):
        threads = re.search(r"(\d+) threads", f"{note} {hardware}")
        rates = find_cpu(name.replace("Ryzen ", "Ryzen 9 "))
        cores, rate = rates or (8, 110e9)  # an M2 Max reads about so much with its cores
        return Device.ram(2**40, rate, cores=int(threads[1]) if threads else cores)
    try:
        return Machine.parse(f"{name} + 1TiB@1GB/s").gpus[0]
    except MachineError:
        return None


def predicted_s(device: Device, row: dict[str, str], qtype: str, factors: Factors) -> float:
    """Seconds per token for a model that has one type."""
    n_bytes = float(row["size_gib"]) * _GIB * _READ_SHARE
    n_weights = n_bytes * 8 / float(row["bpw"]) if row["bpw"] else 7.5e9
    read = Read(qtype, False, True, n_bytes, n_weights, n_bytes, n_weights, _MATRICES)
    return read_s(device, read, factors) + factors.fixed_s


class _FactorsWithout(dict[tuple[str, Runtime], Factors]):
    """The shipped factors, with operations fitted without a machine where the tables are there."""

    def __init__(self, absolute: Path, relative: Path | None) -> None:
        super().__init__()
        self._absolute, self._relative = absolute, relative

    def __missing__(self, key: tuple[str, Runtime]) -> Factors:
        hardware, runtime = key
        found = shipped(runtime)
        if self._relative is not None:
            tables, _ = fit_operations(self._absolute, self._relative, found.overlap, hardware)
            found = replace(found, operations=tables[runtime])
        self[key] = found
        return found


def main() -> None:
    """Prints one line per machine and program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types_absolute", type=Path)
    parser.add_argument("--leave-out", type=Path, metavar="TYPES_RELATIVE")
    options = parser.parse_args()
    factors = _FactorsWithout(options.types_absolute, options.leave_out)
    groups: dict[tuple[str, ...], list[tuple[str, float, float]]] = defaultdict(list)
    fitted = set()
    with options.types_absolute.open(newline="") as file:
        for row in csv.DictReader(file):
            device = device_of(row["hardware"], row["backend"], row["note"])
            names = types_in(row["quant"])
            if device is None or not names or not row["size_gib"] or "tg" not in row["test"]:
                continue
            runtime: Runtime = "ik_llama.cpp" if "ik_llama" in row["engine"] else "llama.cpp"
            key = (row["source"].split(":")[0], row["hardware"], row["engine"])
            if is_fitted(row):
                fitted.add(key)
            seconds = predicted_s(device, row, names[0], factors[row["hardware"], runtime])
            groups[key].append((names[0], 1 / seconds, float(row["tps"])))
    found: dict[bool, list[float]] = defaultdict(list)
    for table, rows in groups.items():
        if len(rows) < _MIN_ALTERNATIVES:
            continue
        rho = spearman([r[1] for r in rows], [r[2] for r in rows])
        base = next((r for r in rows if r[0] == "Q4_K"), rows[0])
        errors = [abs(math.log(p / base[1] * base[2] / m)) for _, p, m in rows]
        found[table in fitted].append(rho)
        print(
            f"{rho:6.3f} of {len(rows):>2} types, ratios to {base[0]} within "
            f"{np.median(errors):.3f}: {', '.join(table)}{' (fitted)' if table in fitted else ''}"
        )
    for is_known, some in found.items():
        said = "fitted" if is_known else "not fitted"
        print(f"{said}: median Spearman {np.median(some):.3f} of {len(some)} tables")


if __name__ == "__main__":
    main()
