"""How sure the predicted loss of a whole model is."""

import math
from collections import defaultdict
from collections.abc import Mapping

from quantplan.costs.quality import LossTable, kld_nats
from quantplan.costs.speed import Z80
from quantplan.inventory import Inventory
from quantplan.schema import Frozen

# A type that the whole model may have; which one hardly matters.
_REFERENCE = "Q4_K"


class LossInterval(Frozen):
    """Predicted KLD of a model, in nats per token, with its 80 % interval.

    Attributes:
        low: The loss is below this with a probability of 10 %.
        expected: The prediction.
        high: The loss is above this with a probability of 10 %.
    """

    low: float
    expected: float
    high: float


def loss_interval(
    table: LossTable, inventory: Inventory, qtypes: Mapping[str, str]
) -> LossInterval:
    """Predicted KLD of the model in some types.

    Errors of three kinds are taken as log-normal and independent: that of the scale, which all
    losses of the model share (a measured curve over types narrows it); those of the errors of
    types, each common to a type; and those of the shares of classes of tensors. The scale is that
    of the whole model at one type, where errors of shares cancel; so what counts of the latter is
    what is left once the loss of the whole model at one type is known.

    Args:
        table: Losses by tensor and type.
        inventory: The model.
        qtypes: Type by full tensor name.
    """
    summed, sd = table.difference_nats(qtypes, {})
    if summed <= 0:
        return LossInterval(low=0.0, expected=0.0, high=0.0)
    known = _explained_variance(table, inventory, qtypes)
    ln_sd = math.hypot(table.scale_ln_sd, math.sqrt(max(0.0, sd**2 - known)) / summed)
    return LossInterval(
        low=kld_nats(summed * math.exp(-Z80 * ln_sd)),
        expected=kld_nats(summed),
        high=kld_nats(summed * math.exp(Z80 * ln_sd)),
    )


def _explained_variance(table: LossTable, inventory: Inventory, qtypes: Mapping[str, str]) -> float:
    """Variance of the loss, in nats squared, that the loss of the model at one type explains.

    With deviations d of classes, independent and of variance 1, the loss in the types varies by
    the sum of a d, and that of the model at one type by the sum of b d. Given the latter, the
    variance of the former is less by (sum of a b)**2 / (sum of b**2).
    """
    own: defaultdict[str, float] = defaultdict(float)
    at_one_type: defaultdict[str, float] = defaultdict(float)
    for tensor in inventory.tensors:
        ln_sd = table.own_ln_sd(tensor)
        own[tensor.role_class] += (
            table.loss_nats(tensor, qtypes.get(tensor.name, tensor.qtype)) * ln_sd
        )
        at_one_type[tensor.role_class] += table.loss_nats(tensor, _REFERENCE) * ln_sd
    norm = sum(b**2 for b in at_one_type.values())
    return sum(own[c] * at_one_type[c] for c in own) ** 2 / norm if norm else 0.0
