"""The integer program in PuLP: variables, and one function per constraint family.

Names follow docs/explanation/architecture.md: cohorts c, options o, devices d; x[c,o,d] counts the
groups of cohort c that take option o on device d. Groups that cost the same whichever of them takes
which choice form one cohort: layers of equal shape would otherwise give the solver as many equal
answers as there are ways to permute them. Which layer is on which device is settled before.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pulp

from quantplan.hardware import Device
from quantplan.inventory import LayerCache
from quantplan.planner.problem import Group, Option, Problem

_MIB = 2**20
# The solver meets a bound to about 1e-6 of its row's unit (MiB); this much memory is held back so
# that the answer also holds in integers.
_TOLERANCE_BYTES = 4096
_MILLI = 1000.0

Choice = tuple[int, int, str]
"""Cohort index, option index, device name."""


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


@dataclass
class Model:
    """A PuLP problem with its variables.

    Attributes:
        problem: What it was built from.
        cohorts: Interchangeable groups.
        lp: The PuLP problem.
        relaxed: Whether layers have no device, so that the optimum bounds that of every split.
        pools: Devices whose memory is counted together; each device alone but in a relaxation.
        x: Counts by choice.
        compute: Each device's compute buffer, in MiB.
        caches: Caches of each kind of layer in each pool, in MiB, by the kind and the name of the
            pool's first device; empty but in a relaxation.
        hops: Groups of a cohort that leave their layer's GPU, by cohort; empty but in a relaxation,
            where layers have no device.
    """

    problem: Problem
    cohorts: tuple[Cohort, ...]
    lp: pulp.LpProblem
    pools: tuple[tuple[Device, ...], ...]
    relaxed: bool
    x: dict[Choice, pulp.LpVariable] = field(default_factory=dict)
    compute: dict[str, pulp.LpVariable] = field(default_factory=dict)
    caches: dict[tuple[LayerCache, str], pulp.LpVariable] = field(default_factory=dict)
    hops: dict[int, pulp.LpVariable] = field(default_factory=dict)

    @property
    def base_decode_s(self) -> float:
        """Seconds per token that do not depend on the variables."""
        return self.problem.fixed_decode_s if self.relaxed else self.problem.base_decode_s

    def option(self, choice: Choice) -> Option:
        """The option that a choice variable stands for."""
        return self.cohorts[choice[0]].options[choice[1]]

    def group(self, choice: Choice) -> Group:
        """A group that a choice variable counts; the others cost the same."""
        return self.problem.groups[self.cohorts[choice[0]].members[0]]

    def decode_ms(self) -> pulp.LpAffineExpression:
        """Milliseconds per token that depend on the variables."""
        problem = self.problem
        weights = [
            _MILLI
            * problem.decode_s(self.group(c), self.option(c), c[2], homeless=self.relaxed)
            * count
            for c, count in self.x.items()
        ]
        caches = [
            _MILLI * problem.cache_s(kind, problem.devices[name]) / _cache_mib(problem, kind) * size
            for (kind, name), size in self.caches.items()
        ]
        hops = [
            _MILLI * problem.hop_s(problem.groups[self.cohorts[c].members[0]]) * count
            for c, count in self.hops.items()
        ]
        return pulp.lpSum([*weights, *caches, *hops])

    def objective(self) -> pulp.LpAffineExpression:
        """Loss and the price of time, in thousandths of a nat, less what is constant."""
        return self.loss_millinats() + self.problem.decode_price_nats_per_s * self.decode_ms()

    def loss_millinats(self) -> pulp.LpAffineExpression:
        """Predicted loss per token in thousandths of a nat."""
        return pulp.lpSum(_MILLI * self.option(c).loss_nats * count for c, count in self.x.items())


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
    offered = options or [group.options for group in problem.groups]
    anywhere = (*(pool[0] for pool in gpu_pools(problem)), problem.machine.ram)
    members: dict[object, list[int]] = defaultdict(list)
    places_of: list[tuple[Device, ...]] = []
    for g, group in enumerate(problem.groups):
        in_layer = group.place in ("layer", "free")
        places_of.append(anywhere if relaxed and in_layer else problem.places(group))
        roles = tuple(tensor.role for tensor in group.tensors)
        names = tuple(device.name for device in places_of[g])
        is_kind_told = relaxed and group.layer is not None
        kind = problem.cache_kinds[group.layer or 0] if is_kind_told else None
        members[group.place, names, roles, offered[g], group.n_crossings, kind].append(g)
    return tuple(
        Cohort(
            members=tuple(sorted(indices, key=lambda g: problem.groups[g].layer or 0)),
            options=offered[indices[0]],
            places=places_of[indices[0]],
        )
        for indices in members.values()
    )


def gpu_pools(problem: Problem) -> tuple[tuple[Device, ...], ...]:
    """GPUs that decode equally fast, taken together."""
    by_rate: dict[tuple[float, ...], list[Device]] = defaultdict(list)
    for gpu in problem.machine.gpus:
        rates = (gpu.bandwidth_bytes_per_s, gpu.vector_flops_per_s, gpu.decode_slowdown)
        by_rate[rates].append(gpu)
    return tuple(tuple(pool) for pool in by_rate.values())


def build_model(problem: Problem, cohorts: tuple[Cohort, ...]) -> Model:
    """The program for the problem's split of the layers; the objective is set by the caller."""
    lp = pulp.LpProblem("quantplan", pulp.LpMinimize)
    alone = tuple((device,) for device in problem.machine.devices)
    return _constrained(Model(problem, cohorts, lp, alone, relaxed=False))


