"""Writes the quantized file that a recipe describes."""

from quantplan.quantize.apply import Progress, QuantizeResult, quantize
from quantplan.quantize.backend import Backend, NumpyBackend
from quantplan.quantize.verify import Verification

__all__ = ["Backend", "NumpyBackend", "Progress", "QuantizeResult", "Verification", "quantize"]
