"""The fitted constants of the speed model (``data/speed.json``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from quantplan.costs import load_data
from quantplan.qtypes import Runtime


@dataclass(frozen=True, slots=True)
class Factors:
    """Constants of one runtime. A number without unit multiplies the time at nominal rates.

    Attributes:
        operations: Operations per weight of each type, by kind of device.
        overlap: Exponent p of (read^p + unpack^p)^(1/p): reading and unpacking go on together, and
            the longer of the two counts.
        gpu_read: Weights over the GPU's bandwidth.
        cpu_read: Weights over the RAM's bandwidth, of a machine that reads 100 GB/s.
        cpu_read_growth: Exponent g of (bandwidth / 100 GB/s)^g by which that grows: the more
            channels and chiplets, the smaller the share of the bandwidth that decoding reaches.
        gpu_expert_read: The same for experts, on top.
        cpu_expert_read: The same for experts, on top.
        gpu_unpack: Operations of a type over the GPU's vector rate.
        cpu_unpack: Operations of a type over the CPU's vector rate.
        gpu_launch_s: Seconds per matrix product on a GPU, whatever its size.
        gpu_expert_launch_s: The same for the products with the chosen experts, on top.
        cpu_launch_s: Seconds per matrix product on the CPU, where all threads meet.
        cpu_expert_launch_s: The same for the products with the chosen experts, on top.
        crossing_s: Seconds per hop from a GPU to the CPU and back.
        fixed_s: Seconds per token.
        gpu_cache_read: Caches over the GPU's bandwidth.
        cpu_cache_read: Caches over the RAM's bandwidth.
        gpu_attention: Attention's operations of one token over the GPU's vector rate.
        gpu_quantized_attention: The same for quantized caches.
        gpu_latent_attention: The same for multi-head latent attention.
        cpu_attention: Attention's operations of one token over the CPU's vector rate.
        gpu_matrix: Prompt: operations over the GPU's matrix rate.
        gpu_expert_matrix: The same for experts, on top.
        expert_rows: Prompt: tokens by which each expert's batch is padded.
        cpu_matrix: Prompt: operations over the CPU's vector rate.
        cpu_prompt_read: Prompt: bytes of the weights used, read once per ubatch, over the RAM's
            bandwidth.
        link: Prompt: bytes of streamed weights over the link's rate.
        gpu_prompt_attention: Prompt: attention's operations over the GPU's matrix rate.
        cpu_prompt_attention: Prompt: attention's operations over the CPU's vector rate.
        cpu_latent_prompt_attention: The same for multi-head latent attention.
        ubatch_launch_s: Prompt: seconds per matrix product and ubatch on a GPU.
    """

    operations: Mapping[str, Mapping[str, float]]
    overlap: float
    gpu_read: float
    cpu_read: float
    cpu_read_growth: float
    gpu_expert_read: float
    cpu_expert_read: float
    gpu_unpack: float
    cpu_unpack: float
    gpu_launch_s: float
    gpu_expert_launch_s: float
    cpu_launch_s: float
    cpu_expert_launch_s: float
    crossing_s: float
    fixed_s: float
    gpu_cache_read: float
    cpu_cache_read: float
    gpu_attention: float
    gpu_quantized_attention: float
    gpu_latent_attention: float
    cpu_attention: float
    gpu_matrix: float
    gpu_expert_matrix: float
    expert_rows: float
    cpu_matrix: float
    cpu_prompt_read: float
    link: float
    gpu_prompt_attention: float
    cpu_prompt_attention: float
    cpu_latent_prompt_attention: float
    ubatch_launch_s: float

    def operations_of(self, kind: str, qtype_name: str) -> float:
        """Operations per weight that a type costs, in units of the nominal rate.

        Args:
            kind: ``gpu``, ``cpu``, or ``cpu_prompt`` for prefill on the CPU.
            qtype_name: The type; interleaved variants (``_R4``, ``_R8``) count as the plain one.
        """
        table = self.operations[kind]
        return table.get(qtype_name.split("_R", maxsplit=1)[0], table["default"])


@cache
def shipped(runtime: Runtime = "llama.cpp") -> Factors:
    """The fitted constants of a runtime."""
    data = load_data("speed.json")
    return Factors(operations=data["operations_per_weight"][runtime], **data["factors"][runtime])
