"""Asks the llama.cpp of this machine what memory a model takes, and how fast it runs."""

from quantplan.runtime.bench import measure_with_any
from quantplan.runtime.calibrate import calibrated, predict_calibrated
from quantplan.runtime.find import LlamaCpp, find_llama_cpp
from quantplan.runtime.memory import MeasuredDevice, MemoryMeasurement, measure_memory
from quantplan.runtime.speed import MeasuredSpeed, SpeedMeasurement, measure_speed

__all__ = [
    "LlamaCpp",
    "MeasuredDevice",
    "MeasuredSpeed",
    "MemoryMeasurement",
    "SpeedMeasurement",
    "calibrated",
    "find_llama_cpp",
    "measure_memory",
    "measure_speed",
    "measure_with_any",
    "predict_calibrated",
]
