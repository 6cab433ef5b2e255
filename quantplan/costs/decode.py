"""Seconds to decode one token: linear in what is placed where."""

from quantplan.costs.factors import Factors, shipped
from quantplan.costs.traffic import Read, Traffic
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.hardware.network import Network
from quantplan.inventory import Architecture, LayerCache
from quantplan.qtypes import qtype
from quantplan.workload import Workload

_COMMON_BANDWIDTH = 100e9
_F32_BYTES = 4
_STATE_BYTES = 2 * _F32_BYTES  # recurrent state is F32, read and written


def read_s(device: Device, read: Read, factors: Factors | None = None) -> float:
    """Seconds to read and multiply matrices for one token.

    (read^p + unpack^p)^(1/p) + launches, where read = bytes / bandwidth and unpack = weights *
    operations of the type / vector rate: a type is as fast as its bytes until its unpacking is
    slower than the memory.

    Args:
        device: Holds and multiplies them.
        read: The matrices.
        factors: By default llama.cpp's fitted ones.
    """
    f = factors or shipped()
    wait = read.n_bytes / device.bandwidth_bytes_per_s
    work = read.n_weights * f.operations_of(device.kind, read.qtype) / device.vector_flops_per_s
    if device.kind == "gpu":
        wait *= f.gpu_read * (f.gpu_expert_read if read.is_expert else 1.0)
        work *= f.gpu_unpack
        launch = f.gpu_launch_s + (f.gpu_expert_launch_s if read.is_expert else 0.0)
    else:
        wait *= cpu_read_share(device, f) * (f.cpu_expert_read if read.is_expert else 1.0)
        work *= f.cpu_unpack
        launch = f.cpu_launch_s + (f.cpu_expert_launch_s if read.is_expert else 0.0)
    longest = max(wait, work)
    shares = [(part / longest) ** f.overlap for part in (wait, work)] if longest else [0.0]
    together = longest * sum(shares) ** (1 / f.overlap)
    return float(device.decode_slowdown * (together + launch * read.n_matrices))


def cpu_read_share(device: Device, f: Factors) -> float:
    """Time of reading from RAM over that at its full bandwidth."""
    growth = (device.bandwidth_bytes_per_s / _COMMON_BANDWIDTH) ** f.cpu_read_growth
    return float(f.cpu_read * growth)


def cached_cells(cache: LayerCache, workload: Workload, depth: float) -> float:
    """Tokens of context that a layer attends to."""
    if not cache.attends:
        return 0.0
    slides = cache.window and not workload.swa_full
    return min(depth, cache.window) if slides else depth


def cell_bytes(cache: LayerCache, workload: Workload) -> float:
    """Bytes of a layer's cache that are read per token of context."""
    k_bytes = (cache.k_width + cache.indexer_k_width) * qtype(workload.kv_type_k).bpw / 8
    return k_bytes + (cache.v_width + cache.indexer_v_width) * qtype(workload.kv_type_v).bpw / 8


def attention_flops(arch: Architecture, cache: LayerCache) -> float:
    """Operations of one token per token of context in a layer: scores and weighted sum.

    With latent attention every head works on the whole compressed row.
    """
    width = arch.n_head * cache.k_width if is_latent(cache) else arch.q_width
    return 4.0 * width if cache.attends else 0.0


def is_latent(cache: LayerCache) -> bool:
    """Whether a layer has multi-head latent attention: keys and values share one row."""
    return cache.attends and cache.v_width == 0 and cache.k_width > 0


def cache_s(
    device: Device,
    arch: Architecture,
    cache: LayerCache,
    workload: Workload,
    depth: float,
    *,
    factors: Factors | None = None,
) -> float:
    """Seconds per token to attend to one layer's cache, or to update its state.

    Args:
        device: The layer's.
        arch: Dimensions of the model.
        cache: The layer's cache.
        workload: Its cache types and flash attention.
        depth: Tokens in the context.
        factors: By default llama.cpp's fitted ones.
    """
    f = factors or shipped()
    cells = cached_cells(cache, workload, depth)
    n_bytes = cells * cell_bytes(cache, workload) + cache.state_elements * _STATE_BYTES
    flops = cells * attention_flops(arch, cache)
    if device.kind == "cpu":
        reading, attention = f.cpu_cache_read, f.cpu_attention
    else:
        reading, attention = f.gpu_cache_read, f.gpu_attention
        if is_latent(cache):
            attention = f.gpu_latent_attention
        elif workload.kv_type_k not in ("f16", "bf16", "f32"):
            attention = f.gpu_quantized_attention
    seconds = n_bytes / device.bandwidth_bytes_per_s * reading
    seconds += flops / device.vector_flops_per_s * attention
    return device.decode_slowdown * seconds


def network_s(traffic: Traffic, machine: Machine, n_tokens: int = 1) -> float:
    """Seconds on the way to and from devices of other hosts, for a batch of tokens.

    Each time a row of F32 activations per token; at the end the logits of one token.

    Args:
        traffic: What goes where.
        machine: The devices.
        n_tokens: Tokens of the batch.
    """
    seconds = 0.0
    for device in machine.gpus:
        if device.network is not None:
            n_ways = traffic.transfers.get(device.name, 0.0)
            seconds += n_ways * row_s(device.network, traffic.architecture, n_tokens)
            if device.name == traffic.output:
                seconds += logits_s(device.network, traffic.n_vocab)
    return seconds


def row_s(network: Network, arch: Architecture, n_tokens: int = 1) -> float:
    """Seconds for a row of F32 activations per token, one way."""
    return network.seconds(_F32_BYTES * arch.n_embd * n_tokens, 1)


def logits_s(network: Network, n_vocab: int) -> float:
    """Seconds for the logits of one token, which come back from the output layer's device."""
    return network.seconds(_F32_BYTES * n_vocab, 1)


def decode_s(
    traffic: Traffic,
    machine: Machine,
    workload: Workload,
    depth: float,
    factors: Factors | None = None,
) -> float:
    """Seconds to decode one token with so many tokens in the context.

    Args:
        traffic: What a token needs where.
        machine: The devices.
        workload: Its cache types.
        depth: Tokens in the context.
        factors: By default llama.cpp's fitted ones.
    """
    f = factors or shipped()
    devices = {device.name: device for device in machine.devices}
    seconds = f.fixed_s + f.crossing_s * traffic.n_crossings + network_s(traffic, machine)
    for name, reads in traffic.reads.items():
        seconds += sum(read_s(devices[name], read, f) for read in reads)
    for name, cache, n_layers in traffic.caches:
        per_layer = cache_s(devices[name], traffic.architecture, cache, workload, depth, factors=f)
        seconds += n_layers * per_layer
    return seconds
