"""Seconds to process a prompt: matrix work, streamed weights, attention."""

from quantplan.costs.compute import LEAST_STREAMED_BATCH
from quantplan.costs.decode import attention_flops, cached_cells, is_latent, network_s
from quantplan.costs.factors import Factors, shipped
from quantplan.costs.traffic import Read, Traffic
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.workload import Workload


def streams(machine: Machine, n_tokens: int) -> bool:
    """Whether weights in RAM are copied to a GPU to multiply a batch (``op offload``)."""
    return machine.streaming_gpu is not None and n_tokens >= LEAST_STREAMED_BATCH


def prefill_s(
    traffic: Traffic,
    machine: Machine,
    workload: Workload,
    depth: float,
    *,
    n_tokens: int | None = None,
    op_offload: bool = True,
    factors: Factors | None = None,
) -> float:
    """Seconds to process one ubatch of a prompt.

    Args:
        traffic: What a token needs where.
        machine: The devices.
        workload: Its ubatch is what one pass processes.
        depth: Tokens in the context before the ubatch.
        n_tokens: Tokens of the ubatch; by default a whole one.
        op_offload: Whether weights in RAM may be copied to a GPU.
        factors: By default llama.cpp's fitted ones.
    """
    f = factors or shipped()
    n = workload.ubatch if n_tokens is None else n_tokens
    devices = {device.name: device for device in machine.devices}
    arch = traffic.architecture
    seconds = network_s(traffic, machine, n)
    for name, reads in traffic.reads.items():
        streamed = op_offload and name == "CPU" and streams(machine, n)
        gpu = machine.streaming_gpu
        worker = gpu if streamed and gpu is not None else devices[name]
        for read in reads:
            if read.is_prompt_work and read.n_weights:
                seconds += _matrix_s(worker, read, n, arch.active_share, f)
                if streamed:
                    used = _used_share(read, n, arch.active_share)
                    slow = worker.prefill_slowdown
                    seconds += slow * f.link * used * read.held_bytes / worker.link_bytes_per_s
    for name, cache, n_layers in traffic.caches:
        # Of a latent cache, prompts decompress the rows: each head works on its own width again.
        flops = 4.0 * arch.q_width if is_latent(cache) else attention_flops(arch, cache)
        cells = cached_cells(cache, workload, depth + n / 2)
        device = devices[name]
        share = f.gpu_prompt_attention
        if device.kind == "cpu":
            latent = f.cpu_latent_prompt_attention
            share = latent if is_latent(cache) else f.cpu_prompt_attention
        work = n_layers * n * cells * flops / device.flops_per_s
        seconds += device.prefill_slowdown * share * work
    return seconds


def _used_share(read: Read, n_tokens: int, active_share: float) -> float:
    """Share of the experts that at least one token of a batch chooses, if it chooses evenly."""
    return 1 - (1 - active_share) ** n_tokens if read.is_expert else 1.0


def _matrix_s(device: Device, read: Read, n_tokens: int, active_share: float, f: Factors) -> float:
    """Seconds to multiply a batch with matrices."""
    if device.kind == "cpu":
        operations = f.cpu_matrix * f.operations_of("cpu_prompt", read.qtype)
        seconds = n_tokens * read.n_weights * operations / device.flops_per_s
        used_bytes = read.held_bytes * _used_share(read, n_tokens, active_share)
        seconds += f.cpu_prompt_read * used_bytes / device.bandwidth_bytes_per_s
        return device.prefill_slowdown * seconds
    flops = 2 * n_tokens * read.n_weights * f.gpu_matrix
    if read.is_expert:
        # Each expert multiplies its own few tokens, in tiles.
        flops = 2 * read.held_weights * (n_tokens * active_share + f.expert_rows)
        flops *= f.gpu_matrix * f.gpu_expert_matrix
    seconds = flops / device.flops_per_s + f.ubatch_launch_s * read.n_matrices
    return device.prefill_slowdown * seconds
