"""The integer program: one function per family of constraints.

Names are those of `quantplan.planner.model` and of docs/explanation/mathematics.md.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import pulp

from quantplan.hardware.device import Device
from quantplan.planner.groups import Option
from quantplan.planner.model import MILLI, Model, form_cohorts, form_shapes, gpu_pools
from quantplan.planner.problem import Problem

_MIB = 2**20
# The solver meets a bound to about 1e-6 of its row's unit (MiB); this much memory is held back so
# that the answer also holds in integers.
_TOLERANCE_BYTES = 4096
# The same of times and losses, which are held against their limits in floating point: relative, for
# rounding, and in milliseconds or millinats, which is more where the limit is small.
_TOLERANCE = 1e-6


def build_model(problem: Problem, options: Sequence[tuple[Option, ...]] | None = None) -> Model:
    """The program for the problem's split of the layers.

    Args:
        problem: Groups, budgets, split and goal.
        options: Options that each group may take; by default all of its own.
    """
    alone = tuple((device,) for device in problem.machine.devices)
    cohorts = form_cohorts(problem, options)
    shapes = form_shapes(problem, cohorts)
    return _constrained(Model(problem, cohorts, shapes, alone, relaxed=False))


def build_relaxation(problem: Problem, *, pooled: bool = True) -> Model:
    """A program whose optimum bounds those of all splits of the layers.

    Layers may be on any device, in any order.

    Args:
        problem: Groups, budgets and goal.
        pooled: Let GPUs of equal speed share their memory, which makes a smaller program.
    """
    gpus = gpu_pools(problem) if pooled else tuple((gpu,) for gpu in problem.machine.gpus)
    pools = (*gpus, (problem.machine.ram,))
    cohorts = form_cohorts(problem, anywhere=tuple(pool[0] for pool in pools))
    shapes = form_shapes(problem, cohorts)
    return _constrained(Model(problem, cohorts, shapes, pools, relaxed=True))


def _constrained(model: Model) -> Model:
    """Adds the variables, every family of constraints, and the objective."""
    add_choices(model)
    if model.relaxed:
        add_layers(model)
        add_hops(model)
        add_boundaries(model)
    add_streaming(model)
    add_pipeline(model)
    add_memory(model)
    add_speed(model)
    add_turn(model)
    add_loss(model)
    add_size(model)
    model.lp.minimise(model.objective())
    return model


def add_choices(model: Model) -> None:
    """Every group takes one option, on one device.

    sum_o t[c,o] = size(c), and sum_d x[k,o,d] = sum of t[c,o] over the cohorts c of shape k
    """
    for c, cohort in enumerate(model.cohorts):
        size = len(cohort.members)
        for o in range(len(cohort.options)):
            model.t[c, o] = model.lp.add_variable(f"t_{c}_{o}", size, is_integer=True)
        terms = {model.t[c, o]: 1.0 for o in range(len(cohort.options))}
        model.lp.add_row(f"choices_{c}", terms, equal=size)
    for k, shape in enumerate(model.shapes):
        for o, takers in enumerate(shape.takers):
            terms = {model.t[taker]: -1.0 for taker in takers}
            most = sum(len(model.cohorts[c].members) for c, _ in takers)
            for d, device in enumerate(shape.places):
                variable = model.lp.add_variable(f"x_{k}_{o}_{d}", most, is_integer=True)
                model.x[k, o, device.name], terms[variable] = variable, 1.0
            model.lp.add_row(f"places_{k}_{o}", terms, equal=0.0)


def add_streaming(model: Model) -> None:
    """The first GPU of this host has room for the largest tensor that is streamed to it from RAM.

    With the sizes h[1] < h[2] < ... of all tensors that may be streamed, above the size h[0] that
    the GPU's graph has room for: y[s] is 1 where some tensor of at least h[s] is streamed.

    streamed[GPU0] = sum_s (h[s] - h[s-1]) y[s], y[s+1] <= y[s], and for every shape k and size s:
    sum of x[k,o,CPU] over the options o of at least h[s] <= size(k) y[s].
    """
    problem, first = model.problem, model.problem.machine.streaming_gpu
    if first is None:
        return
    ram = problem.machine.ram.name
    graph = problem.compute_bytes(first)
    held: dict[int, int] = {}
    by_shape: dict[int, dict[int, int]] = defaultdict(dict)
    for (k, o, name), variable in model.x.items():
        if name == ram and problem.is_streamed(model.shapes[k].group):
            size = problem.around_streamed_bytes + model.shapes[k].options[o].largest_bytes
            if size > graph:
                held[variable] = by_shape[k][variable] = size
    sizes = sorted(set(held.values()))
    steps = [model.lp.add_variable(f"y_{s}", 1, is_integer=True) for s in range(len(sizes))]
    model.steps = steps
    model.streamed[first.name] = model.lp.add_variable("streamed_0")
    total = {model.streamed[first.name]: -1.0}
    for s, (low, high) in enumerate(zip([graph, *sizes], sizes, strict=False)):
        total[steps[s]] = (high - low) / _MIB
        if s:
            model.lp.add_row(f"steps_{s}", {steps[s]: 1.0, steps[s - 1]: -1.0}, upper=0.0)
    model.lp.add_row("streamed", total, equal=0.0)
    for k, variables in by_shape.items():
        for size in sorted(set(variables.values())):
            s = sizes.index(size)
            terms = {
                variable: 1.0 for variable, held_size in variables.items() if held_size >= size
            }
            terms[steps[s]] = -float(model.shapes[k].n_groups)
            model.lp.add_row(f"streams_{k}_{s}", terms, upper=0.0)


def add_pipeline(model: Model) -> None:
    """GPUs that hold every layer work as a pipeline, with more copies of their graphs' inputs.

    p + sum x[k,o,d] over the shapes k and devices d away from their layers' GPUs >= 1, p binary. A
    relaxation knows only of the CPU and of hops.
    """
    problem = model.problem
    if not problem.may_pipeline():
        return
    model.pipeline = model.lp.add_variable("pipeline", 1, is_integer=True)
    moved = list(model.hops.values())
    for (k, _, name), count in model.x.items():
        group = model.shapes[k].group
        if model.relaxed:
            is_moved = group.layer is not None and name == problem.machine.ram.name
        else:
            is_moved = problem.is_moved(group, name)
        moved += [count] if is_moved else []
    model.lp.add_row("pipeline", {model.pipeline: 1.0, **dict.fromkeys(moved, 1.0)}, lower=1.0)


def add_layers(model: Model) -> None:
    """Each layer is somewhere, whole: its cache, and what may not leave it.

    sum_d layers[i,d] = layers with a cache of kind i, n_layers[d] = sum_i layers[i,d], and for the
    shapes k of groups that stay with their layers, all of which are of one kind: sum_o x[k,o,d] =
    layers[i,d], or <= where some of the kind's layers have no such group. So for GPUs d too, and
    groups that may leave for RAM only.
    """
    problem = model.problem
    numbers = Counter(problem.cache_kinds)
    for i, (kind, n_layers) in enumerate(numbers.items()):
        for d, name in model.layer_pools:
            model.layers[kind, name] = model.lp.add_variable(
                f"layers_{i}_{d}", n_layers, is_integer=True
            )
        parts = {model.layers[kind, name]: 1.0 for _, name in model.layer_pools}
        model.lp.add_row(f"layers_{i}", parts, equal=n_layers)
    for d, name in model.layer_pools:
        model.n_layers[name] = model.lp.add_variable(f"n_layers_{d}", problem.n_layers)
        terms = {model.layers[kind, name]: 1.0 for kind in numbers}
        model.lp.add_row(f"n_layers_{d}", {model.n_layers[name]: -1.0, **terms}, equal=0.0)
    ram = problem.machine.ram.name
    for k, shape in enumerate(model.shapes):
        group = shape.group
        if group.place not in ("layer", "free") or group.layer is None or group.may_roam:
            continue
        kind = problem.cache_kinds[group.layer]
        for d, name in model.layer_pools:
            terms = {model.layers[kind, name]: -1.0, **_counts(model, k, name)}
            if group.place == "layer" and shape.n_groups == numbers[kind]:
                model.lp.add_row(f"stays_{k}_{d}", terms, equal=0.0)
            elif group.place == "layer" or name != ram:
                model.lp.add_row(f"stays_{k}_{d}", terms, upper=0.0)


def _counts(model: Model, k: int, name: str) -> dict[pulp.LpVariable, float]:
    """The groups of a shape on a device, of all options."""
    options = range(len(model.shapes[k].options))
    return {model.x[k, o, name]: 1.0 for o in options if (k, o, name) in model.x}


def add_hops(model: Model) -> None:
    """What is not on a device with its layer costs a hop, in a relaxation.

    hops[k,d] >= sum_o x[k,o,d] - layers[i,d], for the shapes k that may leave layers of kind i, and
    without layers[i,d] for devices d that have experts only. From a device d of another host there
    is the way back too: away[k,d] >= layers[i,d] - layers of kind i without k - sum_o x[k,o,d].
    """
    problem, ram = model.problem, model.problem.machine.ram.name
    numbers = Counter(problem.cache_kinds)
    for k, shape in enumerate(model.shapes):
        group = shape.group
        if group.place != "free" or not group.n_crossings or group.layer is None:
            continue
        kind = problem.cache_kinds[group.layer]
        for d, pool in enumerate(model.pools):
            name = pool[0].name
            counts = _counts(model, k, name)
            layers = model.layers.get((kind, name))
            if counts and (group.may_roam or name == ram):
                hops = model.lp.add_variable(f"hops_{k}_{d}", shape.n_groups)
                terms = {hops: 1.0, **dict.fromkeys(counts, -1.0)}
                if layers is not None:
                    terms[layers] = 1.0
                model.lp.add_row(f"hops_{k}_{d}", terms, lower=0.0)
                model.hops[k, name] = hops
            if layers is not None and pool[0].network is not None:
                away = model.lp.add_variable(f"away_{k}_{d}", shape.n_groups)
                terms = {away: 1.0, layers: -1.0, **counts}
                without = numbers[kind] - shape.n_groups
                model.lp.add_row(f"away_{k}_{d}", terms, lower=-without)
                model.away[k, name] = away


def add_boundaries(model: Model) -> None:
    """After the layers of a device, the token moves on, in a relaxation.

    n_layers[d] <= layers used[d], used[d] binary, for devices d other than the output's.
    """
    problem = model.problem
    for d, name in model.layer_pools:
        if problem.output_device in model.pools[d]:
            continue
        model.used[name] = model.lp.add_variable(f"used_{d}", 1, is_integer=True)
        terms = {model.n_layers[name]: 1.0, model.used[name]: -float(problem.n_layers)}
        model.lp.add_row(f"used_{d}", terms, upper=0.0)


def add_memory(model: Model) -> None:
    """Each device (or pool of devices, in a relaxation) holds its weights, caches and buffers.

    sum bytes[k,o] x[k,o,d] + cache(d) + compute(d) + streamed[d] + copies(d) p <= usable(d)
    """
    for p, pool in enumerate(model.pools):
        names = {device.name for device in pool}
        terms: dict[pulp.LpVariable, float] = defaultdict(float)
        for (k, o, name), variable in model.x.items():
            group, option = model.shapes[k].group, model.shapes[k].options[o]
            if name in names or group.place == "host_and_output":
                n_bytes = sum(model.problem.bytes_on(d, group, option, name) for d in pool)
                if n_bytes:
                    terms[variable] += n_bytes / _MIB
        for device in pool:
            if device.name in model.streamed:
                terms[model.streamed[device.name]] = 1.0
        if model.pipeline is not None:
            terms[model.pipeline] = sum(_copies_bytes(model.problem, d) for d in pool) / _MIB
        for (kind, name), variable in model.layers.items():
            if name == pool[0].name:
                n_bytes = model.problem.cache_bytes[model.problem.cache_kinds.index(kind)]
                terms[variable] = n_bytes / _MIB
        model.lp.add_row(f"memory_{p}", terms, upper=_budget_bytes(model, pool) / _MIB)


def _copies_bytes(problem: Problem, device: Device) -> int:
    """What a device's compute buffer holds on top where the GPUs work as a pipeline."""
    return problem.compute_bytes(device, is_pipeline=True) - problem.compute_bytes(device)


