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
    conditions = None
    if measured is not None:
        conditions = Conditions.beside(Path(measured))
        shapes = conditions.shapes if conditions else {}
        found = replace(read_sensitivity_table(measured).evidence, shapes=shapes)
    if weights is not None:
        errors = WeightErrors.load(weights)
        found = replace(
            found,
            weight_errors=errors.ratios(),
            shapes={**found.shapes, **errors.shapes},
            gaps=_mismatches(conditions, errors),
        )
    files = tuple(
        f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        for path in paths
    )
    upper_sds = NormalDist().inv_cdf(_ROBUST_QUANTILE) if robust else 0.0
    return replace(found, files=files, upper_sds=upper_sds)


def _mismatches(conditions: Conditions | None, errors: WeightErrors) -> tuple[str, ...]:
    """What measurements of losses and of errors on the weights do not have in common, in words.

    Args:
        conditions: What losses were measured with; None where that is not known.
        errors: Errors on the weights.
    """
    if conditions is None or (conditions.imatrix_sha256 is not None) == errors.has_imatrix:
        return ()
    losses, weights = ("without", "with") if errors.has_imatrix else ("with", "without")
    return (
        f"KLDs {losses} an importance matrix beside errors {weights} one, which changes both: give "
        "measure and measure-weights the same --imatrix",
    )
