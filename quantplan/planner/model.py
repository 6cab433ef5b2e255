"""What the integer program counts: cohorts and shapes of groups, and what its variables mean.

Names follow docs/explanation/mathematics.md: cohorts c, shapes k, options o, devices d. t[c,o]
counts the groups of cohort c that take option o; x[k,o,d] those of all cohorts of shape k that take
it on device d. Groups that cost the same whichever of them takes which choice form one cohort:
layers of equal shape would otherwise give the solver as many equal answers as there are ways to
permute them. Cohorts that differ in nothing but their losses have one shape: which of them is on
which device makes no difference either. Which layer is on which device is settled before.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pulp

from quantplan.hardware.device import Device
from quantplan.inventory import LayerCache
from quantplan.planner.groups import Group, Option
from quantplan.planner.linear import LinearProgram
from quantplan.planner.problem import Problem
from quantplan.planner.times import Times

MILLI = 1000.0
"""Times and losses are in thousandths of a second and of a nat: near 1, as solvers like it."""


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
        x: Counts by shape, option and device name.
        steps: Whether something as large as this or larger is streamed to the first GPU, by
            increasing size.
        streamed: What the first GPU's compute buffer holds beyond its graph, in MiB, by its name.
        pipeline: Whether several GPUs work as a pipeline; None where they cannot.
        layers: Layers with each kind of cache in each pool, by the kind and the name of the pool's
            first device; empty but in a relaxation, where layers have no device.
        n_layers: Layers of all kinds in a pool; likewise.
        hops: Groups of a shape in a pool that their layer is not in; likewise.
        away: Groups of a shape whose layer is in a pool of other hosts, and they not; likewise.
        used: Whether a device other than the output's has layers; likewise.
    """

    problem: Problem
    cohorts: tuple[Cohort, ...]
    shapes: tuple[Shape, ...]
    pools: tuple[tuple[Device, ...], ...]
    relaxed: bool
    lp: LinearProgram = field(default_factory=LinearProgram)
    t: dict[tuple[int, int], pulp.LpVariable] = field(default_factory=dict)
    x: dict[tuple[int, int, str], pulp.LpVariable] = field(default_factory=dict)
    steps: list[pulp.LpVariable] = field(default_factory=list)
    streamed: dict[str, pulp.LpVariable] = field(default_factory=dict)
    pipeline: pulp.LpVariable | None = None
    layers: dict[tuple[LayerCache, str], pulp.LpVariable] = field(default_factory=dict)
    n_layers: dict[str, pulp.LpVariable] = field(default_factory=dict)
    hops: dict[tuple[int, str], pulp.LpVariable] = field(default_factory=dict)
    away: dict[tuple[int, str], pulp.LpVariable] = field(default_factory=dict)
    used: dict[str, pulp.LpVariable] = field(default_factory=dict)

    @property
    def layer_pools(self) -> list[tuple[int, str]]:
        """Number of each pool that may have layers, and the name of its first device."""
        names = [pool[0].name for pool in self.pools]
        return [(d, name) for d, name in enumerate(names) if name in self.problem.layer_places]

    @property
    def levels(self) -> list[dict[pulp.LpVariable, tuple[float, float]]]:
        """Every setting of the steps: the largest tensor that may be streamed, smallest first."""
        n, settled = len(self.steps), ((0.0, 0.0), (1.0, 1.0))
        return [{c: settled[s < level] for s, c in enumerate(self.steps)} for level in range(n + 1)]

    @cached_property
    def decode_ms(self) -> dict[pulp.LpVariable, float]:
        """Milliseconds per token that depend on the variables."""
        return self._milliseconds(self.problem.decode)

    @cached_property
    def turn_ms(self) -> dict[pulp.LpVariable, float]:
        """Milliseconds of the workload's prompt and answer that depend on the variables."""
        return self._milliseconds(self.problem.turn)

    def _milliseconds(self, times: Times) -> dict[pulp.LpVariable, float]:
        terms = {}
        for (k, o, name), variable in self.x.items():
            group, option = self.shapes[k].group, self.shapes[k].options[o]
            terms[variable] = MILLI * times.group_s(group, option, name, homeless=self.relaxed)
        for (kind, name), variable in self.layers.items():
            terms[variable] = MILLI * times.cache_s(kind, self.problem.devices[name])
        for (k, name), variable in self.hops.items():
            terms[variable] = MILLI * times.hop_s(self.shapes[k].group, (name,))
        for (k, name), variable in self.away.items():
            terms[variable] = MILLI * times.way_s(self.shapes[k].group, name)
        for name, variable in self.used.items():
            terms[variable] = MILLI * times.boundary_s(name)
        return terms

    @cached_property
    def loss_millinats(self) -> dict[pulp.LpVariable, float]:
        """Predicted loss per token in thousandths of a nat."""
        return {
            variable: MILLI * self.cohorts[c].options[o].loss_nats
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
        decode = self.problem.decode
        base = decode.least_s if self.relaxed else decode.base_s
        return self.problem.decode_price_nats_per_s * base

    def in_nats(self, millinats: float) -> float:
        """An objective or a bound of the program with what is constant in it, in nats."""
        return max(0.0, millinats / MILLI + self.constant_nats)


def form_cohorts(
    problem: Problem,
    options: Sequence[tuple[Option, ...]] | None = None,
    anywhere: tuple[Device, ...] = (),
) -> tuple[Cohort, ...]:
    """Sorts the groups into cohorts.

    Args:
        problem: The groups.
        options: Options that each group may take; by default all of its own.
        anywhere: Devices that groups of layers may be on, in a relaxation: those of layers, and of
            experts.
    """
    members: dict[object, list[int]] = defaultdict(list)
    places_of: list[tuple[Device, ...]] = []
    for g, group in enumerate(problem.groups):
        if anywhere and group.place in ("layer", "free"):
            places_of.append(tuple(d for d in anywhere if problem.may_hold(d, group)))
        else:
            places_of.append(problem.places(group))
        kind = None
        if anywhere and group.layer is not None:
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
    """GPUs that decode equally fast and may all have layers or not, taken together."""
    by_rate: dict[tuple[object, ...], list[Device]] = defaultdict(list)
    for gpu in problem.machine.gpus:
        rates: tuple[object, ...] = (
            gpu.bandwidth_bytes_per_s,
            gpu.vector_flops_per_s,
            gpu.decode_slowdown,
            gpu.network,
            gpu in problem.layer_gpus,
        )
        if problem.goal.max_turn_s is not None:
            rates = (*rates, gpu.flops_per_s, gpu.prefill_slowdown)
        by_rate[rates].append(gpu)
    return tuple(tuple(pool) for pool in by_rate.values())
