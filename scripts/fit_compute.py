"""Fits the factors of the compute-buffer model.

    python scripts/fit_compute.py --cases CASES.jsonl.gz --measured MEASURED.jsonl ...

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
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measured_cases import Case, read_cases
from quantplan.costs.compute import Work, graph_keys, graph_sizes, runtime_of, streamed_bytes
from quantplan.errors import InputError, UnsupportedModelError
from quantplan.formats.llama_args import parse_flags
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.placement import Placement, place
from scripts.measure_compute import read_model

Floats = NDArray[np.float64]
OUT = Path(__file__).parents[1] / "quantplan/costs/data/compute.json"
_SIZES = (
    "mask_inputs", "mask", "first_mask", "residual", "queries", "latents", "convolved", "ffn",
    "experts_middle", "experts_out", "scores", "logits", "rope_copies", "expanded",
    "expanded_pieces", "joined",
)  # fmt: skip
# With fewer buffers a fit says more about them than about the graph.
_LEAST_BUFFERS = 8
_ROUNDS = 8
_TERABYTE = 2**40
# Latent attention of ik_llama.cpp was rewritten up to this day (pull requests 246 to 262).
_IK_LATENT_SINCE = datetime.date(2025, 3, 19)
# The published logs are too few to say what their graphs hold, only how much of it: these factors
# follow from the graphs (a mask in F32 and one in F16, logits of every token, rows of the heads),
# and each weighs as much as one measured buffer.
_ONLY_EXPERTS = {"experts_out": 1.0, "experts_middle": 1.0, "residual": 1.0}
_EXPECTED: dict[str, dict[str, dict[str, float]]] = {
    "ik_llama.cpp": {
        "gpu plain flash experts": _ONLY_EXPERTS,
        "gpu plain scores experts": _ONLY_EXPERTS,
        "gpu plain flash layers": {"mask_inputs": 4, "mask": 2, "queries": 6},
        "gpu plain flash layers experts": {
            "mask_inputs": 4, "mask": 2, "queries": 2, "residual": 1, "experts_out": 1,
        },
        "gpu plain scores layers": {"mask_inputs": 4, "scores": 1, "queries": 3},
        "gpu latent flash layers": {
            "mask_inputs": 2, "mask": 1, "first_mask": 2, "residual": 5, "rope_copies": 2.5,
            "expanded": 1, "expanded_pieces": 1,
        },
        "gpu latent scores layers": {"mask_inputs": 4, "scores": 1, "latents": 3, "joined": 1},
        "cpu plain flash layers": {"mask_inputs": 4, "mask": 2, "queries": 3},
        "cpu plain scores layers": {"mask_inputs": 4, "scores": 1, "queries": 3},
        "cpu latent flash layers": {
            "mask_inputs": 4, "mask": 2, "residual": 4, "expanded": 1.5, "expanded_pieces": 2.5,
        },
        "cpu latent scores layers": {"mask_inputs": 4, "scores": 1, "latents": 3, "joined": 1},
        "cpu plain flash inputs": {"mask_inputs": 4, "residual": 1},
        "cpu plain flash experts": {"mask_inputs": 4, "experts_out": 1},
        "cpu plain scores inputs": {"mask_inputs": 4, "residual": 1},
        "cpu plain scores experts": {"mask_inputs": 4, "experts_out": 1},
        "output": {"logits": 1, "residual": 2},
        "streaming": {"mask": 2, "experts_middle": 1, "residual": 5},
    },
    "llama.cpp of 2025": {
        "gpu plain flash experts": _ONLY_EXPERTS,
        "gpu plain scores experts": _ONLY_EXPERTS,
        "gpu plain flash layers": {
            "mask_inputs": 4, "mask": 4, "residual": 2, "experts_out": 1, "queries": 1,
        },
        "gpu plain scores layers": {"mask_inputs": 4, "scores": 1, "queries": 3},
        "gpu latent flash layers": {"mask_inputs": 4, "mask": 4, "queries": 1, "latents": 2},
        "gpu latent scores layers": {"mask_inputs": 4, "scores": 1, "latents": 3, "joined": 1},
        "cpu plain flash layers": {"mask_inputs": 4, "mask": 2, "queries": 3},
        "cpu plain scores layers": {"mask_inputs": 4, "scores": 1, "queries": 3},
        "cpu plain flash inputs": {"mask_inputs": 4, "residual": 1},
        "cpu plain flash experts": {"mask_inputs": 2, "experts_out": 1},
        "cpu plain scores inputs": {"mask_inputs": 4, "residual": 1},
        "cpu plain scores experts": {"mask_inputs": 4, "experts_out": 1},
        "output": {"logits": 1, "residual": 1.5},
        "streaming": {"mask": 8, "residual": 2, "experts_out": 1},
    },
    "llama.cpp": {
        "gpu plain flash experts": _ONLY_EXPERTS,
        "gpu plain scores experts": _ONLY_EXPERTS,
        "output": {"logits": 1, "residual": 2},
        "streaming": {"mask": 2, "residual": 2, "experts_middle": 1, "experts_out": 1},
    },
}  # fmt: skip
# A buffer that is not much larger than the logits says nothing about the rest.
_OUTPUT_DECIDES = 1.15
# A second sum must better the error by as much; smaller factors are dropped.
_WORTH_A_SUM = 0.9
_LEAST_FACTOR = 0.005
# So many architectures make a fit that leaves one out a fair one.
_LEAST_FAMILIES, _PARTS = 3, 4
# Where little was measured an estimate may be so far off.
_UNMEASURED = (0.6, 1.6)


@dataclass(frozen=True)
class Buffer:
    """A measured compute buffer.

    Attributes:
        runtime: Family of builds.
        key: Kind of graph.
        source: Architecture and model, or the thread twice.
        sizes: Sizes that may live in the graph.
        n_bytes: The buffer.
    """

    runtime: str
    key: str
    source: tuple[str, str]
    sizes: dict[str, float]
    n_bytes: int


def measured_buffers(path: Path) -> list[Buffer]:
    """Buffers that ``scripts/measure_compute.py`` measured."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        try:
            inventory = read_model(row["model"])
            inventory.architecture  # noqa: B018 (raises where it is not known)
        except UnsupportedModelError as error:
            print(f"{row['model']}: {error}")
            continue
        launch = parse_flags(row["flags"], inventory, llama_cpp_build=row["build"])
        gpus = [Device.gpu(i, _TERABYTE, 1e12, margin_bytes=0) for i in range(row["n_gpus"])]
        machine = Machine(gpus=tuple(gpus), ram=Device.ram(_TERABYTE, 1e11, margin_bytes=0))
        placement = place(inventory, machine, launch)
        for device, n_bytes in zip(machine.devices, row["compute_bytes"], strict=False):
            work = work_on(placement, device)
            sizes = graph_sizes(inventory.architecture, inventory.n_vocab, launch, work)
            key = graph_keys(inventory.architecture, launch, work)[0]
            model = row["architecture"], row["model"]
            found.append(Buffer(runtime_of(launch), key, model, sizes, n_bytes))
    return [buffer for buffer in found if buffer.n_bytes]


