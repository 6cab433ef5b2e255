"""Says what is in the way where there is no plan."""

import math

from quantplan.errors import NoPlanError
from quantplan.planner.problem import Problem
from quantplan.units import gib


def too_slow(wanted_tps: float, possible_tps: float) -> NoPlanError:
    """The speed asked for is above the fastest one that was found."""
    # Rounded down, and a little below, so that the speed named can be asked for.
    floored = math.floor(possible_tps * 0.9999 * 100) / 100
    return NoPlanError(
        f"no plan decodes {wanted_tps:g} tokens/s with the context full: the fastest one that the "
        f"policy allows reaches {floored:.2f} tokens/s. Lower the speed or the context, use a "
        "smaller KV type, or add memory bandwidth"
    )


def too_large(problem: Problem) -> NoPlanError:
    """What the smallest allowed types need, against what the machine has."""
    weights = sum(group.options[-1].n_bytes for group in problem.groups)
    cache = sum(problem.cache_bytes)
    compute = sum(problem.compute_bytes(d) for d in problem.machine.devices)
    required = weights + cache + compute
    usable = sum(d.usable_bytes for d in problem.machine.devices)
    on_devices = ", ".join(f"{d.name} {gib(d.usable_bytes)}" for d in problem.machine.devices)
    workload = problem.workload
    message = (
        f"no plan fits: weights at their smallest allowed types ({gib(weights)}), the KV cache "
        f"({gib(cache)} at {workload.context} tokens, {workload.kv_type_k}/{workload.kv_type_v}) "
        f"and compute buffers ({gib(compute)}) need {gib(required)}; usable are {gib(usable)} "
        f"({on_devices}, margins taken off). "
    )
    if required > usable:
        message += f"Add {gib(required - usable)} of memory, or "
    else:
        message += (
            "The total would do, but each device must hold its own compute buffer, and the last "
            "GPU the output matrix. Use a GPU with more memory or none, or "
        )
    message += "choose a smaller model, a shorter context, a smaller KV type or a smaller ubatch."
    return NoPlanError(message, required_bytes=required, available_bytes=usable)
