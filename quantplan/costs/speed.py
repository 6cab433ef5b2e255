"""Speed as a curve over context depth, with an interval, and what a person waits for."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from quantplan.costs import load_data
from quantplan.costs.decode import decode_s
from quantplan.costs.factors import shipped
from quantplan.costs.prefill import prefill_s
from quantplan.costs.traffic import Traffic, Where, collect
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, LayerCache
from quantplan.qtypes import Runtime
from quantplan.schema import Frozen
from quantplan.workload import Workload

# 80 % of a normal distribution is within so many standard deviations.
Z80 = 1.2816
_DEPTHS = 9


class SpeedEstimate(Frozen):
    """A number with its 80 % interval.

    Attributes:
        low: Lower end.
        expected: The prediction.
        high: Upper end.
    """

    low: float
    expected: float
    high: float


class SpeedPoint(Frozen):
    """Speed at one depth.

    Attributes:
        depth: Tokens in the context.
        decode_tps: Tokens per second of one request.
        prefill_tps: Prompt tokens per second in whole ubatches.
    """

    depth: int
    decode_tps: SpeedEstimate
    prefill_tps: SpeedEstimate


class SpeedPrediction(Frozen):
    """Decode and prefill speed over the depth of the context.

    Attributes:
        where: Whether GPUs, the CPU or both multiply weights.
        runtime: The program whose constants were used.
        points: Speeds at rising depths, from an empty context to the most that a slot holds;
            between them the seconds per token are linear.
    """

    where: Where
    runtime: Runtime
    points: tuple[SpeedPoint, ...]

    def decode_tps(self, depth: int) -> SpeedEstimate:
        """Decode speed of one request, in tokens per second.

        Args:
            depth: Tokens that are in the context.
        """
        return self._at("decode_tps", depth)

    def prefill_tps(self, depth: int) -> SpeedEstimate:
        """Speed at which a prompt is processed, in tokens per second.

        Args:
            depth: Tokens that are in the context already.
        """
        return self._at("prefill_tps", depth)

    def turn_s(self, prompt: int, answer: int, depth: int = 0) -> SpeedEstimate:
        """Seconds that a person waits for a whole answer.

        Args:
            prompt: New tokens of the prompt.
            answer: Tokens of the answer.
            depth: Tokens that are in the context already, and cached.
        """
        parts = []
        for end in ("low", "expected", "high"):
            prefill = self._seconds("prefill_tps", end, depth, depth + prompt)
            decode = self._seconds("decode_tps", end, depth + prompt, depth + prompt + answer)
            parts.append(prefill + decode)
        slow, expected, fast = parts
        return SpeedEstimate(low=fast, expected=expected, high=slow)

    def _seconds_per_token(self, kind: str, end: str, depth: float) -> float:
        depths = [point.depth for point in self.points]
        seconds = [1 / float(getattr(getattr(point, kind), end)) for point in self.points]
        if len(depths) == 1:
            return seconds[0]
        right = min(max(bisect_right(depths, depth), 1), len(depths) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (depths[right] - depths[left])
        return seconds[left] + slope * (depth - depths[left])

    def _seconds(self, kind: str, end: str, first: int, last: int) -> float:
        """Seconds for the tokens from one depth to another, by the trapezoidal rule."""
        inner = [float(p.depth) for p in self.points if first < p.depth < last]
        bounds = [float(first), *inner, float(last)]
        rates = [self._seconds_per_token(kind, end, depth) for depth in bounds]
        return sum(
            (b - a) * (x + y) / 2
            for a, b, x, y in zip(bounds, bounds[1:], rates, rates[1:], strict=False)
        )

    def _at(self, kind: str, depth: int) -> SpeedEstimate:
        low, expected, high = (
            1 / self._seconds_per_token(kind, end, depth) for end in ("low", "expected", "high")
        )
        return SpeedEstimate(low=low, expected=expected, high=high)


def predict_speed(
    inventory: Inventory,
    assignment: Mapping[str, tuple[str, str]],
    layers: Sequence[str],
    output: str,
    *,
    machine: Machine,
    workload: Workload,
    caches: Sequence[str] | None = None,
    runtime: Runtime = "llama.cpp",
    op_offload: bool = True,
) -> SpeedPrediction:
    """Predicts the speed of a model whose tensors have given types and places.

    Args:
        inventory: The model.
        assignment: Type and device name of each loaded tensor.
        layers: Device name of each layer.
        output: Device name of the output layer.
        machine: The devices.
        workload: Context, ubatch and cache types.
        caches: Device name of each layer's cache; that of the layer by default.
        runtime: The program that will run.
        op_offload: Whether weights in RAM may be streamed to a GPU for prompts.
    """
    traffic = collect(inventory, assignment, layers, output, caches)
    return predict_traffic(traffic, machine, workload, runtime=runtime, op_offload=op_offload)


def predict_traffic(
    traffic: Traffic,
    machine: Machine,
    workload: Workload,
    *,
    runtime: Runtime = "llama.cpp",
    op_offload: bool = True,
) -> SpeedPrediction:
    """`predict_speed` from what a token needs where."""
    factors = shipped(runtime)
    points = []
    for depth in _depths(traffic, workload):
        decode = decode_s(traffic, machine, workload, depth, factors)
        prompt = prefill_s(
            traffic, machine, workload, depth, op_offload=op_offload, factors=factors
        )
        points.append(
            SpeedPoint(
                depth=depth,
                decode_tps=interval("decode", traffic.where, machine, 1 / decode),
                prefill_tps=interval("prefill", traffic.where, machine, workload.ubatch / prompt),
            )
        )
    return SpeedPrediction(where=traffic.where, runtime=runtime, points=tuple(points))


def interval(what: str, where: Where, machine: Machine, tps: float) -> SpeedEstimate:
    """The 80 % interval of a speed.

    Its ends are quantiles of measured over predicted speed among published measurements of the same
    kind, each predicted without those of its own thread; on a calibrated machine, what calibration
    leaves.

    Args:
        what: ``decode`` or ``prefill``.
        where: Whether GPUs, the CPU or both multiply weights.
        machine: Calibrated or not.
        tps: Predicted tokens per second.
    """
    low, high = load_data("speed.json")["measured_over_predicted"][what][where]
    if what == "decode" and machine.speed_log_sd is not None:
        spread = math.exp(Z80 * machine.speed_log_sd)
        low, high = max(low, 1 / spread), min(high, spread)
    return SpeedEstimate(low=tps * low, expected=tps, high=tps * high)


def difference_s(
    seconds: Mapping[tuple[str, str], float],
    others: Mapping[tuple[str, str], float],
    machine: Machine,
) -> tuple[float, float]:
    """Seconds per token of one configuration less those of another one, and how sure that is.

    What both do on one device with one type does not count. Of the rest, what a device's rates are
    wrong by is common to all types on it, by as much as published machines show; what predictions
    for one machine still scatter is a matter of each type (``speed.json``).

    Args:
        seconds: Decode seconds by device name and type.
        others: The same for what it is compared with.
        machine: The devices; of calibrated ones the rates are known.

    Returns:
        The difference, and its standard deviation.
    """
    spread = load_data("speed.json")["calibration"]["decode"]
    by_device: dict[str, float] = {}
    parts = []
    for device, kind in seconds.keys() | others.keys():
        difference = seconds.get((device, kind), 0.0) - others.get((device, kind), 0.0)
        by_device[device] = by_device.get(device, 0.0) + difference
        parts.append(difference * spread["rig_noise"])
    if machine.speed_log_sd is None:
        kinds = {device.name: device.kind for device in machine.devices}
        parts += [total * spread[kinds[device]] for device, total in by_device.items()]
    return sum(by_device.values()), math.hypot(*parts)


def _depths(traffic: Traffic, workload: Workload) -> list[int]:
    """Depths at which to predict: evenly spaced, and where sliding windows are full."""
    return _sample_depths([cache for _, cache, _ in traffic.caches], workload)


def _sample_depths(caches: Iterable[LayerCache], workload: Workload) -> list[int]:
    deepest = workload.slot_context
    even = {round(deepest * i / (_DEPTHS - 1)) for i in range(_DEPTHS)}
    windows = {cache.window for cache in caches if cache.window < deepest}
    return sorted(even | windows)


def turn_depths(
    caches: Iterable[LayerCache], workload: Workload
) -> tuple[dict[int, float], dict[int, float]]:
    """The workload's turn as a sum over the depths at which `predict_traffic` predicts.

    With seconds per token linear between these depths, as `SpeedPrediction.turn_s` has them, the
    seconds of a prompt are the sum of its tokens at each depth times the seconds per token there.

    Args:
        caches: Those of all layers.
        workload: Context, and tokens of prompt and answer.

    Returns:
        Tokens of the prompt and of the answer by depth.
    """
    depths = _sample_depths(caches, workload)
    end = workload.prompt_tokens + workload.answer_tokens
    return (
        _tokens_at(depths, 0, workload.prompt_tokens),
        _tokens_at(depths, workload.prompt_tokens, end),
    )


def _tokens_at(depths: Sequence[int], first: int, last: int) -> dict[int, float]:
    """Weights of the trapezoidal rule from one depth to another, on the nearest sampled depths."""
    weights = dict.fromkeys(depths, 0.0)
    bounds = [first, *(d for d in depths if first < d < last), last]
    for a, b in pairwise(bounds):
        for depth in (a, b):
            right = min(max(bisect_right(depths, depth), 1), len(depths) - 1)
            left_depth, right_depth = depths[right - 1], depths[right]
            share = (depth - left_depth) / (right_depth - left_depth)
            weights[left_depth] += (b - a) / 2 * (1 - share)
            weights[right_depth] += (b - a) / 2 * share
    return {depth: weight for depth, weight in weights.items() if weight}
