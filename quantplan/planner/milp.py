"""The integer program: its variables, and one function per family of constraints.

Names follow docs/explanation/architecture.md: cohorts c, shapes k, options o, devices d. t[c,o]
counts the groups of cohort c that take option o; x[k,o,d] those of all cohorts of shape k that take
it on device d. Groups that cost the same whichever of them takes which choice form one cohort:
layers of equal shape would otherwise give the solver as many equal answers as there are ways to
permute them. Cohorts that differ in nothing but their losses have one shape: which of them is on
which device makes no difference either. Which layer is on which device is settled before.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pulp

from quantplan.hardware import Device
from quantplan.inventory import LayerCache
from quantplan.planner.groups import Group, Option
from quantplan.planner.linear import LinearProgram
from quantplan.planner.problem import Problem

_MIB = 2**20
# The solver meets a bound to about 1e-6 of its row's unit (MiB); this much memory is held back so
# that the answer also holds in integers.
_TOLERANCE_BYTES = 4096
# The same of times and losses, which are held against their limits in floating point.
_TOLERANCE = 1e-6
_MILLI = 1000.0

Choice = tuple[int, int, str]
"""Index of the shape, index of its option, device name."""


@dataclass(frozen=True)
class Cohort:
    """Groups that are interchangeable.

    Attributes:
        members: Indices of the groups, in layer order.
        options: Options that the program may choose from for each of them.
        places: Devices that each of them may be on.
    """

    members: tuple[int, ...]
    options: tuple[Option, ...]
    places: tuple[Device, ...]


@dataclass(frozen=True)
class Shape:
    """Cohorts that take the same bytes and times, option by option.

    Attributes:
        cohorts: Indices of the cohorts.
        group: One of their groups.
        n_groups: Groups in all of them.
        options: One of each cost; the loss is that of some cohort.
        takers: Cohort and its option index, for each of ``options``.
        places: Devices that each group may be on.
    """

    cohorts: tuple[int, ...]
    group: Group
    n_groups: int
    options: tuple[Option, ...]
    takers: tuple[tuple[tuple[int, int], ...], ...]
    places: tuple[Device, ...]


@dataclass
class Model:
    """A program with the meaning of its variables.

    Attributes:
        problem: What it was built from.
        cohorts: Interchangeable groups.
        shapes: Cohorts that differ in their losses only.
        pools: Devices whose memory is counted together; each device alone but in a relaxation.
        relaxed: Whether layers have no device, so that the optimum bounds that of every split.
        lp: Variables and rows.
        t: Counts by cohort and option.
        x: Counts by choice.
        steps: Whether something as large as this or larger is streamed to the first GPU, by
            increasing size.
        streamed: What the first GPU's compute buffer holds beyond its graph, in MiB, by its name.
        pipeline: Whether several GPUs work as a pipeline; None where they cannot.
        caches: Caches of each kind of layer in each pool, in MiB, by the kind and the name of the
            pool's first device; empty but in a relaxation.
        hops: Groups of a shape that leave their layer's GPU, by shape; empty but in a relaxation,
            where layers have no device.
    """

    problem: Problem
    cohorts: tuple[Cohort, ...]
    shapes: tuple[Shape, ...]
    pools: tuple[tuple[Device, ...], ...]
    relaxed: bool
    lp: LinearProgram = field(default_factory=LinearProgram)
    t: dict[tuple[int, int], pulp.LpVariable] = field(default_factory=dict)
    x: dict[Choice, pulp.LpVariable] = field(default_factory=dict)
    steps: list[pulp.LpVariable] = field(default_factory=list)
    streamed: dict[str, pulp.LpVariable] = field(default_factory=dict)
    pipeline: pulp.LpVariable | None = None
    caches: dict[tuple[LayerCache, str], pulp.LpVariable] = field(default_factory=dict)
    hops: dict[int, pulp.LpVariable] = field(default_factory=dict)

    @property
    def levels(self) -> list[dict[pulp.LpVariable, float]]:
        """Every setting of the steps: the largest tensor that may be streamed, smallest first."""
        n = len(self.steps)
        return [{c: float(s < level) for s, c in enumerate(self.steps)} for level in range(n + 1)]

    @cached_property
    def decode_ms(self) -> dict[pulp.LpVariable, float]:
        """Milliseconds per token that depend on the variables."""
        problem = self.problem
        return self._seconds(problem.decode_s, problem.cache_s, problem.hop_s)

    @cached_property
    def turn_ms(self) -> dict[pulp.LpVariable, float]:
        """Milliseconds of the workload's prompt and answer that depend on the variables."""
        problem = self.problem
        return self._seconds(problem.turn_s, problem.cache_turn_s, problem.turn_hop_s)

    def _seconds(
        self,
        weights: Callable[..., float],
        cache: Callable[[LayerCache, Device], float],
        hop: Callable[[Group], float],
    ) -> dict[pulp.LpVariable, float]:
        problem = self.problem
        terms = {
            variable: _MILLI * weights(self.shapes[k].group, self.shapes[k].options[o], name,
                                     homeless=self.relaxed)
            for (k, o, name), variable in self.x.items()
        }  # fmt: skip
        for (kind, name), variable in self.caches.items():
            per_mib = cache(kind, problem.devices[name]) / cache_mib(problem, kind)
            terms[variable] = _MILLI * per_mib
        for k, variable in self.hops.items():
            terms[variable] = _MILLI * hop(self.shapes[k].group)
        return terms

    @cached_property
    def loss_millinats(self) -> dict[pulp.LpVariable, float]:
        """Predicted loss per token in thousandths of a nat."""
        return {
            variable: _MILLI * self.cohorts[c].options[o].loss_nats
            for (c, o), variable in self.t.items()
        }

    def objective(self) -> dict[pulp.LpVariable, float]:
        """Loss and the price of time, in thousandths of a nat, less what is constant."""
        weight, price = self.problem.loss_weight, self.problem.decode_price_nats_per_s
        terms = {variable: weight * loss for variable, loss in self.loss_millinats.items()}
        if price:
            for variable, milliseconds in self.decode_ms.items():
                terms[variable] = terms.get(variable, 0.0) + price * milliseconds
        return terms

    @property
    def constant_nats(self) -> float:
        """What is constant in the objective."""
        problem = self.problem
        base = problem.fixed_decode_s if self.relaxed else problem.base_decode_s
        return problem.decode_price_nats_per_s * base


