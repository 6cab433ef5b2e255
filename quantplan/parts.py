"""What is in memory together: the model, a draft of its next tokens, a draft model, a projector."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantplan.configuration import Resolved
from quantplan.costs import memory
from quantplan.costs.ik_caches import ik_cache_bytes
from quantplan.errors import SourceError
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Architecture, Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.placement import Launch, Placement, place
from quantplan.units import gib

# Architectures whose draft context was not seen in a build that mended those of others.
_UNSEEN_PREDICTION = {"bailingmoe2", "exaone-moe", "exaone4", "glm4"}


@dataclass(frozen=True)
class Part:
    """One of them.

    Attributes:
        inventory: Its tensors.
        placement: Where tensors and caches are.
        cache_bytes: KV cache and recurrent state of each layer.
    """

    inventory: Inventory
    placement: Placement
    cache_bytes: tuple[int, ...]

    def weights_on(self, device: Device) -> tuple[int, int]:
        """Bytes of the weights on a device, and of their padding."""
        weights = padding = 0
        for name, homes in self.placement.tensors.items():
            tensor = self.inventory.by_name[name]
            copies = homes.count(device.name)
            weights += copies * memory.weight_bytes(tensor, tensor.qtype)
            if device.kind == "gpu":
                padding += copies * memory.cuda_padding_bytes(tensor, tensor.qtype)
        return weights, padding

    def caches_on(self, device: Device) -> int:
        """Bytes of the KV caches and recurrent states on a device."""
        pairs = zip(self.cache_bytes, self.placement.caches, strict=True)
        return sum(n_bytes for n_bytes, home in pairs if home == device.name)


def all_parts(
    resolved: Resolved,
    machine: Machine,
    draft: Inventory | None = None,
    projector: Inventory | None = None,
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The model first, then what comes with it, and notes about what is not counted.

    Args:
        resolved: The model and how it is run.
        machine: The devices.
        draft: The draft model; by default read from ``-md`` where that file is here.
        projector: The multimodal projector; by default read from ``-mm``.
    """
    launch, placement = resolved.launch, resolved.placement
    caches = _cache_bytes(resolved.inventory.architecture, launch)
    parts = [Part(resolved.inventory, placement, caches)]
    notes: list[str] = []
    if launch.predicts_tokens:
        parts += _prediction_parts(resolved, notes)
    drafted = draft or _read("-md", launch.draft_model, notes)
    if drafted is not None:
        draft_launch = launch.draft or launch
        caches = _cache_bytes(drafted.architecture, draft_launch)
        parts.append(Part(drafted, place(drafted, machine, draft_launch), caches))
        notes.append(_counted("the draft model", parts[-1]))
        if drafted.architecture.n_nextn:
            notes.append("the draft model's own multi-token prediction is not counted")
    projected = projector or _read("--mmproj", launch.projector, notes)
    if projected is not None:
        gpus = machine.gpus if launch.projector_on_gpu else ()
        home = (gpus[0] if gpus else machine.ram).name
        tensors: dict[str, tuple[str, ...]] = {t.name: (home,) for t in projected.tensors}
        parts.append(Part(projected, Placement((), home, (), tensors), ()))
        notes.append(_counted("the projector", parts[-1]))
    return tuple(parts), tuple(notes)


def _cache_bytes(architecture: Architecture, launch: Launch) -> tuple[int, ...]:
    if launch.ik is None:
        return memory.cache_bytes(architecture, launch.workload)
    return ik_cache_bytes(architecture, launch.workload, launch.ik)


def _prediction_parts(resolved: Resolved, notes: list[str]) -> Sequence[Part]:
    """The draft context of multi-token prediction, whose weights are among the model's."""
    inventory, launch = resolved.inventory, resolved.launch
    arch = inventory.architecture
    if launch.draft is None or not arch.n_nextn:
        notes.append("--spec-type draft-mtp: the model has no blocks for multi-token prediction")
        return ()
    if launch.ik is not None:
        notes.append("multi-token prediction is not counted for ik_llama.cpp")
        return ()
    if arch.name in _UNSEEN_PREDICTION and launch.workload.llama_cpp_build > memory.CHECKED_BUILD:
        notes.append(
            f"multi-token prediction of {arch.name} is counted as one cached layer per block; "
            f"builds after b{memory.CHECKED_BUILD} were not seen to do so"
        )
    notes.append("compute buffers of multi-token prediction are not counted")
    caches = memory.prediction_cache_bytes(arch, launch.draft.workload)
    # To step back, recurrent layers of the model keep a state for each token that is drafted.
    states = (launch.draft_tokens * memory.state_bytes(c, launch.workload) for c in arch.caches)
    added = tuple(map(sum, zip(caches, states, strict=True)))
    return (Part(inventory, replace(resolved.placement, tensors={}), added),)


def _read(flag: str, path: str, notes: list[str]) -> Inventory | None:
    if not path:
        return None
    try:
        return read_inventory(path)
    except SourceError as error:
        notes.append(f"{flag} is not counted: {error}")
        return None


def _counted(what: str, part: Part) -> str:
    weights = sum(
        len(homes) * memory.weight_bytes(tensor, tensor.qtype)
        for name, homes in part.placement.tensors.items()
        for tensor in [part.inventory.by_name[name]]
    )
    caches = f" and {gib(sum(part.cache_bytes))} of KV cache" if part.cache_bytes else ""
    return (
        f"{what} adds {gib(weights)} of weights{caches} to the devices above; its compute buffers "
        "are not counted"
    )
