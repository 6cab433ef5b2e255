"""Predictions in which llama.cpp's own word takes the place of estimates."""

import re
from collections.abc import Sequence

from quantplan.errors import LlamaCppError
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.predict import DeviceUse, MemoryPrediction, predict
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.log import HOST
from quantplan.runtime.memory import MeasuredDevice, MemoryMeasurement, measure_memory
from quantplan.units import MIB


def predict_calibrated(
    inventory: Inventory, flags: str | Sequence[str], machine: Machine, llama_cpp: LlamaCpp
) -> MemoryPrediction:
    """Predicts the memory of a model with compute buffers as a local llama.cpp measures them.

    Args:
        inventory: The model, in the types that it has.
        flags: Flags of llama-server, as a command line or as arguments.
        machine: The devices; its GPUs must be those that llama.cpp has here.
        llama_cpp: The llama.cpp to ask; see `find_llama_cpp`.

    Raises:
        InputError: See `quantplan.predict`.
        LlamaCppError: llama.cpp failed, or has other GPUs than the machine.
    """
    found = predict(
        inventory, flags, machine, llama_cpp_build=llama_cpp.build or NEWEST_KNOWN_BUILD
    )
    return calibrated(found, measure_memory(llama_cpp, inventory, flags))


def calibrated(prediction: MemoryPrediction, measurement: MemoryMeasurement) -> MemoryPrediction:
    """Puts measured compute buffers into a prediction.

    Weights and caches are compared; where llama.cpp has others than predicted, a warning says so.

    Args:
        prediction: Of the same model and flags.
        measurement: What llama.cpp said.

    Raises:
        LlamaCppError: The measurement has GPUs that the prediction has not, or no GPU at all.
    """
    uses = {use.name: use for use in prediction.devices}
    measured = {_name(device, measurement): device for device in measurement.devices}
    unknown = [device.name for name, device in measured.items() if name not in uses]
    if unknown or (len(uses) > 1 and len(measured) == 1):
        here = ", ".join(d.name for d in measurement.devices if d.name != HOST) or "no GPU"
        raise LlamaCppError(
            f"{measurement.llama_cpp.server} has {here} here, but the machine has "
            f"{len(uses) - 1} GPUs: calibrate on the machine itself, or describe this one"
        )
    warnings = [
        text
        for name, device in measured.items()
        if measurement.is_dry_run
        for text in _differences(uses[name], device)
    ]
    note = f"compute buffers as {measurement.llama_cpp} measures them here with the same flags"
    found = prediction.with_measured_compute(
        {name: device.compute_bytes for name, device in measured.items()}
    )
    return found.model_copy(
        update={
            "warnings": (*found.warnings, *warnings),
            "notes": (*found.notes, note),
        }
    )


def _name(device: MeasuredDevice, measurement: MemoryMeasurement) -> str:
    """The prediction's name of a device: by its number where all GPUs are of one kind."""
    if device.name == HOST:
        return "CPU"
    gpus = [d.name for d in measurement.devices if d.name != HOST]
    number = re.search(r"\d+$", device.name)
    if number and len({re.sub(r"\d+$", "", name) for name in gpus}) == 1:
        return f"GPU{number[0]}"
    return f"GPU{gpus.index(device.name)}"


def _differences(use: DeviceUse, device: MeasuredDevice) -> list[str]:
    """What llama.cpp has more or less of than predicted, beyond its rounding and its padding."""
    compared = (
        ("weights", use.weights_bytes, use.padding_bytes, device.weights_bytes),
        ("caches", use.kv_bytes, 0, device.cache_bytes),
    )
    return [
        f"{use.name}: llama.cpp has {found // MIB} MiB of {what}, {predicted // MIB} are predicted"
        for what, predicted, padding, found in compared
        if not predicted - device.rounding_bytes < found <= predicted + padding
    ]