def work_on(placement: Placement, device: Device) -> Work:
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
    if launch.ik is not None and launch.ik.mla and launch.ik.as_of < _IK_LATENT_SINCE:
        return []
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
        has_experts = placement is not None and work_on(placement, device).has_experts
        is_first = device == case.machine.devices[0]
        work = Work(
            device.kind,
            has_layers=bool(caches.get(device.name)),
            has_experts=has_experts,
            n_input_copies=n_copies,
            is_first=is_first,
            streams=is_first and device.kind == "gpu",
        )
        sizes = graph_sizes(arch, inventory.n_vocab, launch, work)
        streams = placement and streamed_bytes(inventory, launch, placement, case.machine)
        if streams and is_first and device.kind == "gpu":
            continue
        expected = _EXPECTED[runtime_of(launch)].get("output", {})
        output = sum(factor * sizes[name] for name, factor in expected.items())
        is_last = device == (case.machine.gpus or (device,))[-1]
        if is_last and n_bytes < _OUTPUT_DECIDES * output:
            continue
        runtime, thread = runtime_of(launch), case.row["source"].split(" ")[0]
        keys = graph_keys(arch, launch, work)
        key = next((k for k in keys if k in _EXPECTED[runtime]), keys[0])
        found.append(Buffer(runtime, key, (thread, thread), sizes, n_bytes))
    # Equal GPUs of one log say the same thing once.
    return list({(buffer.key, buffer.n_bytes): buffer for buffer in found}.values())


def _placement(case: Case) -> Placement | None:
    try:
        return place(case.inventory, case.machine, case.launch)
    except InputError:
        return None


def fit_rows(table: Floats, n_bytes: Floats, n_rows: int, expected: Floats | None) -> Floats:
    """Factors (rows x sizes) of one or two sums whose largest counts.

    The second sum starts from the buffers that are large for their sizes.
    """
    density = n_bytes / table.sum(1)
    part = (density > np.median(density)) * (n_rows - 1)
    rows = np.zeros((n_rows, table.shape[1]))
    for _ in range(_ROUNDS if n_rows > 1 else 1):
        for index in range(n_rows):
            mine = part == index
            if mine.any():
                rows[index] = _non_negative(table[mine] / n_bytes[mine, None], expected)
        part = np.argmax(table @ rows.T, axis=1)
    return rows


