"""What to measure of a model: types for the curve, and groups of tensors in a good order."""

import math
from collections import defaultdict
from collections.abc import Collection

from quantplan.costs.evidence import Evidence
from quantplan.costs.families import quantized
from quantplan.costs.quality import LossTable, link
from quantplan.inventory import Inventory, Tensor
from quantplan.qtypes import fitting_qtype, qtype
from quantplan.schema import Frozen

WHOLE = "all"
# Types of the curve, the one that tells most first: blocks of 256 weights, or of 32.
_CURVES = (
    ("Q4_K", "Q2_K", "Q6_K", "Q3_K", "Q5_K"),
    ("Q4_0", "Q8_0", "Q5_0", "Q4_1", "Q5_1"),
)
# Types of a curve must fit at least so many of the weights; the others stay as they are.
_LEAST_FITTING = 0.95
# A group is measured at the type whose predicted KLD is nearest to this: far above the noise of a
# text of a few thousand tokens, and far below where losses stop to add up.
_TARGET_KLD_NATS = 0.05
# Layers are measured in so many bands of depth.
DEPTH_BANDS = 4


class Job(Frozen):
    """Tensors to quantize to a type while all others stay as they are.

    Attributes:
        name: Of the tensors together; ``all`` for the whole model.
        tensors: Their full names.
        qtype: The type.
    """

    name: str
    tensors: tuple[str, ...]
    qtype: str

    def __str__(self) -> str:
        """What is quantized, in words."""
        return f"{self.name} at {self.qtype}"


def measurable(inventory: Inventory) -> list[Tensor]:
    """Matrices whose loss can be measured: what a source has quantized already stays as it is."""
    return [t for t in quantized(inventory) if qtype(t.qtype).is_float]


def curve_jobs(inventory: Inventory) -> list[Job]:
    """The whole model at each type of the curve; types that fit its rows."""
    matrices = measurable(inventory)
    total = sum(t.n_weights for t in matrices)
    for types in _CURVES:
        fitting = {kind: [t for t in matrices if _fits(t, kind)] for kind in types}
        least = min(sum(t.n_weights for t in found) for found in fitting.values())
        if least >= _LEAST_FITTING * total:
            return [
                Job(name=WHOLE, tensors=tuple(t.name for t in found), qtype=kind)
                for kind, found in fitting.items()
            ]
    return []


def groups(inventory: Inventory) -> dict[str, list[Tensor]]:
    """Tensors by role and band of depth, by a name such as ``attn_v 0-7``."""
    n_layers = max(inventory.architecture.n_loaded_layers, 1)
    found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for tensor in measurable(inventory):
        band = -1 if tensor.layer is None else min(
            tensor.layer * DEPTH_BANDS // n_layers, DEPTH_BANDS - 1
        )  # fmt: skip
        found[tensor.role, band].append(tensor)
    named = {}
    for (role, _), tensors in found.items():
        layers = [t.layer for t in tensors if t.layer is not None]
        named[f"{role} {min(layers)}-{max(layers)}" if layers else role] = tensors
    return named


def next_group(inventory: Inventory, evidence: Evidence, begun: Collection[Job]) -> Job | None:
    """The group whose measurement removes the most uncertainty from the summed loss.

    Errors of sensitivities are taken as common to a group, so its standard deviation is in
    proportion to its loss; a measurement leaves that of single measurements.

    Args:
        inventory: The model.
        evidence: What was measured so far.
        begun: Jobs that are running.

    Returns:
        The group at a type that fits its rows; None where every group was measured.
    """
    table = LossTable(inventory, evidence)
    measured = {single.tensors for single in evidence.singles} | {job.tensors for job in begun}
    types = [job.qtype for job in curve_jobs(inventory)]
    best: tuple[float, Job] | None = None
    for name, tensors in groups(inventory).items():
        names = tuple(t.name for t in tensors)
        fitting = [kind for kind in types if all(_fits(t, kind) for t in tensors)]
        if names in measured or not fitting:
            continue
        losses = {kind: sum(table.loss_nats(t, kind) for t in tensors) for kind in fitting}
        kind = min(losses, key=lambda q: abs(math.log(link().kld(losses[q]) / _TARGET_KLD_NATS)))
        loss_per_error = losses[kind] / table.error(tensors[0], kind)
        before = max(table.own_ln_sd(t) for t in tensors)
        after = (before**-2 + table.single_ln_sd**-2) ** -0.5 if before else 0.0
        gain = loss_per_error * (before - after)
        if best is None or gain > best[0]:
            best = gain, Job(name=name, tensors=names, qtype=kind)
    return best[1] if best else None


def _fits(tensor: Tensor, kind: str) -> bool:
    found = fitting_qtype(kind, tensor.shape_ne[0])
    return found is not None and found.name == kind
