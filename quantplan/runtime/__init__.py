"""Asks the llama.cpp of this machine what memory a model takes."""

from quantplan.runtime.calibrate import calibrated, predict_calibrated
from quantplan.runtime.find import LlamaCpp, find_llama_cpp
from quantplan.runtime.memory import MeasuredDevice, MemoryMeasurement, measure_memory

__all__ = [
    "LlamaCpp",
    "MeasuredDevice",
    "MemoryMeasurement",
    "calibrated",
    "find_llama_cpp",
    "measure_memory",
    "predict_calibrated",
]