def build_relaxation(problem: Problem) -> Model:
    """A program whose optimum bounds those of all splits of the layers.

    Every group of a layer and every part of a cache may be on any device, and GPUs of equal
    bandwidth share their memory.
    """
    lp = pulp.LpProblem("quantplan", pulp.LpMinimize)
    pools = (*gpu_pools(problem), (problem.machine.ram,))
    cohorts = form_cohorts(problem, relaxed=True)
    return _constrained(Model(problem, cohorts, lp, pools, relaxed=True))


def _constrained(model: Model) -> Model:
    """Adds the variables and every family of constraints."""
    add_choices(model)
    add_compute(model)
    if model.relaxed:
        add_caches(model)
        add_hops(model)
    add_memory(model)
    add_decode(model)
    return model


def add_choices(model: Model) -> None:
    """Every group takes one option on one device: sum_{o,d} x[c,o,d] = size(c)."""
    for c, cohort in enumerate(model.cohorts):
        size = len(cohort.members)
        counts = {
            (c, o, device.name): model.lp.add_variable(f"x_{c}_{o}_{d}", 0, size, pulp.LpInteger)
            for o in range(len(cohort.options))
            for d, device in enumerate(cohort.places)
        }
        model.x.update(counts)
        model.lp += pulp.lpSum(counts.values()) == size


def add_compute(model: Model) -> None:
    """A compute buffer holds its graph; the first GPU's also tensors streamed from RAM.

    compute[d] >= graph(d). Where GPUs may work as a pipeline: compute[d] >= pipelined(d) p and
    p + sum x[c,o,CPU] over the cohorts c of layers >= 1, p binary. For every cohort c that is
    streamed from RAM and option o: compute[GPU0] >= (around + largest[c,o]) z[c,o] and
    x[c,o,CPU] <= size(c) z[c,o], z binary.
    """
    problem = model.problem
    for d, device in enumerate(problem.machine.devices):
        graph = problem.compute_bytes(device) / _MIB
        model.compute[device.name] = model.lp.add_variable(f"compute_{d}", lowBound=graph)
    in_ram = {
        choice: count
        for choice, count in model.x.items()
        if choice[2] == problem.machine.ram.name and model.group(choice).layer is not None
    }
    if problem.may_pipeline():
        pipelines = model.lp.add_variable("pipeline", cat=pulp.LpBinary)
        model.lp += pipelines + pulp.lpSum(in_ram.values()) >= 1
        for device in problem.machine.devices:
            held = problem.compute_bytes(device, is_pipeline=True)
            model.lp += model.compute[device.name] >= held / _MIB * pipelines
    for choice, count in in_ram.items():
        if not problem.is_streamed(model.group(choice)):
            continue
        c, o, _ = choice
        streams = model.lp.add_variable(f"z_{c}_{o}", cat=pulp.LpBinary)
        model.lp += count <= len(model.cohorts[c].members) * streams
        held = problem.around_streamed_bytes + model.option(choice).largest_bytes
        model.lp += model.compute[problem.machine.gpus[0].name] >= held / _MIB * streams


