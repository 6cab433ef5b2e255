"""What a little more of each resource would buy, found by planning again with it."""

import math
import time
from collections.abc import Callable
from typing import Any, Literal

from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import kld_nats
from quantplan.display import Table
from quantplan.errors import InputError
from quantplan.given import check_given
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.planner.bounds import split_bounds
from quantplan.planner.goal import Goal
from quantplan.planner.problem import Problem, build_problem
from quantplan.planner.search import Limits, solve
from quantplan.planner.solution import Solution, within_limits
from quantplan.plans.result import Plan
from quantplan.policy import Policy
from quantplan.schema import Frozen
from quantplan.units import GIB, MIB

_MORE_BANDWIDTH = 1.1
_VRAM, _RAM, _BANDWIDTH = "1 GiB of VRAM", "1 GiB of RAM", "10 % of RAM bandwidth"
_BORDER = "1 GiB from CPU to GPU"
_OBJECTIVES = {
    "loss": "the summed loss of the tensors",
    "loss and time": "the summed loss of the tensors, and time at the policy's price",
    "time": "time at the policy's price",
}


class Price(Frozen):
    """What more of one resource would buy.

    Attributes:
        resource: ``1 GiB of VRAM`` (on each GPU), ``1 GiB of RAM``, or ``10 % of RAM bandwidth``.
            Where a GPU shares the RAM, one GiB more is the GPU's, the bandwidth is that of both,
            and ``1 GiB from CPU to GPU`` moves the border between their parts.
        objective_nats: By how much the objective would fall, in nats per token; below 0 where a
            moved border makes it rise.
        low_nats: By how much at least, and
        high_nats: by how much at most, since both plans are proven only to a gap.
        loss_nats: By how much the predicted loss of the model would fall.
        decode_tps: By how much the decode speed would rise.
        dual_nats: What the program without integers says of a little more memory, in proportion;
            None for bandwidth, and where it is not between ``low_nats`` and ``high_nats``: it holds
            for the last byte, not for a whole GiB.
    """

    resource: str
    objective_nats: float
    low_nats: float
    high_nats: float
    loss_nats: float
    decode_tps: float
    dual_nats: float | None