def _non_negative(table: Floats, expected: Floats | None) -> Floats:
    """Factors of 0 or more that make ``table @ factors`` as near to 1 as squares can say.

    Args:
        table: Sizes relative to the measured bytes; one row per buffer.
        expected: Factors that a deviation is held against; those that are 0 stay 0.
    """
    if expected is None:
        return np.asarray(nnls(table, np.ones(len(table)), maxiter=1000)[0])
    used = expected > 0
    stacked = np.vstack([table[:, used] * expected[used], np.eye(int(used.sum()))])
    found = np.zeros(table.shape[1])
    found[used] = nnls(stacked, np.ones(len(stacked)), maxiter=1000)[0] * expected[used]
    return found


def fit(buffers: Sequence[Buffer], expected: dict[str, float] | None) -> dict[str, Any]:
    """The fit of one kind of graph, with one sum or two, whichever predicts others better."""
    # Without a pipeline both masks are alike; present llama.cpp holds the one that it is given.
    known = set(_SIZES) - ({"mask", "first_mask"} if expected is None else set())
    table = np.array([[b.sizes.get(n, 0.0) * (n in known) for n in _SIZES] for b in buffers])
    n_bytes = np.array([b.n_bytes for b in buffers], dtype=float)
    sources = _sources(buffers)
    prior = None if expected is None else np.array([expected.get(name, 0.0) for name in _SIZES])
    best: tuple[float, int, Floats] | None = None
    for n_rows in (1, 2) if prior is None else (1,):
        ratios = _left_out(table, n_bytes, sources, n_rows, prior)
        errors = np.abs(1 / ratios - 1)
        error = float(np.median(errors) + np.quantile(errors, 0.9))
        if best is None or error < _WORTH_A_SUM * best[0]:
            best = (error, n_rows, ratios)
    if best is None:
        raise ValueError("no buffers")
    rows, ratios = fit_rows(table, n_bytes, best[1], prior), best[2]
    errors = np.abs(1 / ratios - 1)
    return {
        "factors": [
            {n: round(float(f), 3) for n, f in zip(_SIZES, row, strict=True) if f > _LEAST_FACTOR}
            for row in rows
        ],
        "interval": list(_UNMEASURED)
        if len(buffers) < _LEAST_BUFFERS
        else [round(float(np.quantile(ratios, q)), 3) for q in (0.05, 0.95)],
        "n": len(buffers),
        "median_error": round(float(np.median(errors)), 4),
        "p90_error": round(float(np.quantile(errors, 0.9)), 4),
    }


def _sources(buffers: Sequence[Buffer]) -> Any:
    """What is left out together: an architecture or thread; a model where these are too few."""
    families = [family for family, _ in (b.source for b in buffers)]
    if len(set(families)) >= _LEAST_FAMILIES:
        return np.array(families)
    models = [model for _, model in (b.source for b in buffers)]
    return np.array(models) if len(set(models)) > 1 else np.arange(len(buffers)) % _PARTS


def _left_out(
    table: Floats, n_bytes: Floats, sources: Any, n_rows: int, prior: Floats | None
) -> Floats:
    """Measured by predicted, each source predicted from the others."""
    ratios = np.ones(len(n_bytes))
    for name in sorted(set(sources)):
        out = sources == name
        rows = fit_rows(table[~out], n_bytes[~out], n_rows, prior)
        ratios[out] = n_bytes[out] / np.maximum(1.0, (table[out] @ rows.T).max(1))
    return ratios


def unmeasured(factors: dict[str, float]) -> dict[str, Any]:
    """Factors that follow from the graph alone."""
    errors = {"n": 0, "median_error": 0.0, "p90_error": 0.0}
    return {"factors": [factors], "interval": list(_UNMEASURED), **errors}


def main() -> None:
    """Fits and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--measured", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    buffers = [b for path in options.measured for b in measured_buffers(path)]
    for case in read_cases(options.cases):
        buffers += case_buffers(case) if isinstance(case, Case) else []
    groups: dict[tuple[str, str], list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        groups[buffer.runtime, buffer.key].append(buffer)
    fits: dict[str, dict[str, Any]] = defaultdict(dict)
    for (runtime, key), of_any_size in sorted(groups.items()):
        # Tiny models are out of proportion: they stand in where there is no other.
        real = [b for b in of_any_size if not b.source[1].startswith("tiny ")]
        members = real or of_any_size
        expected = _EXPECTED[runtime].get(key)
        if expected is None and (runtime != "llama.cpp" or len(members) < _LEAST_BUFFERS):
            print(f"{runtime:18} {key:36} {len(members):4} buffers: too few")
            continue
        fits[runtime][key] = found = fit(members, expected)
        print(f"{runtime:18} {key:36} {found}")
    for runtime, by_key in _EXPECTED.items():
        fits[runtime] = {k: unmeasured(v) for k, v in by_key.items()} | fits[runtime]
    OUT.write_text(json.dumps({"provenance": _provenance(options), "fits": fits}, indent=1) + "\n")


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    paths = [options.cases, *options.measured]
    return {
        "script": "scripts/fit_compute.py",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "data_sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths},
    }


if __name__ == "__main__":
    main()
