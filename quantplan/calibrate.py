"""A benchmark's output, the flags it ran with and a machine -> the machine, calibrated."""

from collections.abc import Iterator, Sequence

from quantplan.costs.calibration import Measurement, calibrate
from quantplan.costs.traffic import collect
from quantplan.errors import InputError
from quantplan.formats.llama_args import parse_flags
from quantplan.formats.llama_bench import BenchResult, parse_bench
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.placement import place


def calibrate_machine(
    machine: Machine,
    inventory: Inventory,
    bench: str | Sequence[BenchResult],
    flags: Sequence[str] = (),
    *,
    tool: str = "",
) -> Machine:
    """Narrows a machine's speed factors by measurements made on it.

    Args:
        machine: As it is known so far.
        inventory: The very model that was measured, with the types that it has in the file.
        bench: What llama-bench or llama-sweep-bench printed, or speeds that were measured.
        flags: Flags that it ran with, where the output does not state them.
        tool: What measured, for people.

    Raises:
        InputError: The output or a flag is not understood, or nothing was measured alone.
    """
    results = parse_bench(bench) if isinstance(bench, str) else tuple(bench)
    measurements = [_measurement(machine, inventory, result, flags) for result in results]
    said = f"{inventory.name}: {', '.join(_said(results))}{f' ({tool})' if tool else ''}"
    return calibrate(machine, measurements, (said,))


def _said(results: Sequence[BenchResult]) -> Iterator[str]:
    """What was measured, for people."""
    for what, some in (
        ("decode", [r for r in results if r.n_generated]),
        ("prefill", [r for r in results if r.n_prompt]),
    ):
        if some:
            first, last = (f(some, key=lambda r: r.depth) for f in (min, max))
            speeds, depths = f"{first.tps:.1f}", f"{first.depth}"
            if last.depth > first.depth:
                speeds, depths = f"{speeds} to {last.tps:.1f}", f"{depths} to {last.depth}"
            yield f"{what} {speeds} tokens/s at depth {depths}"


def _measurement(
    machine: Machine, inventory: Inventory, result: BenchResult, flags: Sequence[str]
) -> Measurement:
    launch = parse_flags(
        # A single request, whatever the slots of a server would be.
        ["-np", "1", *result.flags, *flags],
        inventory,
    )
    placement = place(inventory, machine, launch)
    by_name = inventory.by_name
    assignment = {n: (by_name[n].qtype, homes[0]) for n, homes in placement.tensors.items()}
    traffic = collect(inventory, assignment, placement.layers, placement.output, placement.caches)
    if not traffic.reads:
        raise InputError(f"{inventory.name} has no tensors, so its speed says nothing")
    n_tokens = min(result.n_prompt, launch.workload.ubatch) if result.n_prompt else 1
    # The depth at the middle of what was measured.
    middle = (result.n_prompt - n_tokens) / 2 if result.n_prompt else result.n_generated / 2
    return Measurement(
        traffic=traffic,
        workload=launch.workload,
        depth=result.depth + middle,
        tps=result.tps,
        n_tokens=n_tokens,
    )
