"""How sensitive each tensor is, from metadata alone: a log-linear model of named features.

``ln s(tensor) = ln S(model) + sum of coefficient * feature``, where the features of a tensor are
its role, its class, its size, its depth and the sparsity of its experts, and ``S`` is the loss of
the whole model per unit of relative squared error. The sensitivities of a model sum to S.
Coefficients, with what they were fitted on and how well they predict families that were left out,
are in ``costs/data/quality.json``; ``scripts/fit_quality.py`` fits them.
"""

import math
from collections.abc import Mapping
from typing import Any

from quantplan.costs.families import family
from quantplan.costs.scale import Features, ScalePrior, quantized
from quantplan.inventory import Inventory, Tensor

# Depth is cut into this many bands, so that layers of one band are interchangeable for the planner.
# The first and the last layer are not part of a band: their effects are features of their own.
DEPTH_BANDS = 4
_REFERENCE_WEIGHTS = 1e7
_REFERENCE_SPARSITY = 16.0
_SIZE_EXPONENT = 0.5


def part(tensor: Tensor, inventory: Inventory) -> str:
    """The part that a tensor plays: its role, ``tied`` for an embedding that is the output too."""
    return "tied" if tensor.role == "token_embd" and inventory.has_tied_output else tensor.role


def depth(tensor: Tensor, inventory: Inventory) -> float:
    """Relative depth from 0 (first layer) to 1 (last): the middle of the tensor's depth band."""
    n_layers = inventory.architecture.n_loaded_layers
    if tensor.layer is None:
        return 0.0 if tensor.role_class == "embedding" and not inventory.has_tied_output else 1.0
    band = min(tensor.layer * DEPTH_BANDS // max(n_layers, 1), DEPTH_BANDS - 1)
    return (band + 0.5) / DEPTH_BANDS


def features(tensor: Tensor, inventory: Inventory) -> Features:
    """Features of a tensor, beside the fixed square root of its size.

    ``depth1`` to ``depth3`` are Legendre polynomials over the depth of the model.
    """
    kind = _class(tensor)
    arch = inventory.architecture
    found = {f"part {part(tensor, inventory)}": 1.0, f"class {kind}": 1.0, "size": _size(tensor)}
    if kind == "experts" and arch.active_share < 1:
        found["sparsity"] = -math.log(arch.active_share * _REFERENCE_SPARSITY)
    if tensor.layer is not None:
        x = 2 * depth(tensor, inventory) - 1
        found |= {
            f"depth1 {kind}": x,
            f"depth2 {kind}": (3 * x**2 - 1) / 2,
            f"depth3 {kind}": (5 * x**3 - 3 * x) / 2,
            f"first {kind}": float(tensor.layer == 0),
            f"last {kind}": float(tensor.layer == arch.n_loaded_layers - 1),
        }
    return found


def fixed_term(tensor: Tensor) -> float:
    """The part of ln s that is not fitted: a square root of the size."""
    return _SIZE_EXPONENT * _size(tensor)


class Prior:
    """The fitted model: sensitivities of any inventory."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Takes the document of ``quality.json``, or one of the same form."""
        self._coefficients: dict[str, float] = data["coefficients"]
        self._scale = ScalePrior(data)
        self._families: dict[str, Any] = data["families"]

    def terms(self, tensor: Tensor, inventory: Inventory) -> Features:
        """What each feature adds to ln s; features that were never measured add nothing.

        In a family that was measured they include what is particular to that family.
        """
        own = self._family(inventory).get("coefficients", {})
        found = {"square root of the size": fixed_term(tensor)}
        for name, value in features(tensor, inventory).items():
            coefficient = self._coefficients.get(name, 0.0) + own.get(name, 0.0)
            if value and coefficient:
                found[name] = coefficient * value
        return found

    def ln_scale(self, inventory: Inventory) -> float:
        """Ln S: loss of the whole model in nats per unit of relative squared error."""
        return self._scale.ln_scale(inventory)

    def sensitivities(self, inventory: Inventory) -> dict[str, float]:
        """Loss of each quantizable, loaded tensor per unit of error, in nats; they sum to S."""
        raw = {
            t.name: math.exp(sum(self.terms(t, inventory).values())) for t in quantized(inventory)
        }
        total, scale = sum(raw.values()), math.exp(self.ln_scale(inventory))
        return {name: scale * value / total for name, value in raw.items()}

    def _family(self, inventory: Inventory) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._families.get(family(inventory.architecture.name), {})
        return found


def _size(tensor: Tensor) -> float:
    return math.log(tensor.n_weights / _REFERENCE_WEIGHTS)


def _class(tensor: Tensor) -> str:
    kind = tensor.role_class
    return "experts" if kind in ("up_gate_experts", "down_experts") else kind
