"""Where llama.cpp puts layers and tensors, given its placement flags.

Rules of llama.cpp b10434 to b11434: ``-ngl`` counts every layer and the output layer, from the
back; ``-ts`` shares the counted layers out by cumulative proportions; ``-ot`` patterns are searched
unanchored in the full tensor name, the first match wins; KV caches follow the layers, never
``-ot``. In ik_llama.cpp ``-ngl`` counts the output layer last instead of first.
"""

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quantplan.costs.host import copies_tied_output
from quantplan.errors import InputError
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, Tensor
from quantplan.llama_cpp import GPU_BUFFERS
from quantplan.near import similar_tensors
from quantplan.schema import Frozen
from quantplan.workload import Workload

MAX_OVERRIDES = 4095
# Tensors that a message names.
_NAMED = 3
_CPU_BUFFERS = {"CPU", "CUDA_Host", "Vulkan_Host", "CPU_REPACK"}
_REMOTE_BUFFER = re.compile(r"RPC(\d*)\[(.+)\]")
_DEVICE_BUFFER = re.compile(rf"(?:{GPU_BUFFERS})(\d+)|Metal")


class Override(Frozen):
    """One ``-ot`` rule.

    Attributes:
        pattern: ECMAScript regular expression, searched in the tensor name.
        buffer_type: Name of the buffer type to use, such as ``CPU`` or ``CUDA0``.
        flag: The flag that stands for this rule and perhaps others, such as ``-ncmoe 4``; empty
            for ``-ot`` itself.
    """

    pattern: str
    buffer_type: str
    flag: str = ""


class IkOptions(Frozen):
    """What only ik_llama.cpp has.

    Attributes:
        as_of: Day of the sources that it was built from; it has no releases by number.
        mla: ``-mla``: how latent attention is stored and computed.
        swa_compress: ``--swa-compress``: sliding windows at their own length.
        attention_max_mib: ``-amb``: largest piece of attention to expand at one time; 0 for all.
        fused_experts: ``-fmoe``: up and gate experts in one step.
        repacks_rows: ``-rtr``: weights in RAM are held in rows that only the CPU can read.
    """

    as_of: datetime.date = datetime.date.max
    mla: int = 3
    swa_compress: bool = False
    attention_max_mib: int = 0
    fused_experts: bool = True
    repacks_rows: bool = False


