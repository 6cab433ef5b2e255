"""llama.cpp's own words: placement flags and the quantizer's tensor-type file.

What the flags do was established by running llama.cpp b10434 and b11434: ``-ot`` is split at every
``,`` and then at the first ``=``, searched unanchored, first match wins; the KV cache follows
``-ngl`` and ``-ts``, never ``-ot``; ``-ngl`` counts every layer (next-token-prediction blocks too)
and the output layer, from the back.
"""

import re
import shlex
from collections.abc import Mapping, Sequence

from quantplan.errors import RecipeError
from quantplan.formats.regex import names_patterns, rules_by_value
from quantplan.placement import MAX_OVERRIDES
from quantplan.workload import Workload

_MATCHABLE = re.compile(r"[a-z0-9_.-]+")


def tensor_type_file(qtype_by_name: Mapping[str, str]) -> str:
    r"""Text for ``llama-quantize --tensor-type-file``: one ``pattern=type`` a line.

    llama-quantize lower-cases patterns (so ``\D`` would turn into ``\d``) and takes no comments.
    It must be called with ``--pure``: without, tensors that no pattern names follow the base mix.

    Args:
        qtype_by_name: Type of every quantizable tensor, by full name.

    Raises:
        RecipeError: A name has other characters than small letters, digits, ``_``, ``.`` and ``-``.
    """
    odd = [n for n in qtype_by_name if not _MATCHABLE.fullmatch(n)]
    if odd:
        raise RecipeError(f"llama-quantize cannot match the tensor name {name!r}" for name in odd)
    rules = rules_by_value({n: q.lower() for n, q in qtype_by_name.items()})
    return "".join(f"{pattern}={qtype}\n" for pattern, qtype in rules)


def placement_flags(
    *,
    n_layers: int,
    layer_devices: Sequence[str],
    output_device: str,
    gpu_names: Sequence[str],
    on_cpu: Sequence[str],
) -> list[str]:
    """Flags that put layers on devices, and single tensors of GPU layers into RAM.

    Args:
        n_layers: ``block_count``, next-token-prediction blocks included.
        layer_devices: Device of each loaded layer; a run of ``CPU``, then GPUs in order.
        output_device: Device of the output matrix.
        gpu_names: All GPUs of the machine, in order.
        on_cpu: Names of the tensors to keep in RAM although their layer is on a GPU.

    Raises:
        RecipeError: llama.cpp cannot express it: more than 4095 overrides.
    """
    if output_device == "CPU":
        return ["-ngl", "0"]
    n_cpu_layers = sum(device == "CPU" for device in layer_devices)
    flags = ["-ngl", str(n_layers + 1 - n_cpu_layers)]
    if len(gpu_names) > 1:
        counts = [sum(device == gpu for device in layer_devices) for gpu in gpu_names]
        # The skipped next-token-prediction blocks and the output layer come last.
        counts[gpu_names.index(output_device)] += n_layers - len(layer_devices) + 1
        flags += ["-sm", "layer", "-ts", ",".join(map(str, counts))]
    overrides = names_patterns(on_cpu)
    if len(overrides) > MAX_OVERRIDES:
        raise RecipeError(
            f"the placement needs {len(overrides)} -ot patterns, llama.cpp takes {MAX_OVERRIDES}"
        )
    if overrides:
        flags += ["-ot", ",".join(f"{pattern}=CPU" for pattern in overrides)]
    return flags


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
