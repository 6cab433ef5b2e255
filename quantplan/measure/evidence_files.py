"""Reads what was measured of a model from the files that hold it."""

import hashlib
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

from quantplan.costs.evidence import Evidence
from quantplan.formats.sensitivity_tables import read_sensitivity_table
from quantplan.measure.conditions import Conditions
from quantplan.quantize.weights import WeightErrors

# What `robust` plans against: nine of ten losses are below it.
_ROBUST_QUANTILE = 0.9


def read_evidence(
    measured: str | Path | None = None,
    weights: str | Path | None = None,
    *,
    robust: bool = False,
) -> Evidence | None:
    """Measurements of a model, as plans take them.

    Args:
        measured: A table of KLDs: what ``quantplan measure`` wrote, or a published one (see
            `quantplan.formats.sensitivity_tables`).
        weights: Errors on the weights, as ``quantplan measure-weights`` wrote them.
        robust: Count losses at the upper end of what the evidence leaves open, the 90 % quantile.

    Returns:
        The evidence; None where nothing is given.

    Raises:
        SourceError: A file cannot be read, or holds something else.
    """
    paths = [Path(path) for path in (measured, weights) if path is not None]
    if not paths and not robust:
        return None
    found = Evidence()
    if measured is not None:
        shapes = Conditions.shapes_beside(Path(measured))
        found = replace(read_sensitivity_table(measured).evidence, shapes=shapes)
    if weights is not None:
        errors = WeightErrors.load(weights)
        found = replace(
            found, weight_errors=errors.ratios(), shapes={**found.shapes, **errors.shapes}
        )
    files = tuple(
        f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        for path in paths
    )
    upper_sds = NormalDist().inv_cdf(_ROBUST_QUANTILE) if robust else 0.0
    return replace(found, files=files, upper_sds=upper_sds)
