"""Goals, decisions left open, frontiers, prices, and what to change where there is no plan."""

import contextlib
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pulp import LpConstraintSenses

from quantplan import (
    Device,
    InputError,
    Inventory,
    Machine,
    NoPlanError,
    SolverError,
    Workload,
    frontier,
    plan,
    policy,
    prices,
    read_inventory,
    stock_mix,
)
from quantplan.costs import memory
from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable, kld_nats
from quantplan.costs.speed import predict_speed
from quantplan.hardware.network import Network
from quantplan.planner import decisions
from quantplan.planner.bounds import bounds_over_splits
from quantplan.planner.changes import ANY_TPS, least_loss
from quantplan.planner.context import longest_context
from quantplan.planner.goal import Goal
from quantplan.planner.milp import add_cutoff, build_model, build_relaxation
from quantplan.planner.model import Model
from quantplan.planner.problem import Problem, build_problem
from quantplan.planner.regions import RegionBounds
from quantplan.planner.search import Limits
from quantplan.planner.search import solve as search
from quantplan.planner.solution import Solution
from quantplan.planner.solve import solve_split
from quantplan.planner.split import layer_counts, promising_split
from quantplan.plans.frontier import Over
from quantplan.policy import parse_rule
from tests.support.models import toy_inventory

GLM = "RTX 4090 + 64GiB@80GB/s"
GPUS = "RTX 3060 + RTX 4090"
WORK = Workload(context=32768, kv_type="q8_0")
GAP = 1e-4
solving = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# Small problems, counted out.


def toy_problem(
    widths: list[int],
    gpu_share: float,
    types: tuple[str, ...],
    goal: Goal,
    *,
    experts: int = 4,
    n_gpus: int = 1,
    network: Network | None = None,
) -> Problem:
    """A few layers on GPUs of which each holds a part of them, the first perhaps far away."""
    inventory = toy_inventory(widths, experts=experts)
    work = Workload(context=1024, ubatch=64, prompt_tokens=512, answer_tokens=128)
    rules = policy().model_copy(update={"candidates": types})
    caches = sum(memory.cache_bytes(inventory.architecture, work))
    room = 6 * 2**20 + caches + int(gpu_share * inventory.n_bytes)
    machine = Machine(
        gpus=tuple(
            Device.gpu(n, room, 1e9 / (n + 1), margin_bytes=0, network=None if n else network)
            for n in range(n_gpus)
        ),
        ram=Device.ram(2**30, 1e8, margin_bytes=0),
    )
    return build_problem(inventory, machine, work, rules, goal)


def every_answer(problem: Problem) -> list[tuple[float, float, float, int, bool]]:
    """Loss, decode seconds, turn seconds, file bytes of all choices, and whether each fits."""
    choices = [
        [(o, d.name) for o in group.options for d in problem.places(group)]
        for group in problem.groups
    ]
    assert math.prod(map(len, choices)) < 60000, "too many choices to count out"
    found = []
    for picked in itertools.product(*choices):
        pairs = list(zip(problem.groups, picked, strict=True))
        streamed = max(
            (o.largest_bytes for g, (o, d) in pairs if d == "CPU" and g.layer is not None),
            default=0,
        )
        fits = all(
            sum(problem.bytes_on(device, g, o, d) for g, (o, d) in pairs)
            + problem.device_cache_bytes(device)
            + problem.compute_bytes(device, streamed)
            <= device.usable_bytes - 8192
            for device in problem.machine.devices
        )
        found.append(
            (
                sum(o.loss_nats for _, (o, _) in pairs),
                problem.decode.total_s(pairs),
                problem.turn.total_s(pairs),
                problem.unloaded_bytes + sum(o.n_bytes for _, (o, _) in pairs),
                fits,
            )
        )
    return found


TASKS = st.tuples(
    st.lists(st.integers(1, 12).map(lambda n: 64 * n), min_size=2, max_size=2),
    st.floats(0.05, 0.6),
    st.sampled_from([("Q8_0", "Q4_K"), ("Q6_K", "Q3_K"), ("Q5_K", "IQ4_XS")]),
    st.floats(0.05, 0.95),
)


@pytest.mark.parametrize("kind", ["speed", "turn", "loss", "size"])
@solving
@given(TASKS)
def test_each_goal_is_met_as_well_as_by_counting_every_choice_out(
    kind: str, task: tuple[list[int], float, tuple[str, ...], float]
) -> None:
    """Under a limit of each kind the answer is the best of all choices, to the gap."""
    widths, share, types, where = task
    free = toy_problem(widths, share, types, Goal(max_turn_s=1e9))
    answers = [answer for answer in every_answer(free) if answer[4]]
    assume(answers)
    column = {"loss": 0, "speed": 1, "turn": 2, "size": 3}[kind]
    limit = float(np.quantile([answer[column] for answer in answers], where))
    goal = {
        "speed": Goal(min_decode_tps=1 / limit),
        "turn": Goal(max_turn_s=limit),
        "loss": Goal(best="speed", max_loss_nats=kld_nats(limit)),
        "size": Goal(max_file_bytes=int(limit)),
    }[kind]
    problem = toy_problem(widths, share, types, goal)
    solution = solve_split(problem, GAP, 60.0)
    target = 1 if kind == "loss" else 0
    # The solver holds a little of each limit back.
    easily = limit - 8192 if kind == "size" else limit * (1 - 1e-5)
    best_easily = min((a[target] for a in answers if a[column] <= easily), default=math.inf)
    if solution is None:
        assert best_easily == math.inf
        return
    best = min(a[target] for a in answers if a[column] <= limit * (1 + 1e-9))
    found = solution.decode_s if kind == "loss" else solution.loss_nats
    assert best * (1 - 1e-9) - 1e-9 <= found <= best_easily * (1 + 2.5 * GAP) + 1e-8


