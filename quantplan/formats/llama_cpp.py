"""llama.cpp's own words: placement flags, command lines, and the quantizer's tensor-type file.

What the flags do was established by running llama.cpp b10434 and b11434: ``-ot`` is split at every
``,`` and then at the first ``=``, searched unanchored, first match wins; the KV cache follows
``-ngl`` and ``-ts``, never ``-ot``; ``-ngl`` counts every layer (next-token-prediction blocks too)
and the output layer, from the back.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from quantplan.errors import InputError, RecipeError
from quantplan.formats.regex import names_patterns
from quantplan.formats.rules import LLAMA_QUANTIZE, split_rules, write_rules
from quantplan.hardware.machine import Machine
from quantplan.llama_cpp import BACKENDS, COMMON_BACKEND
from quantplan.placement import MAX_OVERRIDES
from quantplan.workload import Workload

BASE_FTYPE = "Q8_0"
"""What llama-quantize is asked for; with F16, F32 or COPY it would ignore all types of tensors."""

YOUNG_FLAGS = ("-lm", "--fit", "-kvu", "-no-kvu", "-fa")
"""Flags of plans that older builds lack, or that took no value there."""

_SERVER_ONLY = {"-np", "-kvu", "-no-kvu"}


def tensor_type_file(qtype_by_name: Mapping[str, str]) -> str:
    """Text for ``llama-quantize --tensor-type-file``: one ``pattern=type`` a line.

    llama-quantize takes no comments. It must be called with ``--pure``: types of tensors that are
    named change those of the others otherwise.

    Args:
        qtype_by_name: Type of every quantizable tensor, by full name.

    Raises:
        RecipeError: llama-quantize has no such type, or a name has other characters than small
            letters, digits, ``_``, ``.`` and ``-``.
    """
    rules = write_rules(qtype_by_name, LLAMA_QUANTIZE)
    return "".join(f"{pattern}={qtype}\n" for pattern, qtype in rules)


def read_tensor_type_file(text: str) -> list[tuple[str, str]]:
    """The rules of a ``--tensor-type-file``: words that white space parts.

    Raises:
        RecipeError: A word is no rule; comments are none, as in llama-quantize.
    """
    return split_rules(text.split())


def quantize_arguments(qtype_by_name: Mapping[str, str]) -> list[str]:
    """Arguments of ``llama-quantize`` that name every type, without a file.

    Raises:
        RecipeError: See `tensor_type_file`.
    """
    rules = write_rules(qtype_by_name, LLAMA_QUANTIZE)
    named = [("--tensor-type", f"{pattern}={qtype}") for pattern, qtype in rules]
    return ["--pure", *(word for pair in named for word in pair)]


def placement_flags(
    *,
    n_layers: int,
    layer_devices: Sequence[str],
    output_device: str,
    buffers: Mapping[str, str],
    moved: Mapping[str, str],
    others: Iterable[str] | None = None,
) -> list[str]:
    """Flags that put layers on devices, and single tensors of GPU layers on others.

    Args:
        n_layers: ``block_count``, next-token-prediction blocks included.
        layer_devices: Device of each loaded layer; a run of ``CPU``, then GPUs in order.
        output_device: Device of the output matrix.
        buffers: What ``-ot`` calls the memory of each device, GPUs in order; see `buffer_types`.
        moved: Device of each tensor that is not on the GPU of its layer.
        others: Names of all other tensors, which no pattern may match; None for any other name.

    Raises:
        RecipeError: llama.cpp cannot express it: more than 4095 overrides.
    """
    if output_device == "CPU":
        return ["-ngl", "0"]
    n_cpu_layers = sum(device == "CPU" for device in layer_devices)
    flags = ["-ngl", str(n_layers + 1 - n_cpu_layers)]
    gpu_names = [name for name in buffers if name != "CPU"]
    if len(gpu_names) > 1:
        counts = [sum(device == gpu for device in layer_devices) for gpu in gpu_names]
        # The skipped next-token-prediction blocks and the output layer come last.
        counts[gpu_names.index(output_device)] += n_layers - len(layer_devices) + 1
        flags += ["-sm", "layer", "-ts", ",".join(map(str, counts))]
    overrides = []
    for device in dict.fromkeys(moved.values()):
        here = [name for name, place in moved.items() if place == device]
        rest = None if others is None else [*others, *(moved.keys() - set(here))]
        overrides += [f"{pattern}={buffers[device]}" for pattern in names_patterns(here, rest)]
    if len(overrides) > MAX_OVERRIDES:
        raise RecipeError(
            f"the placement needs {len(overrides)} -ot patterns, llama.cpp takes {MAX_OVERRIDES}"
        )
    if overrides:
        flags += ["-ot", ",".join(overrides)]
    return flags


def gpu_backend(machine: Machine) -> str:
    """What ``-ot`` calls the GPUs of this host, without their number.

    It is the name in builds for their vendor (``CUDA`` where no vendor is known), and for GPUs of
    several vendors that in Vulkan builds, which use them all.
    """
    vendors = {gpu.vendor for gpu in machine.gpus if gpu.vendor and not gpu.network}
    return COMMON_BACKEND if len(vendors) > 1 else BACKENDS[min(vendors, default="nvidia")]


def buffer_types(machine: Machine) -> dict[str, str]:
    """What ``-ot`` calls the memory of each device, by the device's name; see `gpu_backend`."""
    backend = gpu_backend(machine)
    found = {machine.ram.name: "CPU"}
    servers: Counter[str] = Counter()
    for gpu in machine.gpus:
        endpoint = gpu.network.endpoint if gpu.network else ""
        number = servers[endpoint]
        found[gpu.name] = f"RPC{number}[{endpoint}]" if endpoint else f"{backend}{number}"
        servers[endpoint] += 1
    return found


