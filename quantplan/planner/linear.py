"""A linear program with integer variables: PuLP holds the model, HiGHS solves it.

PuLP gives a model to HiGHS anew for every run. Here one model is solved many times with other
bounds of a few variables, so PuLP builds the solver's model once, and the bounds are changed there.
"""

import importlib.metadata
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import highspy
import pulp

from quantplan.errors import SolverError

Terms = Mapping[pulp.LpVariable, float]
"""Coefficients by variable."""

Ranges = Mapping[pulp.LpVariable, tuple[float, float]]
"""Least and greatest values of variables, of those that are settled or narrowed for a run."""

Ending = Literal["solved", "infeasible", "out_of_time"]

# How much longer than its limit the solver may take to see that its time is up.
_GRACE_S = 30.0

_BEFORE_RUNS: ContextVar[Callable[[], None]] = ContextVar("before_runs", default=lambda: None)


@contextmanager
def before_every_run(check: Callable[[], None]) -> Iterator[None]:
    """Calls something before every run of the solver in this block and thread.

    Args:
        check: It; what it raises ends what the solver was to be run for.
    """
    earlier = _BEFORE_RUNS.set(check)
    try:
        yield
    finally:
        _BEFORE_RUNS.reset(earlier)


@dataclass(frozen=True)
class Answer:
    """What HiGHS says of a program.

    Attributes:
        ending: ``solved``: to the gap, or in time with some answer; ``infeasible``: proven to have
            none; ``out_of_time``: none was found.
        objective: Of the values; infinite unless solved.
        bound: Proven lower bound of the objective.
        values: One per variable, in the solver's order; empty unless solved.
        duals: Change of the objective per unit of each row's right-hand side, by the row's name;
            empty where integers were asked for.
    """

    ending: Ending
    objective: float
    bound: float
    values: Sequence[float] = ()
    duals: Mapping[str, float] = field(default_factory=dict)

    def value(self, variable: pulp.LpVariable) -> float:
        """Value of a variable of the program that was solved."""
        return float(self.values[variable.index])


