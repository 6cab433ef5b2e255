"""Compute buffers: what the graphs of llama.cpp need beside weights and caches.

llama.cpp lays the largest graph out once and reserves its peak. Which tensors live at that peak
depends on the kind of attention; their sizes follow from the ubatch, the cells and the widths of
the model. So each kind has a few stages (attention, experts, output, ...), each stage is a sum of
named sizes with fitted coefficients, and the buffer is the largest stage. Coefficients, their
origin and their cross-validated errors are in ``data/compute.json``, which
``scripts/fit_compute.py`` makes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from quantplan.costs.ik_caches import ik_cells
from quantplan.costs.memory import kv_cells
from quantplan.inventory import Architecture
from quantplan.placement import Launch

AttentionKind = Literal["plain", "latent", "sparse", "recurrent"]
_F32_BYTES = 4
# From this build on llama-server was seen to reserve logits for one token per slot; builds of 2025
# did so for every token of the ubatch (as llama-bench and llama-perplexity still need).
_FEW_OUTPUTS_FROM_BUILD = 10434


@dataclass(frozen=True)
class Work:
    """What one device computes.

    Attributes:
        has_layers: Layers, with their caches, are on it.
        has_experts: Expert matrices are in its memory.
        has_output: The output matrix is on it.
        streamed_bytes: Weights that it copies from RAM at one time, for large batches.
        n_copies: Copies of the graph's inputs (4 where several GPUs work as a pipeline).
    """

    has_layers: bool = True
    has_experts: bool = False
    has_output: bool = False
    streamed_bytes: int = 0
    n_copies: int = 1


@dataclass(frozen=True)
class Estimate:
    """A size with a 90 % interval, in bytes."""

    low: int
    expected: int
    high: int


def attention_kind(architecture: Architecture, launch: Launch) -> AttentionKind:
    """The kind of attention that decides about the graph."""
    caches = architecture.caches
    if any(cache.indexer_k_width for cache in caches):
        return "sparse"
    if any(cache.state_elements for cache in caches):
        return "recurrent"
    if launch.ik is not None:
        return "latent" if architecture.latent is not None and launch.ik.mla else "plain"
    return "latent" if any(c.k_width and not c.v_width for c in caches) else "plain"


def sizes(
    architecture: Architecture, n_vocab: int, launch: Launch, n_copies: int = 1
) -> dict[str, float]:
    """Bytes of everything that a stage may hold (one entry per element for the masks).

    Args:
        architecture: The model.
        n_vocab: Rows of the output matrix.
        launch: Runtime, context, ubatch and KV types.
        n_copies: Copies of the graph's inputs.
    """
    workload = launch.workload
    tokens = min(workload.ubatch, workload.context)
    lengths = {_cells(architecture, launch, cache) for cache in architecture.caches if cache.attends}
    longest = max(lengths, default=0)
    row = tokens * _F32_BYTES
    used = architecture.n_expert_used
    is_older = launch.ik is not None or workload.llama_cpp_build < _FEW_OUTPUTS_FROM_BUILD
    found: dict[str, float] = {
        "mask_input": tokens * sum(lengths) * n_copies,
        "mask": tokens * sum(lengths),
        "residual": row * architecture.n_embd,
        "queries": row * architecture.q_width,
        "convolved": row * architecture.convolved_width,
        "ffn": row * architecture.ffn_width,
        "experts_middle": row * used * architecture.expert_width,
        "experts_out": row * used * architecture.n_embd,
        "logits": (tokens if is_older else workload.slots) * n_vocab * _F32_BYTES,
        "scores": 0.0 if workload.flash_attention else row * longest * architecture.n_head,
        "latents": 0.0,
    }
    latent = architecture.latent
    if latent is not None:
        found["latents"] = row * architecture.n_head * (latent.rank + latent.rope)
        heads, chunk = _chunk(architecture, launch, longest)
        found["rope_copies"] = _F32_BYTES * latent.rope * architecture.n_head * longest
        found["expanded"] = chunk
        if launch.ik is not None and heads < architecture.n_head:
            found["scores"] *= heads / architecture.n_head
    return found


def _cells(architecture: Architecture, launch: Launch, cache: Any) -> int:
    if launch.ik is not None:
        return ik_cells(cache, launch.workload, launch.ik, architecture.name)
    return kv_cells(cache, launch.workload)


def _chunk(architecture: Architecture, launch: Launch, cells: int) -> tuple[int, float]:
    """Heads that ik_llama.cpp expands at one time (``-amb``), and their bytes."""
    latent = architecture.latent
    n_head = architecture.n_head
    if latent is None or launch.ik is None:
        return n_head, 0.0
    rope = n_head * latent.rope
    per_head = (latent.k_width - rope + latent.v_width) / n_head * cells * _F32_BYTES
    if not launch.workload.flash_attention:
        per_head = min(launch.workload.ubatch, launch.workload.context) * cells * _F32_BYTES
    limit, heads = launch.ik.attention_max_mib * 2**20, n_head
    while limit and heads * per_head > limit and heads % 2 == 0:
        heads //= 2
    return heads, heads * per_head


@cache
def _fits() -> dict[str, Any]:
    text = files("quantplan.costs").joinpath("data/compute.json").read_text(encoding="utf-8")
    fits: dict[str, Any] = json.loads(text)["fits"]
    return fits


def fit_name(launch: Launch) -> str:
    """Which family of builds a launch belongs to."""
    if launch.ik is not None:
        return "ik_llama.cpp"
    is_older = launch.workload.llama_cpp_build < _FEW_OUTPUTS_FROM_BUILD
    return "llama.cpp of 2025" if is_older else "llama.cpp"


def stages(launch: Launch, kind: AttentionKind, device_kind: str) -> Mapping[str, Any]:
    """Fitted stages of a runtime, kind of attention and kind of device."""
    by_kind = _fits()[fit_name(launch)][device_kind]
    flash = "flash" if launch.workload.flash_attention else "scores"
    found: Mapping[str, Any] = by_kind.get(f"{kind} {flash}") or by_kind[f"plain {flash}"]
    return found


def estimate(
    architecture: Architecture, n_vocab: int, launch: Launch, work: Work, device_kind: str
) -> Estimate:
    """The compute buffer of one device."""
    kind = attention_kind(architecture, launch)
    found = sizes(architecture, n_vocab, launch, work.n_copies)
    fit = stages(launch, kind, device_kind)
    peak = 0.0
    for stage in applicable(work):
        coefficients = fit["stages"].get(stage, {})
        peak = max(peak, sum(c * found.get(name, 0.0) for name, c in coefficients.items()))
    streaming = 0.0
    if work.streamed_bytes:
        coefficients = fit["stages"].get("streaming", {})
        streaming = sum(c * found.get(name, 0.0) for name, c in coefficients.items())
    low, high = fit["interval"]
    ...
