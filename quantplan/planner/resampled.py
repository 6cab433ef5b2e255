"""How much a choice of types hangs on the chunks of the text that losses were measured on."""

import time
from dataclasses import replace
from itertools import combinations
from statistics import fmean, median

from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable
from quantplan.costs.resampling import resamples
from quantplan.planner.problem import Problem
from quantplan.planner.search import Limits, solve
from quantplan.planner.solution import Solution
from quantplan.schema import Frozen

Types = tuple[tuple[str, ...], ...]


class TypeChanges(Frozen):
    """Plans for resampled chunks beside each other, and beside the plan.

    Attributes:
        n_resamples: How many resamples were planned for.
        n_decisions: Groups of tensors that have a choice of types.
        n_unsettled: Decisions that are not the same in all of these plans.
        n_changed: Decisions in which two of them differ; the median over pairs.
        excess: Part by which the plan's objective is above that of the plan made for a resample,
            by the losses of that resample; the mean.
    """

    n_resamples: int
    n_decisions: int
    n_unsettled: int
    n_changed: float
    excess: float

    def describe(self) -> str:
        """The numbers in one sentence."""
        return (
            f"of {self.n_decisions} type decisions {self.n_changed:.0f} change between resamples "
            f"of the text ({self.n_unsettled} in any of {self.n_resamples}), which is worth "
            f"{self.excess:.1%}"
        )


def type_changes(
    problem: Problem, solution: Solution, n: int, *, gap: float, time_limit_s: float
) -> TypeChanges | None:
    """Plans again for resampled chunks.

    Args:
        problem: What was planned, with its evidence.
        solution: The plan.
        n: How many resamples.
        gap: Relative gap at which each search may stop.
        time_limit_s: Time for all of them, in seconds.

    Returns:
        None where nothing was measured in enough chunks, or fewer than two plans were found.
    """
    if problem.evidence is None:
        return None
    begun = time.monotonic()
    made: list[Types] = []
    excess = []
    for i, evidence in enumerate(resamples(problem.evidence, "fit", n)):
        left_s = time_limit_s - (time.monotonic() - begun)
        resampled = replace(problem, evidence=evidence).with_policy(problem.policy)
        limits = Limits(gap, time.monotonic() + left_s / (n - i), gap / 2)
        found = solve(resampled, limits, [solution.layer_devices])
        if found is not None:
            made.append(_types(found))
            best = found.objective_nats
            excess.append(_objective_nats(problem, solution, evidence) / best - 1 if best else 0.0)
    if len(made) < 2:
        return None
    differing = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in combinations(made, 2)]
    return TypeChanges(
        n_resamples=len(made),
        n_decisions=sum(len(group.options) > 1 for group in problem.groups),
        n_unsettled=sum(len(set(types)) > 1 for types in zip(*made, strict=True)),
        n_changed=median(differing),
        excess=fmean(excess),
    )


def _types(solution: Solution) -> Types:
    return tuple(option.qtypes for option, _ in solution.choices)


def _objective_nats(problem: Problem, solution: Solution, evidence: Evidence) -> float:
    """The objective of a solution by the losses of other evidence."""
    table = LossTable(problem.inventory, evidence)
    loss = sum(
        table.loss_nats(tensor, name)
        for group, types in zip(problem.groups, _types(solution), strict=True)
        for tensor, name in zip(group.tensors, types, strict=True)
    )
    price = problem.decode_price_nats_per_s
    return problem.loss_weight * loss + price * solution.decode_s
