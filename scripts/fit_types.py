"""Fits how many operations each type costs per weight, from speeds of a model in many types.

t = read (+) unpack + rest for every host, where (+) is the p-norm of the speed model, read is bytes
over the host's reading rate, unpack is weights * operations(type) over the host's vector rate, and
rest is what every token costs. Rates and rest of a host are free within priors; the operations of a
type are those of all hosts of a kind. What is limited by bandwidth everywhere stays near its prior.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantplan.qtypes import QTYPES
from scripts.robust import fit_logs

Array = NDArray[np.float64]
# Llama-3.1-8B: weights in all, those of the embedding (not read), matrices.
_WEIGHTS, _EMBEDDING, _MATRICES = 8.03e9, 128256 * 4096, 225
_GIB = 2**30
# What the fastest types leave over bytes / bandwidth on both GPUs.
_GPU_REST_S = 2e-3
_PRIOR_OPERATIONS = {"gpu": (8.0, 0.8), "cpu": (4.0, 0.8)}
# Host in the table: (kind, runtime, bytes/s, vector flop/s with the threads that were used).
_CORE = 134e9
_HOSTS = {
    ("RTX 4080", "ik_llama.cpp FA"): ("gpu", "ik_llama.cpp", 717e9, 48.7e12),
    ("RTX 3090 350W", "ik_llama.cpp FA"): ("gpu", "ik_llama.cpp", 936e9, 35.6e12),
    ("Ryzen 7950X", "llama.cpp 14b699ec"): ("cpu", "llama.cpp", 60e9, 2 * _CORE),
    ("Ryzen 7950X", "ik_llama.cpp -rtr"): ("cpu", "ik_llama.cpp", 60e9, 2 * _CORE),
    ("Apple M2-Max", "llama.cpp 14b699ec"): ("cpu", "llama.cpp", 110e9, 4 * _CORE),
    ("Apple M2-Max", "ik_llama.cpp -rtr"): ("cpu", "ik_llama.cpp", 110e9, 4 * _CORE),
}
_RELATIVE_HOSTS = {
    "Ryzen 5950X (AVX2) CPU only": ("cpu", "ik_llama.cpp", 45e9, 16 * _CORE),
    "i9-7980XE (AVX512) hybrid -ot ffn_=CPU": ("cpu", "ik_llama.cpp", 85e9, 18 * _CORE),
}
_FTYPES = {"Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q4_K_S": "Q4_K", "Q5_K_S": "Q5_K", "IQ2_M": "IQ2_S"}
# Mixes of several types say nothing about one.
_MIXES = {"Q2_K", "Q3_K_M", "Q3_K_L", "Q3_K", "Q4_K_M", "Q5_K_M", "IQ3_XS", "IQ3_M", "IQ3_KL"}
_SAME = {"MXFP4": "IQ4_NL", "NVFP4": "IQ4_NL", "F16": "BF16", "F32": "BF16", "Q6_0": "Q5_0"}


@dataclass(frozen=True)
class Speed:
    """Seconds per token of a model whose matrices all have one type."""

    host: tuple[str, str]
    qtype: str
    n_bytes: float
    n_weights: float
    seconds: float


def is_fitted(row: Mapping[str, str]) -> bool:
    """Whether a row of the table of tokens per second is among those that are fitted."""
    is_mixed = "mix" in row["model"] and row["quant"].upper() in _MIXES
    is_decode = row["test"].startswith("tg")
    return (row["hardware"], row["engine"]) in _HOSTS and is_decode and not is_mixed


def read_absolute(path: Path) -> list[Speed]:
    """Rows of the table of tokens per second."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            host, quant = (row["hardware"], row["engine"]), row["quant"].upper()
            if not is_fitted(row):
                continue
            share = (_WEIGHTS - _EMBEDDING) / _WEIGHTS
            n_bytes = float(row["size_gib"]) * _GIB * share
            name = _FTYPES.get(quant, quant)
            found.append(Speed(host, name, n_bytes, _WEIGHTS * share, 1 / float(row["tps"])))
    return found