def test_a_turn_in_the_program_is_the_one_that_is_predicted() -> None:
    """Seconds of a turn, summed over choices, are those of the prediction for the same choices."""
    for model in ("GLM-4.5-Air", "gemma-4-31B-it"):
        inventory, machine = read_inventory(model), Machine.parse(GLM)
        goal = Goal(max_turn_s=1e6)
        problem = build_problem(inventory, machine, WORK, policy(), goal)
        solution = search(problem, Limits(0.01, math.inf, 0.01))
        assert isinstance(solution, Solution)
        at = problem.with_layers(solution.layer_devices)
        pairs = list(zip(at.groups, solution.choices, strict=True))
        summed = at.turn.total_s(pairs)
        assignment = {
            tensor.name: (name, device)
            for group, (option, device) in pairs
            for tensor, name in zip(group.tensors, option.qtypes, strict=True)
        }
        speed = predict_speed(
            inventory, assignment, at.layer_devices, "GPU0", machine=machine, workload=WORK
        )
        predicted = speed.turn_s(WORK.prompt_tokens, WORK.answer_tokens).expected
        assert summed == pytest.approx(predicted, rel=1e-9)


# The first GPU beside a slower one: of this host, or of another.
LENT = Network(endpoint="a:1", bytes_per_s=1e8, latency_s=2e-4)
FIRST_GPUS = st.sampled_from([None, LENT])


def splits_of(problem: Problem) -> Iterator[tuple[str, ...]]:
    """All splits of a problem's layers."""
    return itertools.combinations_with_replacement(problem.layer_places, problem.n_layers)


@solving
@given(TASKS, st.sampled_from([0, 4]), FIRST_GPUS)
def test_bounds_over_splits_hold(
    task: tuple[list[int], float, tuple[str, ...], float], experts: int, network: Network | None
) -> None:
    """No split has a better solution than what is proven of all, with integers and without."""
    widths, share, types, _ = task
    problem = toy_problem(widths, share, types, Goal(), experts=experts, n_gpus=2, network=network)
    for relaxed in bounds_over_splits(problem):
        _, bound = promising_split(relaxed, 60.0)
        assert bound >= relaxed.least_nats
        for layers in splits_of(relaxed.problem):
            solution = solve_split(relaxed.problem.with_layers(layers), GAP, 60.0)
            assert solution is None or bound <= solution.objective_nats + 1e-9


@solving
@given(TASKS, st.sampled_from([0, 4]), FIRST_GPUS, st.data())
def test_the_bound_of_a_region_holds(
    task: tuple[list[int], float, tuple[str, ...], float],
    experts: int,
    network: Network | None,
    data: st.DataObject,
) -> None:
    """No split of a region has a better solution than the region's bound; the others are outside.

    Cut around a split, a region leaves regions that have every other split once.
    """
    widths, share, types, _ = task
    problem = toy_problem(widths, share, types, Goal(), experts=experts, n_gpus=2, network=network)
    regions = RegionBounds(problem)
    splits = {layer_counts(problem, layers): layers for layers in splits_of(problem)}
    cut = data.draw(st.sampled_from(sorted(splits)))
    parts = list(regions.everywhere.without(cut))
    for counts in splits:
        assert [counts in part for part in parts].count(True) == (counts != cut)
    part = data.draw(st.sampled_from(parts))
    bounds = regions.bounds(part, range(len(build_relaxation(problem).levels)))
    if bounds.order:
        assert regions.nearest_split(bounds) in part
    for counts, layers in splits.items():
        if counts in part:
            solution = solve_split(problem.with_layers(layers), GAP, 60.0)
            assert solution is None or bounds.least_nats <= solution.objective_nats + 1e-9


# Rows whose coefficients are fitted: the golden program names their variables only.
FITTED = ("speed", "turn", "loss", "cutoff", "streamed")
# Rows that say where layers are, and what is not with its layer.
HOMES = ("layers", "n_layers", "stays", "hops", "away", "used")


def rows_as_text(model: Model) -> list[str]:
    """Each row of a program as a line."""
    lines = []
    for name, row in model.lp.rows.items():
        kind = name.split("_")[0]
        terms = sorted((variable.name, value) for variable, value in row.items())
        left = " ".join(
            f"* {variable}"
            if kind in FITTED or (kind == "memory" and variable == "pipeline")
            else f"{value:+g} {variable}"
            for variable, value in terms
        )
        right = "*" if row.constant and kind in {*FITTED, "memory"} else f"{0.0 - row.constant:g}"
        lines.append(f"{name}: {left} {LpConstraintSenses[row.sense]} {right}")
    return lines


