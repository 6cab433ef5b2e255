"""Bytes of weights, KV caches and recurrent states, exactly.

Rules of llama.cpp b10434 to b11434, checked against the buffer sizes that it prints.
"""

from typing import get_args

from quantplan.errors import WorkloadError
from quantplan.inventory import Architecture, LayerCache, Tensor
from quantplan.llama_cpp import KVType
from quantplan.qtypes import QType, qtype
from quantplan.workload import Workload

# Buffers hold each tensor at a multiple of this (ggml's TENSOR_ALIGNMENT on the CPU, and so on an
# RPC device whose server computes on a CPU).
BUFFER_ALIGNMENT = 32
# CUDA pads more: tensors to 128 bytes, and the last row of a quantized matrix to a multiple of
# 512 weights (ggml-cuda.cu, MATRIX_ROW_PADDING).
_CUDA_ALIGNMENT = 128
_CUDA_ROW_PADDING = 512
# llama.cpp rounds the number of KV cells up to this.
CELL_PADDING = 256
_F32_BYTES = 4
# Builds in which the next-token-prediction blocks of these architectures get a KV cache although
# their weights are skipped. b10434 was seen to do so; b7599 (for glm4moe,
# https://github.com/ggml-org/llama.cpp/issues/18585) and b11434 not to.
_NEXTN_CACHE_BUILDS = range(10434, 11434)
CHECKED_BUILD = 10434
_NEXTN_CACHE = {
    "bailingmoe2", "deepseek2", "exaone-moe", "exaone4", "glm4", "glm4moe", "mistral4",
}  # fmt: skip
# Of these, b10434 ignored the blocks' weights even for multi-token prediction.
_NEXTN_WEIGHTS_IGNORED = {"bailingmoe2", "exaone-moe", "exaone4", "glm4", "glm4moe"}
# Before about this build, which lies between b7815 and b7917, latent attention had a V cache too
# (https://github.com/ggml-org/llama.cpp/pull/19067).
_LATENT_WITHOUT_V_FROM_BUILD = 7830


