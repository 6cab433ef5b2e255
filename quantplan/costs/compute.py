"""Compute buffers: what llama.cpp's graphs need beside weights and caches.

llama.cpp lays its largest graph out once and reserves the peak. Which tensors live at the peak
depends on the kind of attention and on what a device computes; how large they are follows from the
ubatch, the cells and the widths of the model. So a buffer is a sum of a few such sizes with fitted
factors, or the largest of two such sums. Factors, origin and cross-validated errors are in
``data/compute.json``, which ``scripts/fit_compute.py`` makes.
"""

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from quantplan.costs.ik_caches import ik_cells
from quantplan.costs.memory import kv_cells, weight_bytes
from quantplan.hardware.machine import Machine
from quantplan.inventory import Architecture, Inventory, LayerCache
from quantplan.placement import Launch, Placement
from quantplan.schema import Frozen
from quantplan.units import MIB

DeviceKind = Literal["gpu", "cpu"]
Sizes = Mapping[str, float]

_F32_BYTES = 4
# From this build on llama-server was seen to reserve logits for one token per slot; builds of 2025
# did so for every token of the ubatch (as llama-bench and llama-perplexity still need).
_FEW_OUTPUTS_FROM_BUILD = 10068
# From this batch on a GPU multiplies by weights held in RAM, by copying them to it one after the
# other (GGML_OP_OFFLOAD_MIN_BATCH). ik_llama.cpp wants as many tokens for each expert, since the
# pull request of this day (520).
LEAST_STREAMED_BATCH = 32
# GGML_SCHED_MAX_COPIES
PIPELINE_COPIES = 4
# Their scores need more than the flash-attention kernels do (position biases, capped scores).
_WITHOUT_FLASH_ATTENTION = {"grok", "t5", "t5encoder"}
_IK_COUNTS_EXPERTS_SINCE = datetime.date(2025, 6, 11)
# Its GPUs read rows that are interleaved for CPUs only of these types, since about this day.
_IK_STREAMS_ROWS_SINCE = datetime.date(2025, 6, 5)
_ROWS = re.compile(r".*_R\d+")


@dataclass(frozen=True)
class Work:
    """What one device computes.

    Attributes:
        device_kind: ``gpu`` or ``cpu``.
        has_layers: Whether layers, with their caches, are on it.
        has_experts: Whether expert matrices are in its memory.
        has_output: Whether the output matrix is on it.
        streamed_bytes: Weights that a large batch copies to it from RAM at one time; llama.cpp
            has the first GPU do so for all.
        n_input_copies: Copies of the graph's inputs; 4 where several GPUs work as a pipeline.
        is_first: Whether it is the first device, to which the inputs go.
        streams: Whether it computes large batches of every layer, with weights that it copies from
            RAM.
    """

    device_kind: DeviceKind
    has_layers: bool = True
    has_experts: bool = False
    has_output: bool = False
    streamed_bytes: int = 0
    n_input_copies: int = 1
    is_first: bool = True
    streams: bool = False


class BytesEstimate(Frozen):
    """A size in bytes that is not exactly known.

    Attributes:
        low: It is above this in 95 % of the cases.
        expected: The best guess.
        high: It is below this in 95 % of the cases.
    """

    low: int
    expected: int
    high: int

    def at_least(self, other: "BytesEstimate") -> "BytesEstimate":
        """The larger one of two estimates, bound by bound."""
        return BytesEstimate(
            low=max(self.low, other.low),
            expected=max(self.expected, other.expected),
            high=max(self.high, other.high),
        )

    def plus(self, n_bytes: int) -> "BytesEstimate":
        """The estimate with bytes on top that are known."""
        return BytesEstimate(
            low=self.low + n_bytes, expected=self.expected + n_bytes, high=self.high + n_bytes
        )


class Fit(Frozen):
    """The factors of one kind of graph.

    Attributes:
        factors: One or two sums of sizes, the largest of which counts: factor by name of the size.
        interval: Measured by predicted, 5 % and 95 % quantiles of the cross-validation.
        n: Measured buffers.
        median_error: Cross-validated, relative.
        p90_error: Cross-validated, relative; 90 % quantile.
    """

    factors: tuple[dict[str, float], ...]
    interval: tuple[float, float]
    n: int
    median_error: float
    p90_error: float

    def bytes_of(self, sizes: Sizes) -> float:
        """The expected size."""
        return max(
            sum(factor * sizes.get(name, 0.0) for name, factor in row.items())
            for row in self.factors
        )


@cache
def _fits() -> dict[str, dict[str, Fit]]:
    """Fits by runtime, then by kind of graph."""
    text = files("quantplan.costs").joinpath("data/compute.json").read_text(encoding="utf-8")
    by_runtime: dict[str, dict[str, Any]] = json.loads(text)["fits"]
    return {
        runtime: {key: Fit(**fit) for key, fit in fits.items()}
        for runtime, fits in by_runtime.items()
    }