def test_every_family_of_constraints_has_the_rows_of_the_golden_program() -> None:
    """A reader can check each family of constraints in tests/data/program.lp.

    Two GPUs, two layers of different width with experts, two types; the relaxation beside it, and
    what says where layers are if there are no experts and the first GPU is another host's. Names
    are as in docs/explanation/mathematics.md; an asterisk stands for a coefficient that is fitted.
    """
    goal = Goal(min_decode_tps=1.0, max_turn_s=1e4, max_loss_nats=9.0, max_file_bytes=2**30)
    problem = toy_problem([256, 512], 0.3, ("Q8_0", "Q4_K"), goal, experts=4, n_gpus=2)
    problem = problem.with_layers(("GPU0", "GPU1"))
    model, relaxed = build_model(problem), build_relaxation(problem, pooled=False)
    add_cutoff(model, 1.0)
    dense = toy_problem([256, 512], 0.3, ("Q8_0",), Goal(), experts=0, n_gpus=2, network=LENT)
    homes = rows_as_text(build_relaxation(dense, pooled=False))
    found = ["\\ one split", *rows_as_text(model), "\\ all splits", *rows_as_text(relaxed)]
    found += ["\\ all splits, no experts", *(row for row in homes if row.startswith(HOMES))]
    golden = Path(__file__).parent / "data" / "program.lp"
    assert found == golden.read_text(encoding="utf-8").splitlines()


# Real models.


@pytest.fixture(scope="module")
def glm() -> Inventory:
    """A mixture of experts that is larger than a GPU."""
    return read_inventory("GLM-4.5-Air")


@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        ("Qwen3-32B", "RTX 4090 + RTX 3060"),
        ("GLM-4.5-Air", "RPC a:1 RTX 3090@1Gbit/s,0.2ms + RTX 3090"),
    ],
)
def test_no_split_over_two_gpus_is_better_by_more_than_the_gap(model: str, gpus: str) -> None:
    """It is proven of all splits that they are no better, by the 0.1 % that is asked for."""
    machine = Machine.parse(f"{gpus} + 64GiB@80GB/s")
    made = plan(
        read_inventory(model), machine, WORK, min_decode_tps=10, baselines=False, time_limit_s=600
    )
    assert made.gap <= 0.00101


def test_the_fastest_plan_within_a_loss(glm: Inventory) -> None:
    """A plan no worse than Q4_K_M loses no more than that mix, and is faster than a better one."""
    machine = Machine.parse(GLM)
    made = plan(glm, machine, WORK, no_worse_than="Q4_K_M")
    allowed = LossTable(glm).model_kld_nats(stock_mix(glm, "Q4_K_M"))
    assert made.predicted.loss_nats <= allowed
    tighter = plan(glm, machine, WORK, max_loss_nats=allowed / 3)
    assert tighter.predicted.loss_nats <= allowed / 3
    assert tighter.predicted.decode_tps < made.predicted.decode_tps
    # And back: at that speed no plan has less than about this loss.
    again = plan(glm, machine, WORK, min_decode_tps=made.predicted.decode_tps * 0.999)
    assert again.predicted.loss_nats <= made.predicted.loss_nats * 1.01


def test_a_turn_takes_no_longer_than_asked(glm: Inventory) -> None:
    """The predicted turn is within the limit, and a shorter one costs quality."""
    machine = Machine.parse(GLM)
    slow, fast = (plan(glm, machine, WORK, max_turn_s=s) for s in (60.0, 32.0))
    assert slow.predicted.turn_s is not None
    assert slow.predicted.turn_s <= 60
    assert fast.predicted.turn_s is not None
    assert fast.predicted.turn_s <= 32
    assert slow.predicted.loss_nats < fast.predicted.loss_nats