def pad(n_bytes: int, alignment: int) -> int:
    """Rounds up to a multiple."""
    return -(-n_bytes // alignment) * alignment


def weight_bytes(tensor: Tensor, qtype_name: str) -> int:
    """Bytes that a tensor takes in a model buffer.

    Args:
        tensor: The tensor; its own type plays no part.
        qtype_name: The type to hold it in.
    """
    return pad(tensor.bytes_as(qtype_name), BUFFER_ALIGNMENT)


def cuda_padding_bytes(tensor: Tensor, qtype_name: str) -> int:
    """Bytes that a CUDA buffer takes for a tensor on top of `weight_bytes`."""
    kind = qtype(qtype_name)
    n_bytes = tensor.bytes_as(qtype_name)
    overhang = tensor.shape_ne[0] % _CUDA_ROW_PADDING
    if not kind.is_float and kind.block > 1 and overhang:
        padding = _CUDA_ROW_PADDING - overhang
        n_bytes += padding // kind.block * kind.block_bytes
    return pad(n_bytes, _CUDA_ALIGNMENT) - weight_bytes(tensor, qtype_name)


def kv_cells(cache: LayerCache, workload: Workload) -> int:
    """Cells of one layer's KV cache, per stream.

    A sliding window keeps the window of every sequence and one ubatch.
    """
    context = pad(workload.context, CELL_PADDING)
    unified = workload.kv_unified
    cells = context if unified else pad(context // workload.slots, CELL_PADDING)
    if cache.window and not workload.swa_full:
        windows = cache.window * (workload.slots if unified else 1)
        cells = min(cells, windows + workload.ubatch)
    return pad(cells, CELL_PADDING)


def cache_bytes(architecture: Architecture, workload: Workload) -> tuple[int, ...]:
    """Bytes of each layer's KV cache and recurrent state, all streams.

    K and V rows of all cells at their types; an indexer's K rows at the K type; recurrent state in
    F32 for every slot. Without flash attention V rows are as wide as the widest layer's.

    Returns:
        One entry per layer; next-token-prediction blocks have 0 where their cache is skipped.

    Raises:
        WorkloadError: A row of the cache is no whole number of blocks of its type, or the types of
            K and V differ where llama.cpp wants one.
    """
    caches = architecture.caches
    _check_types(architecture, workload)
    n_cached = architecture.n_loaded_layers
    if _caches_nextn_like_others(architecture, workload):
        n_cached = architecture.n_layers
    k_type, v_type = qtype(workload.kv_type_k), qtype(workload.kv_type_v)
    sizes = []
    for cache in caches[:n_cached]:
        indexer = row_bytes(k_type, cache.indexer_k_width)
        indexer += row_bytes(v_type, cache.indexer_v_width)
        row = _attention_row_bytes(architecture, cache, workload) + indexer
        state = state_bytes(cache, workload)
        sizes.append(row * kv_cells(cache, workload) * workload.n_streams + state)
    return (*sizes, *(0,) * (architecture.n_layers - n_cached))


def prediction_cache_bytes(architecture: Architecture, workload: Workload) -> tuple[int, ...]:
    """Bytes that each layer adds for the draft context of multi-token prediction.

    The context has the KV cache of the next-token-prediction blocks alone, without an indexer's;
    older builds made it for every layer of some architectures (as b10434 did for glm4moe; mended
    in https://github.com/ggml-org/llama.cpp/pull/28630).

    Args:
        architecture: The model.
        workload: The main context's, with the KV types of the draft context.

    Raises:
        WorkloadError: See `cache_bytes`.
    """
    _check_types(architecture, workload)
    if _caches_nextn_like_others(architecture, workload):
        return cache_bytes(architecture, workload)
    sizes = [
        _attention_row_bytes(architecture, cache, workload)
        * kv_cells(cache, workload)
        * workload.n_streams
        for cache in architecture.caches[architecture.n_loaded_layers :]
    ]
    return (*(0,) * architecture.n_loaded_layers, *sizes)


def loads_prediction_weights(architecture: Architecture, workload: Workload) -> bool:
    """Whether multi-token prediction makes llama.cpp load the next-token-prediction blocks."""
    is_older = workload.llama_cpp_build in _NEXTN_CACHE_BUILDS
    return not (is_older and architecture.name in _NEXTN_WEIGHTS_IGNORED)


def _caches_nextn_like_others(architecture: Architecture, workload: Workload) -> bool:
    return workload.llama_cpp_build in _NEXTN_CACHE_BUILDS and architecture.name in _NEXTN_CACHE


def _has_latent_v(architecture: Architecture, workload: Workload) -> bool:
    is_older = workload.llama_cpp_build < _LATENT_WITHOUT_V_FROM_BUILD
    return is_older and architecture.latent is not None


def _check_types(architecture: Architecture, workload: Workload) -> None:
    faults = [
        f"llama.cpp has no KV type {kind}, which is ik_llama.cpp's: use one of "
        + ", ".join(get_args(KVType))
        for kind in dict.fromkeys((workload.kv_type_k, workload.kv_type_v))
        if kind not in get_args(KVType)
    ]
    is_latent = any(cache.k_width and not cache.v_width for cache in architecture.caches)
    is_latent = is_latent and not _has_latent_v(architecture, workload)
    if is_latent and workload.kv_type_k != workload.kv_type_v:
        faults.append(
            f"the KV types {workload.kv_type_k} and {workload.kv_type_v} differ, which llama.cpp "
            "refuses for multi-head latent attention: use one type for both"
        )
    if faults:
        raise WorkloadError(faults)


def _attention_row_bytes(architecture: Architecture, cache: LayerCache, workload: Workload) -> int:
    """Bytes of the K and V rows of one cell."""
    v_width = cache.v_width
    if cache.attends and not workload.flash_attention:
        v_width = architecture.widest_v_width
    if _has_latent_v(architecture, workload) and cache.k_width and not v_width:
        v_width = architecture.latent.rank if architecture.latent else 0
    k_row = row_bytes(qtype(workload.kv_type_k), cache.k_width)
    return k_row + row_bytes(qtype(workload.kv_type_v), v_width)


def state_bytes(cache: LayerCache, workload: Workload) -> int:
    """Bytes of a layer's recurrent state, all slots."""
    return cache.state_elements * _F32_BYTES * workload.slots


def row_bytes(kind: QType, width: int) -> int:
    """Bytes of one row of a cache.

    Raises:
        WorkloadError: The row is no whole number of blocks of the type.
    """
    try:
        return kind.row_bytes(width) if width else 0
    except ValueError as error:
        raise WorkloadError(f"KV cache: {error}; use f16 for the KV type") from error