class Launch(Frozen):
    """What llama.cpp is told about placement, and the workload.

    Attributes:
        n_gpu_layers: ``-ngl``; None for all.
        overrides: ``-ot`` rules and what ``--cpu-moe`` and its kin stand for, in order.
        tensor_split: ``-ts`` proportions; empty for the memory of each GPU.
        split_mode: ``-sm``: ``layer``, or ``none`` for the main GPU alone.
        main_gpu: ``-mg``.
        endpoints: ``--rpc``: addresses of the servers that lend devices.
        cache_on_gpu: Whether KV caches follow the layers; else all are in RAM (``-nkvo``).
        op_offload: Whether large batches multiply by weights in RAM on a GPU.
        maps_file: Whether weights in RAM stay in the mapped file.
        repacks: Whether the CPU may hold matrices in another layout (``--repack``).
        embeds: Whether every token of a batch has an output (``--embedding``, ``--reranking``).
        prompt_cache_mib: ``-cram``: most RAM in MiB for earlier prompts; below 0 without a limit.
        predicts_tokens: Multi-token prediction (``--spec-type draft-mtp``).
        draft_tokens: ``--spec-draft-n-max``: tokens that are drafted at a time.
        draft: How a draft model, or multi-token prediction's draft context, is started.
        draft_model: ``-md``: path of the draft model; empty without.
        projector: ``-mm``: path of the multimodal projector; empty without.
        projector_on_gpu: Whether the projector is on the first GPU.
        ik: Options of ik_llama.cpp; None where llama.cpp runs.
        workload: Context, slots, batch and KV types.
        warnings: Flags that do not do what they seem to say.
        notes: What was given but plays no part in the prediction.
    """

    n_gpu_layers: int | None = None
    overrides: tuple[Override, ...] = ()
    tensor_split: tuple[float, ...] = ()
    split_mode: str = "layer"
    main_gpu: int = 0
    endpoints: tuple[str, ...] = ()
    cache_on_gpu: bool = True
    op_offload: bool = True
    maps_file: bool = False
    repacks: bool = True
    embeds: bool = False
    prompt_cache_mib: int = 0
    predicts_tokens: bool = False
    draft_tokens: int = 3
    draft: "Launch | None" = None
    draft_model: str = ""
    projector: str = ""
    projector_on_gpu: bool = True
    ik: IkOptions | None = None
    workload: Workload
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where everything is.

    Attributes:
        layers: Device name of each layer, next-token-prediction blocks included.
        output: Device name of the output layer.
        caches: Device name of each layer's KV cache and recurrent state.
        tensors: Device names of each loaded tensor; a tied embedding may be on two.
        warnings: Overrides that do not do what they seem to say.
        is_overridden: Whether tensors are elsewhere than their layer.
    """

    layers: tuple[str, ...]
    output: str
    caches: tuple[str, ...]
    tensors: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...] = field(default=())
    is_overridden: bool = False


def place(
    inventory: Inventory, machine: Machine, launch: Launch, *, loads_nextn: bool = False
) -> Placement:
    """Places every layer and tensor as llama.cpp does.

    Args:
        inventory: The model.
        machine: The devices.
        launch: The flags.
        loads_nextn: Whether next-token-prediction blocks are loaded too.

    Raises:
        InputError: More than 4095 overrides, a pattern that is no regular expression, an unknown
            buffer type, or more proportions than GPUs. All faults are gathered.
    """
    devices = layer_devices(inventory, machine, launch)
    layers, output = devices[:-1], devices[-1]
    rules = _compiled(machine, launch)
    repacks = launch.repacks and not machine.gpus
    won: list[list[str]] = [[] for _ in rules]
    hits = [0] * len(rules)
    tensors: dict[str, tuple[str, ...]] = {}
    for tensor in inventory.tensors:
        if not (inventory.is_loaded(tensor) or loads_nextn):
            continue
        matching = [index for index, (regex, _) in enumerate(rules) if regex.search(tensor.name)]
        for index in matching:
            hits[index] += 1
        if matching:
            won[matching[0]].append(tensor.name)
            # Rules apply to the copy that some architectures make of a tied embedding, too.
            is_copied = (
                tensor.role == "token_embd"
                and inventory.has_tied_output
                and inventory.architecture.always_copies_tied_output
            )
            tensors[tensor.name] = (rules[matching[0]][1],) * (2 if is_copied else 1)
        else:
            tensors[tensor.name] = _homes(inventory, tensor, layers, output, repacks=repacks)
    caches = layers if launch.cache_on_gpu else (machine.ram.name,) * len(layers)
    warnings = _warnings(inventory, launch, won, hits)
    on_gpus = sum(homes != (machine.ram.name,) for homes in tensors.values())
    if launch.overrides and on_gpus and set(devices) == {machine.ram.name}:
        warnings += (
            f"no layer is on a GPU (-ngl {launch.n_gpu_layers}), so KV caches are in RAM although "
            f"-ot puts {on_gpus} tensors on a GPU; raise -ngl, and keep tensors in RAM with -ot",
        )
    return Placement(layers, output, caches, tensors, warnings, bool(launch.overrides))


def place_tensors(inventory: Inventory, machine: Machine, homes: Mapping[str, str]) -> Placement:
    """The placement in which every tensor is where it is told.

    A layer, with its KV cache, is where its attention is (or its recurrent part, or its first
    tensor); the output layer where the output matrix is (or the output norm, of a tied model).

    Args:
        inventory: The model.
        machine: The devices.
        homes: Device name by tensor name; tensors that are not loaded may be left out.

    Raises:
        InputError: A tensor or a device is unknown, or a loaded tensor has no device. All faults
            are gathered.
    """
    _check_homes(inventory, machine, homes)
    given = [tensor for tensor in inventory.tensors if tensor.name in homes]
    layers = [""] * inventory.architecture.n_layers
    for mixers in (True, False):
        for tensor in given:
            is_mixer = tensor.role_class in ("attention", "recurrent")
            if tensor.layer is not None and not layers[tensor.layer] and is_mixer >= mixers:
                layers[tensor.layer] = homes[tensor.name]
    outside = {tensor.role: homes[tensor.name] for tensor in given if tensor.layer is None}
    output = outside.get("output") or outside.get("output_norm") or layers[-1] or machine.ram.name
    layers = [device or output for device in layers]
    usual = {
        tensor.name: _homes(inventory, tensor, tuple(layers), output, repacks=not machine.gpus)
        for tensor in given
    }
    tensors = {
        tensor.name: usual[tensor.name]
        if tensor.role_class == "embedding" and homes[tensor.name] == machine.ram.name
        else (homes[tensor.name],)
        for tensor in given
    }
    is_overridden = tensors != usual
    return Placement(tuple(layers), output, tuple(layers), tensors, is_overridden=is_overridden)


def _check_homes(inventory: Inventory, machine: Machine, homes: Mapping[str, str]) -> None:
    faults = []
    names = inventory.by_name
    for unknown in [name for name in homes if name not in names][:_NAMED]:
        faults.append(
            f"{inventory.name} has no tensor {unknown!r}{similar_tensors(unknown, names)}"
        )
    devices = [device.name for device in machine.devices]
    faults += [
        f"{device!r} is no device of the machine, which has {', '.join(devices)}"
        for device in dict.fromkeys(homes.values())
        if device not in devices
    ]
    missing = [t.name for t in inventory.tensors if inventory.is_loaded(t) and t.name not in homes]
    if missing:
        faults.append(f"{len(missing)} tensors have no device: {', '.join(missing[:_NAMED])}, ...")
    if faults:
        raise InputError(faults)


def layer_devices(inventory: Inventory, machine: Machine, launch: Launch) -> tuple[str, ...]:
    """Device of every layer and, last, of the output layer."""
    n_all = inventory.architecture.n_layers + 1
    wanted = n_all if launch.n_gpu_layers is None else launch.n_gpu_layers
    n_gpu = min(max(wanted, 0), n_all) if machine.gpus else 0
    front, back = n_all - n_gpu, 0
    if launch.ik is not None and front:
        front, back = front - 1, 1
    ram = (machine.ram.name,)
    return ram * front + _gpus_of_layers(machine, launch, n_gpu) + ram * back


def _gpus_of_layers(machine: Machine, launch: Launch, n_gpu: int) -> tuple[str, ...]:
    """GPU of each layer that is on one; the output layer counts as one."""
    if launch.split_mode == "none" and n_gpu:
        if not 0 <= launch.main_gpu < len(machine.gpus):
            raise InputError(f"-mg {launch.main_gpu}: there are {len(machine.gpus)} GPUs, from 0")
        return (machine.gpus[launch.main_gpu].name,) * n_gpu
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
    names = []
    for index in range(n_gpu):
        position = np.float32(index) / np.float32(n_gpu)
        gpu = min(int(np.searchsorted(ends, position, side="right")), len(ends) - 1)
        names.append(machine.gpus[gpu].name)
    return tuple(names)


def _homes(
    inventory: Inventory, tensor: Tensor, layers: tuple[str, ...], output: str, *, repacks: bool
) -> tuple[str, ...]:
    """Devices of a tensor that no override names."""
    if tensor.role_class == "embedding":
        is_tied = inventory.has_tied_output and tensor.role == "token_embd"
        is_copied = is_tied and copies_tied_output(
            inventory.architecture, tensor, tensor.qtype, on_gpu=output != "CPU", repacks=repacks
        )
        return ("CPU", output) if is_copied else ("CPU",)
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
    if remote := _REMOTE_BUFFER.fullmatch(buffer_type):
        gpus = [g for g in machine.gpus if g.network and g.network.endpoint == remote[2]]
        index = int(remote[1] or 0)
    elif local := _DEVICE_BUFFER.fullmatch(buffer_type):
        gpus, index = [g for g in machine.gpus if g.network is None], int(local[1] or 0)
    elif buffer_type.startswith("GPU") and buffer_type[3:].isdigit():
        gpus, index = list(machine.gpus), int(buffer_type[3:])
    else:
        raise InputError(f"-ot: unknown buffer type {buffer_type!r}; use CPU, CUDA0, Vulkan0, ...")
    if index >= len(gpus):
        raise InputError(f"-ot: {buffer_type} is not among the {len(machine.gpus)} GPUs")
    return gpus[index].name


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
    for flag in dict.fromkeys(override.flag for override in launch.overrides if override.flag):
        rules = [i for i, override in enumerate(launch.overrides) if override.flag == flag]
        n_hits = sum(hits[rule] for rule in rules)
        if not n_hits:
            warnings.append(f"{flag} matches no tensor of this model")
        elif not any(won_by_rule[rule] for rule in rules):
            warnings.append(f"{flag} has no effect: earlier rules take all {n_hits} matches")
    for override, won, n_hits in zip(launch.overrides, won_by_rule, hits, strict=True):
        if override.flag:
            continue
        rule = f"-ot {override.pattern}={override.buffer_type}"
        if not n_hits:
            hint = similar_tensors(override.pattern, names)
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
