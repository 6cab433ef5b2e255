"""Predicted loss in nats per token: role sensitivity times the error of the type.

``loss(tensor, type) = scale * share(tensor) * error(type)``. The error is the type's relative
squared error on Gaussian rows (linearity theorem: HIGGS, arXiv 2411.17525; measured by
``scripts/measure_type_error.py``). Scale and shares are fitted by ``scripts/fit_quality.py`` on
published per-tensor KLD measurements. It is a prior: nothing of the model itself was measured, it
is additive although low-bit damage is not, and the scale of an unseen family is off by a factor of
about 1.7 in the median.
"""

import math

from quantplan.costs import load_data
from quantplan.inventory import Inventory, Tensor

# Where a role was not measured, the role whose part it plays.
_LIKE = {
    "attention": "attn_output",
    "recurrent": "ssm_out",
    "indexer": "attn_k",
    "ffn": "ffn_down",
    "shared_experts": "ffn_down",
    "up_gate_experts": "ffn_up_exps",
    "down_experts": "ffn_down_exps",
    "embedding": "token_embd",
    "output": "output",
}
_DEFAULT_LIKE = "attn_output"


def type_error(qtype_name: str) -> float:
    """Relative squared error of a type on Gaussian rows.

    Raises:
        KeyError: The type was not measured.
    """
    return float(load_data("type_error.json")["relative_squared_error"][qtype_name])


class LossTable:
    """Predicted loss of each tensor of one model at each type."""

    def __init__(self, inventory: Inventory) -> None:
        """Distributes the model's loss scale over its quantizable, loaded tensors."""
        data = load_data("quality.json")
        self._factors: dict[str, float] = data["ln_role_factor"]
        # A tied embedding is the output matrix, and as sensitive as one.
        self._embedding_like = "output" if inventory.has_tied_output else "token_embd"
        tensors = [t for t in inventory.tensors if t.is_quantizable and inventory.is_loaded(t)]
        raw = {t.name: math.sqrt(t.n_weights) * self._factor(t) for t in tensors}
        total_loss = math.exp(data["ln_scale"])
        total = sum(raw.values())
        self._weight = {name: total_loss * value / total for name, value in raw.items()}

    def _factor(self, tensor: Tensor) -> float:
        if tensor.role_class == "embedding":
            return math.exp(self._factors[self._embedding_like])
        like = _LIKE.get(tensor.role_class, _DEFAULT_LIKE)
        return math.exp(self._factors.get(tensor.role, self._factors[like]))

    def loss_nats(self, tensor: Tensor, qtype_name: str) -> float:
        """Predicted loss in nats per token when this tensor alone has the type.

        A tensor that keeps its source type, is not quantizable or is not loaded costs nothing.
        """
        if qtype_name == tensor.qtype:
            return 0.0
        return self._weight.get(tensor.name, 0.0) * type_error(qtype_name)
