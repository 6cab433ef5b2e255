"""How much of a predicted gain is there on the half of the chunks that chose nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable
from quantplan.costs.resampling import on_half, resamples
from quantplan.planner.baselines import Baseline, type_sets
from quantplan.planner.problem import Problem
from quantplan.schema import Frozen

_RESAMPLES = 200
# Ends of the interval, in percent: 90 % of resamples are between.
_ENDS = (5.0, 95.0)
# Part of the plain answer's loss below which a gain is not worth a word.
_LEAST_GAIN = 0.01


class HeldOutGain(Frozen):
    """What remains of a predicted gain in loss on the half of the chunks that was held out.

    Attributes:
        over: The plain answer that the gain is over.
        gain_nats: The gain by the half that losses were fitted on, in nats per token.
        held_out_nats: The gain of the same types by the other half.
        low_nats: The lower, and
        high_nats: the upper end of its 90 % interval, over resamples of those chunks.
    """

    over: str
    gain_nats: float
    held_out_nats: float
    low_nats: float
    high_nats: float

    @property
    def share(self) -> float:
        """Part of the gain that remains."""
        return self.held_out_nats / self.gain_nats

    def describe(self) -> str:
        """The shares in one sentence."""
        low, high = (nats / self.gain_nats for nats in (self.low_nats, self.high_nats))
        return (
            f"on the held-out half of the text {self.share:.0%} of the gain over {self.over} "
            f"remains ({low:.0%} to {high:.0%})"
        )


def held_out_gain(
    problem: Problem, types: Mapping[str, str], baselines: Sequence[Baseline]
) -> HeldOutGain | None:
    """The gain of a plan over the best plain answer, by both halves of the chunks.

    Losses of the held-out half are those of its measurements, combined with the prior as those of
    the other half are.

    Args:
        problem: What was planned, with its evidence.
        types: The plan's type by full tensor name.
        baselines: Plain answers, the best first.

    Returns:
        None where nothing was measured in enough chunks, no plain answer will do, or the plan was
        not made for its loss or gains less than 1 % of it.
    """
    inventory, evidence = problem.inventory, problem.evidence
    best = next((baseline for baseline in baselines if baseline.is_answer), None)
    if best is None or evidence is None or not evidence.holds_out or not problem.loss_weight:
        return None
    plain = type_sets(inventory)[best.types]

    def gain_nats(found: Evidence) -> float:
        table = LossTable(inventory, found)
        return table.model_kld_nats(plain) - table.model_kld_nats(types)

    expected = replace(evidence, upper_sds=0.0)
    gain = gain_nats(on_half(expected, "fit"))
    if gain <= _LEAST_GAIN * best.loss_nats:  # both are 0 where nothing is quantized
        return None
    drawn = [gain_nats(one) for one in resamples(expected, "held out", _RESAMPLES)]
    low, high = np.percentile(drawn, _ENDS)
    return HeldOutGain(
        over=best.types,
        gain_nats=gain,
        held_out_nats=gain_nats(on_half(expected, "held out")),
        low_nats=float(low),
        high_nats=float(high),
    )
