"""Fits the loss model and writes quantplan/costs/data/quality.json.

Usage: python scripts/fit_quality.py SENSITIVITIES_DIRECTORY

Reads MODEL.csv.gz tables of measured KLDs (see `quantplan.formats.sensitivity_tables`) of models
that are in the catalog, and those in scripts/measured. `scripts/quality_fit.py` says what is
fitted; benchmarks/validate_quality.py judges it. Standard deviations in the file come from
predicting families, and models of known families, that were left out of the fit.
"""

import argparse
import datetime
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.costs import load_data
from quantplan.costs.evidence import Link, Measurement, fit_singles
from quantplan.costs.scale import ScalePrior
from quantplan.costs.sensitivity import Prior
from quantplan.measure.groups import groups
from scripts.quality_curves import Curves, fit_curves
from scripts.quality_data import OWN_TABLES, Measured, Unit, all_tables, read_models, tables
from scripts.quality_fit import fit, leave_one_family_out

TARGET = Path(__file__).parents[1] / "quantplan" / "costs" / "data" / "quality.json"
# A median absolute deviation times this is a standard deviation, where the rest is Gaussian.
_ROBUST = 1.4826
# Families' worth of pooled errors in the errors of a class.
_POOLING = 2.0
# A floor is seen where its ln is known better than this.
_SEEN_SD = 0.3


def robust_sd(values: list[float]) -> float:
    """Standard deviation about zero, from the median absolute value."""
    return _ROBUST * median(map(abs, values))


def root_mean_square(values: list[float]) -> float:
    """Standard deviation about zero."""
    return round(math.sqrt(fmean(v**2 for v in values)), 3)


def share_errors(
    models: Mapping[str, Measured], documents: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], list[float]]:
    """Ln of measured over predicted sensitivity, the model's median removed.

    The constants are given by model or by family. Only measurements that are at least twice their
    model's floor tell the two apart.

    Returns:
        Errors by class of the tensors, and family.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, model in models.items():
        if model.units:
            errors = unit_errors(model, documents.get(name) or documents[model.family])
            middle = median(error for _, error in errors)
            for unit, error in errors:
                found[unit.tensors[0].role_class, model.family].append(error - middle)
    return found


def unit_errors(model: Measured, document: Mapping[str, Any]) -> list[tuple[Unit, float]]:
    """Ln of measured over predicted sensitivity of what is at least twice the model's floor."""
    link = Link(document["link"]["curvature"], document["link"]["valid_kld_nats"])
    own = Prior(document).sensitivities(model.inventory)
    floor = float(np.percentile([u.kld_nats for u in model.units], 5))
    return [
        (u, math.log(link.loss(u.kld_nats - floor) / sum(own[t.name] for t in u.tensors)))
        for u in model.units
        if u.kld_nats > 2 * floor
    ]


def within_groups(
    models: Mapping[str, Measured], documents: Mapping[str, Mapping[str, Any]]
) -> list[float]:
    """The same errors less their mean over like tensors of neighbouring layers.

    The groups are those that ``quantplan measure`` measures together.
    """
    found = []
    for name, model in models.items():
        if not model.units:
            continue
        of = {t.name: group for group, ts in groups(model.inventory).items() for t in ts}
        members: dict[str, list[float]] = defaultdict(list)
        for unit, error in unit_errors(model, documents.get(name) or documents[model.family]):
            members[of[unit.tensors[0].name]].append(error)
        for errors in members.values():
            # Errors from a mean of few are too small.
            few = math.sqrt(len(errors) / max(len(errors) - 1, 1))
            found += [few * (e - fmean(errors)) for e in errors if len(errors) > 1]
    return found


def class_sds(errors: Mapping[tuple[str, str], list[float]], pooled: float) -> dict[str, float]:
    """Standard deviation of ln sensitivity by class of tensors.

    A class errs in common within a family, so families count, not tensors: the mean square over
    families of their mean squares, pulled towards the pooled one as by two families.
    """
    squares: dict[str, list[float]] = defaultdict(list)
    for (kind, _), found in errors.items():
        squares[kind].append(fmean(e**2 for e in found))
    return {
        kind: round(math.sqrt((sum(found) + _POOLING * pooled**2) / (len(found) + _POOLING)), 3)
        for kind, found in sorted(squares.items())
    }


