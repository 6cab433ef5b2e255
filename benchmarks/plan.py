"""Times `quantplan plan` as a whole process: import, catalog, integer program, output.

Usage: python benchmarks/plan.py [--runs 5]

Prints the median wall time and the proven gap per task, and beside it the time that Python takes to
import the libraries alone, since machines differ; then the CPU time of a frontier of 24 points.
Exits with 1 if GLM-4.5-Air on one GPU takes more than 3 s or has a gap above 0.1 %, or if its
frontier takes more than 15 s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import quantplan as qp

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
    failed |= frontier_s() > LIMIT_FRONTIER_S
    sys.exit(failed)


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
