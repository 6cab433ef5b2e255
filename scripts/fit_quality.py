"""Fits the first loss table: how sensitive each role is, and the scale of a whole model.

Usage: python scripts/fit_quality.py SENSITIVITIES_DIRECTORY

Reads per-tensor KLD tables (MODEL.csv.gz with the columns scope, tensor_or_group, bench_group,
qtype, metric, value, flag: the KLD of the whole model when one tensor or bundle has a low type) and
writes quantplan/costs/data/quality.json.

Model: loss(tensor, type) = scale * share(tensor) * error(type), where error is the type's relative
squared error on Gaussian rows, share is proportional to sqrt(weights) * factor(role) and sums to 1
over the quantized tensors, and scale is the geometric mean over families of models. (A slope on the
number of active weights predicts families that were left out worse: median |ln error| 0.66.) The
factor of a role is the geometric mean over models of mean KLD above the model's floor over
sqrt(mean weights). A model's floor is the 5th percentile of its single-tensor KLDs. Bundles count
once.

The printed errors leave one family of models out at a time.
"""

import argparse
import csv
import datetime
import gzip
import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import numpy as np

from quantplan.costs import load_data
from quantplan.inventory import Inventory
from quantplan.inventory.catalog import catalog_names, read_catalog
from quantplan.inventory.roles import split_name

TARGET = Path(__file__).parent.parent / "quantplan" / "costs" / "data" / "quality.json"
CURVE_TYPES = ("Q4_K", "IQ4_XS", "Q3_K", "IQ3_S")
FLOOR_PERCENTILE = 5
MIN_MODELS = 3
# Below this share of the whole a factor is noise around the floor.
SMALLEST_SHARE = 1e-4

Row = dict[str, str]


def family(name: str) -> str:
    """Models that share weights or an architecture belong to one family."""
    return "Qwen-VL" if "-VL-" in name else name.partition("-")[0].rstrip("0123456789.")


def whole_model_scale(rows: list[Row]) -> float | None:
    """KLD of the whole model per unit of relative squared error, median over curve types."""
    errors = load_data("type_error.json")["relative_squared_error"]
    slopes = [
        float(r["value"]) / errors[r["qtype"].upper()]
        for r in rows
        if r["scope"] == "all_tensors_pure" and r["metric"] == "kld" and not r["flag"]
        and r["qtype"].upper() in CURVE_TYPES
    ]  # fmt: skip
    return median(slopes) if slopes else None


def role_factors(rows: list[Row], inventory: Inventory) -> dict[str, float]:
    """Logarithm of each role's KLD share per square root of weights share, for one model."""
    bundles = defaultdict(list)
    for row in rows:
        known = row["tensor_or_group"] in inventory.by_name
        if row["scope"] == "tensor" and row["metric"] == "kld" and not row["flag"] and known:
            bundles[row["bench_group"] or row["tensor_or_group"], row["qtype"]].append(row)
    # One type per model: the one that most tensors were measured at.
    by_type = defaultdict(list)
    for (_, qtype), members in bundles.items():
        by_type[qtype].append(members)
    measured = max(by_type.values(), key=len, default=[])
    if len(measured) < 20:
        return {}
    floor = np.percentile([float(m[0]["value"]) for m in measured], FLOOR_PERCENTILE)
    kld, weights = defaultdict(list), defaultdict(list)
    for members in measured:
        roles = {split_name(m["tensor_or_group"])[1] for m in members}
        if len(roles) == 1:
            role = roles.pop()
            kld[role].append(max(0.0, float(members[0]["value"]) - floor))
            weights[role].append(
                sum(inventory.by_name[m["tensor_or_group"]].n_weights for m in members)
            )
    total_kld = sum(map(sum, kld.values()))
    total_weights = sum(map(sum, weights.values()))
    return {
        role: math.log(max(fmean(kld[role]) / total_kld, SMALLEST_SHARE / len(kld[role])))
        - 0.5 * math.log(fmean(weights[role]) / total_weights)
        for role in kld
    }


def fit_scale(scales: dict[str, float]) -> float:
    """Mean over families of the mean ln scale of their models."""
    by_family = defaultdict(list)
    for name, scale in scales.items():
        by_family[family(name)].append(math.log(scale))
    return fmean(fmean(values) for values in by_family.values())


def main() -> None:
    """Fits, cross-validates by family and writes the data file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sensitivities", type=Path)
    directory = parser.parse_args().sensitivities
    digest = hashlib.sha256()
    scales: dict[str, float] = {}
    factors: dict[str, dict[str, float]] = defaultdict(dict)
    for name in catalog_names():
        path = directory / f"{name}.csv.gz"
        inventory = read_catalog(name)
        if not path.is_file() or inventory is None:
            continue
        digest.update(path.read_bytes())
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        scale = whole_model_scale(rows)
        if scale:
            scales[name] = scale
        for role, value in role_factors(rows, inventory).items():
            factors[role][name] = value
    errors = []
    for name, scale in scales.items():
        others = {n: s for n, s in scales.items() if family(n) != family(name)}
        errors.append(abs(fit_scale(others) - math.log(scale)))
        print(f"{name:32} scale {scale:6.2f} left-out ln error {errors[-1]:.2f}")
    kept = {r: fmean(v.values()) for r, v in factors.items() if len(v) >= MIN_MODELS}
    document = {
        "about": "loss = exp(ln_scale) * share * type error, in nats per token",
        "script": "scripts/fit_quality.py",
        "credit": "per-tensor KLD measurements: GGUF-Tool-Suite (Thireus and contributors), "
        "commit 384c1f8",
        "data_sha256": digest.hexdigest(),
        "date": datetime.date.today().isoformat(),
        "ln_scale": round(fit_scale(scales), 4),
        "n_models_for_scale": len(scales),
        "left_out_family_median_abs_ln_error": round(median(errors), 3),
        "ln_role_factor": {role: round(value, 3) for role, value in sorted(kept.items())},
        "n_models_per_role": {role: len(factors[role]) for role in sorted(kept)},
    }
    TARGET.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
