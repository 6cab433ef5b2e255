"""Narrows a machine's speed factors by what was measured on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantplan.costs import load_data
from quantplan.costs.decode import decode_s
from quantplan.costs.factors import Factors, shipped
from quantplan.costs.prefill import prefill_s
from quantplan.costs.traffic import Traffic
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Architecture
from quantplan.qtypes import Runtime
from quantplan.workload import Workload

# 95 % of a normal distribution is within so many standard deviations.
_Z95 = 1.96
_STEPS = 8
_STEP = 1e-4


@dataclass(frozen=True)
class Measurement:
    """One measured speed.

    Attributes:
        traffic: What a token needs where.
        workload: Ubatch and cache types.
        depth: Tokens in the context.
        tps: Tokens per second.
        n_tokens: Prompt tokens of a ubatch; 1 for decoding.
        runtime: The program that ran.
    """

    traffic: Traffic
    workload: Workload
    depth: float
    tps: float
    n_tokens: int = 1
    runtime: Runtime = "llama.cpp"


def calibrate(
    machine: Machine,
    measurements: Sequence[Measurement],
    measured: Sequence[str] = (),
    *,
    factors: Factors | None = None,
) -> Machine:
    """The machine with slowdowns that agree with what was measured.

    The result holds for the model that was measured, and where several were for all; see
    `for_model`. The logarithms of the GPUs' slowdown and of the CPU's are normal with the standard
    deviations that published runs show (``speed.json``); the answer is their most probable value
    given the measurements, each with its own noise. A measurement in which a device does little
    moves that device little.

    Args:
        machine: The machine as it is known so far; its present slowdowns count as the prior's
            centre.
        measurements: Decode and prefill speeds.
        measured: One sentence for each source of measurements.
        factors: By default the fitted ones of each measurement's runtime.
    """
    prior = load_data("speed.json")["calibration"]
    decode = [m for m in measurements if m.n_tokens == 1]
    prompts = [m for m in measurements if m.n_tokens > 1]
    keys = [*dict.fromkeys(model_key(m.traffic.architecture) for m in measurements)]
    found = for_model(machine, measurements[0].traffic.architecture) if measurements else machine
    for kind, some in (("decode", decode), ("prefill", prompts)):
        if some:
            found = _slowed(found, kind, _most_probable(found, kind, some, prior[kind], factors))
    log_sd = prior["decode"]["noise"] * prior["decode"]["left"] if decode else machine.speed_log_sd
    return found.model_copy(
        update={
            "measured": (*machine.measured, *measured),
            "calibrated_with": keys[0] if len(keys) == 1 else "",
            "speed_log_sd": log_sd,
        }
    )


def for_model(machine: Machine, architecture: Architecture) -> Machine:
    """The machine as it is known for a model.

    What a measurement of one model says of another one on the same machine is little: in published
    runs it does not make the prediction better. So only the part of a slowdown beyond what models
    and programs usually differ by is taken to be the machine's, and the interval is that of a
    machine on which nothing was measured.

    Args:
        machine: Calibrated or not.
        architecture: The model's.
    """
    if machine.calibrated_with in ("", model_key(architecture)):
        return machine
    prior = load_data("speed.json")["calibration"]

    def beyond(device: Device) -> Device:
        found = {}
        for kind in ("decode", "prefill"):
            log = math.log(getattr(device, f"{kind}_slowdown"))
            usual = _Z95 * prior[kind][device.kind]
            found[f"{kind}_slowdown"] = math.exp(math.copysign(max(0.0, abs(log) - usual), log))
        return device.model_copy(update=found)

    return machine.model_copy(
        update={
            "gpus": tuple(beyond(gpu) for gpu in machine.gpus),
            "ram": beyond(machine.ram),
            "calibrated_with": "",
            "speed_log_sd": None,
        }
    )


def model_key(architecture: Architecture) -> str:
    """What tells models apart, whatever their types and fine-tuning."""
    experts = f", {architecture.n_expert} experts" if architecture.n_expert else ""
    return (
        f"{architecture.name}, {architecture.n_loaded_layers} layers of {architecture.n_embd}"
        f"{experts}"
    )


def _most_probable(
    machine: Machine,
    kind: str,
    measurements: Sequence[Measurement],
    prior: dict[str, float],
    factors: Factors | None,
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """ln(slowdown) of the GPUs and of the CPU, by Gauss-Newton."""
    sds = np.array([prior["gpu"], prior["cpu"]])
    # Speeds at several depths of one run share their error.
    weight = 1 / (prior["noise"] ** 2 * len(measurements))

    def errors(logs: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float]:
        slowed = _slowed(machine, kind, logs)
        return [
            math.log(_predicted_s(slowed, m, factors or shipped(m.runtime)) * m.tps)
            for m in measurements
        ]

    logs = np.zeros(2)
    for _ in range(_STEPS):
        now = np.array(errors(logs))
        slopes = np.stack([
            (np.array(errors(logs + _STEP * np.eye(2)[i])) - now) / _STEP for i in range(2)
        ], axis=1)  # fmt: skip
        normal = weight * slopes.T @ slopes + np.diag(sds**-2.0)
        logs = logs - np.linalg.solve(normal, weight * slopes.T @ now + logs / sds**2)
    return logs


def _predicted_s(machine: Machine, m: Measurement, factors: Factors) -> float:
    if m.n_tokens == 1:
        return decode_s(m.traffic, machine, m.workload, m.depth, factors)
    seconds = prefill_s(
        m.traffic, machine, m.workload, m.depth, n_tokens=m.n_tokens, factors=factors
    )
    return seconds / m.n_tokens


def _slowed(
    machine: Machine, kind: str, logs: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> Machine:
    """The machine with its GPUs' and its CPU's slowdown multiplied."""
    gpu, cpu = (float(x) for x in np.exp(logs))

    def slowed(device: Device, factor: float) -> Device:
        name = f"{kind}_slowdown"
        return device.model_copy(update={name: getattr(device, name) * factor})

    gpus = tuple(slowed(device, gpu) for device in machine.gpus)
    return machine.model_copy(update={"gpus": gpus, "ram": slowed(machine.ram, cpu)})