def read_relative(path: Path) -> list[Speed]:
    """Rows of the table of efficiencies: seconds per weight of a host that reads at 1 byte/s."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            name = row["quant"].upper().split("_R")[0]
            if row["hardware"] in _RELATIVE_HOSTS and name in QTYPES:
                rate = _RELATIVE_HOSTS[row["hardware"]][2]
                n_bytes = float(row["bpw"]) / 8
                seconds = n_bytes / rate / float(row["eff_rel_q4_K"])
                found.append(Speed((row["hardware"], ""), name, n_bytes, 1.0, seconds))
    return found


def read_prompt_operations(path: Path) -> dict[str, dict[str, float]]:
    """Operations per weight and prompt token on CPUs, by runtime and type, from pp512."""
    logs: dict[tuple[str, str], list[float]] = defaultdict(list)
    cores = {"Ryzen 7950X": 16, "Apple M2-Max": 8}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            host = (row["hardware"], row["engine"])
            if row["test"] == "pp512" and row["hardware"] in cores and host in _HOSTS:
                operations = cores[row["hardware"]] * _CORE / float(row["tps"])
                operations /= _WEIGHTS - 2 * _EMBEDDING
                name = _FTYPES.get(row["quant"].upper(), row["quant"].upper())
                logs[_HOSTS[host][1], name].append(float(np.log(operations)))
    tables: dict[str, dict[str, float]] = defaultdict(dict)
    for (runtime, name), values in logs.items():
        tables[runtime][name] = float(np.exp(np.mean(values)))
    return {runtime: _finished(table) for runtime, table in tables.items()}


def fit_kind(speeds: Sequence[Speed], kind: str, overlap: float) -> tuple[dict[str, float], Array]:
    """Operations per weight of each type on one kind of device, and the residuals (ln)."""
    hosts = sorted({s.host for s in speeds})
    n = len(hosts)
    names = sorted({s.qtype for s in speeds})
    host_of = np.array([hosts.index(s.host) for s in speeds])
    name_of = np.array([names.index(s.qtype) for s in speeds])
    n_bytes = np.array([s.n_bytes for s in speeds])
    n_weights = np.array([s.n_weights for s in speeds])
    measured = np.log([s.seconds for s in speeds])
    rates = [_RELATIVE_HOSTS.get(h[0]) or _HOSTS[h] for h in hosts]
    fastest = np.array([min(s.seconds for s in speeds if s.host == h) for h in hosts])
    prior, sd = _PRIOR_OPERATIONS[kind]
    means = np.concatenate([
        -np.log([r[2] for r in rates]), -np.log([r[3] for r in rates]),
        np.full(n, np.log(_GPU_REST_S)) if kind == "gpu" else np.log(0.1 * fastest),
        np.full(len(names), np.log(prior)),
    ])  # fmt: skip
    # Rates of GPUs are known; what a token costs beside weights hardly depends on the GPU.
    read_sd, vector_sd, rest_sd = (0.05, 0.02, 0.15) if kind == "gpu" else (0.15, 0.35, 1.0)
    sds = np.concatenate([
        np.full(n, read_sd), np.full(n, vector_sd), np.full(n, rest_sd), np.full(len(names), sd)
    ])  # fmt: skip

    def residuals(x: Array) -> Array:
        read = n_bytes * np.exp(x[host_of])
        unpack = n_weights * np.exp(x[n + host_of] + x[3 * n + name_of])
        together = (read**overlap + unpack**overlap) ** (1 / overlap)
        found: Array = np.log(together + np.exp(x[2 * n + host_of])) - measured
        return found

    # From above: what is hidden behind reading has no slope, and would stay where it starts.
    start = means.copy()
    start[3 * n :] += np.log(4)
    x = fit_logs(residuals, start, means, sds, weights=np.ones(len(speeds)), steps=60)
    table = {name: float(np.exp(x[3 * n + i])) for i, name in enumerate(names)}
    return table, residuals(x)


def _finished(table: dict[str, float]) -> dict[str, float]:
    """Adds types that are computed like others, and one for types that were not measured."""
    for name, like in _SAME.items():
        if like in table:
            table.setdefault(name, table[like])
    table["default"] = float(np.median(list(table.values())))
    return {name: float(f"{value:.4g}") for name, value in sorted(table.items())}


def fit_operations(
    absolute: Path, relative: Path, overlap: float, leave_out: str = ""
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, float]]:
    """Operations per weight by runtime, kind of device and type, and the median error of each kind.

    Mainline's kernels on GPUs are taken to be those of ik_llama.cpp, which shares their origin. On
    CPUs a type that mainline was not measured in costs what it costs there, times the median of
    mainline's operations over ik_llama.cpp's among the types that both were measured in.

    Args:
        absolute: Table of tokens per second.
        relative: Table of efficiencies.
        overlap: Exponent of the p-norm.
        leave_out: A machine in the words of the tables, whose rows are not fitted.
    """
    speeds = [s for s in read_absolute(absolute) if s.host[0] != leave_out]
    cpu_relative = [s for s in read_relative(relative) if s.host[0] != leave_out]
    errors = {}
    gpu = [s for s in speeds if _HOSTS[s.host][0] == "gpu"]
    gpu_table, residuals = fit_kind(gpu, "gpu", overlap)
    errors["gpu"] = float(np.median(np.abs(residuals)))
    prompt = read_prompt_operations(absolute)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    ik: dict[str, float] = {}
    for runtime in ("ik_llama.cpp", "llama.cpp"):
        cpu = [s for s in speeds if _HOSTS[s.host][:2] == ("cpu", runtime)]
        cpu += cpu_relative if runtime == "ik_llama.cpp" else []
        table, residuals = fit_kind(cpu, "cpu", overlap)
        errors[f"cpu {runtime}"] = float(np.median(np.abs(residuals)))
        if runtime == "llama.cpp":
            ratio = float(np.median([table[name] / ik[name] for name in table if name in ik]))
            table = {name: ratio * operations for name, operations in ik.items()} | table
        else:
            ik = table
        tables[runtime] = {
            "gpu": _finished(dict(gpu_table)),
            "cpu": _finished(dict(table)),
            "cpu_prompt": prompt[runtime],
        }
    return tables, errors
