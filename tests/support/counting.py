"""Every choice of a small problem counted out, at costs that llama.cpp's rules give.

Bytes, seconds and budgets are worked out here again, not asked of the planner.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import ne

import gguf
import numpy as np
from numpy.typing import NDArray

from quantplan import Device, Inventory, Machine, Policy, Tensor, Workload
from quantplan.costs import load_data
from quantplan.costs.compute import Work
from quantplan.costs.quality import LossTable
from quantplan.planner.goal import Goal
from quantplan.planner.problem import Problem, build_problem
from tests.support.compute import around_streamed_bytes, planned_bytes

# The solver holds 4096 bytes of each device back, and a millionth of the time.
HELD_BACK_BYTES = 8192
HELD_BACK_TIME = 1 + 1e-5
OFFLOAD_MIN_BATCH = 32
SPEED = load_data("speed.json")
FACTORS = SPEED["factors"]["llama.cpp"]


def raw_bytes(tensor: Tensor, qtype: str) -> int:
    """Bytes in the file."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]]
    return int(tensor.n_weights // block * block_bytes)


def bytes_on(kind: str, tensor: Tensor, qtype: str) -> int:
    """Bytes in a buffer: 32-byte steps on the CPU; on CUDA 128, and rows in steps of 512."""
    n_bytes = raw_bytes(tensor, qtype)
    if kind == "cpu":
        return math.ceil(n_bytes / 32) * 32
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]]
    if block > 1 and tensor.shape_ne[0] % 512:
        n_bytes += (512 - tensor.shape_ne[0] % 512) // block * block_bytes
    return math.ceil(n_bytes / 128) * 128


def is_expert(tensor: Tensor) -> bool:
    """Whether the tensor holds experts."""
    return tensor.name.endswith("_exps.weight")


def seconds(inventory: Inventory, tensor: Tensor, qtype: str, home: Device, last: Device) -> float:
    """Seconds per token for a tensor, the output's copy of a tied embedding included."""
    share = 1.0
    if is_expert(tensor):
        share = inventory.architecture.n_expert_used / inventory.architecture.n_expert
    if tensor.name == "token_embd.weight":
        found = raw_bytes(tensor, qtype) / tensor.shape_ne[1] * read_factor(home, experts=False)
        found /= home.bandwidth_bytes_per_s
        copied = is_tied(inventory, tensor)
        return found + (product_s(tensor, qtype, last, 1.0) if copied else 0.0)
    return product_s(tensor, qtype, home, share)


def read_factor(home: Device, *, experts: bool) -> float:
    """Seconds to read a byte, in units of those at the device's bandwidth."""
    found = float(FACTORS[f"{home.kind}_read"])
    if home.kind == "cpu":
        found *= (home.bandwidth_bytes_per_s / 100e9) ** FACTORS["cpu_read_growth"]
    return found * (FACTORS[f"{home.kind}_expert_read"] if experts else 1.0)


def product_s(tensor: Tensor, qtype: str, home: Device, share: float) -> float:
    """Seconds for the product with a matrix, or with a share of its experts."""
    kind, p = home.kind, FACTORS["overlap"]
    table = SPEED["operations_per_weight"]["llama.cpp"][kind]
    read = raw_bytes(tensor, qtype) * share / home.bandwidth_bytes_per_s
    read *= read_factor(home, experts=is_expert(tensor))
    unpack = tensor.n_weights * share * table.get(qtype, table["default"])
    unpack *= FACTORS[f"{kind}_unpack"] / home.vector_flops_per_s
    launch = 0.0
    if len(tensor.shape_ne) > 1 and "norm" not in tensor.name:
        launch = FACTORS[f"{kind}_launch_s"]
        launch += FACTORS[f"{kind}_expert_launch_s"] if is_expert(tensor) else 0.0
    return float((read**p + unpack**p) ** (1 / p) + launch)


def is_tied(inventory: Inventory, tensor: Tensor) -> bool:
    """Whether the tensor is the embedding and the output matrix."""
    return tensor.name == "token_embd.weight" and "output.weight" not in inventory.by_name