class Prices(Frozen):
    """What a little more of each resource would buy.

    Attributes:
        schema_version: Version of this format.
        model: Name of the model.
        machine: The machine as it is, for people.
        objective: What a plan is judged by: ``loss``, ``loss and time``, or ``time``.
        decode_tps: Tokens per second of the plan without more.
        loss_nats: Its predicted loss, in nats per token.
        resources: What more of each would buy; empty where no plan was found in time.
    """

    schema_version: Literal[1] = 1
    model: str
    machine: str
    objective: Literal["loss", "loss and time", "time"]
    decode_tps: float
    loss_nats: float
    resources: tuple[Price, ...]

    def summary(self) -> str:
        """A table of at most 80 columns."""
        rows = [
            f"{self.model} on {self.machine}",
            f"  now: {self.decode_tps:.2f} tokens/s, loss {self.loss_nats:.5f} nats/token",
            f"  {'with more':22} {'tokens/s':>8} {'loss nats':>10}  objective (interval), nats",
        ]
        rows += [
            f"  {p.resource:22} {p.decode_tps:+8.2f} {-p.loss_nats:+10.5f}  {_objective_text(p)}"
            for p in self.resources
        ]
        if not self.resources:
            rows.append("  no plan was found in time")
        rows.append(
            f"  The objective is {_OBJECTIVES[self.objective]}. Both plans are proven to a gap, so "
            "what is gained has an interval; from 0 on, it may be nothing."
        )
        return "\n".join(rows)

    def _table(self) -> Table:
        found = self.resources
        return Table(
            f"{self.model} on {self.machine}: what a little more would buy",
            {
                "resource": [p.resource for p in found],
                "decode_tps": [p.decode_tps for p in found],
                "loss_nats": [-p.loss_nats for p in found],
                "objective_nats": [-p.objective_nats for p in found],
                "objective_low_nats": [-p.high_nats for p in found],
                "objective_high_nats": [-p.low_nats for p in found],
            },
        )

    def to_frame(self) -> Any:
        """The changes as a pandas data frame (or polars where only that is installed).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return self._table().to_frame()

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def _objective_text(price: Price) -> str:
    """What happens to the objective: less is better."""
    expected, low, high = (
        f"{-n:+.2g}" if n else "0" for n in (price.objective_nats, price.high_nats, price.low_nats)
    )
    return f"{expected} ({low} to {high})"


def prices(
    plan: Plan,
    inventory: Inventory,
    *,
    policy: Policy | None = None,
    evidence: Evidence | None = None,
    gap: float = 1e-3,
    time_limit_s: float = 30.0,
    progress: Callable[[int, int], None] | None = None,
) -> Prices:
    """Says what one more GiB of VRAM or RAM, or 10 % more RAM bandwidth, would buy.

    Args:
        plan: A plan for a machine.
        inventory: The model that it is for.
        policy: The rules that it was made with, where they are not those that it names.
        evidence: What it was made with.
        gap: Relative gap at which each search may stop.
        time_limit_s: Time for all searches together, in seconds.
        progress: Is told before each resource how many are done, and how many there are.

    Raises:
        InputError: The plan is for another model, or was made with other evidence, or with rules
            that have no name.
    """
    check_given(("plan", plan, Plan), ("model", inventory, Inventory))
    if plan.provenance.header_sha256 != inventory.header_sha256:
        raise InputError(f"the plan is for {plan.model}, not for {inventory.name}")
    if not plan.was_made_with(inventory, evidence):
        raise InputError(
            f"the plan for {plan.model} was made with losses from "
            f"{plan.provenance.evidence or 'metadata alone'}: give the same evidence, or plan again"
        )
    asked = plan.provenance
    goal = Goal.within(asked.min_decode_tps, asked.max_turn_s, asked.max_loss_nats)
    rules = policy or asked.rules
    deadline = time.monotonic() + time_limit_s

    def problem_on(machine: Machine) -> Problem:
        return build_problem(inventory, machine, plan.workload, rules, goal, evidence=evidence)

    here = problem_on(plan.machine)
    base = solve(here, Limits(gap, deadline, gap / 2))
    found = []
    if base is not None:
        duals = _duals(here, base)
        changed = _with_more(plan.machine)
        for n, (resource, better) in enumerate(changed.items()):
            if progress is not None:
                progress(n, len(changed))
            problem = problem_on(better)
            known = within_limits(problem, base)  # None where a moved border leaves too little
            search = Limits(gap, deadline, gap / 2)
            new = solve(problem, search, [base.layer_devices], known=known) or known
            if new is not None:
                found.append(_price(resource, base, new, duals.get(resource)))
    return Prices(
        model=plan.model,
        machine=plan.machine.describe(),
        objective=_objective(here),
        decode_tps=plan.predicted.decode_tps,
        loss_nats=plan.predicted.loss_nats,
        resources=tuple(found),
    )


def _with_more(machine: Machine) -> dict[str, Machine]:
    """The machine with more of each resource that it has."""
    changed = {
        resource: machine.with_more({name: n * GIB for name, n in gib_of.items()})
        for resource, gib_of in _memory_of(machine).items()
        if machine.ram.capacity_bytes + GIB * gib_of.get(machine.ram.name, 0) >= 0
    }
    gpus = tuple(_faster(gpu) if gpu.shares_ram else gpu for gpu in machine.gpus)
    changed[_BANDWIDTH] = machine.model_copy(update={"ram": _faster(machine.ram), "gpus": gpus})
    return changed


def _memory_of(machine: Machine) -> dict[str, dict[str, int]]:
    """By the name of each resource that is memory: how many GiB more each device has with it."""
    own = {gpu.name: 1 for gpu in machine.gpus if not gpu.shares_ram}
    shared = {gpu.name: 1 for gpu in machine.gpus if gpu.shares_ram}
    memory = {_VRAM: own, _RAM: shared or {machine.ram.name: 1}}
    if shared:
        memory[_BORDER] = shared | {machine.ram.name: -1}
    return {resource: gib_of for resource, gib_of in memory.items() if gib_of}


def _faster(device: Device) -> Device:
    rate = device.bandwidth_bytes_per_s * _MORE_BANDWIDTH
    return device.model_copy(update={"bandwidth_bytes_per_s": rate})


def _objective(problem: Problem) -> Literal["loss", "loss and time", "time"]:
    if not problem.loss_weight:
        return "time"
    return "loss and time" if problem.decode_price_nats_per_s else "loss"


def _price(resource: str, base: Solution, new: Solution, dual: float | None) -> Price:
    # A better machine can do what the plain one does, so it is never worse.
    least = -math.inf if resource == _BORDER else 0.0
    low = max(least, base.bound_nats - new.objective_nats)
    high = max(least, base.objective_nats - new.bound_nats)
    agrees = dual is not None and low <= dual <= high
    return Price(
        resource=resource,
        objective_nats=max(least, base.objective_nats - new.objective_nats),
        low_nats=low,
        high_nats=high,
        loss_nats=kld_nats(base.loss_nats) - kld_nats(new.loss_nats),
        decode_tps=1 / new.decode_s - 1 / base.decode_s,
        dual_nats=dual if agrees else None,
    )


def _duals(problem: Problem, base: Solution) -> dict[str, float]:
    """Nats per GiB of memory, from the program without integers at the solution's split."""
    bounds = split_bounds(base.split(problem))
    if not bounds.order:
        return {}
    duals = bounds.answers[bounds.order[0]].duals
    per_gib = {
        device.name: -duals[f"memory_{p}"] * (GIB / MIB) / 1000
        for p, (device, *_) in enumerate(bounds.model.pools)
    }
    return {
        resource: sum(n * per_gib[name] for name, n in gib_of.items())
        for resource, gib_of in _memory_of(problem.machine).items()
    }
