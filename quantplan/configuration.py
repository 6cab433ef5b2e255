"""Every way to say how a model is run: flags, a plan or recipe, or a device for each tensor."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from quantplan.costs.memory import loads_prediction_weights
from quantplan.errors import InputError
from quantplan.formats.llama_args import parse_flags
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.near import similar, similar_tensors
from quantplan.placement import Launch, Placement, place, place_tensors
from quantplan.qtypes import QTYPES, Runtime
from quantplan.recipe import Assignment, Recipe
from quantplan.workload import Workload


@runtime_checkable
class HasRecipe(Protocol):
    """A plan, which holds its recipe."""

    @property
    def recipe(self) -> Recipe:
        """What a quantizer and a runtime need to carry the plan out."""
        ...


Homes = Mapping[str, tuple[str, str | None]] | Sequence[Assignment]
"""Type and device of every tensor; None where a tensor is not loaded."""

Configuration = str | Sequence[str] | Recipe | HasRecipe | Homes
"""llama-server's flags, a plan or recipe, or type and device of every tensor."""


@dataclass(frozen=True)
class Resolved:
    """A configuration in the cost models' terms.

    Attributes:
        inventory: The model in the types that it has then.
        launch: Workload and flags.
        placement: Where layers and tensors are.
    """

    inventory: Inventory
    launch: Launch
    placement: Placement


def resolve(
    inventory: Inventory,
    configuration: Configuration,
    machine: Machine,
    workload: Workload | None = None,
    *,
    engine: Runtime = "llama.cpp",
    engine_date: datetime.date | None = None,
    llama_cpp_build: int = NEWEST_KNOWN_BUILD,
) -> Resolved:
    """Works out types, placement and workload of a configuration; see `quantplan.predict`.

    Raises:
        InputError: See `quantplan.predict`.
    """
    recipe = configuration.recipe if isinstance(configuration, HasRecipe) else configuration
    build = llama_cpp_build
    flags: str | Sequence[str]
    if isinstance(recipe, Recipe):
        made_for = recipe.provenance.workload
        build = made_for.llama_cpp_build if made_for else build
        types = {t.tensor: t.qtype for t in recipe.tensors}
        inventory, flags = _in_types(inventory, types), recipe.flags
    else:
        homes = _as_homes(recipe)
        if homes is not None:
            if engine != "llama.cpp":
                raise InputError(f"devices of tensors are for llama.cpp; give flags for {engine}")
            return _with_homes(inventory, homes, machine, workload)
        flags = recipe if isinstance(recipe, str) else [a for a in recipe if isinstance(a, str)]
    if workload is not None:
        raise InputError("the flags state the workload already; leave the workload out")
    launch = parse_flags(
        flags, inventory, engine=engine, engine_date=engine_date, llama_cpp_build=build
    )
    loads_nextn = launch.ik is None and launch.predicts_tokens
    if loads_nextn:
        loads_nextn = loads_prediction_weights(inventory.architecture, launch.workload)
    placement = place(inventory, machine, launch, loads_nextn=loads_nextn)
    return Resolved(inventory, launch, placement)


def _as_homes(
    configuration: str | Sequence[str] | Homes,
) -> Mapping[str, tuple[str, str | None]] | None:
    """Type and device by tensor name; None where the configuration is flags."""
    if isinstance(configuration, Mapping):
        return configuration
    assignments = [a for a in configuration if isinstance(a, Assignment)]
    return {a.tensor: (a.qtype, a.device) for a in assignments} or None


def _with_homes(
    inventory: Inventory,
    homes: Mapping[str, tuple[str, str | None]],
    machine: Machine,
    workload: Workload | None,
) -> Resolved:
    written = _in_types(inventory, {name: qtype for name, (qtype, _) in homes.items()})
    devices = {name: device for name, (_, device) in homes.items() if device is not None}
    launch = Launch(workload=workload or Workload())
    return Resolved(written, launch, place_tensors(written, machine, devices))


def _in_types(inventory: Inventory, types: Mapping[str, str]) -> Inventory:
    """The model in other types.

    Raises:
        InputError: A tensor or a type is unknown, or a type does not fit a row. All are gathered.
    """
    faults = []
    for name, wanted in types.items():
        tensor = inventory.by_name.get(name)
        if tensor is None:
            hint = similar_tensors(name, inventory.by_name)
            faults.append(f"{inventory.name} has no tensor {name!r}{hint}")
        elif wanted.upper() not in QTYPES:
            faults.append(f"{name}: there is no type {wanted!r}{similar(wanted, QTYPES)}")
        elif fault := QTYPES[wanted.upper()].row_fault(tensor.shape_ne[0]):
            faults.append(f"{name}: {fault}")
    if faults:
        raise InputError(faults)
    return inventory.with_qtypes({name: wanted.upper() for name, wanted in types.items()})
