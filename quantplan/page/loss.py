"""How sure the predicted loss of a whole model is."""

import math
from collections.abc import Mapping

from quantplan.costs.quality import LossTable, kld_nats
from quantplan.costs.speed import Z80, SpeedEstimate


def loss_interval(table: LossTable, qtypes: Mapping[str, str]) -> SpeedEstimate:
    """Predicted KLD of the model in some types, in nats per token, with its 80 % interval.

    The scale of the model is uncertain as for models of its family that the fit had not seen, more
    for models unlike those that were fitted, and less where a curve over types was measured; the
    sensitivities of a class of tensors and the errors of a type each as far as they are not common
    to all (`LossTable.difference_nats`, the careful end). All are taken as log-normal and
    independent.

    Args:
        table: Losses by tensor and type.
        qtypes: Type by full tensor name.
    """
    summed, sd = table.difference_nats(qtypes, {})
    if summed <= 0:
        return SpeedEstimate(low=0.0, expected=0.0, high=0.0)
    ln_sd = math.hypot(table.scale_ln_sd, sd / summed)
    return SpeedEstimate(
        low=kld_nats(summed * math.exp(-Z80 * ln_sd)),
        expected=kld_nats(summed),
        high=kld_nats(summed * math.exp(Z80 * ln_sd)),
    )
