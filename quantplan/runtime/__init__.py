"""Asks the llama.cpp of this machine what memory a model takes, and what it loses."""

from quantplan.runtime.calibrate import calibrated, predict_calibrated
from quantplan.runtime.find import LlamaCpp, find_llama_cpp
from quantplan.runtime.memory import MeasuredDevice, MemoryMeasurement, measure_memory
from quantplan.runtime.perplexity import Divergence, measure_divergence

__all__ = [
    "Divergence",
    "LlamaCpp",
    "MeasuredDevice",
    "MemoryMeasurement",
    "calibrated",
    "find_llama_cpp",
    "measure_divergence",
    "measure_memory",
    "predict_calibrated",
]
