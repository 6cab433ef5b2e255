"""Flags of llama-server in llama-bench's words, and back."""

from collections.abc import Sequence

from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import options

# Flags of llama-server and what llama-bench calls them.
_NAMES = {
    name: names[0]
    for names in (
        ("-rpc", "--rpc"),
        ("-dev", "--device"),
        ("-ngl", "--gpu-layers", "--n-gpu-layers"),
        ("-ncmoe", "--n-cpu-moe"),
        ("-ot", "--override-tensor"),
        ("-ts", "--tensor-split"),
        ("-sm", "--split-mode"),
        ("-mg", "--main-gpu"),
        ("-ctk", "--cache-type-k"),
        ("-ctv", "--cache-type-v"),
        ("-fa", "--flash-attn"),
        ("-t", "--threads"),
        ("-b", "--batch-size"),
        ("-ub", "--ubatch-size"),
        ("-lm", "--load-mode"),
    )
    for name in names
}
# Both join several of these; llama-bench keeps the comma for alternatives.
_JOINS = {"-ot": ";", "-ts": "/", "-dev": "/"}
_ALL_LAYERS = "999"
_VALUES = {
    "-fa": {"on": "1", "auto": "1", "off": "0"},
    "-ngl": {"all": _ALL_LAYERS, "auto": _ALL_LAYERS},
}
# Flags of llama-server that stand alone, and what says the same.
_SWITCHES = {
    **dict.fromkeys(["-nkvo", "--no-kv-offload"], ("-nkvo", "1")),
    **dict.fromkeys(["-nr", "--no-repack"], ("--repack", "0")),
    "--no-op-offload": ("-nopo", "1"),
    "--no-host": ("--no-host", "1"),
    "--no-mmap": ("-mmp", "0"),
    "--mmap": ("-mmp", "1"),
    "--direct-io": ("-dio", "1"),
}
# What stood for -lm before llama-bench knew it.
_LOAD_MODES = {"none": ("-mmp", "0"), "mmap": ("-mmp", "1"), "auto": ("-mmp", "1")}
# llama-bench makes its contexts as long as needed, for one request; it warms up by itself.
_ITS_OWN = {
    *("-c", "--ctx-size", "-np", "--parallel", "-kvu", "--kv-unified", "-no-kvu"),
    *("--no-kv-unified", "--warmup", "--no-warmup", "-fit", "--fit"),
}
# What llama-server does by itself; llama-bench of some builds does not.
_DEFAULTS = {"-fa": "1", "-ngl": _ALL_LAYERS}
# Devices of other hosts must be known before tensors are put on them.
_FIRST = ("-rpc", "-dev")


def bench_flags(flags: Sequence[str], known: frozenset[str] | None = None) -> tuple[str, ...]:
    """Flags of llama-server as llama-bench takes them.

    ``,`` parts test cases there, so that overrides are joined by ``;`` and proportions by ``/``.
    Context and slots are left out: llama-bench sets them for each test.

    Args:
        flags: The flags.
        known: Those that llama-bench's help names; all that some llama-bench has by default.

    Raises:
        RecipeError: It has no words for some of the flags; all are named.
    """
    found: dict[str, str] = {}
    lost = []
    for flag, *values in options(flags):
        if flag in _ITS_OWN:
            continue
        words = _words(flag, values, known)
        if words is None:
            lost.append(f"llama-bench has nothing for {' '.join([flag, *values])}")
            continue
        name, value = words
        again = name in found and name in _JOINS
        found[name] = f"{found[name]}{_JOINS[name]}{value}" if again else value
    if lost:
        raise RecipeError(lost)
    found = {name: found[name] for name in _FIRST if name in found} | _DEFAULTS | found
    return tuple(part for pair in found.items() for part in pair)


def from_bench_flags(flags: Sequence[str]) -> list[str]:
    """Flags of llama-bench as llama-server takes them; the opposite of `bench_flags`."""
    switches = {words: flag for flag, words in _SWITCHES.items()}
    found = []
    for flag, *values in options(flags):
        name = _NAMES.get(flag)
        if len(values) == 1 and (flag, values[0]) in switches:
            found.append(switches[flag, values[0]])
        elif name is not None:
            between = _JOINS.get(name, ",")
            switch = {"1": "on", "0": "off"} if name == "-fa" else {}
            ours = "--rpc" if name == "-rpc" else flag
            found += [ours, *(switch.get(v, v).replace(between, ",") for v in values)]
    return found


def _words(
    flag: str, values: Sequence[str], known: frozenset[str] | None
) -> tuple[str, str] | None:
    """One flag in llama-bench's words; None where it has none."""
    if values:
        name = _NAMES.get(flag)
        if name is None or len(values) > 1:
            return None
        if name == "-lm" and known is not None and name not in known:
            words = _LOAD_MODES.get(values[0])
        else:
            value = _VALUES.get(name, {}).get(values[0], values[0])
            words = name, value.replace(",", _JOINS.get(name, ","))
    else:
        words = _SWITCHES.get(flag)
    return words if words is None or known is None or words[0] in known else None
