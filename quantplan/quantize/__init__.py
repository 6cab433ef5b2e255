"""Writes the quantized file that a recipe describes."""

from quantplan.quantize.apply import Progress, QuantizeResult, quantize
from quantplan.quantize.backend import Backend, NumpyBackend
from quantplan.quantize.external import LlamaQuantize, find_llama_quantize
from quantplan.quantize.verify import Verification

__all__ = [
    "Backend",
    "LlamaQuantize",
    "NumpyBackend",
    "Progress",
    "QuantizeResult",
    "Verification",
    "find_llama_quantize",
    "quantize",
]