def test_no_time_for_the_longest_context_is_not_no_plan(
    glm: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no context was found in time, though there is a plan, that is what is said."""
    monkeypatch.setattr("quantplan.planner.decisions.longest_context", lambda *_: None)
    with pytest.raises(SolverError, match="give it more time"):
        plan(glm, Machine.parse(GLM), WORK, context="max", min_decode_tps=10.0)


def test_one_context_leaves_time_for_others(
    glm: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that takes all the time that it is given does not take that of shorter ones."""
    tried = []

    def slow(problem: Problem, deadline: float) -> Solution | None:
        tried.append((problem.workload.context, deadline))
        return None

    monkeypatch.setattr("quantplan.planner.context.any_solution", slow)
    problem = build_problem(glm, Machine.parse(GLM), WORK, policy(), Goal(min_decode_tps=10.0))
    end = time.monotonic() + 100
    assert longest_context(problem, 131072, end) is None
    assert len(tried) > 5
    assert all(until < end - 50 for _, until in tried)


def test_the_longest_context_is_the_longest(glm: Inventory) -> None:
    """With the longest context the goals are met; with a little more there is no plan."""
    machine = Machine.parse(GLM)
    made = plan(glm, machine, WORK, context="max", min_decode_tps=12.0, max_loss_nats=0.02)
    assert made.predicted.decode_tps >= 12
    assert made.predicted.loss_nats <= 0.02
    longer = WORK.model_copy(update={"context": round(made.workload.context * 1.01) + 256})
    with pytest.raises(NoPlanError):
        plan(glm, machine, longer, min_decode_tps=12.0, max_loss_nats=0.02)


def test_the_longest_context_is_none_that_nobody_gave() -> None:
    """Where no context fits, the shortest that was tried is named, and what to change is for it."""
    inventory, machine = read_inventory("Qwen3-32B"), "12GiB@360GB/s + {}MiB@60GB/s"
    with pytest.raises(NoPlanError, match="context of 256 tokens is the shortest") as caught:
        plan(inventory, Machine.parse(machine.format(4096)), context="max")
    assert "4096 tokens" not in str(caught.value)
    (ram,) = [int(change.value) for change in caught.value.changes if change.kind == "ram"]
    enough = Machine.parse(machine.format(ram // 2**20))
    assert plan(inventory, enough, context="max", baselines=False).workload.context >= 256


def test_the_longest_context_holds_a_limited_turn() -> None:
    """A context too short for the turn whose time is limited is no answer."""
    inventory, turn = read_inventory("Qwen3-32B"), Workload(prompt_tokens=8000)
    for ram_gib, fits in ((6, False), (9, True)):
        machine = Machine.parse(f"12GiB@360GB/s + {ram_gib}GiB@60GB/s")
        with contextlib.nullcontext() if fits else pytest.raises(NoPlanError, match="8704 tokens"):
            made = plan(inventory, machine, turn, context="max", max_turn_s=4000, baselines=False)
            assert made.workload.context >= 8512


def test_q8_0_caches_are_chosen_where_they_pay(glm: Inventory) -> None:
    """A cache of the type that is left open is F16 where there is room, Q8_0 where there is not."""
    small = Machine.parse("8GiB@300GB/s + 60GiB@80GB/s")
    short = plan(glm, Machine.parse(GLM), Workload(context=2048), kv_type="auto")
    long = plan(glm, small, Workload(context=131072), kv_type="auto", gap=0.05)
    assert short.workload.kv_type_k == "f16"
    assert long.workload.kv_type_k == long.workload.kv_type_v == "q8_0"


def test_one_gpu_is_used_where_more_are_no_better() -> None:
    """A model that one GPU holds is not spread over four, and the flags say so."""
    machine = Machine.parse("4x RTX 3090 + 64GiB@80GB/s")
    made = plan(read_inventory("Qwen3-4B-Instruct-2507"), machine, n_gpus="auto")
    used = [device.name for device in made.devices if device.weights_bytes]
    assert used == ["GPU0", "CPU"]
    assert made.flags[made.flags.index("-sm") + 1] == "none"


@pytest.mark.parametrize("model", ["gpt-oss-20b", "GLM-4.5-Air"])
def test_a_slow_last_gpu_makes_no_plan_worse(model: str) -> None:
    """Behind a fast GPU a slow one holds experts or nothing, not the output, where that is best."""
    inventory, fast, slow = read_inventory(model), "RTX 3090", "RTX 4060"
    one, two = (
        plan(inventory, Machine.parse(f"{gpus} + 96GiB@60GB/s"), Workload(context=8192))
        for gpus in (fast, f"{fast} + {slow}")
    )
    assert one.provenance.objective_nats is not None
    assert two.provenance.objective_nats is not None
    assert two.provenance.objective_nats <= one.provenance.objective_nats * 1.001
    assert two.status in ("optimal", "within_gap")
    assert two.flags[two.flags.index("-ts") + 1].endswith(",0")
    gpu = two.devices[1]
    assert bool(gpu.weights_bytes) == (model == "GLM-4.5-Air")
    assert gpu.kv_bytes == 0


def test_only_a_search_whose_time_is_up_says_so() -> None:
    """A gap that stays open long before the time is up is left, not for want of time."""
    machine = Machine.parse("2x RPC a:1 RTX 3090@1Gbit/s,0.2ms + 64GiB@60GB/s")
    inventory = read_inventory("GLM-4.5-Air")
    made = plan(inventory, machine, WORK, baselines=False, time_limit_s=600)
    assert made.status != "time_limit"
    assert not [note for note in made.notes if "time was up" in note]


def test_every_change_that_is_named_is_enough(glm: Inventory) -> None:
    """With any one of the changes that the error names, there is a plan."""
    machine = Machine.parse("8GiB@300GB/s + 48GiB@80GB/s")
    work = Workload(context=131072)
    with pytest.raises(NoPlanError) as caught:
        plan(glm, machine, work)
    changes = {change.kind: change.value for change in caught.value.changes}
    assert {"context", "ram", "vram", "kv_type"} <= set(changes)
    assert all(change.text in str(caught.value) for change in caught.value.changes)
    ram, gpu = machine.ram, machine.gpus[0]
    more_ram = ram.with_more(int(changes["ram"]) - ram.capacity_bytes)
    more_vram = gpu.with_more(int(changes["vram"]) - gpu.capacity_bytes)
    for better, changed in (
        (machine, work.model_copy(update={"context": int(changes["context"])})),
        (machine, Workload(context=work.context, kv_type=str(changes["kv_type"]))),
        (machine.model_copy(update={"ram": more_ram}), work),
        (machine.model_copy(update={"gpus": (more_vram,)}), work),
    ):
        assert plan(glm, better, changed, gap=0.5).predicted.loss_nats > 0
    # A step less memory is not enough.
    less = ram.with_more(int(changes["ram"]) - ram.capacity_bytes - 3 * 2**28)
    with pytest.raises(NoPlanError):
        plan(glm, machine.model_copy(update={"ram": less}), work)


def test_changes_are_sought_while_the_search_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no plan, what is left of the time goes into what would have to change."""
    monkeypatch.setattr(decisions, "_DIAGNOSIS_S", 0.0)
    with pytest.raises(NoPlanError) as caught:
        plan(read_inventory("gemma-3-12b-it"), Machine.parse("4GiB@60GB/s"), WORK)
    assert caught.value.changes


@pytest.mark.parametrize(
    ("model", "machine", "most"),
    [
        ("gemma-3-12b-it", "10GiB@60GB/s", 0.001),
        ("gemma-3-12b-it", "10GiB@60GB/s", 0.0053),
        ("Qwen3-235B-A22B", "RTX 4090 + 96GiB@80GB/s", 0.005),
    ],
)
def test_the_loss_that_is_named_is_enough(model: str, machine: str, most: float) -> None:
    """Where no plan loses so little, the loss named can be asked for as it is written."""
    inventory, devices = read_inventory(model), Machine.parse(machine)
    with pytest.raises(NoPlanError) as caught:
        plan(inventory, devices, max_loss_nats=most)
    named = {change.kind: change for change in caught.value.changes}
    assert {"loss", "ram"} <= set(named)
    written = re.search(r"a loss of ([\d.]+) nats", named["loss"].text)
    assert written is not None
    value = float(written[1])
    assert value == named["loss"].value
    made = plan(inventory, devices, max_loss_nats=value, gap=0.05, baselines=False)
    assert made.predicted.loss_nats <= value


@pytest.mark.parametrize("limits", [{}, {"max_loss_nats": 0.02}, {"max_turn_s": 40.0}])
def test_the_speed_that_is_named_is_enough(glm: Inventory, limits: dict[str, Any]) -> None:
    """Where no plan is so fast, the speed named within the other limits can be had with them."""
    machine = Machine.parse(GLM)
    with pytest.raises(NoPlanError) as caught:
        plan(glm, machine, min_decode_tps=1000, **limits)
    (named,) = [change.value for change in caught.value.changes if change.kind == "speed"]
    if not limits:
        assert f"reaches {named:.2f} tokens/s" in str(caught.value)
    made = plan(glm, machine, min_decode_tps=float(named), baselines=False, **limits)
    assert made.predicted.decode_tps >= float(named)


def test_limits_that_fail_together_are_told_from_one_that_fails_alone(glm: Inventory) -> None:
    """Limits that can be had one by one are listed, and said to fail together."""
    machine = Machine.parse(GLM)
    with pytest.raises(NoPlanError, match="at the same time; each of these alone can be had"):
        plan(glm, machine, min_decode_tps=20, max_loss_nats=0.005)
    with pytest.raises(NoPlanError, match="at the same time: the fastest one") as caught:
        plan(glm, machine, Workload(context=65536), min_decode_tps=40, max_loss_nats=0.005)
    assert "with the context of 65536 tokens full" in str(caught.value)
    with pytest.raises(NoPlanError, match=r"tokens full, takes at most 9 s for a turn and loses"):
        plan(glm, machine, min_decode_tps=20, max_turn_s=9, max_loss_nats=0.005)


def test_the_fastest_plan_says_which_loss_would_do_in_no_time() -> None:
    """Where no time is left, the loss of a plan that is fast enough is known all the same."""
    machine = Machine.parse("2x RTX 3090 + 64GiB@60GB/s")
    free = build_problem(
        read_inventory("GLM-4.5-Air"), machine, Workload(), policy(), Goal(best="speed")
    )
    fastest = search(free, Limits(1e-3, math.inf))
    assert fastest is not None
    asked = replace(free, goal=Goal.within(0.999 / fastest.decode_s, None, 0.0))
    least = least_loss(asked, Limits(1e-3, 0.0), fastest)
    assert least is not None
    assert least.loss_nats <= fastest.loss_nats


def test_limits_that_no_single_change_reaches_are_told_to_need_several(glm: Inventory) -> None:
    """Where advice about one thing cannot be had, the message does not end without any."""
    with pytest.raises(NoPlanError, match="change more than one thing") as caught:
        plan(glm, Machine.parse("96GiB@60GB/s"), min_decode_tps=500, max_turn_s=1)
    assert caught.value.changes == ()


@pytest.mark.parametrize("kind", ["ram", "vram"])
def test_memory_that_is_shared_is_added_to_a_part(kind: str) -> None:
    """On a chip with one memory what to add is named as a part, and is enough with all margins."""
    inventory, machine = read_inventory("Qwen3-32B"), Machine.parse("M3 Max 10GiB + 16GiB")
    with pytest.raises(NoPlanError, match="of memory to the GPU's part of it") as caught:
        plan(inventory, machine)
    assert "RAM (" not in str(caught.value)
    parts = {"ram": machine.ram.capacity_bytes, "vram": machine.gpus[0].capacity_bytes}
    (parts[kind],) = [int(change.value) for change in caught.value.changes if change.kind == kind]
    gpu, total = (n_bytes // 2**20 for n_bytes in (parts["vram"], sum(parts.values())))
    grown = Machine.parse(f"M3 Max {gpu}MiB + {total}MiB")
    assert plan(inventory, grown, baselines=False).devices


@pytest.mark.parametrize(
    ("model", "part", "total", "tps", "word"),
    [("Qwen3-32B", 23.5, 24, None, "less"), ("gpt-oss-20b", 8, 32, 80.0, "more")],
)
def test_the_border_in_shared_memory_may_be_moved(
    model: str, part: float, total: int, tps: float | None, word: str
) -> None:
    """Where another part of one memory for the GPU is enough, it is named, and is enough."""
    inventory = read_inventory(model)
    with pytest.raises(NoPlanError, match=rf"shares with the CPU, [\d.]+ GiB {word}") as caught:
        plan(inventory, Machine.parse(f"M3 Max {part}GiB + {total}GiB"), min_decode_tps=tps)
    (moved,) = [int(c.value) for c in caught.value.changes if c.kind == "gpu_part"]
    assert (moved < part * 2**30) == (word == "less")
    machine = Machine.parse(f"M3 Max {moved // 2**20}MiB + {total}GiB")
    assert plan(inventory, machine, min_decode_tps=tps, baselines=False).devices


def test_what_does_not_fit_at_any_speed_is_told_to_be_so(glm: Inventory) -> None:
    """Where memory and speed are both out of reach, changes for the memory alone are named so."""
    with pytest.raises(NoPlanError, match="fits, even without the limit on speed") as caught:
        plan(glm, Machine.parse("RTX 4090 + 16GiB@60GB/s"), min_decode_tps=300)
    assert caught.value.changes == ()
    advice = str(caught.value).partition("Without the limit on speed any one")[2]
    assert "GiB of RAM" in advice


def test_types_below_those_of_the_policy_are_named_where_they_are_enough() -> None:
    """A model far too large for the policy's types can be planned with the types that are named."""
    inventory = read_inventory("Kimi-K2-Instruct")
    machine, work = Machine.parse("2x RTX 5090 + 192GiB@80GB/s"), Workload(context=32768)
    with pytest.raises(NoPlanError) as caught:
        plan(inventory, machine, work)
    changes = {change.kind: str(change.value) for change in caught.value.changes}
    assert {"types", "ram", "vram"} <= set(changes)
    pattern, types = parse_rule(changes["types"])
    rules = policy().allow(pattern, *types)
    made = plan(inventory, machine, work, policy=rules, gap=0.05, baselines=False)
    assert {t.qtype for t in made.assignments} & {"IQ1_M", "IQ2_XXS"}


def test_a_gpu_that_is_too_small_may_be_left_out() -> None:
    """Where the RAM alone holds a model, and a GPU not even the output matrix, that is said."""
    inventory = read_inventory("gemma-3-27b-it")
    with pytest.raises(NoPlanError) as caught:
        plan(inventory, Machine.parse("1GiB@100GB/s + 64GiB@60GB/s"))
    assert "gpus" in {change.kind for change in caught.value.changes}
    assert plan(inventory, Machine.parse("64GiB@60GB/s"), baselines=False).devices


def test_no_loss_at_all_can_be_asked_for() -> None:
    """With room for the model as it is, a plan may lose nothing."""
    machine = Machine.parse("1GiB@100GB/s + 1GiB@10GB/s")
    made = plan(toy_inventory([256], experts=0), machine, max_loss_nats=0.0)
    assert made.predicted.loss_nats == 0


@pytest.mark.parametrize("over", ["speed", "size", "context"])
def test_a_frontier_has_no_point_that_another_beats(glm: Inventory, over: Over) -> None:
    """Less speed, more size or less context comes with less loss, at every point."""
    found = frontier(glm, Machine.parse(GLM), WORK, over=over, points=5, time_limit_s=600)
    assert len(found.points) >= 4
    slack = 1 + max(point.gap for point in found.points) + 1e-6
    harder = sorted(found.points, key=lambda p: p.limit, reverse=over == "size")
    for easy, hard in itertools.pairwise(harder):
        assert easy.loss_nats <= hard.loss_nats * slack
    assert all(0 <= point.gap < 0.05 for point in found.points)
    if over == "speed":
        assert all(point.decode_tps >= point.limit for point in found.points)
    if over == "size":
        assert all(point.file_bytes <= point.limit for point in found.points)


def test_points_over_the_context_are_the_fastest_plans_with_their_loss() -> None:
    """Each point's speed is that of a plan at its own context that loses as little."""
    inventory = read_inventory("Qwen3-4B-Instruct-2507")
    machine = Machine.parse("RTX 3060 + 16GiB@40GB/s")
    found = frontier(inventory, machine, over="context", points=4)
    assert [point.context for point in found.points] == [4096, 16384, 65536]
    for point in found.points:
        work, most = Workload(context=point.context), point.loss_nats * (1 + 1e-5) + 1e-8
        made = plan(inventory, machine, work, max_loss_nats=most, baselines=False)
        assert point.decode_tps == pytest.approx(made.predicted.decode_tps, rel=0.011)


def test_points_over_the_size_are_on_the_faster_card() -> None:
    """A size limits no time, and still each point is as fast as its types can be."""
    inventory = read_inventory("Qwen3-4B-Instruct-2507")
    alone, both = (Machine.parse(f"{gpus} + 16GiB@40GB/s") for gpus in ("RTX 4090", GPUS))
    slow, fast = (frontier(inventory, m, over="size", points=3).points for m in (both, alone))
    assert [p.decode_tps for p in slow] == pytest.approx([p.decode_tps for p in fast], rel=0.02)


@pytest.mark.parametrize("turn_s", [None, 500.0])
def test_where_places_lose_alike_the_plan_is_in_the_fastest(turn_s: float | None) -> None:
    """A model that fits on either card as it is goes to the faster one, whatever is asked for."""
    inventory = read_inventory("Qwen3-4B-Instruct-2507")
    machine = Machine.parse(f"{GPUS} + 16GiB@40GB/s")
    made, fastest = (
        plan(
            inventory,
            machine,
            min_decode_tps=None if turn_s else 3.0,
            max_turn_s=turn_s,
            max_loss_nats=most,
            baselines=False,
        )
        for most in (None, 0.0)
    )
    assert made.predicted.loss_nats == 0
    assert made.predicted.decode_tps >= 0.95 * fastest.predicted.decode_tps


def test_a_frontier_over_the_speed_reaches_the_fastest_plan(
    glm: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest plan is a point, also where there is no time for any but those at the ends."""

    def in_no_time(problem: Problem, limits: Limits, *more: Any, **known: Any) -> Solution | None:
        is_end = problem.goal.min_decode_tps in (None, ANY_TPS)
        return search(problem, limits, *more, **known) if is_end else known["known"]

    monkeypatch.setattr("quantplan.plans.frontier.solve", in_no_time)
    found = frontier(glm, Machine.parse(GLM), WORK, points=3).points
    fastest = plan(glm, Machine.parse(GLM), WORK, max_loss_nats=1.0, baselines=False)
    assert found[-1].decode_tps >= 0.98 * fastest.predicted.decode_tps


def test_a_frontier_without_time_does_not_say_that_nothing_fits(
    glm: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no plan was found in time, that is what is said: none of its limits is in the way."""
    monkeypatch.setattr("quantplan.plans.frontier.solve", lambda *_, **__: None)
    with pytest.raises(SolverError, match=r"within 1e-09 s; give it more time"):
        frontier(glm, Machine.parse(GLM), WORK, time_limit_s=1e-9)


def test_a_frontier_solves_no_limit_twice() -> None:
    """A model that was trained for no more than the shortest context has one point over it."""
    told: list[tuple[int, int]] = []
    frontier(
        toy_inventory([256], experts=0),
        Machine.parse("1GiB@100GB/s + 1GiB@10GB/s"),
        over="context",
        progress=lambda *counts: told.append(counts),
    )
    assert told == [(1, 1)]


def test_prices_are_what_planning_again_gives(glm: Inventory) -> None:
    """The price of a GiB of VRAM is the difference to the plan with it, under the same rules; duals
    agree.
    """
    machine = Machine.parse(GLM)
    rules = policy().pin("ffn_down_exps", "Q8_0")
    made = plan(glm, machine, WORK, min_decode_tps=12.0, policy=rules)
    found = {price.resource: price for price in prices(made, glm).resources}
    assert set(found) == {"1 GiB of VRAM", "1 GiB of RAM", "10 % of RAM bandwidth"}
    gpu = machine.gpus[0]
    more = gpu.model_copy(update={"capacity_bytes": gpu.capacity_bytes + 2**30})
    larger = machine.model_copy(update={"gpus": (more,)})
    again = plan(glm, larger, WORK, min_decode_tps=12.0, policy=rules)
    before, after = made.provenance.objective_nats, again.provenance.objective_nats
    assert before is not None
    assert after is not None
    gain = before - after
    vram = found["1 GiB of VRAM"]
    assert vram.low_nats <= gain * 1.01 + 1e-9
    assert gain <= vram.high_nats * 1.01 + 1e-9
    assert gain > 0
    for price in found.values():
        assert price.low_nats <= price.objective_nats <= price.high_nats
        assert price.dual_nats is None or price.low_nats <= price.dual_nats <= price.high_nats
    with pytest.raises(InputError, match="is for"):
        prices(made, read_inventory("Qwen3.5-2B"))


def test_shared_memory_has_one_price(glm: Inventory) -> None:
    """Where a GPU shares the RAM, no VRAM can be bought, and the border has a price of its own,
    which is what planning again gives.
    """
    made = plan(glm, Machine.parse("M3 Max 60GiB + 96GiB"), WORK, baselines=False)
    found = {price.resource: price for price in prices(made, glm).resources}
    assert set(found) == {"1 GiB of RAM", "1 GiB from CPU to GPU", "10 % of RAM bandwidth"}
    again = plan(glm, Machine.parse("M3 Max 61GiB + 96GiB"), WORK, baselines=False)
    before, after = made.provenance.objective_nats, again.provenance.objective_nats
    assert before is not None
    assert after is not None
    border = found["1 GiB from CPU to GPU"]
    slack = 1e-3 * before
    assert border.low_nats - slack <= before - after <= border.high_nats + slack


def test_more_of_a_resource_is_never_worse(glm: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that there is fits a better machine too, also where there is no time to search."""

    def in_no_time(problem: Problem, limits: Limits, *more: Any, **known: Any) -> Solution | None:
        return known["known"] if known else search(problem, limits, *more)

    made = plan(glm, Machine.parse(GLM), WORK, min_decode_tps=15.0, baselines=False)
    monkeypatch.setattr("quantplan.plans.prices.solve", in_no_time)
    found = prices(made, glm).resources
    assert len(found) == 3
    for price in found:
        assert price.loss_nats == 0
        assert price.decode_tps >= 0


def test_prices_need_the_evidence_of_the_plan() -> None:
    """A plan that rests on measurements is not priced without them."""
    inventory, machine = (
        toy_inventory([256], experts=0),
        Machine.parse("1GiB@100GB/s + 1GiB@10GB/s"),
    )
    evidence = Evidence(curve={"Q4_0": 0.5, "Q3_K": 1.0})
    made = plan(inventory, machine, evidence=evidence, policy=policy().pin(".", "Q4_K"))
    assert prices(made, inventory, evidence=evidence).resources
    with pytest.raises(InputError, match="the KLD of 2 types: give the same evidence"):
        prices(made, inventory)


def test_a_long_turn_finds_its_context() -> None:
    """With the context left open a turn may be longer than the context that is usual."""
    model = read_inventory("Qwen3-30B-A3B")
    work = Workload(prompt_tokens=8000)
    machine = Machine.parse("RTX 4090 + 64GiB@80GB/s")
    made = plan(model, machine, work, context="max", max_turn_s=60, baselines=False)
    assert made.workload.context >= 8512
    assert made.predicted.turn_s is not None
    assert made.predicted.turn_s <= 60


@pytest.mark.parametrize(
    ("model", "machine", "context", "tps"),
    [
        ("Kimi-K2-Instruct", "2x RTX 3090 + 128GiB@60GB/s", 16384, None),
        ("GLM-4.5-Air", "RTX 4090 + 16GiB@60GB/s", 4096, 30.0),
    ],
)
def test_what_does_not_fit_is_no_fault_of_the_solver(
    model: str, machine: str, context: int, tps: float | None
) -> None:
    """The relaxation of a model that is too large, at a speed or without one, ends in an answer."""
    work = Workload(context=context)
    with pytest.raises(NoPlanError, match="no plan fits"):
        plan(read_inventory(model), Machine.parse(machine), work, min_decode_tps=tps)


def test_the_ram_to_add_is_enough_with_the_margin_of_as_much() -> None:
    """A machine with as much RAM as is advised, which leaves more of it free, holds a plan."""
    model = read_inventory("GLM-4.6")
    with pytest.raises(NoPlanError) as caught:
        plan(model, Machine.parse("RTX 3090 + 64GiB@80GB/s"), Workload(context=16384))
    (advised,) = [change.value for change in caught.value.changes if change.kind == "ram"]
    machine = Machine.parse(f"RTX 3090 + {float(advised) / 2**30}GiB@80GB/s")
    assert plan(model, machine, Workload(context=16384), baselines=False).devices


@pytest.mark.parametrize("name", ["BitNet-b1.58-2B-4T", "DeepSeek-V3-ik-MLA"])
def test_what_only_ik_llama_cpp_loads_is_not_planned(name: str) -> None:
    """Models in a layout that llama.cpp refuses are refused with what to do."""
    machine = Machine.parse("RTX 4090 + 1500GiB@80GB/s")
    with pytest.raises(InputError, match="is laid out for ik_llama"):
        plan(read_inventory(name), machine)


@pytest.mark.parametrize(
    "numbers", [{"max_turn_s": -1.0}, {"max_loss_nats": math.nan}, {"no_worse_than": "Q99"}]
)
def test_goals_that_make_no_sense_are_refused(numbers: dict[str, float]) -> None:
    """A time, a loss or a mix that cannot be is refused before anything is solved."""
    with pytest.raises(InputError):
        plan(read_inventory("Qwen3.5-2B"), Machine.parse(GLM), **numbers)  # type: ignore[arg-type]


def test_the_command_line_draws_a_frontier() -> None:
    """`quantplan frontier --json` prints the points and nothing else."""
    command = [sys.executable, "-m", "quantplan.cli", "frontier", "Qwen3.5-2B", "--points", "3"]
    command += ["--machine", "4GiB@200GB/s + 16GiB@40GB/s", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["points"]) >= 2


def test_a_problem_keeps_its_groups_with_another_goal() -> None:
    """What points of a frontier share is not built again."""
    problem = toy_problem([256, 256], 0.3, ("Q8_0", "Q4_K"), Goal())
    assert replace(problem, goal=Goal(min_decode_tps=1.0)).groups is problem.groups


def test_other_rules_leave_the_output_where_it_is() -> None:
    """A problem that is settled on a GPU before the last stays so, with all layers on it."""
    problem = toy_problem([256, 256], 0.3, ("Q8_0", "Q4_K"), Goal(), n_gpus=2)
    settled = problem.with_layers(("GPU0", "GPU0"), "GPU0").with_policy(policy())
    assert settled.output_device.name == "GPU0"
    assert settled.layer_devices == ("GPU0", "GPU0")
    assert settled.by_output() == (settled,)
