"""The integer program in PuLP: variables, and one function per constraint family.

Names follow docs/explanation/architecture.md: cohorts c, options o, devices d; x[c,o,d] counts the
groups of cohort c that take option o on device d. Groups that cost the same whichever of them takes
which choice form one cohort: layers of equal shape would otherwise give the solver as many equal
answers as there are ways to permute them. Which layer is on which device is settled before.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pulp

from quantplan.hardware import Device
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
        x: Counts by choice.
        scratch: What each GPU's compute buffer needs beside the activations, in MiB.
    """

    problem: Problem
    cohorts: tuple[Cohort, ...]
    lp: pulp.LpProblem
    x: dict[Choice, pulp.LpVariable] = field(default_factory=dict)
    scratch: dict[str, pulp.LpVariable] = field(default_factory=dict)

    def option(self, choice: Choice) -> Option:
        """The option that a choice variable stands for."""
        return self.cohorts[choice[0]].options[choice[1]]

    def group(self, choice: Choice) -> Group:
        """A group that a choice variable counts; the others cost the same."""
        return self.problem.groups[self.cohorts[choice[0]].members[0]]

    def decode_ms(self) -> pulp.LpAffineExpression:
        """Milliseconds per token that depend on the choices."""
        return pulp.lpSum(
            _MILLI * self.problem.decode_s(self.group(c), self.option(c), c[2]) * count
            for c, count in self.x.items()
        )

    def loss_millinats(self) -> pulp.LpAffineExpression:
        """Predicted loss per token in thousandths of a nat."""
        return pulp.lpSum(_MILLI * self.option(c).loss_nats * count for c, count in self.x.items())


def form_cohorts(
    problem: Problem, options: Sequence[tuple[Option, ...]] | None = None
) -> tuple[Cohort, ...]:
    """Sorts the groups into cohorts.

    Args:
        problem: The groups.
        options: Options that each group may take; by default all of its own.
    """
    offered = options or [group.options for group in problem.groups]
    members: dict[object, list[int]] = defaultdict(list)
    for g, group in enumerate(problem.groups):
        roles = tuple(tensor.role for tensor in group.tensors)
        places = tuple(device.name for device in problem.places(group))
        members[group.place, places, roles, offered[g]].append(g)
    return tuple(
        Cohort(
            members=tuple(sorted(indices, key=lambda g: problem.groups[g].layer or 0)),
            options=offered[indices[0]],
            places=problem.places(problem.groups[indices[0]]),
        )
        for indices in members.values()
    )


def build_model(problem: Problem, cohorts: tuple[Cohort, ...], *, pool_gpus: bool = False) -> Model:
    """Builds variables and constraints; the objective is set by the caller.

    Args:
        problem: Groups and budgets.
        cohorts: From `form_cohorts`.
        pool_gpus: Treat the memory of all GPUs as one. With all layers on the fastest GPU this
            relaxes every way to split the layers, so its optimum bounds theirs.
    """
    model = Model(problem, cohorts, pulp.LpProblem("quantplan", pulp.LpMinimize))
    add_choices(model)
    add_scratch(model)
    add_memory(model, pool_gpus=pool_gpus)
    add_decode(model)
    return model


def add_choices(model: Model) -> None:
    """Every group takes one option on one device: sum_{o,d} x[c,o,d] = size(c)."""
    for c, cohort in enumerate(model.cohorts):
        size = len(cohort.members)
        for o in range(len(cohort.options)):
            for d, device in enumerate(cohort.places):
                name = f"x_{c}_{o}_{d}"
                model.x[c, o, device.name] = model.lp.add_variable(name, 0, size, pulp.LpInteger)
        model.lp += pulp.lpSum(count for choice, count in model.x.items() if choice[0] == c) == size


def add_scratch(model: Model) -> None:
    """A GPU's scratch holds the logits (beside the output), or a tensor streamed from RAM.

    scratch[d] >= logits[d]; for every cohort c that may be in RAM and option o: scratch[d] >=
    largest[c,o] z[c,o] and x[c,o,CPU] <= size(c) z[c,o], z binary.
    """
    problem = model.problem
    for d, device in enumerate(problem.machine.gpus):
        logits = problem.scratch_bytes(device, 0) / _MIB
        model.scratch[device.name] = model.lp.add_variable(f"scratch_{d}", lowBound=logits)
    for choice, count in model.x.items():
        c, o, name = choice
        if name != problem.machine.ram.name or not problem.is_streamed(model.group(choice)):
            continue
        streams = model.lp.add_variable(f"z_{c}_{o}", cat=pulp.LpBinary)
        model.lp += count <= len(model.cohorts[c].members) * streams
        for variable in model.scratch.values():
            model.lp += variable >= model.option(choice).largest_bytes / _MIB * streams


def add_memory(model: Model, *, pool_gpus: bool) -> None:
    """Each device holds its weights, caches and buffers.

    sum bytes[c,o] x[c,o,d] + cache(d) + compute(d) + scratch[d] <= usable(d)
    """
    problem = model.problem
    gpus = list(problem.machine.gpus)
    pools = [gpus] if pool_gpus else [[gpu] for gpu in gpus]
    for pool in [*pools, [problem.machine.ram]]:
        used: list[pulp.LpAffineExpression] = []
        budget = 0
        for device in pool:
            budget += device.usable_bytes - _TOLERANCE_BYTES - problem.device_cache_bytes(device)
            if device.kind == "gpu":
                budget -= problem.activation_bytes
                used.append(model.scratch[device.name])
            else:
                budget -= problem.compute_bytes(device, 0)
            for choice, count in model.x.items():
                group, option = model.group(choice), model.option(choice)
                n_bytes = problem.bytes_on(device, group, option, choice[2])
                if n_bytes:
                    used.append(n_bytes / _MIB * count)
        model.lp += pulp.lpSum(used) <= budget / _MIB


def add_decode(model: Model) -> None:
    """A token takes at most the target's time, with the context full.

    sum seconds[c,o,d] x[c,o,d] + caches + fixed <= 1 / min_decode_tps
    """
    problem = model.problem
    if problem.min_decode_tps is not None:
        allowed = (1 - 1e-6) / problem.min_decode_tps - problem.base_decode_s
        model.lp += model.decode_ms() <= _MILLI * allowed