def form_cohorts(
    problem: Problem,
    options: Sequence[tuple[Option, ...]] | None = None,
    *,
    relaxed: bool = False,
) -> tuple[Cohort, ...]:
    """Sorts the groups into cohorts.

    Args:
        problem: The groups.
        options: Options that each group may take; by default all of its own.
        relaxed: Let every group of a layer be on any device.
    """
    anywhere = (*(pool[0] for pool in gpu_pools(problem)), problem.machine.ram)
    members: dict[object, list[int]] = defaultdict(list)
    places_of: list[tuple[Device, ...]] = []
    for g, group in enumerate(problem.groups):
        is_free = relaxed and group.place in ("layer", "free")
        places_of.append(anywhere if is_free else problem.places(group))
        kind = None
        if relaxed and group.layer is not None:
            kind = problem.cache_kind_numbers[group.layer]
        names = tuple(device.name for device in places_of[g])
        roles = tuple(tensor.role for tensor in group.tensors)
        # Equal options are the same object, which is cheaper to compare.
        offers = tuple(map(id, options[g])) if options else id(group.options)
        members[group.place, names, roles, offers, group.n_crossings, kind].append(g)
    return tuple(
        Cohort(
            members=tuple(sorted(indices, key=lambda g: problem.groups[g].layer or 0)),
            options=(options or [g.options for g in problem.groups])[indices[0]],
            places=places_of[indices[0]],
        )
        for indices in members.values()
    )


