"""Holds the loss model against published measurements of models that it was not fitted on.

Usage: python benchmarks/validate_quality.py --sensitivities DIRECTORY --recipes CSV [--no-refit]

By default the model is fitted anew without each family in turn, and judged on that family; with
``--no-refit`` the shipped constants are judged as they are, which says something only about models
that they were not fitted on. Tables in scripts/measured take part in the fits and are not judged.
Reported are

- the rank correlation of predicted and measured KLD of single tensors: all of a model, and within
  each role (``_median``: over families, of the median of a family's models);
- pairs of published recipes of one model, equal in size within 3 % and with perplexities that
  differ by more than 0.3 %: in how many the better one has the lower predicted loss, with nothing
  of the model measured, and with its KLD at whole-model types known;
- whole models at one type: in how many the predicted KLD is within a factor of 1.5, with nothing
  of the model measured; and for the others where its KLD at three types is known.

The last line is one JSON object.
"""

import argparse
import csv
import gzip
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.costs import load_data
from quantplan.costs.evidence import Evidence, fit_curve
from quantplan.costs.families import family, quantized
from quantplan.costs.quality import LossTable, link, type_errors
from quantplan.costs.scale import ScalePrior
from quantplan.formats.sensitivity_tables import plain_type
from quantplan.inventory import Inventory
from quantplan.inventory.catalog import read_catalog
from quantplan.qtypes import QTYPES
from scripts.quality_data import Measured, all_tables, read_models, tables
from scripts.quality_fit import fit_without
from scripts.quality_shares import depth_floor, depth_floor_share

SAME_SIZE, LEAST_LN_PPL = 0.03, 0.003
FACTOR = 1.5
# Types of a short curve: what `quantplan measure` measures first.
CURVE = ("Q4_K", "Q2_K", "Q6_K")
FEWEST_OF_A_ROLE = 8

Document = Mapping[str, Any]