def rpc_flags(machine: Machine) -> list[str]:
    """Flags that name the servers which lend devices; they come before all others."""
    return ["--rpc", ",".join(machine.endpoints)] if machine.endpoints else []


def workload_flags(workload: Workload) -> list[str]:
    """Flags for everything of the workload that memory depends on.

    ``-lm none`` reads the weights into buffers of exactly the planned size instead of mapping the
    file, and ``--fit off`` keeps llama.cpp from changing the plan.
    """
    flags = ["-c", str(workload.context), "-np", str(workload.slots)]
    if workload.slots > 1:
        flags += ["-kvu" if workload.kv_unified else "-no-kvu"]
    return [
        *flags,
        "-b", str(workload.batch),
        "-ub", str(workload.ubatch),
        "-ctk", workload.kv_type_k,
        "-ctv", workload.kv_type_v,
        "-fa", "on" if workload.flash_attention else "off",
        *(["--swa-full"] if workload.swa_full else []),
        "-lm", "none",
        "--fit", "off",
    ]  # fmt: skip


def server_command(model_path: str, flags: Sequence[str]) -> str:
    """A ``llama-server`` command line for a POSIX shell."""
    return shlex.join(["llama-server", "-m", model_path, *flags])


def command_line(words: Sequence[str]) -> str:
    """A line for a POSIX shell."""
    return shlex.join(words) + "\n"


def cli_flags(flags: Sequence[str]) -> list[str]:
    """Flags of llama-server as llama-cli takes them, which has no slots."""
    return [word for flag, *values in options(flags) if flag not in _SERVER_ONLY
            for word in (flag, *values)]  # fmt: skip


def flag_words(flags: str | Sequence[str]) -> list[str]:
    """The arguments of a command line, without a leading program name.

    Long names are spelt with ``-``, for which llama.cpp takes ``_`` too.

    Raises:
        InputError: A quote is not closed.
    """
    try:
        found = shlex.split(flags) if isinstance(flags, str) else list(flags)
    except ValueError as error:
        raise InputError(f"the flags {flags!r} cannot be read: {error}") from error
    words = found[1:] if found and not found[0].startswith("-") else found
    return [w.replace("_", "-") if w.startswith("--") else w for w in words]


def options(flags: Sequence[str]) -> list[list[str]]:
    """Flags, each with the values that follow it. Negative numbers are values."""
    found: list[list[str]] = []
    for word in flags:
        is_flag = word.startswith("-") and not word[1:].replace(".", "").isdigit()
        if is_flag or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found
