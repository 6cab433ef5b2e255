"""Bytes of the KV caches that ik_llama.cpp makes, where they differ from llama.cpp's.

Established from the buffer sizes of 111 published load logs and from the pull requests named here
(https://github.com/ikawrakow/ik_llama.cpp).
"""

import datetime

from quantplan.costs.memory import pad, row_bytes, state_bytes
from quantplan.errors import WorkloadError
from quantplan.inventory import Architecture, LayerCache
from quantplan.placement import IkOptions
from quantplan.qtypes import qtype
from quantplan.workload import Workload

# The only architectures whose latent rows it can store, and those that can compact their windows
# (pull requests 2253, 2266, 2310, 2378).
_LATENT = {"deepseek2", "deepseek32", "glm-dsa", "mistral4"}
COMPACTS_WINDOWS = {"gemma4", "laguna", "openpangu"}
# Cells are padded for the flash-attention kernels, otherwise less.
_FLASH_PADDING = 256
_PADDING = 32
# A compacted window leaves room for one ubatch, or for this many tokens.
_LEAST_WINDOW_SLACK = 256
# Next-token-prediction blocks have no cache from this day on (pull request 843).
_SKIPS_NEXTN_SINCE = datetime.date(2025, 10, 20)


def ik_cells(cache: LayerCache, workload: Workload, options: IkOptions, arch_name: str) -> int:
    """Cells of one layer's KV cache, which all slots share.

    Sliding-window layers keep the full context unless they are compacted.
    """
    padding = _FLASH_PADDING if workload.flash_attention else _PADDING
    cells = pad(workload.context, padding)
    if cache.window and options.swa_compress and arch_name in COMPACTS_WINDOWS:
        window = cache.window + max(workload.ubatch, _LEAST_WINDOW_SLACK)
        cells = min(cells, pad(window, _FLASH_PADDING))
    return cells


def ik_cache_bytes(
    architecture: Architecture, workload: Workload, options: IkOptions
) -> tuple[int, ...]:
    """Bytes of each layer's KV cache and recurrent state.

    Args:
        architecture: The model.
        workload: Context, slots and KV types.
        options: What is particular to ik_llama.cpp.

    Returns:
        One entry per layer; next-token-prediction blocks have 0 where their cache is skipped.

    Raises:
        WorkloadError: A row of the cache is no whole number of blocks of its type.
    """
    skips_nextn = options.as_of >= _SKIPS_NEXTN_SINCE
    n_cached = architecture.n_loaded_layers if skips_nextn else architecture.n_layers
    sizes = []
    for cache in architecture.caches[:n_cached]:
        cells = ik_cells(cache, workload, options, architecture.name)
        row = _row_bytes(architecture, cache, workload, options)
        sizes.append(row * cells + state_bytes(cache, workload))
    return (*sizes, *(0,) * (architecture.n_layers - n_cached))


def _row_bytes(
    architecture: Architecture, cache: LayerCache, workload: Workload, options: IkOptions
) -> int:
    """Bytes of one cell: K and V, or the latent row, or it and its transposed values."""
    k_type, v_type = qtype(workload.kv_type_k), qtype(workload.kv_type_v)
    latent = architecture.latent if architecture.name in _LATENT else None
    indexer = row_bytes(qtype("F16"), cache.indexer_k_width)
    if latent is None:
        return row_bytes(k_type, cache.k_width) + row_bytes(v_type, cache.v_width) + indexer
    if options.mla == 0:
        return row_bytes(k_type, latent.k_width) + row_bytes(v_type, latent.v_width) + indexer
    width = latent.rank + latent.rope
    if workload.flash_attention:
        return row_bytes(k_type, width) + indexer
    if options.mla == 1:
        return row_bytes(k_type, width) + row_bytes(v_type, latent.rank) + indexer
    # Without flash attention the row of -mla 2 and 3 has the type of V.
    return row_bytes(v_type, width) + indexer


def derived_weight_bytes(architecture: Architecture) -> int:
    """About what ik_llama.cpp takes, in Q8_0, for weights of latent attention that it derives.

    It has use for the projection to keys and values in one piece and in two; a file has only one
    form, so that it computes the other while it loads.
    """
    latent = architecture.latent
    if latent is None or architecture.name not in _LATENT:
        return 0
    rope_width = architecture.n_head * latent.rope
    rows = latent.k_width - rope_width + latent.v_width
    try:
        return architecture.n_loaded_layers * rows * row_bytes(qtype("Q8_0"), latent.rank)
    except WorkloadError:
        return 0
