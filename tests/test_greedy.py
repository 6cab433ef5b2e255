"""The greedy that the optimiser is measured against: sound, and never better."""

import pytest

import quantplan as qp
from benchmarks.greedy import BITS_PER_WEIGHT, WORKLOAD, greedy, machine_for
from quantplan.planner.decisions import best_solution
from quantplan.planner.goal import Goal
from quantplan.planner.problem import Problem, build_problem

CASES = [("Qwen3-4B-Thinking-2507", 4.5), ("DeepSeek-V2-Lite", 6.0), ("gpt-oss-20b", 4.5)]


def problem_of(model: str, bits: float) -> Problem:
    inventory = qp.read_inventory(model)
    machine = machine_for(inventory, bits)
    return build_problem(inventory, machine, WORKLOAD, qp.policy(), Goal())


@pytest.mark.parametrize(("model", "bits"), CASES)
def test_the_planner_is_never_worse(model: str, bits: float) -> None:
    """On the same groups, budgets and objective, no greedy answer is below the planner's."""
    problem = problem_of(model, bits)
    found = greedy(problem)
    assert found is not None
    _, exact = best_solution(problem, gap=1e-4, time_limit_s=600)
    assert exact.objective_nats <= found.objective_nats * (1 + 1e-9)
    assert exact.objective_nats > 0


@pytest.mark.parametrize(("model", "bits"), CASES)
def test_the_greedy_plays_by_the_rules(model: str, bits: float) -> None:
    """Its answer is one option and one allowed device per group, and its objective theirs."""
    problem = problem_of(model, bits)
    found = greedy(problem)
    assert found is not None
    assert len(found.choices) == len(problem.groups)
    for group, (option, name) in zip(problem.groups, found.choices, strict=True):
        assert option in group.options
        assert name in problem.devices
    for device in problem.machine.devices:
        weights = sum(
            problem.bytes_on(device, group, option, name)
            for group, (option, name) in zip(problem.groups, found.choices, strict=True)
        )
        assert weights <= device.usable_bytes
    assert found.loss_nats == pytest.approx(sum(option.loss_nats for option, _ in found.choices))
    assert found.objective_nats > found.loss_nats


def test_the_greedy_is_no_straw_man() -> None:
    """With room to spare it ends where the planner does, so that what it loses is its own fault."""
    inventory = qp.read_inventory("Qwen3-4B-Thinking-2507")
    machine = qp.Machine.parse("24GiB@1000GB/s + 64GiB@80GB/s")
    problem = build_problem(inventory, machine, WORKLOAD, qp.policy(), Goal())
    found = greedy(problem)
    _, exact = best_solution(problem, gap=1e-4, time_limit_s=600)
    assert found is not None
    assert found.objective_nats == pytest.approx(exact.objective_nats, rel=1e-3)


def test_budgets_grow_with_the_bits() -> None:
    """The three budgets of the benchmark hold the bits per weight that they are named after."""
    inventory = qp.read_inventory("Qwen3-4B-Thinking-2507")
    sizes = [
        sum(d.capacity_bytes for d in machine_for(inventory, bits).devices) - 4 * 2**30
        for bits in BITS_PER_WEIGHT
    ]
    for size, bits in zip(sizes, BITS_PER_WEIGHT, strict=True):
        assert size * 8 / inventory.n_weights == pytest.approx(bits, rel=1e-3)
