"""KoboldCpp's own words for llama-server's flags."""

from collections.abc import Sequence

from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import options

_SAME = {"-c": "--contextsize", "-ngl": "--gpulayers", "-ub": "--batchsize"}
# By number, which old and new versions take.
_QUANTIZED_KV = {"q8_0": "1", "q4_0": "2"}
# What has no flag there because it is so, or is said below.
_SAID = {"-ts", "-ot", "-np", "-kvu", "-no-kvu", "-b", "-ctk", "-ctv", "-fa", "-lm", "--fit"}


def koboldcpp_flags(flags: Sequence[str]) -> list[str]:
    """llama.cpp's flags as KoboldCpp takes them.

    ``--tensor_split`` takes words, ``--overridetensors`` what ``-ot`` takes. There are no flags for
    the load mode, and flash attention is on by default.

    Raises:
        RecipeError: KoboldCpp cannot do it: KV types other than f16, q8_0 and q4_0 or different
            ones for K and V, several slots, no flash attention, or there is no flag for something
            else. All faults are gathered.
    """
    given = {flag: values for flag, *values in options(flags)}
    kinds = {values[0] for flag, values in given.items() if flag in ("-ctk", "-ctv")}
    faults = []
    if len(kinds) > 1 or not kinds <= {"f16", *_QUANTIZED_KV}:
        faults.append(
            f"KoboldCpp has KV caches of f16, {' and '.join(_QUANTIZED_KV)}, the same for K and V; "
            f"this recipe wants {' and '.join(sorted(kinds))}"
        )
    if given.get("-np", ["1"]) != ["1"]:
        faults.append(f"KoboldCpp is planned with one slot; this recipe wants {given['-np'][0]}")
    if given.get("-fa") == ["off"]:
        faults.append("this recipe wants no flash attention, for which KoboldCpp has other caches")
    faults += [
        f"KoboldCpp is not told by quantplan how to do what this recipe says: "
        f"{' '.join([flag, *values])}"
        for flag, values in given.items()
        if flag not in {*_SAME, *_SAID} and [flag, *values] != ["-sm", "layer"]
    ]
    if faults:
        raise RecipeError(faults)
    found = []
    for flag, values in given.items():
        if flag in _SAME:
            found += [_SAME[flag], *values]
        elif flag == "-ts":
            found += ["--tensor_split", *values[0].split(",")]
        elif flag == "-ot":
            found += ["--overridetensors", *values]
    found += ["--quantkv", _QUANTIZED_KV[next(iter(kinds))]] if kinds & set(_QUANTIZED_KV) else []
    return found


def from_koboldcpp_flags(flags: Sequence[str]) -> list[str]:
    """KoboldCpp's flags as llama-server takes them; the opposite of `koboldcpp_flags`."""
    names = {theirs: ours for ours, theirs in _SAME.items()}
    types = {number: kind for kind, number in _QUANTIZED_KV.items()}
    found = []
    for flag, *values in options(flags):
        if flag in names:
            found += [names[flag], *values]
        elif flag == "--tensor_split":
            found += ["-ts", ",".join(values)]
        elif flag == "--overridetensors":
            found += ["-ot", *values]
        elif flag == "--quantkv" and values:
            kind = types.get(values[0], values[0])
            found += ["-ctk", kind, "-ctv", kind]
    return found