def spearman(a: Iterable[float], b: Iterable[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(list(values), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(map(np.ptp, ranks)) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def predicted_klds(model: Measured, document: Document) -> list[float]:
    """KLD that each unit of a model should show: its loss and the noise floor of its depth."""
    inventory = model.inventory
    table, bend = LossTable(inventory, data=document), link(document)
    share = depth_floor_share(inventory, document)
    matrices = [t for t in quantized(inventory) if t.layer is not None]
    step = share * fmean(table.loss_nats(t, model.qtype) for t in matrices)
    return [
        step * depth_floor(unit.tensors, inventory)
        + bend.kld(sum(table.loss_nats(t, model.qtype) for t in unit.tensors))
        for unit in model.units
    ]


def correlations(model: Measured, document: Document) -> tuple[float, list[float]]:
    """Rank correlation over all units of a model, and within each role with enough of them."""
    measured = [unit.kld_nats for unit in model.units]
    roles = [unit.roles for unit in model.units]
    return rank_correlations(predicted_klds(model, document), measured, roles)


def rank_correlations(
    predicted: Sequence[float], measured: Sequence[float], roles: Sequence[str]
) -> tuple[float, list[float]]:
    """Rank correlation over everything, and within each role with enough of it."""
    by_role = defaultdict(list)
    for i, role in enumerate(roles):
        by_role[role].append(i)
    within = [
        spearman([predicted[i] for i in found], [measured[i] for i in found])
        for found in by_role.values()
        if len(found) >= FEWEST_OF_A_ROLE
    ]
    return spearman(predicted, measured), within


def uniform_errors(
    model: Measured, document: Document, measured: tuple[str, ...] = ()
) -> dict[str, float]:
    """Ln of measured over predicted KLD of the whole model, by type.

    Args:
        model: The model.
        document: Constants to predict with.
        measured: Types whose KLD is known; they are left out of what is returned.
    """
    errors, bend = type_errors(document), link(document)
    prior = ScalePrior(document).curve(model.inventory)
    floor, ln_scale = math.exp(prior.ln_floor), prior.ln_scale
    known = {name: model.curve[name] for name in measured if name in model.curve}
    base = errors.get(model.table.baseline or "", 0.0)
    if any(errors[name] > base for name in known):
        found = fit_curve(
            known, model.table.baseline, errors, bend,
            type_sd=document["ln_sd"]["type"], prior=prior,
        )  # fmt: skip
        floor, ln_scale = found.floor_nats, found.ln_scale
    return {
        name: math.log(kld / (floor + bend.kld(math.exp(ln_scale) * (errors[name] + base))))
        for name, kld in model.curve.items()
        if name in errors and name not in measured
    }


@dataclass(frozen=True)
class Published:
    """A recipe that somebody measured.

    Attributes:
        model: Its model.
        inventory: The model's inventory, or that of a sibling with the same shapes.
        bpw: Bits per weight.
        ln_ppl: Logarithm of the measured perplexity.
        qtypes: Type by tensor name.
    """

    model: str
    inventory: Inventory
    bpw: float
    ln_ppl: float
    qtypes: Mapping[str, str]


def read_recipes(path: Path) -> tuple[list[Published], dict[str, str]]:
    """Reads recipes, and their tensors from the file beside them.

    Returns:
        The recipes, and the reason for each that cannot be used.
    """
    qtypes: dict[str, dict[str, str]] = defaultdict(dict)
    with gzip.open(path.with_name(f"{path.stem}_tensors.csv.gz"), "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            qtypes[row["recipe_id"]][row["tensor"]] = plain_type(row["qtype"])
    found, skipped = [], {}
    errors = type_errors()
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label = f"{row['recipe_id']} ({row['model']})"
            # A sibling's shapes serve where a model has no inventory of its own.
            names = (row["model"], row.get("inventory_used") or row["model"])
            inventory = next((i for i in map(read_catalog, names) if i), None)
            own = qtypes[row["recipe_id"]]
            unknown = {q for q in own.values() if q not in QTYPES} | {
                q for q in own.values() if q in QTYPES and q not in errors and q != "F32"
            }
            if inventory is None:
                skipped[label] = "the catalog has no inventory of the model"
            elif unknown:
                skipped[label] = f"no known error of {', '.join(sorted(unknown))}"
            elif not row["ppl"]:
                skipped[label] = "no perplexity"
            else:
                ln_ppl = math.log(float(row["ppl"]))
                bpw = float(row["bpw_computed"])
                found.append(Published(row["model"], inventory, bpw, ln_ppl, own))
    return found, skipped


def comparable(recipes: list[Published]) -> list[tuple[Published, Published]]:
    """Pairs of one model and size whose perplexities differ by more than noise."""
    return [
        (a, b)
        for a, b in combinations(recipes, 2)
        if a.model == b.model
        and abs(a.bpw - b.bpw) <= SAME_SIZE * max(a.bpw, b.bpw)
        and abs(a.ln_ppl - b.ln_ppl) > LEAST_LN_PPL
    ]


def summed_loss(recipe: Published, table: LossTable) -> float:
    """Predicted loss of a recipe."""
    by_name = recipe.inventory.by_name
    return sum(
        table.loss_nats(by_name[name], kind)
        for name, kind in recipe.qtypes.items()
        if name in by_name and kind not in ("F32", "F16", "BF16")
    )


def pairs_right(
    pairs: list[tuple[Published, Published]],
    documents: Mapping[str, Document],
    models: Mapping[str, Measured],
    with_curve: bool,
) -> dict[str, list[bool]]:
    """Whether each pair is ranked right, by model."""
    tables: dict[str, LossTable] = {}
    right = defaultdict(list)
    for a, b in pairs:
        if a.model not in tables:
            own = models.get(a.model) if with_curve else None
            evidence = Evidence(curve=own.curve, baseline=own.table.baseline) if own else None
            document = documents[family(a.inventory.architecture.name)]
            tables[a.model] = LossTable(a.inventory, evidence, document)
        losses = [summed_loss(recipe, tables[a.model]) for recipe in (a, b)]
        right[a.model].append((losses[0] > losses[1]) == (a.ln_ppl > b.ln_ppl))
    return right


class _Documents(dict[str, Document]):
    """Constants to judge each family with: the shipped ones, or fitted without it."""

    def __init__(self, models: Mapping[str, Measured], refit: bool) -> None:
        super().__init__()
        self._models, self._refit = models, refit

    def __missing__(self, left_out: str) -> Document:
        if self._refit:
            self[left_out] = fit_without(self._models, left_out)
        else:
            self[left_out] = load_data("quality.json")
        return self[left_out]


def over_families(values: Mapping[str, float], models: Mapping[str, Measured]) -> float | None:
    """Median over families of the median of their models."""
    found = defaultdict(list)
    for name, value in values.items():
        found[models[name].family].append(value)
    return median(map(median, found.values())) if found else None


def _print_skipped(what: str, skipped: Mapping[str, str]) -> None:
    by_reason = defaultdict(list)
    for name, reason in skipped.items():
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        print(f"{len(names)} {what} left out: {reason}: {', '.join(names)}")


def _share(values: Iterable[bool]) -> float | None:
    found = list(values)
    return round(fmean(found), 4) if found else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def main() -> None:
    """Judges the loss model and prints one line per model, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sensitivities", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, required=True)
    parser.add_argument("--no-refit", action="store_true")
    options = parser.parse_args()
    known, skipped = read_models(all_tables(options.sensitivities))
    models = {name: known[name] for name in tables(options.sensitivities) if name in known}
    recipes, unused = read_recipes(options.recipes)
    documents = _Documents(known, refit=not options.no_refit)
    _print_skipped("models", skipped)
    _print_skipped("recipes", unused)
    overall, inside, uniform, others = {}, {}, {}, {}
    for name, model in models.items():
        document = documents[model.family]
        line = f"{name:30} {model.family:9}"
        if model.units and model.qtype in type_errors(document):
            overall[name], within = correlations(model, document)
            if within:
                inside[name] = median(within)
                line += f" spearman {overall[name]:5.2f}, within roles {inside[name]:5.2f}"
        errors = uniform_errors(model, document)
        if errors:
            uniform[name] = [abs(e) <= math.log(FACTOR) for e in errors.values()]
            left = uniform_errors(model, document, CURVE)
            others[name] = [abs(e) <= math.log(FACTOR) for e in left.values()]
            line += (
                f"; {len(errors)} uniform types, {fmean(uniform[name]):.2f} within {FACTOR}, "
                f"median ln error {median(errors.values()):+.2f}"
            )
        print(line)
    pairs = comparable(recipes)
    plain = pairs_right(pairs, documents, models, with_curve=False)
    curve = pairs_right(pairs, documents, models, with_curve=True)
    for name in plain:
        print(
            f"{name:30} {len(plain[name])} pairs, {fmean(plain[name]):.2f} right, "
            f"{fmean(curve[name]):.2f} with the type curve"
        )
    print(f"median over models: {_rounded(median(overall.values()) if overall else None)}")
    within_type = [ok for values in uniform.values() for ok in values]
    summary = {
        "n_models": len(overall),
        "spearman_median": _rounded(over_families(overall, models)),
        "spearman_min": _rounded(min(overall.values(), default=None)),
        "spearman_within_role_median": _rounded(over_families(inside, models)),
        "n_pairs": len(pairs),
        "pairs_right": _share(ok for values in plain.values() for ok in values),
        "pairs_right_with_curve": _share(ok for values in curve.values() for ok in values),
        "n_uniform": len(within_type),
        "uniform_within_1_5": _share(within_type),
        "uniform_within_1_5_with_curve": _share(ok for found in others.values() for ok in found),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
