"""Compares the integer program with a greedy on loss per byte, on the same groups and objective.

Usage: python benchmarks/greedy.py [--models GLM-4.5-Air,...] [--time-limit 20]

Every catalog model, with a GPU and RAM whose sizes together hold 3.5, 4.5 and 6 bits per weight,
30 % of it on the GPU, beside 2 GiB each for caches and buffers. The greedy starts with the smallest
types in RAM and takes the change (another type, or a move to the layer's GPU) that lowers the
objective (loss, and the price of time) most per byte, until none fits; it does so from each of the
splits of the layers that the search starts from, and its best counts. Exits with 1 if the greedy's
objective is below the planner's anywhere, by more than the gap at which the search may stop.
"""

import argparse
import heapq
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import quantplan as qp
from quantplan.errors import NoPlanError, UnsupportedModelError
from quantplan.hardware.device import Device
from quantplan.planner.decisions import best_solution
from quantplan.planner.goal import Goal
from quantplan.planner.groups import Group
from quantplan.planner.problem import Problem, build_problem
from quantplan.planner.solution import Choice
from quantplan.planner.split import first_splits

BITS_PER_WEIGHT = (3.5, 4.5, 6.0)
GPU_SHARE = 0.3
BESIDE_WEIGHTS_BYTES = 2 * 2**30
WORKLOAD = qp.Workload(context=8192, kv_type="q8_0")
# At which the search over splits may stop.
STOP_GAP = 1e-3


@dataclass(frozen=True)
class Answer:
    """What a greedy found.

    Attributes:
        choices: Option and device name of each group.
        loss_nats: Summed loss.
        objective_nats: Loss and the price of time.
    """

    choices: tuple[Choice, ...]
    loss_nats: float
    objective_nats: float


class _Greedy:
    """Choices that only ever improve, and what they use."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.ram = problem.machine.ram.name
        self.choices: list[Choice] = []
        self.used = {d.name: problem.device_cache_bytes(d) for d in problem.machine.devices}
        self.streamed: Counter[int] = Counter()
        self._buffers: dict[tuple[str, int], int] = {}
        for group in problem.groups:
            self.choices.append((group.options[-1], problem.places(group)[-1].name))
            self._add(group, self.choices[-1], 1)
        self._relieve_ram()

    def _relieve_ram(self) -> None:
        """Moves groups to their layers' GPUs, first layers first, until the RAM holds the rest."""
        ram = self.problem.machine.ram
        for g, group in enumerate(self.problem.groups):
            if self.used[ram.name] + self._buffer_bytes(ram) <= ram.usable_bytes:
                return
            self._choose(g, (group.options[-1], self.problem.places(group)[0].name))

    def _choose(self, g: int, choice: Choice) -> None:
        self._add(self.problem.groups[g], self.choices[g], -1)
        self._add(self.problem.groups[g], choice, 1)
        self.choices[g] = choice

    def _add(self, group: Group, choice: Choice, sign: int) -> None:
        option, name = choice
        for device in self.problem.machine.devices:
            n_bytes = self.problem.bytes_on(device, group, option, name)
            self.used[device.name] += sign * n_bytes
        if name == self.ram and self.problem.is_streamed(group):
            self.streamed[option.largest_bytes] += sign

    def _buffer_bytes(self, device: Device) -> int:
        largest = max((n for n, count in self.streamed.items() if count), default=0)
        key = device.name, largest
        if key not in self._buffers:
            self._buffers[key] = self.problem.compute_bytes(device, largest)
        return self._buffers[key]

    def fits(self) -> bool:
        """Whether every device holds what it is given."""
        return all(
            self.used[d.name] + self._buffer_bytes(d) <= d.usable_bytes
            for d in self.problem.machine.devices
        )

    def cost(self, group: Group, choice: Choice) -> float:
        """What a choice adds to the objective."""
        seconds = self.problem.decode.group_s(group, *choice)
        return choice[0].loss_nats + self.problem.decode_price_nats_per_s * seconds

    def changes(self, g: int) -> Iterator[tuple[float, int, int, str]]:
        """Changes of a group that lower the objective: less its gain per byte, which, and how."""
        group, now = self.problem.groups[g], self.choices[g]
        cost = self.cost(group, now)
        for device in self.problem.places(group):
            held = now[0].n_bytes if device.name == now[1] else 0
            for o, option in enumerate(group.options):
                gain = cost - self.cost(group, (option, device.name))
                if gain > 0:
                    yield -gain / max(1, option.n_bytes - held), g, o, device.name

    def improve(self) -> None:
        """Takes the change of most gain per byte that fits, until there is none."""
        changed = True
        while changed:  # what did not fit may do so once other groups have left the RAM
            changed = False
            version = [0] * len(self.choices)
            waiting = [(change, 0) for g in range(len(self.choices)) for change in self.changes(g)]
            heapq.heapify(waiting)
            while waiting:
                (_, g, o, name), made_at = heapq.heappop(waiting)
                old = self.choices[g]
                if made_at != version[g]:
                    continue
                self._choose(g, (self.problem.groups[g].options[o], name))
                if not self.fits():
                    self._choose(g, old)
                    continue
                changed = True
                version[g] += 1
                for change in self.changes(g):
                    heapq.heappush(waiting, (change, version[g]))


