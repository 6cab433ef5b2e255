"""Fits the factors of the compute-buffer model.

    python scripts/fit_compute.py --cases CASES.jsonl.gz --measured MEASURED.jsonl [MEASURED.jsonl ...]

CASES are published load logs (``benchmarks/measured_cases.py``), for ik_llama.cpp and for
llama.cpp of 2025; MEASURED comes from ``scripts/measure_compute.py``, for present llama.cpp. Writes
``quantplan/costs/data/compute.json``: factors that are 0 or more, by least squares of the relative
error. Errors and intervals come from fits that leave out one architecture at a time (present
llama.cpp) or one thread at a time (logs).
"""

import argparse
import datetime
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measured_cases import Case, read_cases
from quantplan.costs.compute import Work, graph_key, graph_sizes, runtime_of, streamed_bytes
from quantplan.errors import InputError
from quantplan.formats.llama_args import parse_flags
from quantplan.hardware import Device, Machine
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.placement import Launch, Placement, place

OUT = Path(__file__).parents[1] / "quantplan/costs/data/compute.json"
_SIZES = (
    "mask", "mask_inputs", "residual", "queries", "latents", "convolved", "ffn", "experts_middle",
    "experts_out", "scores", "logits", "rope_copies", "expanded", "expanded_pieces",
)  # fmt: skip
# With fewer buffers a fit says more about them than about the graph.
_LEAST_BUFFERS = 8
_STEPS, _ROUNDS = 4000, 12
_TERABYTE = 2**40
# What the graphs of the published logs are known to hold beside fitted parts: the logits of every
# token with the rows that they are made from; around a streamed matrix the rows of one ubatch.
_OUTPUT = {"logits": 1.0, "residual": 2.0}
_STREAMING = {"mask": 2.0, "experts_middle": 1.0, "residual": 5.0}


@dataclass(frozen=True)
class Buffer:
    """A measured compute buffer."""

    runtime: str
    key: str
    source: str
    sizes: dict[str, float]
    n_bytes: int


def measured_buffers(path: Path) -> list[Buffer]:
    """Buffers that ``scripts/measure_compute.py`` measured."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        inventory = read_inventory(row["model"])
        launch = parse_flags(row["flags"], inventory, llama_cpp_build=row["build"])
        gpus = [Device.gpu(i, _TERABYTE, 1e12, margin_bytes=0) for i in range(row["n_gpus"])]
        machine = Machine(gpus=tuple(gpus), ram=Device.ram(_TERABYTE, 1e11, margin_bytes=0))
        placement = place(inventory, machine, launch)
        sizes = graph_sizes(inventory.architecture, inventory.n_vocab, launch)
        for device, n_bytes in zip(machine.devices, row["compute_bytes"], strict=True):
            work = work_on(inventory, placement, device)
            key = graph_key(inventory.architecture, launch, work)
            found.append(Buffer(runtime_of(launch), key, row["architecture"], sizes, n_bytes))
    return [buffer for buffer in found if buffer.n_bytes]


def work_on(inventory: Inventory, placement: Placement, device: Device) -> Work:
    """What a device computes."""
    return Work(
        device_kind=device.kind,
        has_layers=device.name in placement.layers,
        has_experts=any(
            device.name in homes and "_exps" in name for name, homes in placement.tensors.items()
        ),
        has_output=device.name == placement.output,
    )


def case_buffers(case: Case) -> list[Buffer]:
    """Buffers of a published log where neither output nor streamed weights decide."""
    inventory, launch = case.inventory, case.launch
    measured = case.bytes_by_device("compute_buffers_mib")
    caches = case.bytes_by_device("kv_buffers_mib")
    placement = _placement(case)
    n_copies = (case.row.get("flags") or {}).get("n_copies") or 1
    found = []
    for device in case.machine.devices:
        n_bytes = measured.get(device.name, 0)
        if not n_bytes or (device.kind == "cpu" and case.machine.gpus):
            continue
        arch = inventory.architecture
        sizes = graph_sizes(arch, inventory.n_vocab, launch, n_copies)
        if placement is not None and streamed_bytes(inventory, launch, placement, case.machine):
            continue
        output = sum(factor * sizes[name] for name, factor in _OUTPUT.items())
        if n_bytes < 1.15 * output and (device.kind == "cpu" or device == case.machine.gpus[-1]):
            continue
        has_experts = placement is not None and work_on(inventory, placement, device).has_experts
        work = Work(device.kind, has_layers=bool(caches.get(device.name)), has_experts=has_experts)
        key = graph_key(arch, launch, work)
        found.append(Buffer(runtime_of(launch), key, case.row["source"][:40], sizes, n_bytes))
    # Equal GPUs of one log say the same thing once.
    return list({(buffer.key, buffer.n_bytes): buffer for buffer in found}.values())


def _placement(case: Case) -> Placement | None:
    try:
        return place(case.inventory, case.machine, case.launch)
    except InputError:
        return None


def fit_rows(table: NDArray[np.float64], n_bytes: NDArray[np.float64], n_rows: int) -> Any:
    """Factors of one or two sums whose largest counts; the second starts as the larger buffers."""
    part = table[:, 0] * 0 if n_rows == 1 else (n_bytes / table.sum(1) > np.median(n_bytes / table.sum(1))) * 1.0
    rows = np.zeros((n_rows, table.shape[1]))
    for _ in range(_ROUNDS):
        for index in range(n_rows):
            mine = part == index
            if mine.any():
                rows[index] = _non_negative(table[mine] / n_bytes[mine, None])
        if n_rows == 1:
            break
        part = np.argmax(table @ rows.T, axis=1).astype(float)
    return rows


def _non_negative(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares of ``table @ factors - 1`` with factors of 0 or more, by projected gradient."""
    scale = np.linalg.norm(table, axis=0)
    used = scale > 0
    scaled = table[:, used] / scale[used]
    gram, target = scaled.T @ scaled, scaled.sum(0)
    step = 1 / np.linalg.norm(gram, 2)
    factors = np.full(int(used.sum()), 0.1)
    for _ in range(_STEPS):
        factors = np.maximum(0, factors - step * (gram @ factors - target))
    found = np.zeros(table.shape[1])
    found[used] = factors / scale[used]
    return found