@dataclass(frozen=True)
class Task:
    """A problem with the layers on given devices."""

    inventory: Inventory
    machine: Machine
    workload: Workload
    rules: Policy
    layers: tuple[str, ...]
    min_decode_tps: float | None = None
    output: str | None = None

    @property
    def problem(self) -> Problem:
        """The same for the code under test."""
        goal = Goal(min_decode_tps=self.min_decode_tps)
        parts = (self.inventory, self.machine, self.workload, self.rules, goal)
        return build_problem(*parts).with_layers(self.layers, self.output)

    @property
    def last(self) -> Device:
        """The device of the output."""
        gpus = self.machine.gpus or (self.machine.ram,)
        return next((gpu for gpu in gpus if gpu.name == self.output), gpus[-1])


def homes(task: Task, tensor: Tensor) -> list[Device]:
    """Devices that a tensor may be on."""
    by_name = {device.name: device for device in task.machine.devices}
    if tensor.name == "token_embd.weight":
        return [task.machine.ram]
    if tensor.layer is None:
        return [task.last]
    home = by_name[task.layers[tensor.layer]]
    if home.kind == "cpu" or not task.rules.rule(tensor.role_class).may_leave_gpu:
        return [home]
    others = [gpu for gpu in task.machine.gpus if gpu != home and is_expert(tensor)]
    return [home, *others, task.machine.ram]


def decisions(task: Task) -> list[list[Tensor]]:
    """Tensors by what is decided together: up and gate experts of a layer, else one by one."""
    found = defaultdict(list)
    for tensor in task.inventory.tensors:
        is_tie = "_up_exps" in tensor.name or "_gate_exps" in tensor.name
        found[f"experts of layer {tensor.layer}" if is_tie else tensor.name].append(tensor)
    return list(found.values())


@dataclass(frozen=True)
class Everything:
    """All combinations of types and places: one row each."""

    loss: NDArray[np.float64]
    seconds: NDArray[np.float64]
    fits: NDArray[np.bool_]
    fits_easily: NDArray[np.bool_]


def every_choice(task: Task, only: dict[str, str] | None = None) -> Everything:
    """Count all combinations out.

    Args:
        task: The problem.
        only: Type of each tensor, where only the places are to be counted out.
    """
    losses = LossTable(task.inventory)
    devices = task.machine.devices
    sums = np.zeros((1, 2 + len(devices)))  # loss, seconds, bytes of each device
    streamed, is_moved = np.zeros(1), np.zeros(1, bool)
    for tensors in decisions(task):
        rows, largest, moved = [], [], []
        names = task.rules.candidates_for(tensors[0], is_loaded=True)
        for qtype in [only[tensors[0].name]] if only else names:
            for home in homes(task, tensors[0]):
                row = [0.0] * (2 + len(devices))
                for tensor in tensors:
                    row[0] += losses.loss_nats(tensor, qtype)
                    row[1] += seconds(task.inventory, tensor, qtype, home, task.last)
                    row[1] += hop_seconds(task.inventory, tensor, home, task.layers)
                    copies = {home, task.last} if is_tied(task.inventory, tensor) else {home}
                    for d, device in enumerate(devices):
                        if device in copies:
                            row[2 + d] += bytes_on(device.kind, tensor, qtype)
                rows.append(row)
                streams = home.kind == "cpu" and tensors[0].layer is not None
                largest.append(max(bytes_on("cpu", t, qtype) for t in tensors) if streams else 0)
                layer = tensors[0].layer
                moved.append(layer is not None and home.name != task.layers[layer])
        sums = (sums[:, None, :] + np.array(rows)[None]).reshape(-1, sums.shape[1])
        streamed = np.maximum(streamed[:, None], np.array(largest)[None]).reshape(-1)
        is_moved = (is_moved[:, None] | np.array(moved)[None]).reshape(-1)
        assert len(sums) < 2e6, "too many choices to count out"
    time = sums[:, 1] + base_seconds(task)
    room = [
        device.usable_bytes - cache_bytes(task).get(device.name, 0) - sums[:, 2 + d]
        - compute_bytes(task, device, streamed, is_moved)
        for d, device in enumerate(devices)
    ]  # fmt: skip
    least_room = np.minimum.reduce(room)
    allowed_s = 1 / task.min_decode_tps if task.min_decode_tps else math.inf
    return Everything(
        loss=sums[:, 0],
        seconds=time,
        fits=(least_room >= 0) & (time <= allowed_s),
        fits_easily=(least_room >= HELD_BACK_BYTES) & (time * HELD_BACK_TIME <= allowed_s),
    )