def graph_sizes(
    architecture: Architecture, n_vocab: int, launch: Launch, work: Work
) -> dict[str, float]:
    """Bytes of everything that may live in a graph, by name; masks in elements.

    Args:
        architecture: The model.
        n_vocab: Rows of the output matrix.
        launch: Runtime, context, ubatch and KV types.
        work: What the device computes.
    """
    workload = launch.workload
    tokens = min(workload.ubatch, workload.context)
    row = tokens * _F32_BYTES
    used = architecture.n_expert_used
    # Layers with and without a sliding window have a mask each.
    lengths = {_cells(architecture, launch, c) for c in architecture.caches if c.k_width}
    longest = max(lengths, default=0)
    # Encoders, which keep no cache, have no logits; of other models embeddings come with them.
    is_encoder = not any(c.k_width or c.state_elements for c in architecture.caches)
    has_all_outputs = _is_older(launch) or (launch.embeds and not is_encoder)
    found: dict[str, float] = {
        "mask": tokens * sum(lengths),
        "mask_inputs": tokens * sum(lengths) * work.n_input_copies,
        "first_mask": tokens * sum(lengths) * work.is_first,
        "residual": row * architecture.n_embd,
        "queries": row * architecture.q_width,
        "convolved": row * architecture.convolved_width,
        "ffn": row * architecture.ffn_width,
        "experts_middle": row * used * architecture.expert_width,
        "experts_out": row * used * architecture.n_embd,
        "logits": n_vocab * _F32_BYTES * (tokens if has_all_outputs else workload.slots),
        "scores": 0.0 if _is_flash(architecture, launch) else row * longest * architecture.n_head,
    }
    latent = architecture.latent
    if latent is not None:
        found["latents"] = row * architecture.n_head * (latent.rank + latent.rope)
    if latent is not None and launch.ik is not None and launch.ik.mla:
        found |= _expanded_sizes(architecture, launch, longest, found["scores"])
    return found


def _is_flash(architecture: Architecture, launch: Launch) -> bool:
    return launch.workload.flash_attention and architecture.name not in _WITHOUT_FLASH_ATTENTION


def _is_older(launch: Launch) -> bool:
    return launch.ik is not None or launch.workload.llama_cpp_build < _FEW_OUTPUTS_FROM_BUILD


def _cells(architecture: Architecture, launch: Launch, layer_cache: LayerCache) -> int:
    if launch.ik is not None:
        return ik_cells(layer_cache, launch.workload, launch.ik, architecture.name)
    return kv_cells(layer_cache, launch.workload)


def _expanded_sizes(
    architecture: Architecture, launch: Launch, cells: int, scores: float
) -> dict[str, float]:
    """What ik_llama.cpp expands latent rows to, some heads at a time as ``-amb`` allows."""
    latent, ik, n_head = architecture.latent, launch.ik, architecture.n_head
    if latent is None or ik is None:
        return {}
    tokens = min(launch.workload.ubatch, launch.workload.context)
    rope_width = latent.rope * n_head
    width = latent.k_width - rope_width + latent.v_width
    expanded = float(_F32_BYTES * width * cells)
    piece = expanded if launch.workload.flash_attention else scores
    share, limit = 1.0, ik.attention_max_mib * MIB
    while limit and share * piece > limit and share * n_head > 1:
        share /= 2
    if not launch.workload.flash_attention:
        # Pieces are joined one by one, and what is joined so far is held twice for a moment.
        joined = 2 * _F32_BYTES * tokens * n_head * latent.rank if share < 1 else 0
        return {"scores": share * scores, "joined": float(joined)}
    name = "expanded" if share == 1.0 else "expanded_pieces"
    return {"rope_copies": float(_F32_BYTES * rope_width * cells), name: share * expanded}


def attention_kind(architecture: Architecture, launch: Launch) -> str:
    """What the graph of the attention is like: plain, latent, sparse, recurrent or none at all."""
    caches = architecture.caches
    if not any(c.k_width for c in caches):
        return "attention-free"
    if any(c.indexer_k_width for c in caches):
        return "sparse"
    if any(c.state_elements for c in caches):
        return "recurrent"
    if launch.ik is not None:
        return "latent" if architecture.latent is not None and launch.ik.mla else "plain"
    return "latent" if any(c.k_width and not c.v_width for c in caches) else "plain"


def runtime_of(launch: Launch) -> str:
    """The family of builds, as ``data/compute.json`` names it."""
    if launch.ik is not None:
        return "ik_llama.cpp"
    return "llama.cpp of 2025" if _is_older(launch) else "llama.cpp"


def graph_keys(architecture: Architecture, launch: Launch, work: Work) -> tuple[str, ...]:
    """The kind of graph, as ``data/compute.json`` names it, then the most similar kinds."""
    flash = "flash" if _is_flash(architecture, launch) else "scores"
    kind = attention_kind(architecture, launch)
    has_layers = work.has_layers or work.streams
    held = {"layers": has_layers, "experts": work.has_experts and architecture.n_expert > 0}
    does = " ".join(name for name, is_here in held.items() if is_here) or "inputs"
    kinds = dict.fromkeys([kind, "latent" if kind == "sparse" else "plain", "plain"])
    similar = dict.fromkeys([does, "layers"] if has_layers else [does])
    return tuple(f"{work.device_kind} {k} {flash} {d}" for k in kinds for d in similar)