def fit(buffers: Sequence[Buffer]) -> dict[str, Any]:
    """The fit of one kind of graph, with one sum or two, whichever predicts others better."""
    table = np.array([[b.sizes.get(name, 0.0) for name in _SIZES] for b in buffers])
    n_bytes = np.array([b.n_bytes for b in buffers], dtype=float)
    sources = np.array([b.source for b in buffers])
    best: tuple[float, int, NDArray[np.float64]] | None = None
    for n_rows in (1, 2):
        ratios = _left_out(table, n_bytes, sources, n_rows)
        error = float(np.median(np.abs(1 / ratios - 1)) + np.quantile(np.abs(1 / ratios - 1), 0.9))
        if best is None or error < 0.9 * best[0]:
            best = (error, n_rows, ratios)
    if best is None:
        raise ValueError("no fit")
    rows, ratios = fit_rows(table, n_bytes, best[1]), best[2]
    errors = np.abs(1 / ratios - 1)
    return {
        "factors": [
            {n: round(float(f), 3) for n, f in zip(_SIZES, row, strict=True) if f > 5e-3}
            for row in rows
        ],
        "interval": [round(float(np.quantile(ratios, q)), 3) for q in (0.05, 0.95)],
        "n": len(buffers),
        "median_error": round(float(np.median(errors)), 4),
        "p90_error": round(float(np.quantile(errors, 0.9)), 4),
    }


def _left_out(table: Any, n_bytes: Any, sources: Any, n_rows: int) -> NDArray[np.float64]:
    """Measured by predicted, each source predicted from the others; by halves where there is one."""
    names = sorted(set(sources))
    if len(names) == 1:
        sources = np.arange(len(n_bytes)) % 4
        names = sorted(set(sources))
    ratios = np.ones(len(n_bytes))
    for name in names:
        out = sources == name
        rows = fit_rows(table[~out], n_bytes[~out], n_rows)
        ratios[out] = n_bytes[out] / np.maximum(1.0, (table[out] @ rows.T).max(1))
    return ratios


def main() -> None:
    """Fits and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--measured", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    buffers = [b for path in options.measured for b in measured_buffers(path)]
    buffers += [b for c in read_cases(options.cases) if isinstance(c, Case) for b in case_buffers(c)]
    groups: dict[tuple[str, str], list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        groups[buffer.runtime, buffer.key].append(buffer)
    fits: dict[str, dict[str, Any]] = defaultdict(dict)
    for (runtime, key), members in sorted(groups.items()):
        if len(members) < _LEAST_BUFFERS:
            print(f"{runtime:18} {key:36} {len(members):4} buffers: too few")
            continue
        fits[runtime][key] = found = fit(members)
        print(f"{runtime:18} {key:36} {found}")
    for runtime in fits:
        if runtime != "llama.cpp":
            fits[runtime] |= {"output": _known(_OUTPUT)}
        fits[runtime] |= {"streaming": _known(_STREAMING)}
    OUT.write_text(json.dumps({"provenance": _provenance(options), "fits": fits}, indent=1) + "\n")


def _known(factors: dict[str, float]) -> dict[str, Any]:
    """Factors that follow from the graph itself."""
    interval = [1.0, 1.0] if factors is _OUTPUT else [0.5, 2.0]
    return {"factors": [factors], "interval": interval, "n": 0, "median_error": 0, "p90_error": 0}


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    paths = [options.cases, *options.measured]
    return {
        "script": "scripts/fit_compute.py",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "data_sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths},
    }


if __name__ == "__main__":
    main()
