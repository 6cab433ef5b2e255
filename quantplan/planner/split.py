"""Which layer is on which device: contiguous, as llama.cpp's ``-ngl`` and ``-ts`` place them."""

from collections.abc import Iterator

from quantplan.planner.problem import Problem


def least_layer_bytes(problem: Problem) -> list[int]:
    """Fewest bytes that each loaded layer needs on its own device: its cache and what stays."""
    least = list(problem.cache_bytes[: problem.n_layers])
    for group in problem.groups:
        if group.layer is not None and group.place == "layer":
            least[group.layer] += group.options[-1].n_bytes
    return least


def split_layers(problem: Problem, n_cpu_layers: int) -> tuple[str, ...]:
    """Spreads the layers over the GPUs in proportion to the memory that each has for them.

    Args:
        problem: Groups and budgets.
        n_cpu_layers: How many of the first layers are in RAM.

    Returns:
        Device name of each loaded layer: a run of ``CPU``, then GPUs in order.
    """
    gpus = problem.machine.gpus
    if not gpus:
        return (problem.machine.ram.name,) * problem.n_layers
    output_bytes = sum(g.options[-1].n_bytes for g in problem.groups if g.place == "output")
    room = [
        max(
            0,
            gpu.usable_bytes
            - problem.compute_bytes(gpu, 0)
            - (output_bytes if gpu == problem.output_device else 0),
        )
        for gpu in gpus
    ]
    least = least_layer_bytes(problem)[n_cpu_layers:]
    names = [problem.machine.ram.name] * n_cpu_layers
    total_room, total, done = sum(room), sum(least), 0.0
    share_end = [sum(room[: d + 1]) / total_room if total_room else 1.0 for d in range(len(gpus))]
    for n_bytes in least:
        # A layer belongs to the GPU whose share of the bytes its middle falls into.
        middle = (done + n_bytes / 2) / total
        d = next((d for d, end in enumerate(share_end) if middle <= end), len(gpus) - 1)
        names.append(gpus[d].name)
        done += n_bytes
    return tuple(names)


def neighbours(problem: Problem, layer_devices: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Splits in which one boundary between two GPUs is moved by one layer."""
    gpus = {gpu.name for gpu in problem.machine.gpus}
    for layer in range(1, len(layer_devices)):
        before, after = layer_devices[layer - 1 : layer + 1]
        if before != after and before in gpus:
            yield (*layer_devices[:layer], before, *layer_devices[layer + 1 :])
            yield (*layer_devices[: layer - 1], after, *layer_devices[layer:])
