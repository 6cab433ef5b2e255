"""What the exit code of a command says."""

from types import MappingProxyType

FAILED, UNUSABLE, BROKEN, INTERNAL, INTERRUPTED, SIGNALLED = 1, 2, 3, 70, 130, 128

MEANINGS = MappingProxyType(
    {
        "0": "All went well; of `verify`, that every promise was kept.",
        f"{FAILED}": "The question is sound, but there is no answer: no plan satisfies the limits, "
        "llama.cpp is missing or failed, a file could not be written, or an optional package is "
        "not installed. Of `doctor`, that no llama-server runs.",
        f"{UNUSABLE}": "What was given cannot be used: options, a model, a machine, a recipe, a "
        "table. Nothing was computed or written.",
        f"{BROKEN}": "Of `verify`, that llama.cpp ran, and a promise was not kept.",
        f"{INTERNAL}": "A fault of quantplan itself; the message says how to see where.",
        f"{INTERRUPTED}": "Ctrl+C. `quantize` and `measure` go on from there with `--resume`.",
        f"{SIGNALLED} + N": "The signal N ended the command, such as SIGTERM (143).",
    }
)
"""Meanings of exit codes; `run` ends with that of llama-server where that was started."""
