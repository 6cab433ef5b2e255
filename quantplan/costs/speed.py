"""Seconds per token: bytes read over bandwidth for decoding, matrix work for prefill.

A first model: every rate is a constant share of the nominal one (``data/speed.json``), whatever the
tensor type.
"""

from quantplan.costs import load_data
from quantplan.hardware import Device, Machine
from quantplan.inventory import Inventory, Tensor
from quantplan.qtypes import qtype
from quantplan.workload import Workload

_EXPERT_CLASSES = ("up_gate_experts", "down_experts")


def is_expert(tensor: Tensor) -> bool:
    """Whether only some of the tensor's matrices are read per token."""
    return tensor.role_class in _EXPERT_CLASSES


def active_bytes(inventory: Inventory, tensor: Tensor, qtype_name: str) -> float:
    """Bytes read for one token: active experts only, one row of the embedding, else everything."""
    if is_expert(tensor):
        return tensor.bytes_as(qtype_name) * inventory.architecture.active_share
    if tensor.role_class == "embedding":
        return float(qtype(qtype_name).row_bytes(tensor.shape_ne[0]))
    return float(tensor.bytes_as(qtype_name))


def active_weights(inventory: Inventory, tensor: Tensor) -> float:
    """Weights multiplied for one token."""
    if is_expert(tensor):
        return tensor.n_weights * inventory.architecture.active_share
    return 0.0 if tensor.role_class == "embedding" else float(tensor.n_weights)


def read_rate(device: Device, *, experts: bool) -> float:
    """Bytes per second at which a device reads weights while decoding."""
    data = load_data("speed.json")
    if device.kind == "gpu":
        share = data["gpu_bandwidth_share"]
    else:
        share = data["cpu_expert_bandwidth_share" if experts else "cpu_bandwidth_share"]
    return float(device.bandwidth_bytes_per_s * share)


def fixed_s() -> float:
    """Seconds per token that depend on nothing else."""
    return float(load_data("speed.json")["fixed_s_per_token"])


def prefill_tps(
    machine: Machine, workload: Workload, weights_on: dict[str, float], streamed_bytes: float
) -> float:
    """Prompt tokens per second for whole ubatches at an empty context.

    Args:
        machine: The devices.
        workload: Its ubatch is what one pass processes.
        weights_on: Weights multiplied per token, by the name of the device that holds them.
        streamed_bytes: Bytes of weights held in RAM that llama.cpp copies to a GPU once per ubatch
            (``op offload``), where their matrix work happens then.
    """
    share = load_data("speed.json")["matrix_share"]
    seconds = 0.0
    for device in machine.devices:
        worker = machine.gpus[0] if streamed_bytes and device.kind == "cpu" else device
        flops = 2 * weights_on.get(device.name, 0.0) * workload.ubatch
        seconds += flops / (worker.flops_per_s * share)
    if streamed_bytes:
        seconds += streamed_bytes / machine.gpus[0].link_bytes_per_s
    return workload.ubatch / seconds if seconds else 0.0
