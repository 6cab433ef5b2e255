"""Finds a plan, or says what is in the way."""

from quantplan.errors import NoPlanError
from quantplan.planner.problem import Problem
from quantplan.planner.solve import Solution, fastest_split, solve
from quantplan.planner.split import first_splits, least_layer_bytes
from quantplan.units import gib


def best_solution(problem: Problem, *, gap: float, time_limit_s: float) -> tuple[Problem, Solution]:
    """Solves with every layer on the GPUs, or with as few of the first layers in RAM as fit.

    Args:
        problem: Groups and budgets.
        gap: Relative gap at which the solver may stop.
        time_limit_s: Time for each run of the solver, in seconds.

    Returns:
        The problem with the layers where they are, and its solution.

    Raises:
        NoPlanError: Nothing fits, or the speed asked for is out of reach.
    """
    for n_cpu_layers in _layer_counts(problem):
        splits = first_splits(problem, n_cpu_layers)
        solution = solve(problem, splits=splits, gap=gap, time_limit_s=time_limit_s)
        if solution is None and problem.min_decode_tps is not None:
            fastest = fastest_split(problem, splits)
            if fastest is not None:
                if fastest[1] * problem.min_decode_tps > 1:
                    raise _too_slow(problem.min_decode_tps, 1 / fastest[1])
                solution = solve(problem, splits=[fastest[0]], gap=gap, time_limit_s=time_limit_s)
        if solution is not None:
            return problem.with_layers(solution.layer_devices), solution
    raise _too_large(problem)


def _layer_counts(problem: Problem) -> range:
    """Numbers of layers in RAM to try, from the least that arithmetic allows."""
    if not problem.machine.gpus:
        return range(problem.n_layers, problem.n_layers + 1)
    room = sum(gpu.usable_bytes - problem.compute_bytes(gpu, 0) for gpu in problem.machine.gpus)
    layers = least_layer_bytes(problem)
    n_cpu = 0
    while n_cpu < len(layers) and sum(layers[n_cpu:]) > room:
        n_cpu += 1
    return range(n_cpu, problem.n_layers + 1)


def _too_slow(wanted_tps: float, possible_tps: float) -> NoPlanError:
    return NoPlanError(
        f"no plan decodes {wanted_tps:g} tokens/s with the context full: the fastest one that the "
        f"policy allows reaches {possible_tps:.2f} tokens/s. Lower the speed or the context, use a "
        "smaller KV type, or add memory bandwidth"
    )


def _too_large(problem: Problem) -> NoPlanError:
    """What the smallest allowed types need, against what the machine has."""
    weights = sum(group.options[-1].n_bytes for group in problem.groups)
    cache = sum(problem.cache_bytes)
    compute = sum(problem.compute_bytes(d, 0) for d in problem.machine.devices)
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
