"""Asks the llama.cpp of this machine what a model takes, how fast it runs, what it loses."""

from quantplan.runtime.bench import measure_with_any
from quantplan.runtime.calibrate import calibrated, predict_calibrated
from quantplan.runtime.divergence import Divergence
from quantplan.runtime.find import LlamaCpp, find_llama_cpp
from quantplan.runtime.memory import MeasuredDevice, MemoryMeasurement, measure_memory
from quantplan.runtime.perplexity import measure_divergence
from quantplan.runtime.speed import MeasuredSpeed, SpeedMeasurement, measure_speed

__all__ = [
    "Divergence",
    "LlamaCpp",
    "MeasuredDevice",
    "MeasuredSpeed",
    "MemoryMeasurement",
    "SpeedMeasurement",
    "calibrated",
    "find_llama_cpp",
    "measure_divergence",
    "measure_memory",
    "measure_speed",
    "measure_with_any",
    "predict_calibrated",
]
