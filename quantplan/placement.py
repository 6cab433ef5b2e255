"""Where llama.cpp puts layers and tensors, given its placement flags.

Rules of llama.cpp b10434 to b11434: ``-ngl`` counts every layer and the output layer, from the
back; ``-ts`` shares the counted layers out by cumulative proportions; ``-ot`` patterns are searched
unanchored in the full tensor name, the first match wins; KV caches follow the layers, never
``-ot``.
"""

import difflib
import re
from dataclasses import dataclass, field

import numpy as np

from quantplan.errors import InputError
from quantplan.hardware import Machine
from quantplan.inventory import Inventory, Tensor
from quantplan.schema import Frozen
from quantplan.workload import Workload

MAX_OVERRIDES = 4095
_CPU_BUFFERS = {"CPU", "CUDA_Host", "Vulkan_Host", "CPU_REPACK"}
_DEVICE_BUFFER = re.compile(r"(?:CUDA|Vulkan|ROCm|SYCL|CANN|MUSA|OpenCL)(\d+)|(Metal)")


class Override(Frozen):
    """One ``-ot`` rule.

    Attributes:
        pattern: ECMAScript regular expression, searched in the tensor name.
        buffer_type: Name of the buffer type to use, such as ``CPU`` or ``CUDA0``.
    """

    pattern: str
    buffer_type: str