def add_caches(model: Model) -> None:
    """The caches of each kind of layer are somewhere.

    sum_p cache[k,p] = all caches of kind k, cache[k,p] >= 0
    """
    problem = model.problem
    for k, (kind, n_layers) in enumerate(Counter(problem.cache_kinds).items()):
        if not _cache_mib(problem, kind):
            continue
        parts = []
        for p, pool in enumerate(model.pools):
            parts.append(model.lp.add_variable(f"cache_{k}_{p}", lowBound=0))
            model.caches[kind, pool[0].name] = parts[-1]
        model.lp += pulp.lpSum(parts) == n_layers * _cache_mib(problem, kind)


def _cache_mib(problem: Problem, kind: LayerCache) -> float:
    """MiB of the cache of one layer of a kind."""
    return problem.cache_bytes[problem.cache_kinds.index(kind)] / _MIB


def add_hops(model: Model) -> None:
    """A group in RAM leaves a GPU, unless the rest of its layer is in RAM too.

    hops[c] >= sum_o x[c,o,CPU] - sum_o x[a,o,CPU], hops[c] >= 0, for cohorts c that may leave and
    every cohort a that may not and is in all of c's layers; and the same for their caches, counted
    in layers.
    """
    problem, ram = model.problem, model.problem.machine.ram.name
    if not problem.machine.gpus:
        return

    def layers(cohort: Cohort) -> set[int | None]:
        return {problem.groups[g].layer for g in cohort.members}

    def in_ram(c: int) -> pulp.LpAffineExpression:
        return pulp.lpSum(n for (d, _, name), n in model.x.items() if (d, name) == (c, ram))

    places = [problem.groups[cohort.members[0]].place for cohort in model.cohorts]
    staying = [c for c, place in enumerate(places) if place == "layer"]
    for c, cohort in enumerate(model.cohorts):
        same = [a for a in staying if layers(model.cohorts[a]) >= layers(cohort)]
        if places[c] != "free" or not problem.groups[cohort.members[0]].n_crossings:
            continue
        model.hops[c] = model.lp.add_variable(f"hops_{c}", lowBound=0)
        for a in same:
            model.lp += model.hops[c] >= in_ram(c) - in_ram(a)
        kind = problem.cache_kinds[problem.groups[cohort.members[0]].layer or 0]
        cache = model.caches.get((kind, ram))
        if cache is not None:
            model.lp += model.hops[c] >= in_ram(c) - cache / _cache_mib(problem, kind)


def add_memory(model: Model) -> None:
    """Each device (or pool of devices, in a relaxation) holds its weights, caches and buffers.

    sum bytes[c,o] x[c,o,d] + cache(d) + compute[d] <= usable(d)
    """
    problem = model.problem
    for pool in model.pools:
        used: list[pulp.LpAffineExpression] = []
        budget = 0
        for device in pool:
            budget += device.usable_bytes - _TOLERANCE_BYTES
            used.append(model.compute[device.name])
            if model.relaxed:
                budget -= problem.trailing_cache_bytes if device == problem.output_device else 0
            else:
                budget -= problem.device_cache_bytes(device)
            for choice, count in model.x.items():
                group, option = model.group(choice), model.option(choice)
                n_bytes = problem.bytes_on(device, group, option, choice[2])
                if n_bytes:
                    used.append(n_bytes / _MIB * count)
        used += [part for (_, name), part in model.caches.items() if name == pool[0].name]
        model.lp += pulp.lpSum(used) <= budget / _MIB


def add_decode(model: Model) -> None:
    """A token takes at most the target's time, with the context full.

    sum seconds[c,o,d] x[c,o,d] + caches + fixed <= 1 / min_decode_tps
    """
    target = model.problem.min_decode_tps
    if target is not None:
        allowed = (1 - 1e-6) / target - model.base_decode_s
        model.lp += model.decode_ms() <= _MILLI * allowed


def add_cutoff(model: Model, objective_nats: float) -> None:
    """The objective is below one that is already known: objective <= objective_nats."""
    base = model.problem.decode_price_nats_per_s * model.base_decode_s
    model.lp += model.objective() <= _MILLI * (objective_nats - base)