def _budget_bytes(model: Model, pool: Iterable[Device]) -> int:
    """What the devices of a pool have for weights, and for caches where these may be anywhere."""
    problem, budget = model.problem, 0
    for device in pool:
        budget += device.usable_bytes - _TOLERANCE_BYTES - problem.compute_bytes(device)
        if not model.relaxed:
            budget -= problem.device_cache_bytes(device)
        elif device == problem.output_device:
            budget -= problem.trailing_cache_bytes
    return budget


def add_speed(model: Model) -> None:
    """A token takes at most the target's time, with the context full.

    sum seconds[k,o,d] x[k,o,d] + caches + hops + fixed <= 1 / min_decode_tps
    """
    problem, target = model.problem, model.problem.goal.min_decode_tps
    if target is not None:
        base = problem.decode.least_s if model.relaxed else problem.decode.base_s
        allowed = (1 - _TOLERANCE) / target - base
        model.lp.add_row("speed", model.decode_ms, upper=MILLI * allowed - _TOLERANCE)


def add_turn(model: Model) -> None:
    """The workload's prompt and answer take at most the time that is allowed.

    sum turn[k,o,d] x[k,o,d] + caches + hops + fixed <= max_turn_s
    """
    problem, most = model.problem, model.problem.goal.max_turn_s
    if most is not None:
        base = problem.turn.least_s if model.relaxed else problem.turn.base_s
        allowed = (1 - _TOLERANCE) * most - base
        model.lp.add_row("turn", model.turn_ms, upper=MILLI * allowed - _TOLERANCE)