def form_shapes(problem: Problem, cohorts: tuple[Cohort, ...]) -> tuple[Shape, ...]:
    """Sorts the cohorts by shape."""
    members: dict[object, list[int]] = defaultdict(list)
    for c, cohort in enumerate(cohorts):
        group = problem.groups[cohort.members[0]]
        kind = None if group.layer is None else problem.cache_kind_numbers[group.layer]
        roles = tuple(tensor.role for tensor in group.tensors)
        names = tuple(device.name for device in cohort.places)
        members[group.place, names, roles, group.n_crossings, kind].append(c)
    shapes = []
    for found in members.values():
        takers: dict[object, list[tuple[int, int]]] = defaultdict(list)
        for c in found:
            tensors = problem.groups[cohorts[c].members[0]].tensors
            sizes = tuple((tensor.shape_ne, tensor.qtype) for tensor in tensors)
            for o, option in enumerate(cohorts[c].options):
                takers[sizes, option.qtypes].append((c, o))
        shapes.append(
            Shape(
                cohorts=tuple(found),
                group=problem.groups[cohorts[found[0]].members[0]],
                n_groups=sum(len(cohorts[c].members) for c in found),
                options=tuple(cohorts[same[0][0]].options[same[0][1]] for same in takers.values()),
                takers=tuple(map(tuple, takers.values())),
                places=cohorts[found[0]].places,
            )
        )
    return tuple(shapes)


def gpu_pools(problem: Problem) -> tuple[tuple[Device, ...], ...]:
    """GPUs that decode equally fast, taken together."""
    by_rate: dict[tuple[float, ...], list[Device]] = defaultdict(list)
    for gpu in problem.machine.gpus:
        rates: tuple[float, ...] = (
            gpu.bandwidth_bytes_per_s,
            gpu.vector_flops_per_s,
            gpu.decode_slowdown,
        )
        if problem.goal.max_turn_s is not None:
            rates = (*rates, gpu.flops_per_s, gpu.prefill_slowdown)
        by_rate[rates].append(gpu)
    return tuple(tuple(pool) for pool in by_rate.values())


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


def build_relaxation(problem: Problem) -> Model:
    """A program whose optimum bounds those of all splits of the layers.

    Every group of a layer and every part of a cache may be on any device, and GPUs of equal
    speed share their memory.
    """
    pools = (*gpu_pools(problem), (problem.machine.ram,))
    cohorts = form_cohorts(problem, relaxed=True)
    shapes = form_shapes(problem, cohorts)
    return _constrained(Model(problem, cohorts, shapes, pools, relaxed=True))