def share_sds(
    models: Mapping[str, Measured], documents: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Standard deviation of ln of a tensor's share of the model's sensitivity, and by class.

    ``within_group`` is how much of it is left where the sum over a group is known.
    """
    errors = share_errors(models, documents)
    share = robust_sd([e for found in errors.values() for e in found])
    inside = robust_sd(within_groups(models, documents))
    return {
        "share": round(share, 3),
        "share_by_class": class_sds(errors, share),
        "within_group": round(inside / share, 3),
    }


def scale_sds(
    models: Mapping[str, Measured], curves: Curves, documents: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float]:
    """Root mean square error of ln scale and of ln floor where a floor can be seen.

    Args:
        models: All models.
        curves: What their curves show.
        documents: Constants to predict with, by model or by family.
    """
    scales, floors = [], []
    for name, value in curves.ln_scale.items():
        document = documents.get(name) or documents.get(models[name].family)
        if document is None:
            continue
        found = ScalePrior(document).curve(models[name].inventory)
        scales.append(value - found.ln_scale)
        if curves.ln_floor_sd[name] < _SEEN_SD:
            floors.append(curves.ln_floor[name] - found.ln_floor)
    return root_mean_square(scales), root_mean_square(floors)


def repeat_errors(models: Mapping[str, Measured], curves: Curves) -> list[float]:
    """How far sensitivities of a tensor measured at several types are from their mean, in ln."""

    def error(one: Measurement) -> float:
        return curves.errors[one.qtype]

    found = []
    for model in models.values():
        by_tensor: dict[tuple[str, ...], list[float]] = {}
        if len({single.qtype for single in model.table.singles}) < 2:
            continue
        # A few tensors of a large table are no floor; the limit keeps the percentile meaningful.
        singles: list[Measurement] = [s for s in model.table.singles if s.qtype in curves.errors]
        for single in fit_singles(singles, error, curves.link, 0.1):
            if single.ln_sd < 0.5:
                by_tensor.setdefault(single.tensors, []).append(single.ln_sensitivity)
        found += [v - fmean(vs) for vs in by_tensor.values() if len(vs) > 1 for v in vs]
    return found


def without_one(models: Mapping[str, Measured]) -> dict[str, Mapping[str, Any]]:
    """Constants fitted without each model that has siblings, by model."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, model in models.items():
        if sum(m.family == model.family for m in models.values()) > 1:
            found[name] = fit({n: m for n, m in models.items() if n != name})
    return found


def main() -> None:
    """Fits, cross-validates by family and writes the data file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sensitivities", type=Path)
    paths = all_tables(parser.parse_args().sensitivities)
    models, skipped = read_models(paths)
    own = [name for name, path in tables(OWN_TABLES).items() if paths[name] == path]
    digest = hashlib.sha256()
    for name in models:
        digest.update(paths[name].read_bytes())
    document, curves = fit(models), fit_curves(models)
    left_out = leave_one_family_out(models)
    siblings = without_one(models)
    new_scale, new_floor = scale_sds(models, curves, left_out)
    known_scale, known_floor = scale_sds(models, curves, siblings)
    alike = {
        n: models[n]
        for n, found in siblings.items()
        if Prior(found).same_shape(models[n].inventory)
    }
    gaussian = load_data("type_error.json")["relative_squared_error"]
    both = [math.log(e / gaussian[q]) for q, e in curves.errors.items() if q in gaussian]
    document["ln_sd"] |= {
        "scale_new_family": new_scale,
        "scale_known_family": known_scale,
        "floor_new_family": new_floor,
        "floor_known_family": known_floor,
        **share_sds(models, left_out),
        "same_shape": share_sds(alike, siblings),
        "untested_type": round(robust_sd(both), 3),
        "single": round(robust_sd(repeat_errors(models, curves)), 3),
    }
    provenance = {
        "about": "loss(tensor, type) = sensitivity * type_error, nats per token; sensitivities are "
        "exp(coefficients * features) scaled to sum to exp(scale * features of the model + effects "
        "of its maker, family and shape); shapes: what measured models whose layers have the same "
        "tensors add to ln of a sensitivity, in hundredths by role in the order of the layers; "
        "KLD = loss + curvature * loss^2",
        "script": "scripts/fit_quality.py",
        "credit": "KLD measurements: GGUF-Tool-Suite (Thireus and contributors), commit 384c1f8; "
        f"of {', '.join(own)}: benchmarks/order_matrices.py",
        "data_sha256": digest.hexdigest(),
        "date": datetime.date.today().isoformat(),
        "models": sorted(models),
        "ln_sd_why": "scale_*: root mean square error of ln scale for families, and for models of "
        "known families, left out of the fit, to be multiplied by sqrt((1 + leverage) / "
        "(1 + usual)) where a model's features x have more than the usual leverage, x inverse x "
        "(scale_spread); floor_*: root mean square error of the ln of the noise floor of curves, "
        "likewise; share: robust error of a tensor's sensitivity within a model of a family left "
        "out, share_by_class the same by class, families counting alike and pooled as by two "
        "of them, within_group: how much of it is left where the sum over like tensors of "
        "neighbouring layers is known; same_shape: all of these for models left out whose shape "
        "another one has; type: robust scatter of the error of a type between models, "
        "untested_type: "
        "robust difference between errors of types on Gaussian rows and in whole models; single: "
        "scatter of one tensor's sensitivity measured at several types",
    }
    TARGET.write_text(json.dumps({**provenance, **document}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(models)} models; {len(skipped)} left out: {', '.join(skipped)}")
    print(json.dumps(document["ln_sd"], indent=1))


if __name__ == "__main__":
    main()
