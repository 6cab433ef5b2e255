"""Flags in the words of one build of llama.cpp: names have changed, and old ones are refused."""

import re
from collections.abc import Sequence

from quantplan.errors import LlamaCppError
from quantplan.formats.llama_cpp import options
from quantplan.llama_cpp import GPU_BUFFERS
from quantplan.runtime.find import LlamaCpp, known_options

_LOAD_MODE = ("-lm", "--load-mode")
# What stood for a load mode before b10400 or so, and stands for it in ik_llama.cpp.
_BEFORE_LOAD_MODES = {
    "auto": (),
    "mmap": (),
    "none": ("--no-mmap",),
    "mlock": ("--no-mmap", "--mlock"),
    "mmap+mlock": ("--mlock",),
    "dio": ("--direct-io",),
}
_DIRECT = ("-dio", "--direct-io")
_MAPPING = ("--mmap", "--no-mmap", "--mlock", *_DIRECT, "-ndio", "--no-direct-io")
_FLASH = ("-fa", "--flash-attn")
_FIT = ("-fit", "--fit", "-fitt", "--fit-target", "-fitc", "--fit-ctx")
_OVERRIDES = ("-ot", "--override-tensor")
_UNIFIED = ("-kvu", "--kv-unified")
_APART = ("-no-kvu", "--no-kv-unified")


def flags_for(llama_cpp: LlamaCpp, flags: Sequence[str]) -> tuple[str, ...]:
    """Says the same as some flags in the words that a build knows and does not call deprecated.

    Args:
        llama_cpp: The build.
        flags: Flags of llama-server, of any generation.

    Raises:
        LlamaCppError: The build has no such flag, nor another word for it. All are named.
    """
    words = options(flags)
    given = [word[0] for word in words]
    found: list[str] = []
    for name, *values in words:
        if name in _MAPPING and llama_cpp.has_load_mode:
            if name == next(n for n in given if n in _MAPPING):  # one flag stands for all of them
                found += ["-lm", _load_mode(given)]
        elif name in _LOAD_MODE and not llama_cpp.has_load_mode:
            found += _BEFORE_LOAD_MODES.get(values[0] if values else "", (name, *values))
        elif name in _OVERRIDES:
            found += [name, *(_buffers_named(llama_cpp, value) for value in values)]
        elif name in _FLASH and not llama_cpp.has_flash_value:
            found += [name] if values != ["off"] else []
        elif not (
            (name in _FIT and not llama_cpp.has_fit)
            or (name in _UNIFIED and not llama_cpp.has_unified_cache)
        ):
            found += [name, *values]
    _check(llama_cpp, found)
    return tuple(found)


def _buffers_named(llama_cpp: LlamaCpp, overrides: str) -> str:
    """Overrides with the build's own names for the GPUs of this host, where it has others."""
    names = dict(enumerate(llama_cpp.devices))

    def named(match: re.Match[str]) -> str:
        name, number = match[1], int(match[2])
        return f"={name if name in llama_cpp.devices else names.get(number, name)}"

    return re.sub(rf"=((?:{GPU_BUFFERS})(\d+))(?=,|$)", named, overrides)


def _load_mode(given: Sequence[str]) -> str:
    """The load mode that the flags of before ask for together."""
    if any(name in given for name in _DIRECT):
        return "dio"
    locks, maps = "--mlock" in given, "--no-mmap" not in given
    if locks:
        return "mmap+mlock" if maps else "mlock"
    return "auto" if maps else "none"


def _check(llama_cpp: LlamaCpp, flags: Sequence[str]) -> None:
    known = known_options(llama_cpp.server)
    unknown = dict.fromkeys(word[0] for word in options(flags) if word[0] not in known)
    reasons = [
        f"{name} (its slots always share one cache)" if name in _APART else name for name in unknown
    ]
    if reasons:
        named = ", ".join(reasons)
        raise LlamaCppError(
            f"{llama_cpp.server} ({llama_cpp}) does not know {named}: "
            "leave it out, or use another llama.cpp"
        )
