"""What both halves of the chunks show of the groups of tensors that were measured."""

import math

import numpy as np

from quantplan.costs.evidence import Evidence, can_be_halved
from quantplan.costs.quality import LossTable, link
from quantplan.costs.resampling import Half, half_nats
from quantplan.formats.sensitivity_tables import SensitivityTable
from quantplan.inventory import Inventory

# Below this a KLD of half a text is noise.
_LEAST_KLD_NATS = 1e-6
_HALVES: tuple[Half, ...] = ("fit", "held out")
# With two groups, and their mean removed, both halves say the same or the opposite.
_FEWEST_GROUPS = 3


def survival(inventory: Inventory, table: SensitivityTable) -> float | None:
    """How much of what groups show on half of the chunks is there on the other half.

    What a plan gains by measurements is where they differ from the prior. The share of that which
    is not fitted to the text is the slope of the differences (in ln loss, their mean removed) on
    the held-out chunks over those on the others, and the other way round.

    Args:
        inventory: The model.
        table: What was measured of it, chunk by chunk.

    Returns:
        The share; 1 where both halves say the same. None with fewer than 3 groups.
    """
    prior = LossTable(inventory, Evidence(curve=table.curve) if table.curve else None)
    rows = [
        [
            math.log(link().loss(max(half_nats(one.by_chunk, half), _LEAST_KLD_NATS)))
            - math.log(sum(prior.loss_nats(inventory.by_name[n], one.qtype) for n in one.tensors))
            for half in _HALVES
        ]
        for one in table.singles
        if can_be_halved(one.by_chunk)
    ]
    if len(rows) < _FEWEST_GROUPS:
        return None
    differences = np.array(rows) - np.mean(rows, axis=0)
    product = float((differences[:, 0] * differences[:, 1]).sum())
    return 2 * product / float((differences**2).sum())
