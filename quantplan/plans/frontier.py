"""Quality against speed, size or context: what each costs in terms of the other."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from quantplan.costs.calibration import for_model
from quantplan.costs.evidence import Evidence
from quantplan.costs.memory import CELL_PADDING
from quantplan.costs.quality import kld_nats
from quantplan.display import Table
from quantplan.errors import InputError, SolverError
from quantplan.given import check_given
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.planner.changes import ANY_TPS
from quantplan.planner.context import with_context
from quantplan.planner.diagnose import no_plan
from quantplan.planner.goal import Goal, Status
from quantplan.planner.problem import Problem, build_problem
from quantplan.planner.search import Limits, in_faster_places, solve
from quantplan.planner.solution import Solution, checked, within_limits
from quantplan.policy import Policy
from quantplan.policy import policy as policy_preset
from quantplan.schema import Frozen
from quantplan.units import GIB, gib
from quantplan.workload import Workload

Over = Literal["speed", "size", "context"]

# A size that the smallest types fit into in spite of what the solver holds back.
_SIZE_SLACK_BYTES = 2**21
_SHORTEST_CONTEXT = 4096


class FrontierPoint(Frozen):
    """The plan of least loss at one speed, size or context.

    Attributes:
        limit: What was asked for: tokens per second, bytes of the file, or tokens of context.
        loss_nats: Predicted loss of the model, in nats per token.
        decode_tps: Tokens per second of one request, with the context full.
        file_bytes: Tensor data of the file.
        context: Tokens of context.
        status: ``optimal``, ``within_gap``, ``gap_left`` or ``time_limit``.
        gap: Proven relative gap of the summed loss.
    """

    limit: float
    loss_nats: float
    decode_tps: float
    file_bytes: int
    context: int
    status: Status
    gap: float


class Frontier(Frozen):
    """Plans none of which is better in both than another.

    Attributes:
        model: Name of the model.
        over: What is traded for quality.
        points: From the easiest limit to the hardest; fewer than asked for where two are equal.
    """

    model: str
    over: Over
    points: tuple[FrontierPoint, ...]

    def summary(self) -> str:
        """A table."""
        rows = [
            f"{self.model}: quality against {self.over}",
            "  tokens/s   loss nats/token        file   context      gap",
        ]
        rows += [
            f"  {p.decode_tps:8.2f}   {p.loss_nats:15.5f}  {gib(p.file_bytes):>10}  {p.context:>8}"
            f"  {p.gap:7.3%}"
            for p in self.points
        ]
        return "\n".join(rows)

    def _table(self) -> Table:
        points = self.points
        return Table(
            f"{self.model}: quality against {self.over}",
            {
                "decode_tps": [p.decode_tps for p in points],
                "loss_nats": [p.loss_nats for p in points],
                "file_gib": [p.file_bytes / GIB for p in points],
                "context": [p.context for p in points],
                "status": [p.status for p in points],
                "gap": [p.gap for p in points],
            },
        )

    def to_frame(self) -> Any:
        """The points as a pandas data frame (or polars where only that is installed).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return self._table().to_frame()

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def frontier(
    inventory: Inventory,
    machine: Machine,
    workload: Workload | None = None,
    *,
    over: Over = "speed",
    points: int = 24,
    min_decode_tps: float | None = None,
    policy: Policy | str = "quality",
    evidence: Evidence | None = None,
    gap: float = 1e-2,
    time_limit_s: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> Frontier:
    """Traces the least loss against speed, size or context.

    One limit after the other is set and the loss minimised under it (the epsilon-constraint
    method). The points share the groups, their options and the splits that were good so far, and a
    solution under a harder limit is one under an easier limit too. The types of each point are in
    the fastest places.

    Args:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types; by default 4096 tokens in F16.
        over: What to trade for quality: decode ``speed``, ``size`` of the file, or ``context``.
        points: How many, evenly spaced by ratio.
        min_decode_tps: Least decode speed of all points; over size or context.
        policy: Rules about types and places, or the name of a preset.
        evidence: What was measured of the model's losses.
        gap: Relative gap at which the search of a point may stop.
        time_limit_s: Time for all points, in seconds.
        progress: Is told after each limit how many are done, and how many there are.

    Raises:
        InputError: A number is out of range.
        NoPlanError: Nothing fits.
        SolverError: Nothing was found in time.
    """
    check_given(("model", inventory, Inventory), ("machine", machine, Machine))
    goal = Goal(min_decode_tps=min_decode_tps)
    faults = goal.faults()
    if points < 2:
        faults.append(f"{points} points make no frontier; there must be at least 2")
    if over == "speed" and min_decode_tps is not None:
        faults.append("the frontier over speed has every speed; give no min_decode_tps")
    if faults:
        raise InputError(faults)
    rules = policy_preset(policy) if isinstance(policy, str) else policy

    deadline = time.monotonic() + time_limit_s
    known = for_model(machine, inventory.architecture)
    problem = build_problem(
        inventory, known, workload or Workload(), rules, goal, evidence=evidence
    )
    search = Limits(gap, deadline, gap / 2)
    fastest = solve(replace(problem, goal=Goal(best="speed")), search)
    easiest = _at(problem, "speed", min_decode_tps or ANY_TPS)
    best = fastest and solve(easiest, search, known=within_limits(easiest, fastest))
    if fastest is None or best is None:
        if search.is_over:
            raise SolverError(f"no plan was found within {time_limit_s:g} s; give it more time")
        raise no_plan(problem, time_limit_s)
    if over == "speed":
        until = time.monotonic() + (deadline - time.monotonic()) / points
        best = in_faster_places(easiest, best, gap, until)
    limits = _limits_between(problem, fastest, best, over, points)
    start = fastest if over == "speed" else None
    traced = _trace(problem, limits, over, start, gap=gap, deadline=deadline, progress=progress)
    points_found = tuple(_undominated(list(traced)[::-1]))
    return Frontier(model=inventory.name, over=over, points=points_found)


def _limits_between(
    problem: Problem, fastest: Solution, best: Solution, over: Over, points: int
) -> list[float]:
    """The limits, the hardest first; at the easiest one, more of it improves nothing."""
    if over == "speed":
        hardest, easiest = 0.999 / fastest.decode_s, 0.999 / best.decode_s
    elif over == "size":
        sizes = [[o.n_bytes for o in g.options] for g in problem.groups]
        hardest = float(problem.unloaded_bytes + sum(map(min, sizes)) + _SIZE_SLACK_BYTES)
        easiest = float(_file_bytes(problem, best))
    else:
        trained = problem.inventory.architecture.context_length or problem.workload.context
        hardest, easiest = float(trained), float(min(_SHORTEST_CONTEXT, trained))
    ratio = (easiest / hardest) ** (1 / (points - 1))
    limits = [hardest * ratio**n for n in range(points)]
    if over == "context":  # whole cells, which a power may miss by a hair
        limits = [
            float(max(CELL_PADDING, int(limit + 0.5) // CELL_PADDING * CELL_PADDING))
            for limit in limits
        ]
    return list(dict.fromkeys(limits))


def _at(problem: Problem, over: Over, limit: float) -> Problem:
    if over == "speed":
        return replace(problem, goal=replace(problem.goal, min_decode_tps=limit))
    if over == "size":
        return replace(problem, goal=replace(problem.goal, max_file_bytes=int(limit)))
    slow = replace(problem.goal, min_decode_tps=problem.goal.min_decode_tps or ANY_TPS)
    return replace(with_context(problem, int(limit)), goal=slow)


def _trace(
    problem: Problem,
    limits: list[float],
    over: Over,
    known: Solution | None,
    *,
    gap: float,
    deadline: float,
    progress: Callable[[int, int], None] | None,
) -> Iterator[FrontierPoint]:
    """Points from the hardest limit to the easiest; limits without a plan are left out.

    ``known`` is a solution at the hardest limit, where there is one.
    """
    for n, limit in enumerate(limits):
        left_s = max(0.3, (deadline - time.monotonic()) / (len(limits) - n))
        at = _at(problem, over, limit)
        if known is not None:
            known = checked(known.split(at), known.choices)
        # Most points close their gap at once; one that does not may use what they left over.
        search = Limits(gap, time.monotonic() + 4 * left_s, gap / 2)
        found = solve(at, search, [known.layer_devices] if known else (), known=known)
        if found is not None:
            until = time.monotonic() + left_s
            known = in_faster_places(at, found, gap, until)
            yield _point(at, limit, known)
        if progress is not None:
            progress(n + 1, len(limits))


def _point(problem: Problem, limit: float, solution: Solution) -> FrontierPoint:
    return FrontierPoint(
        limit=limit,
        loss_nats=kld_nats(solution.loss_nats),
        decode_tps=1 / solution.decode_s,
        file_bytes=_file_bytes(problem, solution),
        context=problem.workload.context,
        status=solution.status,
        gap=solution.gap,
    )


def _file_bytes(problem: Problem, solution: Solution) -> int:
    return problem.unloaded_bytes + sum(option.n_bytes for option, _ in solution.choices)


def _undominated(points: list[FrontierPoint]) -> Iterator[FrontierPoint]:
    """Points without those that repeat the one before."""
    last: FrontierPoint | None = None
    for point in points:
        same = last is not None and (point.loss_nats, point.decode_tps, point.context) == (
            last.loss_nats, last.decode_tps, last.context,
        )  # fmt: skip
        if not same:
            yield point
        last = point
