"""Fits the loss model: errors of types, link, sensitivities, scale. See `fit` for the order.

Two data sets constrain different things. Runs of whole models at one type give the error of each
type, the link from summed loss to KLD, and the scale of each model. Runs with one tensor at a low
type give the shares of tensors. Both contain a noise floor: any change at all to a large model,
however small, changes its KLD, the more so the earlier the layer.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from scripts.quality_curves import VALID_KLD_NATS, fit_curves
from scripts.quality_data import Measured
from scripts.quality_scale import fit_scales, scale_spread
from scripts.quality_shares import SensitivityFit

# Until families that were left out have been predicted.
_UNVALIDATED_SD = {
    "scale_new_family": 0.3, "scale_known_family": 0.3,
    "floor_new_family": 0.8, "floor_known_family": 0.5,
    "share": 0.5, "within_group": 0.5, "single": 0.1,
}  # fmt: skip


def fit(models: Mapping[str, Measured]) -> dict[str, Any]:
    """Fits everything: curves, then sensitivities, then scales; a document for `LossTable`.

    Standard deviations and provenance are the caller's to add.
    """
    curves = fit_curves(models)
    shares = SensitivityFit(models)
    scales = fit_scales(models, curves)
    # Most types differ little between models; a few runs are broken.
    type_sd = round(1.4826 * median(map(abs, curves.residuals.values())), 3)
    return {
        "type_error": {
            q: float(f"{e:.5g}") for q, e in sorted(curves.errors.items(), key=lambda i: i[1])
        },
        "link": {"curvature": round(curves.link.curvature, 4), "valid_kld_nats": VALID_KLD_NATS},
        "scale": scales.scale,
        "scale_effects": scales.effects,
        "scale_spread": scale_spread(models, curves),
        "coefficients": shares.coefficients(),
        "families": {
            family: {
                "coefficients": shares.coefficients(family),
                "depth_share": shares.family_depth_floor_share(family),
            }
            for family in sorted({m.family for m in shares.models.values()})
        },
        "shapes": shares.same_shapes(),
        "floor": {"curve_nats": scales.floors, "depth_share": shares.depth_floor_share()},
        "ln_sd": {**_UNVALIDATED_SD, "scale_with_curve": type_sd, "type": type_sd},
    }


def fit_without(models: Mapping[str, Measured], family: str) -> dict[str, Any]:
    """The document fitted without a family."""
    return fit({name: m for name, m in models.items() if m.family != family})


def leave_one_family_out(models: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """The document fitted without each family, by family."""
    families = sorted({m.family for m in models.values()})
    return {family: fit_without(models, family) for family in families}