class LinearProgram:
    """Variables, rows and an objective to minimise.

    Attributes:
        lp: The model.
        rows: Its rows by name, as they were added.
    """

    def __init__(self) -> None:
        """An empty program."""
        self.lp = pulp.LpProblem("quantplan", pulp.LpMinimize)
        self.rows: dict[str, pulp.LpConstraint] = {}

    def add_variable(
        self, name: str, upper: float | None = None, *, is_integer: bool = False
    ) -> pulp.LpVariable:
        """Adds a variable of at least 0."""
        category = pulp.LpInteger if is_integer else pulp.LpContinuous
        return self.lp.add_variable(name, 0, upper, category)

    def add_row(
        self,
        name: str,
        terms: Terms,
        *,
        lower: float | None = None,
        upper: float | None = None,
        equal: float | None = None,
    ) -> None:
        """Adds ``sum of terms >= lower``, ``<= upper``, or ``= equal``: one of them."""
        for sense, side in (
            (pulp.LpConstraintGE, lower), (pulp.LpConstraintLE, upper),
            (pulp.LpConstraintEQ, equal),
        ):  # fmt: skip
            if side is not None:
                row = pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, name, side)
                self.lp.addConstraint(row)
                self.rows[name] = row

    def loosen(self, rows: Mapping[str, float]) -> pulp.LpVariable:
        """Adds a variable that raises the upper sides of rows, each by so many times itself."""
        extra = self.add_variable("extra")
        for name, times in rows.items():
            self.rows[name].expr.addterm(extra, -times)
        return extra

    def minimise(self, costs: Terms) -> None:
        """Sets the objective."""
        self.lp.setObjective(pulp.LpAffineExpression(costs))

    def solve(
        self, gap: float = 0.0, time_limit_s: float = math.inf, *, within: Ranges | None = None
    ) -> Answer:
        """Runs HiGHS.

        Args:
            gap: Relative gap at which to stop.
            time_limit_s: Time at which to stop.
            within: Ranges of some variables.

        Raises:
            SolverError: HiGHS failed.
        """
        highs = self._built(solver_options(gap, time_limit_s), is_mixed=True)
        return self._run(highs, within or {}, time_limit_s, is_mixed=bool(self.lp.isMIP()))

    def relaxation(self) -> Callable[[Ranges], Answer]:
        """A function that solves the program without integers, with some variables in ranges.

        Each run starts from the last one's basis, so that many take little longer than one; all of
        them name the same variables. The bound is weaker than that with integers, and rows have
        duals. The function raises `SolverError` where HiGHS fails.
        """
        highs = self._built(solver_options(0.0, math.inf), is_mixed=False)
        return lambda within: self._run(highs, within, math.inf, is_mixed=False)

    def _built(self, options: Mapping[str, Any], *, is_mixed: bool) -> Any:
        with _GREETING:
            _greet()
        solver = pulp.HiGHS(mip=is_mixed, msg=False, **options)
        solver.createAndConfigureSolver(self.lp)
        solver.buildSolverModel(self.lp)
        return self.lp.solverModel

    def _run(self, highs: Any, within: Ranges, time_limit_s: float, *, is_mixed: bool) -> Answer:
        """Runs HiGHS with some variables in ranges, and says how that ended."""
        for variable, (least, most) in within.items():
            highs.changeColBounds(variable.index, least, most)
        ended = highspy.HighsModelStatus
        _BEFORE_RUNS.get()()
        if not _ends(highs, time_limit_s):
            return Answer("out_of_time", math.inf, -math.inf)
        if highs.getModelStatus() in (ended.kUnknown, ended.kNotset, ended.kSolveError):
            # It may lose its way from the basis of the run before, or in what presolve leaves of a
            # program that is just infeasible; without both it does not.
            highs.clearSolver()
            highs.setOptionValue("presolve", "off")
            if not _ends(highs, time_limit_s):
                return Answer("out_of_time", math.inf, -math.inf)
            highs.setOptionValue("presolve", "choose")
        status, info = highs.getModelStatus(), highs.getInfo()
        if status in (ended.kInfeasible, ended.kUnboundedOrInfeasible):
            return Answer("infeasible", math.inf, math.inf)
        bound = float(info.mip_dual_bound) if is_mixed else -math.inf
        if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            found, objective = highs.getSolution(), float(info.objective_function_value)
            if is_mixed:
                return Answer("solved", objective, bound, tuple(found.col_value))
            duals = dict(zip(self.rows, found.row_dual, strict=True))
            proven = objective if status == ended.kOptimal else bound
            return Answer("solved", objective, proven, tuple(found.col_value), duals)
        if status == ended.kTimeLimit:
            return Answer("out_of_time", math.inf, bound)
        raise SolverError(f"HiGHS failed: {status.name}; please report this")


def _ends(highs: Any, time_limit_s: float) -> bool:
    """Runs HiGHS; whether it ends, at the latest some time after its limit.

    HiGHS 1.16 was seen to propagate conflicts for ever, blind to its time limit. Nothing can end it
    then, so its thread is left behind, to be gone with this process.
    """
    if math.isinf(time_limit_s):
        highs.run()
        return True
    run = threading.Thread(target=highs.run, daemon=True)
    run.start()
    run.join(time_limit_s + _GRACE_S)
    return not run.is_alive()


_GREETING = threading.Lock()


@cache
def _greet() -> None:
    """Makes a solver, whose first one prints a banner to file descriptor 1, out of sight.

    That would spoil ``--json`` output. Only once, and briefly: while the descriptor leads nowhere,
    nothing that any thread prints arrives.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as null:  # noqa: PTH123 (a descriptor is needed)
            os.dup2(null.fileno(), 1)
            highspy.Highs()
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def solver_name() -> str:
    """Name and version of the solver, and of what modelled the program."""
    versions = {name: importlib.metadata.version(name) for name in ("highspy", "pulp")}
    return f"highspy {versions['highspy']} (pulp {versions['pulp']})"


def solver_options(gap: float, time_limit_s: float) -> dict[str, float | int | bool | None]:
    """Options for HiGHS, as PuLP names them.

    One thread, so that answers repeat. HiGHS 1.16 was seen to loop for ever after a restart on one
    of these programs, blind to its time limit; without restarts it is no slower on them.
    """
    return {
        "gapRel": gap,
        "timeLimit": time_limit_s if math.isfinite(time_limit_s) else None,
        "threads": 1,
        "random_seed": 0,
        "mip_allow_restart": False,
    }
