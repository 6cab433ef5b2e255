"""A benchmark's output, the flags it ran with and a machine -> the machine, calibrated."""

from collections.abc import Sequence

from quantplan.costs.calibration import Measurement, calibrate
from quantplan.costs.traffic import collect
from quantplan.errors import InputError
from quantplan.formats.llama_args import parse_flags
from quantplan.formats.llama_bench import BenchResult, parse_bench
from quantplan.hardware import Machine
from quantplan.inventory import Inventory
from quantplan.placement import place


def calibrate_machine(
    machine: Machine, inventory: Inventory, bench_output: str, flags: Sequence[str] = ()
) -> Machine:
    """Narrows a machine's speed factors by measurements made on it.

    Args:
        machine: As it is known so far.
        inventory: The very model that was measured, with the types that it has in the file.
        bench_output: What llama-bench or llama-sweep-bench printed.
        flags: Flags that it ran with, where the output does not state them.

    Raises:
        InputError: The output or a flag is not understood, or nothing was measured alone.
    """
    return calibrate_by(machine, inventory, parse_bench(bench_output), flags)


def calibrate_by(
    machine: Machine,
    inventory: Inventory,
    results: Sequence[BenchResult],
    flags: Sequence[str] = (),
    by: str = "",
) -> Machine:
    """`calibrate_machine` by speeds that are known already.

    Args:
        machine: As it is known so far.
        inventory: The very model that was measured.
        results: The speeds.
        flags: Flags that it ran with.
        by: What measured them and when, for the machine's list of measurements.

    Raises:
        InputError: A flag is not understood, or the model has no tensors.
    """
    measurements = [_measurement(machine, inventory, result, flags) for result in results]
    n_decode = sum(r.n_generated > 0 for r in results)
    said = f"{inventory.name}: {n_decode} decode and {len(results) - n_decode} prefill speeds"
    return calibrate(machine, measurements, (f"{said}{f', {by}' if by else ''}",))


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
    traffic = collect(inventory, assignment, placement.layers, placement.output)
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