def greedy(problem: Problem) -> Answer | None:
    """The best of what a greedy on loss per byte finds from the planner's first splits.

    Args:
        problem: Groups and budgets, without a speed target.
    """
    best: Answer | None = None
    for layers in first_splits(problem):
        split = problem.with_layers(layers)
        state = _Greedy(split)
        if not state.fits():
            continue
        state.improve()
        pairs = list(zip(split.groups, state.choices, strict=True))
        base = split.decode_price_nats_per_s * split.decode.base_s
        objective = base + sum(state.cost(group, choice) for group, choice in pairs)
        if best is None or objective < best.objective_nats:
            loss = sum(option.loss_nats for option, _ in state.choices)
            best = Answer(tuple(state.choices), loss, objective)
    return best


def machine_for(inventory: qp.Inventory, bits: float) -> qp.Machine:
    """A GPU and RAM that together hold so many bits per weight."""
    n_bytes = bits / 8 * inventory.n_weights
    shares = (GPU_SHARE * n_bytes, (1 - GPU_SHARE) * n_bytes)
    gpu, ram = (round((share + BESIDE_WEIGHTS_BYTES) / 2**20) for share in shares)
    return qp.Machine.parse(f"{gpu}MiB@1000GB/s + {ram}MiB@80GB/s")


def compare(inventory: qp.Inventory, bits: float, time_limit_s: float) -> tuple[str, float | None]:
    """One row of the table.

    Returns:
        The row, and by which part of itself the greedy's objective is above the planner's; None
        where it has no answer.
    """
    machine = machine_for(inventory, bits)
    problem = build_problem(inventory, machine, WORKLOAD, qp.policy(), Goal())
    start = time.perf_counter()
    by_greedy = greedy(problem)
    greedy_s = time.perf_counter() - start
    start = time.perf_counter()
    try:
        _, exact = best_solution(problem, gap=1e-4, time_limit_s=time_limit_s)
    except NoPlanError:
        if by_greedy is None:
            return f"{inventory.name:36} {bits:4.1f}  nothing fits", None
        return f"{inventory.name:36} {bits:4.1f}  only the greedy finds an answer", -1.0
    exact_s = time.perf_counter() - start
    row = f"{inventory.name:36} {bits:4.1f} {exact.objective_nats:9.5f} {exact.loss_nats:9.5f}"
    row += f" {exact.gap:8.3%} {exact_s:6.2f}"
    if by_greedy is None:
        return f"{row}  the greedy finds nothing", None
    worse = 1 - exact.objective_nats / by_greedy.objective_nats
    row += f" {by_greedy.objective_nats:9.5f} {by_greedy.loss_nats:9.5f} {greedy_s:6.2f}"
    return f"{row} {worse:8.3%}", worse


def main() -> None:
    """Prints a row for each model and budget, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    planned = [n for n in qp.catalog_names() if not qp.read_inventory(n).is_for_ik_only]
    parser.add_argument("--models", default=",".join(planned))
    parser.add_argument("--time-limit", type=float, default=20.0)
    options = parser.parse_args()
    print(
        f"{'model':36} {'bits':>4} {'planner':>9} {'loss':>9} {'gap':>8} {'s':>6} "
        f"{'greedy':>9} {'loss':>9} {'s':>6} {'above by':>8}"
    )
    found = []
    for name in options.models.split(","):
        for bits in BITS_PER_WEIGHT:
            try:
                row, worse = compare(qp.read_inventory(name), bits, options.time_limit)
            except UnsupportedModelError as error:
                row, worse = f"{name:36} {error}", None
            print(row, flush=True)
            found += [worse] if worse is not None else []
    print(
        f"{len(found)} problems: the greedy's objective is above the planner's by "
        f"{statistics.median(found):.3%} in the median, {max(found):.3%} at most, "
        f"{min(found):.3%} at least; below it by more than {STOP_GAP:.1%} in "
        f"{sum(worse < -STOP_GAP for worse in found)}"
    )
    sys.exit(any(worse < -STOP_GAP for worse in found))


if __name__ == "__main__":
    main()