def cache_bytes(task: Task) -> dict[str, int]:
    """KV cache of each device: F16 rows of two heads of 64 for K and V."""
    cells = math.ceil(task.workload.context / 256) * 256
    found: dict[str, int] = defaultdict(int)
    for name in task.layers:
        found[name] += cells * 2 * (2 * 64 * 2)
    return found


def base_seconds(task: Task) -> float:
    """Seconds per token that no type changes."""
    devices = {d.name: d for d in task.machine.devices}
    found = FACTORS["fixed_s"] + boundary_seconds(task.layers, task.last.name)
    depth = task.workload.context / task.workload.n_streams
    return float(found + sum(attention_s(task.inventory, devices[n], depth) for n in task.layers))


def boundary_seconds(layers: Sequence[str], last: str) -> float:
    """Half a hop wherever the next layer, or the output, is on another device."""
    ends = (*layers[1:], last)
    return float(FACTORS["crossing_s"] * sum(map(ne, layers, ends)) / 2)


def hop_seconds(inventory: Inventory, tensor: Tensor, home: Device, layers: Sequence[str]) -> float:
    """A hop to the CPU, shared by a layer's experts, or by its other matrices of one kind."""
    if tensor.layer is None or home.name == layers[tensor.layer]:
        return 0.0
    of_layer = [t.name for t in inventory.tensors if t.layer == tensor.layer]
    experts = [name for name in of_layer if "_exps" in name]
    kind = "_exps" if is_expert(tensor) else tensor.name.split(".")[2].split("_")[0] + "_"
    if kind == "ffn_" and experts:
        return 0.0
    same = [n for n in of_layer if kind in n and "norm" not in n and len(n.split(".")) > 3]
    assert same
    return float(FACTORS["crossing_s"]) / len(same)


def attention_s(inventory: Inventory, device: Device, depth: float, width: int = 128) -> float:
    """Seconds to attend to one layer's F16 cache of so many elements per row of K and of V."""
    flops = 4 * inventory.architecture.q_width * depth
    read = depth * 2 * 2 * width / device.bandwidth_bytes_per_s
    return float(
        read * FACTORS[f"{device.kind}_cache_read"]
        + flops / device.vector_flops_per_s * FACTORS[f"{device.kind}_attention"]
    )


def compute_bytes(
    task: Task, device: Device, streamed: NDArray[np.float64], is_moved: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The high end of a compute buffer: a graph, or on the first GPU what is streamed from RAM.

    Several GPUs with all layers work as a pipeline, which has four copies of the inputs, unless
    something is on another device than its layer.
    """
    gpus = task.machine.gpus
    is_first = device == task.machine.devices[0]
    streams = bool(gpus) and is_first and task.workload.ubatch >= OFFLOAD_MIN_BATCH

    def graph(n_copies: int) -> int:
        parts = {False, "CPU" in task.layers}
        if device.kind == "gpu":
            parts = {gpus.index(device) <= gpus.index(task.last)}
        is_last = device == task.last
        return max(
            planned_bytes(
                task.inventory,
                task.workload,
                Work(device.kind, has_layers, False, is_last, 0, n_copies, is_first, streams),
            )
            for has_layers in parts
        )

    is_pipeline = (streamed == 0) & ~is_moved & (len(gpus) > 1)
    found = np.where(is_pipeline, graph(4), graph(1)).astype(float)
    if streams:
        around = around_streamed_bytes(task.inventory, task.workload)
        found = np.where(streamed > 0, np.maximum(found, around + streamed), found)
    return found


def objective(task: Task, found: Everything) -> NDArray[np.float64]:
    """What is minimised: the loss, and the price of time where no speed is asked for."""
    price = 0.0 if task.min_decode_tps else task.rules.decode_price_nats_per_s
    return found.loss + price * found.seconds


def best(task: Task, *, easily: bool = False) -> float:
    """Least objective; infinite where nothing fits."""
    found = every_choice(task)
    fits = found.fits_easily if easily else found.fits
    return float(objective(task, found)[fits].min(initial=math.inf))
