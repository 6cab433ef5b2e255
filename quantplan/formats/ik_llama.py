"""ik_llama.cpp's own words: ``--custom-q`` and its llama-server's flags.

``--custom-q`` is split at every ``,`` and then at the first ``=``; it is matched before row
fallbacks apply, and ignored beside ``--pure``. Its ``-ngl`` counts the output layer last of all,
llama.cpp's first.
"""

from collections.abc import Mapping, Sequence

from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import options
from quantplan.formats.rules import IK_QUANTIZE, split_rules, write_rules

_DROPPED = {"--fit", "-kvu", "--swa-full"}


def custom_q(qtype_by_name: Mapping[str, str]) -> str:
    """The value of ``llama-quantize --custom-q``; it has no effect with ``--pure``.

    Args:
        qtype_by_name: Type of every matrix, by full name; those that a quantizer leaves alone too,
            since its list of them is shorter than llama.cpp's.

    Raises:
        RecipeError: ik_llama.cpp has no such type, or a name has characters that cannot be matched.
    """
    rules = write_rules(qtype_by_name, IK_QUANTIZE)
    return ",".join(f"{pattern}={qtype}" for pattern, qtype in rules)


def read_custom_q(text: str) -> list[tuple[str, str]]:
    """The rules of ``--custom-q``, or of a list that is kept for it: lines, with ``#`` comments.

    Raises:
        RecipeError: Something is no rule; a pattern holds no ``,`` and no ``=``.
    """
    lines = (line.partition("#")[0] for line in text.splitlines())
    words = (word.strip() for line in lines for word in line.split(","))
    return split_rules(word for word in words if word)


def ik_flags(
    flags: Sequence[str], *, n_layers: int, has_output: bool, backend: str = "CUDA"
) -> list[str]:
    """llama.cpp's placement flags as ik_llama.cpp takes them.

    Where front layers are in RAM, one layer fewer is counted and ``-ot`` puts the output layer on
    the last GPU.

    Args:
        flags: Flags that quantplan writes for llama.cpp.
        n_layers: ``block_count`` of the model.
        has_output: Whether the output matrix is a tensor of its own.
        backend: What ``-ot`` calls the GPUs, without their number.

    Raises:
        RecipeError: ik_llama.cpp cannot do it: slots with KV caches of their own; front layers in
            RAM, but the output on a GPU where it is the embedding.
    """
    found = {flag: list(values) for flag, *values in options(flags)}
    if "-no-kvu" in found:
        raise RecipeError("ik_llama.cpp has one KV cache for all slots; plan with kv_unified")
    for flag in _DROPPED:
        found.pop(flag, None)
    if found.pop("-lm", None) == ["none"]:
        found["--no-mmap"] = []
    n_gpu = int(found.get("-ngl", ["0"])[0])
    if 0 < n_gpu <= n_layers:
        if not has_output:
            raise RecipeError(
                "ik_llama.cpp keeps a tied output matrix in RAM unless all layers are on GPUs"
            )
        _count_output_apart(found, n_gpu, backend)
    return [word for flag, values in found.items() for word in (flag, *values)]


def _count_output_apart(found: dict[str, list[str]], n_gpu: int, backend: str) -> None:
    """Takes the output layer out of the counts, and puts it where they had it."""
    gpu = 0
    found["-ngl"] = [str(n_gpu - 1)]
    if "-ts" in found:
        counts = [int(count) for count in found["-ts"][0].split(",")]
        gpu = max(index for index, count in enumerate(counts) if count)
        counts[gpu] -= 1
        found["-ts"] = [",".join(map(str, counts))]
    output = rf"^output(_norm)?\.weight$={backend}{gpu}"
    found["-ot"] = [",".join([*found.get("-ot", []), output])]