def add_loss(model: Model) -> None:
    """The model loses at most what is allowed: sum loss[c,o] t[c,o] <= max_loss."""
    most = model.problem.max_summed_loss_nats
    if most is not None:
        allowed = MILLI * (1 - _TOLERANCE) * most - _TOLERANCE
        terms = model.loss_millinats
        if allowed <= 0:  # nothing may be lost, so no choice is taken that loses anything
            allowed, terms = 0.0, {choice: 1.0 for choice, loss in terms.items() if loss > 0}
        model.lp.add_row("loss", terms, upper=allowed)


def add_size(model: Model) -> None:
    """The tensors of the file take at most the bytes that are allowed.

    sum bytes[c,o] t[c,o] + tensors that are not loaded <= max_file_bytes
    """
    problem, most = model.problem, model.problem.goal.max_file_bytes
    if most is not None:
        terms = {
            variable: model.cohorts[c].options[o].n_bytes / _MIB
            for (c, o), variable in model.t.items()
        }
        allowed = (most - problem.unloaded_bytes - _TOLERANCE_BYTES) / _MIB
        model.lp.add_row("size", terms, upper=allowed)


def add_cutoff(model: Model, objective_nats: float) -> None:
    """The objective is below one that is already known: objective <= objective_nats."""
    allowed = MILLI * (objective_nats - model.constant_nats)
    model.lp.add_row("cutoff", model.objective(), upper=allowed)