def _constrained(model: Model) -> Model:
    """Adds the variables, every family of constraints, and the objective."""
    add_choices(model)
    if model.relaxed:
        add_caches(model)
        add_hops(model)
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
    """The first GPU's compute buffer holds the largest tensor that is streamed to it from RAM.

    With the sizes h[1] < h[2] < ... of all tensors that may be streamed, above the size h[0] that
    the GPU's graph has room for: y[s] is 1 where some tensor of at least h[s] is streamed.

    streamed[GPU0] = sum_s (h[s] - h[s-1]) y[s], y[s+1] <= y[s], and for every shape k and size s:
    sum of x[k,o,CPU] over the options o of at least h[s] <= size(k) y[s].
    """
    problem = model.problem
    if not problem.machine.gpus:
        return
    first, ram = problem.machine.gpus[0], problem.machine.ram.name
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

    p + sum x[k,o,CPU] over the shapes k of layers >= 1, p binary.
    """
    problem, ram = model.problem, model.problem.machine.ram.name
    if not problem.may_pipeline():
        return
    model.pipeline = model.lp.add_variable("pipeline", 1, is_integer=True)
    in_ram = [
        count
        for (k, _, name), count in model.x.items()
        if name == ram and model.shapes[k].group.layer is not None
    ]
    model.lp.add_row("pipeline", {model.pipeline: 1.0, **dict.fromkeys(in_ram, 1.0)}, lower=1.0)


def add_caches(model: Model) -> None:
    """The caches of each kind of layer are somewhere.

    sum_p cache[k,p] = all caches of kind k, cache[k,p] >= 0
    """
    problem = model.problem
    for k, (kind, n_layers) in enumerate(Counter(problem.cache_kinds).items()):
        total = n_layers * cache_mib(problem, kind)
        if not total:
            continue
        parts = {}
        for p, pool in enumerate(model.pools):
            variable = model.lp.add_variable(f"cache_{k}_{p}")
            model.caches[kind, pool[0].name], parts[variable] = variable, 1.0
        model.lp.add_row(f"caches_{k}", parts, equal=total)


def cache_mib(problem: Problem, kind: LayerCache) -> float:
    """MiB of the cache of one layer of a kind."""
    return problem.cache_bytes[problem.cache_kinds.index(kind)] / _MIB


def add_hops(model: Model) -> None:
    """A group in RAM leaves a GPU, unless the rest of its layer is in RAM too.

    hops[k] >= sum_o x[k,o,CPU] - sum_o x[a,o,CPU], hops[k] >= 0, for shapes k that may leave and
    every shape a that may not and is in all of k's layers; and the same for their caches, counted
    in layers.
    """
    problem, ram = model.problem, model.problem.machine.ram.name
    if not problem.machine.gpus:
        return
    in_ram: dict[int, list[pulp.LpVariable]] = defaultdict(list)
    for (k, _, name), variable in model.x.items():
        if name == ram:
            in_ram[k].append(variable)
    layers = [
        {problem.groups[g].layer for c in shape.cohorts for g in model.cohorts[c].members}
        for shape in model.shapes
    ]
    staying = [k for k, shape in enumerate(model.shapes) if shape.group.place == "layer"]
    for k, shape in enumerate(model.shapes):
        group = shape.group
        if group.place != "free" or not group.n_crossings:
            continue
        model.hops[k] = model.lp.add_variable(f"hops_{k}")
        leaves = {model.hops[k]: 1.0, **dict.fromkeys(in_ram[k], -1.0)}
        for a in staying:
            if layers[a] >= layers[k]:
                terms = leaves | dict.fromkeys(in_ram[a], 1.0)
                model.lp.add_row(f"hops_{k}_{a}", terms, lower=0.0)
        kind = problem.cache_kinds[group.layer or 0]
        cache = model.caches.get((kind, ram))
        if cache is not None:
            terms = leaves | {cache: 1 / cache_mib(problem, kind)}
            model.lp.add_row(f"hops_{k}_cache", terms, lower=0.0)


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
        for (_, name), variable in model.caches.items():
            if name == pool[0].name:
                terms[variable] = 1.0
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
        base = problem.fixed_decode_s if model.relaxed else problem.base_decode_s
        allowed = (1 - _TOLERANCE) / target - base
        model.lp.add_row("speed", model.decode_ms, upper=_MILLI * allowed)


def add_turn(model: Model) -> None:
    """The workload's prompt and answer take at most the time that is allowed.

    sum turn[k,o,d] x[k,o,d] + caches + hops + fixed <= max_turn_s
    """
    problem, most = model.problem, model.problem.goal.max_turn_s
    if most is not None:
        base = problem.fixed_turn_s if model.relaxed else problem.base_turn_s
        allowed = (1 - _TOLERANCE) * most - base
        model.lp.add_row("turn", model.turn_ms, upper=_MILLI * allowed)


def add_loss(model: Model) -> None:
    """The model loses at most what is allowed: sum loss[c,o] t[c,o] <= max_loss."""
    most = model.problem.max_summed_loss_nats
    if most is not None:
        allowed = _MILLI * (1 - _TOLERANCE) * most
        model.lp.add_row("loss", model.loss_millinats, upper=allowed)


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


def add_layers_in_ram(model: Model, at_least: int, at_most: int) -> None:
    """So many layers are in RAM, in a relaxation: at_least <= sum_k cache[k,CPU] <= at_most.

    Counted in layers, of those that have a cache; the others may be anywhere.
    """
    ram = model.problem.machine.ram.name
    terms = {
        variable: 1 / cache_mib(model.problem, kind)
        for (kind, name), variable in model.caches.items()
        if name == ram
    }
    without = sum(not cache_mib(model.problem, kind) for kind in model.problem.cache_kinds)
    model.lp.add_row("in_ram_least", terms, lower=at_least - without)
    model.lp.add_row("in_ram_most", terms, upper=at_most)


def add_cutoff(model: Model, objective_nats: float) -> None:
    """The objective is below one that is already known: objective <= objective_nats."""
    allowed = _MILLI * (objective_nats - model.constant_nats)
    model.lp.add_row("cutoff", model.objective(), upper=allowed)
