"""The other points of the frontier, each as a whole plan with its own command."""

from collections.abc import Callable

from quantplan.costs.evidence import Evidence
from quantplan.errors import NoPlanError
from quantplan.inventory import Inventory
from quantplan.plans.frontier import frontier
from quantplan.plans.plan import plan
from quantplan.plans.result import Plan
from quantplan.policy import Policy

# Relative gap of the points: to prove less takes most of the time, and no picture shows it.
_GAP = 1e-2


def why_not(made: Plan, inventory: Inventory, policy: Policy, evidence: Evidence | None) -> str:
    """Why other plans would not be comparable with this one; empty where they are.

    Args:
        made: The plan.
        inventory: The model as it is read now.
        policy: The policy as it is known now.
        evidence: What was measured of the model, as it is given now.
    """
    if inventory.header_sha256 != made.provenance.header_sha256:
        return f"{inventory.source} is not the model that the plan was made for"
    asked = made.provenance
    if (policy.name, policy.tensor_rules) != (asked.policy, asked.tensor_rules):
        return (
            f"the plan was made with the policy {asked.policy_text}; give the same --policy, "
            "--pin and --allow, or none of them"
        )
    if made.predicted.upper_loss_nats is not None and not (evidence and evidence.upper_sds):
        return "the plan was made against the upper end of losses (--robust)"
    if not made.was_made_with(inventory, evidence):
        return (
            "the plan was made with measurements of the model, or by another version of "
            "quantplan; give the same --measured and --weights, or plan again"
        )
    return ""


def other_plans(
    made: Plan,
    inventory: Inventory,
    *,
    policy: Policy | str,
    evidence: Evidence | None = None,
    points: int = 12,
    time_limit_s: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Plan]:
    """Plans at other speeds, for the model, machine and workload of one that is there.

    Args:
        made: The plan that is there.
        inventory: Its model.
        policy: Its policy.
        evidence: What it was made with.
        points: How many points of the frontier to work out; equal ones are left out.
        time_limit_s: Time for each search, in seconds.
        progress: Is told before every point how many are done, and how many there are.
    """
    ends = frontier(
        inventory, made.machine, made.workload, points=2, policy=policy, evidence=evidence,
        gap=_GAP, time_limit_s=time_limit_s,
    )  # fmt: skip
    known, found = {_numbers(made)}, []
    limits = _between(ends.points[0].limit, ends.points[-1].limit, points)
    for n, limit in enumerate(limits):
        if progress is not None:
            progress(n, len(limits))
        try:
            other = plan(
                inventory, made.machine, made.workload, min_decode_tps=limit, policy=policy,
                evidence=evidence, gap=_GAP, time_limit_s=time_limit_s, baselines=False,
            )  # fmt: skip
        except NoPlanError:  # the fastest speed may be out of reach by what rounding hides
            continue
        if _numbers(other) not in known:
            known.add(_numbers(other))
            found.append(other)
    return _undominated(made, found)


def _between(first: float, last: float, points: int) -> list[float]:
    """So many limits from the first to the last, evenly spaced by ratio."""
    if points == 1 or first == last:
        return [first]
    return [first * (last / first) ** (n / (points - 1)) for n in range(points)]


def _numbers(found: Plan) -> tuple[float, float]:
    return (round(found.predicted.decode_tps, 6), round(found.predicted.loss_nats, 9))


def _undominated(made: Plan, found: list[Plan]) -> list[Plan]:
    """Those that no other one, nor the plan that is there, beats in speed and loss."""
    everything = [_numbers(p) for p in (made, *found)]
    return [
        p
        for p in found
        if not any(
            tps >= _numbers(p)[0] and nats <= _numbers(p)[1]
            for tps, nats in everything
            if (tps, nats) != _numbers(p)
        )
    ]
