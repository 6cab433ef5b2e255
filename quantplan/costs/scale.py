"""What a whole model loses, from metadata alone: its scale, and the noise floor of its KLD.

``KLD = floor + link(S * error)`` when all matrices have one type. S is the loss of the whole model
in nats per unit of relative squared error. The floor is the KLD that any change of the weights
shows, however small. Both are log-linear in features of the model, with effects for who trained it,
for its family and for its shape where such models were measured; ``scripts/quality_scale.py`` fits
them as a mixed model, so that an effect known from few models counts little.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantplan.costs.evidence import CurvePrior
from quantplan.costs.families import groups, quantized
from quantplan.inventory import Inventory

Features = dict[str, float]
"""Value of each named feature."""

# Models below the smallest one whose losses were compared with predictions (SmolLM2-135M) count as
# about as large: the features would go on to losses of thousands of nats.
_FEWEST_BILLIONS = 0.1


def scale_features(inventory: Inventory) -> Features:
    """Features of the whole model's loss per unit of error.

    A tied embedding adds its damage as output matrix; small models are more sensitive.
    """
    billions = sum(t.n_weights for t in quantized(inventory)) / 1e9
    return {
        "constant": 1.0,
        "tied": float(inventory.has_tied_output),
        "inverse root of billions of weights": 1 / math.sqrt(max(billions, _FEWEST_BILLIONS)),
    }


def density(inventory: Inventory) -> str:
    """``sparse`` for mixtures of experts: a small change there sends tokens to other experts."""
    return "sparse" if inventory.architecture.n_expert else "dense"


class ScalePrior:
    """The fitted scale and noise floor of any model."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Takes the document of ``quality.json``, or one of the same form."""
        self._scale: dict[str, float] = data["scale"]
        self._spread: dict[str, Any] | None = data.get("scale_spread")
        self._floors: dict[str, float] = data["floor"]["curve_nats"]
        self._effects: dict[str, dict[str, dict[str, float]]] = data["scale_effects"]
        self._sd: dict[str, Any] = data["ln_sd"]

    def _effect(self, inventory: Inventory, what: str) -> float:
        return sum(
            self._effects[level].get(name, {}).get(what, 0.0)
            for level, name in groups(inventory).items()
        )

    def ln_scale(self, inventory: Inventory) -> float:
        """Ln S: loss of the whole model in nats per unit of relative squared error."""
        pooled = sum(self._scale[k] * v for k, v in scale_features(inventory).items())
        return pooled + self._effect(inventory, "ln_scale")

    def floor_nats(self, inventory: Inventory) -> float:
        """KLD in nats per token that any change of the weights shows."""
        known = self._floors.get(density(inventory)) or min(self._floors.values())
        return known * math.exp(self._effect(inventory, "ln_floor"))

    def sd_factor(self, inventory: Inventory) -> float:
        """By how much ln S is less sure than for the models that were fitted, at least 1.

        A regression knows least far from its data: a model much smaller than any that was measured
        is extrapolated to.
        """
        if self._spread is None:
            return 1.0
        x = np.array([scale_features(inventory)[name] for name in self._scale])
        leverage = float(x @ np.array(self._spread["inverse"]) @ x)
        return max(1.0, math.sqrt((1 + leverage) / (1 + self._spread["usual"])))

    def is_known(self, inventory: Inventory) -> bool:
        """Whether models of the family were measured."""
        return groups(inventory)["family"] in self._effects["family"]

    def curve(self, inventory: Inventory) -> CurvePrior:
        """What is expected of the model's curve over types."""
        which = "known_family" if self.is_known(inventory) else "new_family"
        return CurvePrior(
            ln_scale=self.ln_scale(inventory),
            ln_scale_sd=self._sd[f"scale_{which}"] * self.sd_factor(inventory),
            ln_floor=math.log(self.floor_nats(inventory)),
            ln_floor_sd=self._sd[f"floor_{which}"],
        )
