"""Which layer is on which device: contiguous, as llama.cpp's ``-ngl`` and ``-ts`` place them."""

from collections.abc import Iterator, Sequence

from quantplan.planner.bounds import Bounds
from quantplan.planner.milp import build_relaxation
from quantplan.planner.problem import Problem

# Gap at which a guess is good enough.
_GUESS_GAP = 1e-3


def least_layer_bytes(problem: Problem) -> list[int]:
    """Fewest bytes that each loaded layer needs on its own device: its cache and what stays."""
    least = list(problem.cache_bytes[: problem.n_layers])
    for group in problem.groups:
        if group.layer is not None and group.place == "layer":
            least[group.layer] += group.options[-1].n_bytes
    return least


def _room(problem: Problem) -> list[int]:
    """Bytes that each GPU for layers has for them."""
    output = sum(g.options[-1].n_bytes for g in problem.groups if g.place == "output")
    return [
        max(
            0,
            gpu.usable_bytes
            - problem.compute_bytes(gpu)
            - (output if gpu == problem.output_device else 0),
        )
        for gpu in problem.layer_gpus
    ]


def devices_of(problem: Problem, counts: Sequence[int]) -> tuple[str, ...]:
    """Device name of each layer, from how many there are in RAM and then on each GPU."""
    pairs = zip(problem.layer_places, counts, strict=True)
    return tuple(name for name, n in pairs for _ in range(n))


def layer_counts(problem: Problem, layer_devices: Sequence[str]) -> tuple[int, ...]:
    """How many layers there are in RAM, and then on each GPU."""
    return tuple(layer_devices.count(name) for name in problem.layer_places)


def split_layers(problem: Problem, n_cpu_layers: int) -> tuple[str, ...]:
    """Spreads the layers over the GPUs in proportion to the memory that each has for them.

    Args:
        problem: Groups and budgets.
        n_cpu_layers: How many of the first layers are in RAM.

    Returns:
        Device name of each loaded layer: a run of ``CPU``, then GPUs in order.
    """
    gpus = problem.layer_gpus
    if not gpus:
        return (problem.machine.ram.name,) * problem.n_layers
    room = _room(problem)
    least = least_layer_bytes(problem)[n_cpu_layers:]
    total_room, total, done = sum(room), sum(least), 0.0
    share_end = [sum(room[: d + 1]) / total_room if total_room else 1.0 for d in range(len(gpus))]
    counts = [0] * len(gpus)
    for n_bytes in least:
        # A layer belongs to the GPU whose share of the bytes its middle falls into.
        middle = (done + n_bytes / 2) / total
        counts[next((d for d, end in enumerate(share_end) if middle <= end), len(gpus) - 1)] += 1
        done += n_bytes
    return devices_of(problem, (n_cpu_layers, *counts))


def _sequential(problem: Problem, n_cpu_layers: int) -> tuple[str, ...]:
    """As many layers as fit on the first GPUs, which fits if any split does."""
    gpus, room = problem.layer_gpus, _room(problem)
    counts, d, free = [0] * len(gpus), 0, room[0]
    for n_bytes in least_layer_bytes(problem)[n_cpu_layers:]:
        while n_bytes > free and d < len(gpus) - 1:
            d, free = d + 1, room[d + 1]
        counts[d], free = counts[d] + 1, free - n_bytes
    return devices_of(problem, (n_cpu_layers, *counts))


def _fastest_first(problem: Problem, n_cpu_layers: int) -> tuple[str, ...]:
    """As many layers as fit on the GPUs with the most bandwidth."""
    gpus, room = problem.layer_gpus, _room(problem)
    least = least_layer_bytes(problem)[n_cpu_layers:]
    left, typical = len(least), max(least, default=1)
    counts = [0] * len(gpus)
    for d in sorted(range(len(gpus)), key=lambda d: -gpus[d].bandwidth_bytes_per_s):
        counts[d] = min(left, int(room[d] // typical))
        left -= counts[d]
    counts[-1] += left
    return devices_of(problem, (n_cpu_layers, *counts))


def first_splits(problem: Problem) -> list[tuple[str, ...]]:
    """Splits to start a search from, without repetition.

    From the fewest layers in RAM that arithmetic allows: shared out in proportion to memory, to the
    first GPUs, and to the fastest ones; then with more and more layers in RAM.
    """
    if not problem.layer_gpus:
        return [split_layers(problem, problem.n_layers)]
    room, least = sum(_room(problem)), least_layer_bytes(problem)
    fewest = 0
    while fewest < problem.n_layers and sum(least[fewest:]) > room:
        fewest += 1
    splits = [split_layers(problem, fewest)]
    if len(problem.layer_gpus) > 1:
        splits += [_sequential(problem, fewest), _fastest_first(problem, fewest)]
    step = 1
    while fewest + step <= problem.n_layers:
        splits.append(split_layers(problem, fewest + step))
        step *= 2
    splits.append(split_layers(problem, problem.n_layers))
    return list(dict.fromkeys(splits))


def promising_split(relaxed: Bounds, time_limit_s: float) -> tuple[tuple[str, ...] | None, float]:
    """How many layers each device has in a good solution of the relaxation, with integers.

    Args:
        relaxed: Bounds without integers.
        time_limit_s: Time at which to stop.

    Returns:
        Device name of each loaded layer, or None where nothing was found in time; and a lower bound
        of the objective over every split, which the integers raise.
    """
    problem, (level, *others) = relaxed.problem, relaxed.order
    model = build_relaxation(problem, pooled=False)
    answer = model.lp.solve(_GUESS_GAP, time_limit_s, within=model.levels[level])
    proven = max(relaxed.nats(level), model.in_nats(answer.bound))
    bound = min([proven, *map(relaxed.nats, others)])
    if answer.ending != "solved":
        return None, bound
    counts = [round(answer.value(model.n_layers[name])) for name in problem.layer_places]
    return devices_of(problem, counts), bound


def neighbours(problem: Problem, layer_devices: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Splits in which one boundary is moved: by one layer, the one to RAM also by four.

    Hybrid models repeat their layers in fours.
    """
    counts = layer_counts(problem, layer_devices)
    for d in range(len(counts) - 1):
        for step in (1, 4) if d == 0 else (1,):
            for giver, taker in ((d, d + 1), (d + 1, d)):
                if counts[giver] >= step:
                    moved = list(counts)
                    moved[giver] -= step
                    moved[taker] += step
                    yield devices_of(problem, moved)
