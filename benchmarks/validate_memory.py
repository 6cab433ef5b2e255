"""Holds predicted memory against what published load logs printed.

    PYTHONPATH=. python benchmarks/validate_memory.py --cases CASES.jsonl.gz

Per case and device: predicted and measured weights, KV cache, compute buffer and total, in MiB. The
last line is one JSON object of shares and relative errors, each with its count ``n_...``:

- ``kv_within_1pct``: KV cache and state of a case, all devices together.
- ``gpu_weights_within_0_5pct``: weights of a GPU, where the recipe of the file is known: one whose
  types are, number by number, those that the log counts, placed by the flags as posted.
- ``compute_median_err``, ``compute_p90_err``: compute buffer of a GPU, or of the CPU where no GPU
  is used. GPUs of one case with the same two numbers count once.
- ``vram_within_3pct``: weights, KV cache and compute buffer of a GPU together. Where the recipe is
  not known the printed weights stand in for the file, which would tell them. Several GPUs count as
  one where the log does not say how the layers were shared out (no ``-ts``, which leaves that to
  the free memory, and no free memory printed).

Of a log without its command only the KV cache is compared. A case that cannot be used at all is
printed with its reason.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measured_cases import MIB, Case, read_cases
from quantplan.configuration import Resolved
from quantplan.errors import QuantplanError
from quantplan.ftypes.mixes import FTYPES, stock_mix
from quantplan.inventory import Inventory
from quantplan.placement import place
from quantplan.predict import DeviceUse, predict_resolved
from quantplan.qtypes import QTYPES

_KV_LIMIT, _WEIGHTS_LIMIT, _TOTAL_LIMIT = 0.01, 0.005, 0.03
_FILE_LIMIT = 0.002
_GIB = 2**30


@dataclass(frozen=True)
class Compared:
    """One device of one case, in bytes; None where a number was not printed or is not known."""

    device: str
    weights: tuple[int | None, int | None]
    kv: tuple[int, int | None]
    compute: tuple[int, int | None]

    @property
    def total(self) -> tuple[int, int] | None:
        """Predicted and measured bytes together; printed weights where the recipe is not known."""
        (weights, printed), (kv, kv_printed), (compute, compute_printed) = (
            self.weights, self.kv, self.compute,
        )  # fmt: skip
        if printed is None or compute_printed is None:
            return None
        predicted = (printed if weights is None else weights) + kv + compute
        return predicted, printed + (kv_printed or 0) + compute_printed


def known_recipe(case: Case) -> Inventory | None:
    """The model in the types of its file, if these can be told from what the log printed."""
    counted = {k.upper(): n for k, n in (case.row.get("tensor_types") or {}).items()}
    if not counted:
        return None
    size_gib = case.row.get("file_size_gib")
    for types in _possible_recipes(case, counted):
        written = case.inventory.with_qtypes(types)
        found: dict[str, int] = {}
        for tensor in written.tensors:
            found[tensor.qtype] = found.get(tensor.qtype, 0) + 1
        n_bytes = sum(tensor.n_bytes for tensor in written.tensors)
        is_size = not size_gib or abs(n_bytes / _GIB / size_gib - 1) < _FILE_LIMIT
        if found == counted and is_size:
            return written
    return None


def _possible_recipes(case: Case, counted: Mapping[str, int]) -> list[dict[str, str]]:
    """All matrices in one type, and every stock mix."""
    found = []
    others = [name for name in counted if name != "F32"]
    if len(others) == 1 and others[0] in QTYPES:
        matrices = [t for t in case.inventory.tensors if t.qtype != "F32"]
        found.append({tensor.name: others[0] for tensor in matrices})
    for ftype in FTYPES:
        for has_imatrix in (True, False):
            try:
                found.append(stock_mix(case.inventory, ftype, has_imatrix=has_imatrix))
            except QuantplanError:
                continue
    return found


def nominal_recipe(case: Case) -> Inventory:
    """The model with its experts in the type that the file is named after, to size streams."""
    names = re.findall(r"[A-Z]+\d\w*", str(case.row.get("quant") or "").upper().replace(" ", "_"))
    for name in names:
        base = next((q for q in (name, re.sub(r"_(M|S|L|XL)$", "", name)) if q in QTYPES), None)
        if base is None:
            base = next(
                (q for q in sorted(QTYPES, key=len, reverse=True) if name.startswith(q)), None
            )
        if base is not None and base not in ("F32", "F16", "BF16"):
            block = QTYPES[base].block
            return case.inventory.with_qtypes(
                {t.name: base for t in case.inventory.tensors
                 if "_exps" in t.name and t.shape_ne[0] % block == 0}
            )  # fmt: skip
    return case.inventory


def compare(case: Case) -> list[Compared]:
    """Every device of a case.

    Raises:
        QuantplanError: The flags contradict the model or the machine.
    """
    recipe = known_recipe(case)
    inventory = recipe or nominal_recipe(case)
    placement = place(inventory, case.machine, case.launch)
    prediction = predict_resolved(Resolved(inventory, case.launch, placement), case.machine)
    weights, kv, compute = (
        case.bytes_by_device(f"{name}_buffers_mib") for name in ("model", "kv", "compute")
    )
    return [
        _compared(use, weights, kv, compute, is_known=recipe is not None and case.has_command)
        for use in prediction.devices
    ]


def _compared(
    use: DeviceUse,
    weights: Mapping[str, int],
    kv: Mapping[str, int],
    compute: Mapping[str, int],
    *,
    is_known: bool,
) -> Compared:
    predicted = use.weights_bytes + use.padding_bytes if is_known else None
    return Compared(
        device=use.name,
        weights=(predicted, weights.get(use.name)),
        kv=(use.kv_bytes, kv.get(use.name)),
        compute=(use.compute_bytes, compute.get(use.name)),
    )


class Totals:
    """Errors over all cases."""

    def __init__(self) -> None:
        """Starts with none."""
        self.kv: list[float] = []
        self.weights: list[float] = []
        self.compute: list[float] = []
        self.vram: list[float] = []
        self.n = 0

    def add(self, case: Case, devices: list[Compared]) -> None:
        """Counts one case."""
        self.n += 1
        printed = [d.kv[1] for d in devices if d.kv[1] is not None]
        if sum(printed):
            self.kv.append(_error(sum(d.kv[0] for d in devices), sum(printed)))
        if not case.has_command:
            return
        gpus = [d for d in devices if d.device != "CPU"]
        compute = {d.compute for d in gpus or devices if d.compute[1]}
        self.compute += [_error(predicted, real) for predicted, real in compute if real]
        is_split_known = len(gpus) == 1 or case.launch.tensor_split or case.has_free_memory
        totals = [d.total for d in gpus if d.total is not None and d.total[1]]
        if not is_split_known and totals and len(totals) == len(gpus):
            totals = [(sum(t[0] for t in totals), sum(t[1] for t in totals))]
        elif not is_split_known:
            totals = []
        self.vram += [_error(*total) for total in totals]
        for predicted, real in (d.weights for d in gpus if is_split_known):
            if predicted is not None and real:
                self.weights.append(_error(predicted, real))

    def summary(self) -> dict[str, Any]:
        """Shares and errors with their counts."""
        compute = np.array(self.compute)
        return {
            "n": self.n,
            "kv_within_1pct": _share(self.kv, _KV_LIMIT),
            "n_kv_within_1pct": len(self.kv),
            "gpu_weights_within_0_5pct": _share(self.weights, _WEIGHTS_LIMIT),
            "n_gpu_weights_within_0_5pct": len(self.weights),
            "compute_median_err": round(float(np.median(compute)), 4) if len(compute) else None,
            "n_compute_median_err": len(compute),
            "compute_p90_err": round(float(np.quantile(compute, 0.9)), 4) if len(compute) else None,
            "n_compute_p90_err": len(compute),
            "vram_within_3pct": _share(self.vram, _TOTAL_LIMIT),
            "n_vram_within_3pct": len(self.vram),
        }


def _error(predicted: float, real: float) -> float:
    return abs(predicted / real - 1)


def _share(errors: list[float], limit: float) -> float | None:
    return round(float(np.mean(np.array(errors) <= limit)), 4) if errors else None


def _mib(pair: tuple[int | None, int | None]) -> str:
    texts = ["-" if n is None else f"{n / MIB:.2f}" for n in pair]
    ratio = f" ({pair[0] / pair[1]:.3f})" if pair[0] is not None and pair[1] else ""
    return f"{texts[0]:>10} | {texts[1]:>10}{ratio:8}"


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    options = parser.parse_args()
    totals, unused = Totals(), []
    print("predicted | measured (ratio) in MiB: weights, KV cache, compute buffer, total")
    for case in read_cases(options.cases):
        if not isinstance(case, Case):
            unused.append(f"{case[0].get('id')} {case[0].get('model')}: {case[1]}")
            continue
        try:
            devices = compare(case)
        except QuantplanError as error:
            unused.append(f"{case.row.get('id')} {case.row.get('model')}: {error}")
            continue
        totals.add(case, devices)
        print(*(case.row.get(field) for field in ("id", "engine", "model", "quant")))
        for device in devices:
            pairs = (device.weights, device.kv, device.compute, device.total or (None, None))
            print(f"  {device.device:5} " + "  ".join(_mib(pair) for pair in pairs))
    print(f"{totals.n} cases, {len(unused)} not used:")
    print("\n".join(f"  {text}" for text in unused))
    print(json.dumps(totals.summary()))


if __name__ == "__main__":
    main()
