"""Writes the quantized file that a recipe describes."""

from quantplan.quantize.apply import Progress, QuantizeResult, quantize

__all__ = ["Progress", "QuantizeResult", "quantize"]
