"""Times `quantplan plan` as a whole process: import, catalog, integer program, output.

Usage: python benchmarks/plan.py [--runs 5]

Prints the median wall time and the proven gap per task, and beside it the time that Python takes to
import the libraries alone, since machines differ; then, for the integer program alone with 12
types, the CPU time of modelling and of solving it; then the CPU time of a frontier of 24 points.
Exits with 1 if GLM-4.5-Air on one GPU takes more than 3 s or has a gap above 0.1 %, if an integer
program misses its limits, or if the frontier takes more than 15 s.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import highspy

import quantplan as qp
from quantplan.planner.decisions import best_solution
from quantplan.planner.goal import Goal
from quantplan.planner.problem import build_problem

LIMIT_S, LIMIT_GAP = 3.0, 1e-3
LIMIT_FRONTIER_S = 15.0
TASKS = [
    ("GLM-4.5-Air", "RTX 4090 + 64GiB@80GB/s", 10),
    ("GLM-4.5-Air", "RTX 5090 + 64GiB@80GB/s", None),
    ("Qwen3.5-27B", "RTX 4090 + 64GiB@80GB/s", None),
    ("DeepSeek-V3.1-Terminus", "RTX 5090 + 384GiB@300GB/s", 8),
    ("GLM-5.1", "RTX 4090 + 384GiB@300GB/s", None),
    ("GLM-4.5-Air", "2x RTX 3090 + 64GiB@80GB/s", 10),
    ("Kimi-K2-Thinking", "4x RTX 3090 + 768GiB@300GB/s", 8),
]
# Model, machine, tokens per second asked for, and the limits of CPU seconds and gap.
PROGRAMS = [
    ("GLM-4.5-Air", "RTX 4090 + 64GiB@80GB/s", 10.0, 1.0, 1e-3),
    ("GLM-4.5-Air", "RTX 4090 + 64GiB@80GB/s", None, 1.0, 1e-3),
    ("DeepSeek-V3.1-Terminus", "RTX 5090 + 384GiB@300GB/s", 8.0, 5.0, 2e-3),
    ("GLM-5.1", "RTX 4090 + 384GiB@300GB/s", None, 5.0, 2e-3),
    ("Kimi-K2-Thinking", "4x RTX 3090 + 768GiB@300GB/s", None, 10.0, 5e-3),
    ("Kimi-K2-Thinking", "4x RTX 3090 + 768GiB@300GB/s", 8.0, 10.0, 5e-3),
]
TIME_LIMIT_S = 10.0
WORKLOAD = qp.Workload(context=32768, kv_type="q8_0")
TYPES = (
    "SOURCE", "Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_K", "Q4_1", "IQ4_XS", "Q4_0", "Q3_K",
    "Q2_K",
)  # fmt: skip


def run(command: list[str]) -> tuple[float, str]:
    """Wall time in seconds, and what the process printed."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    """Runs every task and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    imports = [sys.executable, "-c", "import gguf, highspy, numpy, pydantic, typer"]
    import_s = statistics.median(run(imports)[0] for _ in range(runs))
    print(f"{'importing the libraries alone':64} {import_s:6.2f} s")
    failed = False
    for index, (model, machine, tps) in enumerate(TASKS):
        command = [sys.executable, "-m", "quantplan.cli", "plan", model, "--machine", machine]
        command += ["--ctx", "32768", "--kv", "q8_0", "--json"]
        command += ["--min-tps", str(tps)] if tps else []
        results = [run(command) for _ in range(runs)]
        seconds = statistics.median(s for s, _ in results)
        plan = json.loads(results[0][1])
        print(
            f"{model + ' on ' + machine:64} {seconds:6.2f} s ({seconds / import_s:5.1f} x imports)"
            f"  gap {plan['gap']:.4%}  {plan['status']}"
        )
        failed |= index == 0 and (seconds > LIMIT_S or plan["gap"] > LIMIT_GAP)
    for program in PROGRAMS:
        failed |= not solve(*program)
    failed |= frontier_s() > LIMIT_FRONTIER_S
    sys.exit(failed)


def solve(model: str, machine: str, tps: float | None, limit_s: float, limit_gap: float) -> bool:
    """Solves a model's integer program; returns whether time and gap are within their limits."""
    rules = qp.policy()
    rules, inventory = rules.model_copy(update={"candidates": TYPES}), qp.read_inventory(model)
    start, goal = time.process_time(), Goal(min_decode_tps=tps)
    problem = build_problem(inventory, qp.Machine.parse(machine), WORKLOAD, rules, goal)
    priced_s, start = time.process_time() - start, time.process_time()
    with timed_solver() as spent:
        _, solution = best_solution(problem, gap=1e-4, time_limit_s=TIME_LIMIT_S)
    total_s = time.process_time() - start
    print(
        f"{f'{model} on {machine}, {tps} tokens/s':64} prices {priced_s:5.2f} s, model "
        f"{total_s - spent[0]:5.2f} s, HiGHS {spent[0]:5.2f} s CPU  gap {solution.gap:.4%}"
    )
    return total_s <= limit_s and solution.gap <= limit_gap


@contextlib.contextmanager
def timed_solver() -> Iterator[list[float]]:
    """Adds up the CPU seconds that HiGHS runs."""
    spent, run_highs = [0.0], highspy.Highs.run

    def run(self: highspy.Highs) -> object:
        start = time.process_time()
        try:
            return run_highs(self)
        finally:
            spent[0] += time.process_time() - start

    highspy.Highs.run = run
    try:
        yield spent
    finally:
        highspy.Highs.run = run_highs


def frontier_s() -> float:
    """CPU seconds of a frontier of GLM-4.5-Air, in this process."""
    inventory, machine = qp.read_inventory(TASKS[0][0]), qp.Machine.parse(TASKS[0][1])
    start = time.process_time()
    found = qp.frontier(inventory, machine, qp.Workload(context=32768, kv_type="q8_0"))
    seconds, worst = time.process_time() - start, max(point.gap for point in found.points)
    print(f"frontier of {len(found.points)} points {seconds:43.2f} s CPU, largest gap {worst:.4%}")
    return seconds


if __name__ == "__main__":
    main()