def fit_of(architecture: Architecture, launch: Launch, work: Work) -> Fit:
    """The fit for one device; that of the most similar graph where its own was not measured."""
    fits = _fits()[runtime_of(launch)]
    return next(fits[k] for k in graph_keys(architecture, launch, work) if k in fits)


def estimate(architecture: Architecture, n_vocab: int, launch: Launch, work: Work) -> BytesEstimate:
    """The compute buffer of one device.

    Args:
        architecture: The model.
        n_vocab: Rows of the output matrix.
        launch: Runtime, context, ubatch and KV types.
        work: What the device computes.
    """
    sizes = graph_sizes(architecture, n_vocab, launch, work)
    fits = _fits()[runtime_of(launch)]
    found = BytesEstimate(low=0, expected=0, high=0)
    has_experts = work.has_experts and architecture.n_expert > 0
    if work.device_kind == "cpu" or work.has_layers or work.streams or has_experts:
        found = _interval(fit_of(architecture, launch, work), sizes)
    if work.has_output:
        found = found.at_least(_interval(fits["output"], sizes))
    if work.streamed_bytes:
        found = found.at_least(_interval(fits["streaming"], sizes).plus(work.streamed_bytes))
    return found


def _interval(fit: Fit, sizes: Sizes) -> BytesEstimate:
    expected = fit.bytes_of(sizes)
    low, high = (round(expected * bound) for bound in fit.interval)
    return BytesEstimate(low=low, expected=round(expected), high=high)


def around_streamed(architecture: Architecture, n_vocab: int, launch: Launch) -> BytesEstimate:
    """What a compute buffer holds beside weights that are streamed to it."""
    fit = _fits()[runtime_of(launch)]["streaming"]
    return _interval(fit, graph_sizes(architecture, n_vocab, launch, Work("gpu")))


def n_input_copies(launch: Launch, placement: Placement, machine: Machine) -> int:
    """Copies of the graph's inputs: several where the GPUs work as a pipeline.

    They do so where every layer is on a GPU and no tensor is elsewhere (llama.cpp's
    ``llama_context``); the number is ``GGML_SCHED_MAX_COPIES``.
    """
    is_whole = machine.ram.name not in (*placement.layers, placement.output)
    pipes = is_whole and launch.split_mode == "layer" and launch.cache_on_gpu
    # Devices of other hosts compute nothing while the next batch is prepared.
    pipes = (
        pipes and len(machine.gpus) > 1 and not machine.endpoints and not placement.is_overridden
    )
    return PIPELINE_COPIES if pipes else 1


def streams(launch: Launch) -> bool:
    """Whether llama.cpp multiplies by matrices that are held in RAM on a GPU, copying them there.

    ik_llama.cpp asks for more tokens before it does so with experts; see `streamed_bytes`.
    """
    return launch.op_offload and launch.workload.ubatch >= LEAST_STREAMED_BATCH


def streamed_bytes(
    inventory: Inventory, launch: Launch, placement: Placement, machine: Machine
) -> int:
    """Most bytes of weights that a large batch copies from RAM to the first GPU at one time.

    One tensor; in ik_llama.cpp with fused experts the up and gate experts of a layer.
    """
    if not (machine.streaming_gpu and streams(launch)) or (launch.ik and launch.ik.repacks_rows):
        return 0
    architecture, tokens = inventory.architecture, launch.workload.ubatch
    pieces: dict[str, int] = {}
    for name, homes in placement.tensors.items():
        tensor = inventory.by_name[name]
        is_output = tensor.role_class == "output" and launch.ik is not None
        if tensor.layer is None and not is_output:
            continue
        is_matrix = len(tensor.shape_ne) > 1 and _is_streamable(tensor.qtype, launch)
        if machine.ram.name not in homes or not is_matrix:
            continue
        if tokens < _least_streamed_batch(architecture, launch, is_expert=tensor.is_expert):
            continue
        fuses = tensor.is_expert and launch.ik is not None and launch.ik.fused_experts
        piece = re.sub("_(up|gate)_exps", "_up_gate_exps", name) if fuses else name
        pieces[piece] = pieces.get(piece, 0) + weight_bytes(tensor, tensor.qtype)
    return max(pieces.values(), default=0)


def _is_streamable(qtype_name: str, launch: Launch) -> bool:
    if launch.ik is None or not _ROWS.fullmatch(qtype_name):
        return True
    return qtype_name.startswith("IQ") and launch.ik.as_of >= _IK_STREAMS_ROWS_SINCE


def _least_streamed_batch(architecture: Architecture, launch: Launch, *, is_expert: bool) -> float:
    if not is_expert or launch.ik is None or launch.ik.as_of < _IK_COUNTS_EXPERTS_SINCE:
        return LEAST_STREAMED_BATCH
    return LEAST_STREAMED_BATCH * architecture.n_expert / max(1, architecture.n_expert_used)
