"""LM Studio's settings of a model: the file that it keeps for each model beside its own.

Keys and types are those of LM Studio's public SDK (``lmstudio-js`` 2.0, MIT). Its own settings of
placement are a share of the layers and a share of the experts, which cannot say what a plan says.
So the layers, single tensors and proportions are given as llama.cpp's own arguments, which LM
Studio passes on since that SDK (``argumentsOverride``, called experimental there). Versions without
it would ignore them, put the whole model on the GPU and run out of its memory.
"""

import json
from collections.abc import Sequence
from typing import Any

from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import options

# Their meaning needs llama.cpp's own words.
_ARGUMENTS = {"-ngl": "--n-gpu-layers", "-ot": "--override-tensor", "-ts": "--tensor-split",
              "-sm": "--split-mode"}  # fmt: skip
_NUMBERS = {
    "-c": "llm.load.contextLength",
    "-np": "llm.load.numParallelSessions",
    "-b": "llm.load.llama.evalBatchSize",
    "-ub": "llm.load.llama.physicalBatchSize",
}
_KV_TYPES = {
    "-ctk": "llm.load.llama.kCacheQuantizationType",
    "-ctv": "llm.load.llama.vCacheQuantizationType",
}
# --fit and -lm are said by autoFit and tryMmap.
_KNOWN = {*_ARGUMENTS, *_NUMBERS, *_KV_TYPES, "-fa", "-kvu", "-no-kvu", "--fit", "-lm"}


def lm_studio_settings(flags: Sequence[str]) -> str:
    """The JSON file of a model's settings in LM Studio, from llama.cpp's flags.

    Args:
        flags: Flags that quantplan writes for llama.cpp.

    Raises:
        RecipeError: LM Studio has no setting for a flag.
    """
    given = {flag: values for flag, *values in options(flags)}
    lost = [flag for flag in given if flag not in _KNOWN]
    if lost:
        raise RecipeError(f"LM Studio has no setting for {flag}" for flag in lost)
    settings: dict[str, Any] = {"llm.load.llama.autoFit": False, "llm.load.llama.tryMmap": False}
    settings |= {key: int(given[flag][0]) for flag, key in _NUMBERS.items() if flag in given}
    for flag, key in _KV_TYPES.items():
        if flag in given:
            settings[key] = {"checked": given[flag][0] != "f16", "value": given[flag][0]}
    settings |= {
        "llm.load.useUnifiedKvCache": "-kvu" in given,
        "llm.load.llama.flashAttention": given.get("-fa", ["on"]) != ["off"],
        "llm.load.offloadKVCacheToGpu": True,
        # Nothing of its own beside what the arguments say.
        "llm.load.llama.acceleration.offloadRatio": "off" if given.get("-ngl") == ["0"] else "max",
        "llm.load.numCpuExpertLayersRatio": "off",
        "llm.load.llama.argumentsOverride": {
            "enabled": True,
            "excludeAllConfig": False,
            "disabledParameters": [],
            "overrideParameters": [
                {"key": name, "value": given[flag][0]}
                for flag, name in _ARGUMENTS.items()
                if flag in given
            ],
        },
    }
    fields = [{"key": key, "value": value} for key, value in settings.items()]
    content = {"preset": "", "operation": {"fields": []}, "load": {"fields": fields}}
    return json.dumps(content, indent=2) + "\n"