class Launch(Frozen):
    """What llama.cpp is told about placement, and the workload.

    Attributes:
        n_gpu_layers: ``-ngl``; None for all.
        overrides: ``-ot`` rules and what ``--cpu-moe`` and its kin stand for, in order.
        tensor_split: ``-ts`` proportions; empty for the memory of each GPU.
        split_mode: ``-sm``: ``layer``, or ``none`` for the main GPU alone.
        main_gpu: ``-mg``.
        op_offload: Whether large batches multiply by weights in RAM on a GPU.
        loads_nextn: Whether next-token-prediction blocks are loaded (``--spec-type draft-mtp``).
        workload: Context, slots, batch and KV types.
        notes: What was given but plays no part in the prediction.
    """

    n_gpu_layers: int | None = None
    overrides: tuple[Override, ...] = ()
    tensor_split: tuple[float, ...] = ()
    split_mode: str = "layer"
    main_gpu: int = 0
    op_offload: bool = True
    loads_nextn: bool = False
    workload: Workload
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where everything is.

    Attributes:
        layers: Device name of each layer, next-token-prediction blocks included.
        output: Device name of the output layer.
        tensors: Device names of each loaded tensor; a tied embedding may be on two.
        warnings: Overrides that do not do what they seem to say.
    """

    layers: tuple[str, ...]
    output: str
    tensors: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...] = field(default=())


def place(inventory: Inventory, machine: Machine, launch: Launch) -> Placement:
    """Places every layer and tensor as llama.cpp does.

    Raises:
        InputError: More than 4095 overrides, a pattern that is no regular expression, an unknown
            buffer type, or more proportions than GPUs. All faults are gathered.
    """
    devices = _layer_devices(inventory, machine, launch)
    layers, output = devices[:-1], devices[-1]
    rules = _compiled(machine, launch)
    won: list[list[str]] = [[] for _ in rules]
    hits = [0] * len(rules)
    tensors: dict[str, tuple[str, ...]] = {}
    for tensor in inventory.tensors:
        if not (inventory.is_loaded(tensor) or launch.loads_nextn):
            continue
        matching = [index for index, (regex, _) in enumerate(rules) if regex.search(tensor.name)]
        for index in matching:
            hits[index] += 1
        if matching:
            won[matching[0]].append(tensor.name)
            tensors[tensor.name] = (rules[matching[0]][1],)
        else:
            tensors[tensor.name] = _homes(inventory, tensor, layers, output)
    return Placement(layers, output, tensors, _warnings(inventory, launch, won, hits))


def _layer_devices(inventory: Inventory, machine: Machine, launch: Launch) -> tuple[str, ...]:
    """Device of every layer and, last, of the output layer."""
    n_all = inventory.architecture.n_layers + 1
    wanted = n_all if launch.n_gpu_layers is None else launch.n_gpu_layers
    n_gpu = min(max(wanted, 0), n_all) if machine.gpus else 0
    ram = machine.ram.name
    if launch.split_mode == "none" and n_gpu:
        if launch.main_gpu >= len(machine.gpus):
            raise InputError(f"-mg {launch.main_gpu}: there are {len(machine.gpus)} GPUs, from 0")
        return (ram,) * (n_all - n_gpu) + (machine.gpus[launch.main_gpu].name,) * n_gpu
    if len(launch.tensor_split) > max(1, len(machine.gpus)):
        raise InputError(
            f"-ts has {len(launch.tensor_split)} proportions for {len(machine.gpus)} GPUs"
        )
    shares = launch.tensor_split or tuple(float(g.capacity_bytes) for g in machine.gpus)
    # In single precision, as there, so that a layer on a boundary lands on the same side.
    ends = np.cumsum(np.array(shares, dtype=np.float32), dtype=np.float32)
    if len(ends) and not ends[-1] > 0:
        raise InputError(f"-ts {launch.tensor_split} has no proportion above 0")
    ends = ends / ends[-1] if len(ends) else ends
    names = [ram] * (n_all - n_gpu)
    for index in range(n_gpu):
        position = np.float32(index) / np.float32(n_gpu)
        gpu = min(int(np.searchsorted(ends, position, side="right")), len(ends) - 1)
        names.append(machine.gpus[gpu].name)
    return tuple(names)


def _homes(
    inventory: Inventory, tensor: Tensor, layers: tuple[str, ...], output: str
) -> tuple[str, ...]:
    """Devices of a tensor that no override names."""
    if tensor.role_class == "embedding":
        is_tied = inventory.has_tied_output and tensor.role == "token_embd"
        is_copied = output != "CPU" or inventory.architecture.always_copies_tied_output
        return ("CPU", output) if is_tied and is_copied else ("CPU",)
    return (output,) if tensor.layer is None else (layers[tensor.layer],)


def _compiled(machine: Machine, launch: Launch) -> list[tuple[re.Pattern[str], str]]:
    faults = []
    if len(launch.overrides) > MAX_OVERRIDES:
        faults.append(
            f"{len(launch.overrides)} overrides: llama.cpp stops above {MAX_OVERRIDES}; join "
            "patterns with |"
        )
    rules = []
    for override in launch.overrides:
        try:
            rules.append((re.compile(override.pattern), _device(machine, override.buffer_type)))
        except re.error as error:
            faults.append(f"-ot {override.pattern!r} is no regular expression: {error}")
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    return rules


def _device(machine: Machine, buffer_type: str) -> str:
    """The device whose memory a buffer type is in."""
    if buffer_type in _CPU_BUFFERS:
        return machine.ram.name
    match = _DEVICE_BUFFER.fullmatch(buffer_type)
    index = int(match[1] or 0) if match else None
    if buffer_type.startswith("GPU") and buffer_type[3:].isdigit():
        index = int(buffer_type[3:])
    if index is None:
        raise InputError(f"-ot: unknown buffer type {buffer_type!r}; use CPU, CUDA0, Vulkan0, ...")
    if index >= len(machine.gpus):
        raise InputError(f"-ot: {buffer_type} is not among the {len(machine.gpus)} GPUs")
    return machine.gpus[index].name


def _warnings(
    inventory: Inventory, launch: Launch, won_by_rule: list[list[str]], hits: list[int]
) -> tuple[str, ...]:
    """Says which rules match nothing, come too late, or match what they hardly mean.

    Args:
        inventory: The model.
        launch: The rules.
        won_by_rule: Names of the tensors that each rule decides.
        hits: How many tensors each rule matches.
    """
    warnings = []
    names = [tensor.name for tensor in inventory.tensors]
    outside = {tensor.role for tensor in inventory.tensors if tensor.layer is None}
    for override, won, n_hits in zip(launch.overrides, won_by_rule, hits, strict=True):
        rule = f"-ot {override.pattern}={override.buffer_type}"
        if not n_hits:
            literal = re.sub(r"[\\^$()|\[\]*+?]", "", override.pattern)
            near = difflib.get_close_matches(literal, names, n=3, cutoff=0.4)
            hint = f"; similar names are {', '.join(near)}" if near else ""
            warnings.append(f"{rule} matches no tensor{hint}")
        elif not won:
            warnings.append(f"{rule} has no effect: earlier rules take all {n_hits} matches")
        stem = override.pattern.removesuffix(r"\.weight").removesuffix(".weight")
        in_layers = [name for name in won if name.startswith("blk.")]
        if stem in outside and in_layers:
            warnings.append(
                f"{rule} also matches {len(in_layers)} tensors such as {in_layers[0]}; write "
                f"^{stem}\\.weight$ for the one outside the layers"
            )
    return tuple(warnings)
