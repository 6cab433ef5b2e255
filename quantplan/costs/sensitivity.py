"""How sensitive each tensor is, from metadata alone: a log-linear model of named features.

``ln s(tensor) = ln S(model) + sum of coefficient * feature``, where the features of a tensor are
its role, its class, its size, its depth and the sparsity of its experts, and ``S`` is the loss of
the whole model per unit of relative squared error. The sensitivities of a model sum to S. Where
models of the same shape were measured (`quantplan.costs.families.shape`), what their tensors have
beyond that is added.
Coefficients, with what they were fitted on and how well they predict families that were left out,
are in ``costs/data/quality.json``; ``scripts/fit_quality.py`` fits them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from quantplan.costs.families import family, quantized, shape
from quantplan.costs.scale import Features, ScalePrior
from quantplan.inventory import Inventory, Tensor

# What layers add to ln s is rounded to this, a fraction of its standard error, so that layers that
# are nearly alike are interchangeable for the planner.
LAYER_STEP = 0.25
_REFERENCE_WEIGHTS = 1e7
_REFERENCE_SPARSITY = 16.0
_SIZE_EXPONENT = 0.5
_LAYER_FEATURES = ("depth", "first ", "last ")


def part(tensor: Tensor, inventory: Inventory) -> str:
    """The part that a tensor plays: its role, ``tied`` for an embedding that is the output too."""
    return "tied" if tensor.role == "token_embd" and inventory.has_tied_output else tensor.role


def depth(tensor: Tensor, inventory: Inventory) -> float:
    """Relative depth of the middle of the tensor's layer, from 0 (first layer) to 1 (last)."""
    if tensor.layer is None:
        return 0.0 if tensor.role_class == "embedding" and not inventory.has_tied_output else 1.0
    return (tensor.layer + 0.5) / max(inventory.architecture.n_loaded_layers, 1)


def by_role(inventory: Inventory) -> dict[str, list[Tensor]]:
    """Quantizable, loaded tensors by part (see `part`), in the order of the layers."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in sorted(quantized(inventory), key=lambda t: (t.layer or 0, t.name)):
        found[part(tensor, inventory)].append(tensor)
    return found


def features(tensor: Tensor, inventory: Inventory) -> Features:
    """Features of a tensor, beside the fixed square root of its size.

    ``depth1`` to ``depth3`` are Legendre polynomials over the depth of the model; ``first`` and
    ``last`` fall e-fold with each layer away from that end.
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
            f"first {kind}": math.exp(-tensor.layer),
            f"last {kind}": math.exp(tensor.layer + 1 - arch.n_loaded_layers),
        }
    return found


def fixed_term(tensor: Tensor) -> float:
    """The part of ln s that is not fitted: a square root of the size."""
    return _SIZE_EXPONENT * _size(tensor)


class Prior:
    """The fitted model: sensitivities of any inventory.

    Attributes:
        scale: What their sum is.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Takes the document of ``quality.json``, or one of the same form."""
        self._coefficients: dict[str, float] = data["coefficients"]
        self.scale = ScalePrior(data)
        self._families: dict[str, Any] = data["families"]
        self._shapes: dict[str, Any] = data.get("shapes", {})

    def terms(self, tensor: Tensor, inventory: Inventory) -> Features:
        """What each feature adds to ln s; features that were never measured add nothing.

        In a family that was measured they include what is particular to that family, and for models
        of a shape that was measured what is particular to the tensor.
        """
        return self._terms(tensor, inventory, self._from_shape(inventory))

    def _terms(
        self, tensor: Tensor, inventory: Inventory, of_shape: Mapping[str, float]
    ) -> Features:
        own = self._family(inventory).get("coefficients", {})
        found = {"square root of the size": fixed_term(tensor)}
        by_layer = 0.0
        for name, value in features(tensor, inventory).items():
            coefficient = self._coefficients.get(name, 0.0) + own.get(name, 0.0)
            if value and coefficient:
                found[name] = coefficient * value
                by_layer += found[name] if name.startswith(_LAYER_FEATURES) else 0.0
        borrowed = of_shape.get(tensor.name, 0.0)
        if borrowed:
            found["measured in models of the same shape"] = borrowed
        if tensor.layer is not None:
            by_layer += borrowed
            rounded = LAYER_STEP * round(by_layer / LAYER_STEP)
            found[f"rounded to steps of {LAYER_STEP} over layers"] = rounded - by_layer
        return found

    def same_shape(self, inventory: Inventory) -> Mapping[str, Any]:
        """What was measured of models of the same shape; empty where none was."""
        found: Mapping[str, Any] = self._shapes.get(shape(inventory), {})
        return found

    def _from_shape(self, inventory: Inventory) -> dict[str, float]:
        """What models of the same shape add to ln s, by tensor."""
        found: dict[str, float] = {}
        tensors = by_role(inventory)
        for role, hundredths in self.same_shape(inventory).get("ln_hundredths", {}).items():
            values = [int(word) / 100 for word in hundredths.split()]
            found |= {t.name: v for t, v in zip(tensors.get(role, ()), values, strict=False)}
        return found

    def borrowed(self, inventory: Inventory) -> frozenset[str]:
        """Tensors of the parts that were measured in models of the same shape."""
        of_shape = self._from_shape(inventory)
        measured = {part(inventory.by_name[name], inventory) for name, v in of_shape.items() if v}
        return frozenset(n for n in of_shape if part(inventory.by_name[n], inventory) in measured)

    def sensitivities(self, inventory: Inventory) -> dict[str, float]:
        """Loss of each quantizable, loaded tensor per unit of error, in nats; they sum to S."""
        of_shape = self._from_shape(inventory)
        raw = {
            t.name: math.exp(sum(self._terms(t, inventory, of_shape).values()))
            for t in quantized(inventory)
        }
        total, scale = math.fsum(raw.values()), math.exp(self.scale.ln_scale(inventory))
        return {name: scale * value / total for name, value in raw.items()}

    def _family(self, inventory: Inventory) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._families.get(family(inventory.architecture.name), {})
        return found


def _size(tensor: Tensor) -> float:
    return math.log(tensor.n_weights / _REFERENCE_WEIGHTS)


def _class(tensor: Tensor) -> str:
    return "experts" if tensor.is_expert else tensor.role_class
