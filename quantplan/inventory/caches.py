"""Which cache each layer keeps, for every architecture that llama.cpp loads.

Most architectures follow from their metadata; what llama.cpp fixes in its source is named here, in
one place. The tables were established by loading a tiny model of each of 139 architectures with
llama.cpp b10434 and comparing every byte that it allocated.
"""

from quantplan.errors import UnsupportedModelError
from quantplan.inventory.keys import Keys
from quantplan.schema import Frozen

# Encoders and diffusion models, whose context keeps nothing, and a draft model that shares the
# caches of its target.
_NO_CACHE = {
    "bert", "dream", "eurobert", "gemma-embedding", "gemma4-assistant", "jina-bert-v2",
    "jina-bert-v3", "llada", "llada-moe", "modern-bert", "neo-bert", "nomic-bert",
    "nomic-bert-moe", "rnd1", "wavtokenizer-dec",
}  # fmt: skip
# Layer il slides where il % period < period - 1, or, for those in _FULL_FIRST, where il % period is
# not 0. A pattern in the metadata goes before the period named here.
_WINDOW_PERIOD = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "laguna": 4,
    "llama4": 4,
    "muse-glimmer": 4,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
_FULL_FIRST = {"cohere2moe", "laguna", "smallthinker"}
# A single number for the pattern makes every layer slide.
_NUMBER_MEANS_ALL = {"gemma4", "mimo2", "step35"}
# Windows that the source fixes: always, or in place of any that the metadata name.
_ALWAYS_WINDOW = {"llama4": 8192}
_FIXED_WINDOW = {"smallthinker": 4096}
_EXAONE4_LAYERS_WITH_WINDOW = 64
_GEMMA3N_CACHED_LAYERS = 20

_DELTA_NET = {"qwen3next", "qwen35", "qwen35moe"}
_DEFAULT_FULL_ATTENTION_INTERVAL = 4
_MAMBA = {"mamba", "mamba2"}
_MAMBA_WHERE_NO_KV_HEADS = {"jamba", "granitehybrid", "plamo2"}
_MAMBA_WHERE_NO_FFN = {"nemotron_h", "nemotron_h_moe"}
_MAMBA_BESIDE_ATTENTION = {"falcon-h1"}
_MAMBA_WITHOUT_GROUPS = {"mamba", "jamba", "plamo2"}
_RWKV = {"rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7"}
_DEFAULT_TOKEN_SHIFTS = 2
_SHORT_CONVOLUTION = {"lfm2", "lfm2moe"}
_DELTA_ATTENTION = {"kimi-linear"}
_SPARSE_ATTENTION = {"deepseek32", "glm-dsa"}
_SPARSE_ATTENTION_WITH_VALUES = {"minimax-m3"}
# Low-rank keys and values that are expanded before they are cached.
_EXPANDED = {"minicpm3", "plm"}
# Compressed caches with states of their own; a router layer with a cache of another width.
_NOT_MODELLED = {"deepseek4", "graniteswitch"}


class LayerCache(Frozen):
    """What one layer keeps per sequence or per cell.

    Attributes:
        attends: Whether the layer has a KV cache, of whatever width.
        k_width: Elements of the K row per cell, all heads.
        v_width: Elements of the V row per cell; 0 for MLA, whose values are part of K.
        window: Sliding window in tokens; 0 for full attention.
        indexer_k_width: Elements of a sparse-attention indexer's K row per cell.
        indexer_v_width: Elements of its V row per cell.
        state_elements: F32 elements of recurrent state per sequence.
    """

    attends: bool = True
    k_width: int = 0
    v_width: int = 0
    window: int = 0
    indexer_k_width: int = 0
    indexer_v_width: int = 0
    state_elements: int = 0


class LatentAttention(Frozen):
    """Multi-head latent attention: keys and values are stored in a common low rank.

    Attributes:
        rank: Elements of the compressed row that keys and values share.
        rope: Elements of the key that carry the position, one row for all heads.
        k_width: Elements of the K row of all heads, expanded.
        v_width: Elements of the V row of all heads, expanded.
    """

    rank: int
    rope: int
    k_width: int
    v_width: int


def latent_attention(keys: Keys, n_heads: int) -> LatentAttention | None:
    """What an architecture with latent attention stores; None without."""
    rank = keys.number("attention.kv_lora_rank")
    if not rank or keys.arch in _EXPANDED:
        return None
    k_length, v_length = (
        keys.number(f"attention.{part}_length_mla") or keys.number(f"attention.{part}_length")
        for part in ("key", "value")
    )
    return LatentAttention(
        rank=rank,
        rope=keys.number("rope.dimension_count"),
        k_width=n_heads * k_length,
        v_width=n_heads * v_length,
    )


def convolved_width(keys: Keys) -> int:
    """Channels that a recurrent layer convolves: values, and keys and queries of all groups."""
    groups = 0 if keys.arch in _MAMBA_WITHOUT_GROUPS else keys.number("ssm.group_count")
    return keys.number("ssm.inner_size") + 2 * groups * keys.number("ssm.state_size")


def _mamba_state(keys: Keys) -> int:
    """Convolution window and state matrix, also of a gated delta net."""
    window = (keys.need("ssm.conv_kernel") - 1) * convolved_width(keys)
    return window + keys.need("ssm.state_size") * keys.need("ssm.inner_size")


def _rwkv_state(keys: Keys) -> int:
    n_embd = keys.need("embedding_length")
    shifts = keys.number("token_shift_count", _DEFAULT_TOKEN_SHIFTS)
    return shifts * n_embd + n_embd * keys.need("wkv.head_size")


def _delta_attention_state(keys: Keys, n_heads: int) -> int:
    """Three convolution windows and a state matrix per head."""
    width = keys.need("kda.head_dim")
    return 3 * (keys.need("ssm.conv_kernel") - 1) * n_heads * width + n_heads * width**2


def _layer_kinds(  # noqa: PLR0911 (one return per family reads as the table that it is)
    keys: Keys, n_layers: int, n_nextn: int, heads: tuple[int, ...], kv_heads: tuple[int, ...]
) -> list[tuple[bool, int]]:
    """Whether each layer has a KV cache, and the F32 elements of its recurrent state."""
    arch = keys.arch
    if arch in _NO_CACHE:
        return [(False, 0)] * n_layers
    if arch in _RWKV:
        return [(False, _rwkv_state(keys))] * n_layers
    if arch in _MAMBA:
        return [(False, _mamba_state(keys))] * n_layers
    if arch in _MAMBA_BESIDE_ATTENTION:
        return [(True, _mamba_state(keys))] * n_layers
    if arch in _MAMBA_WHERE_NO_FFN:
        state, widths = _mamba_state(keys), keys.per_layer("feed_forward_length", n_layers, 0)
        pairs = zip(kv_heads, widths, strict=True)
        return [(n > 0 and not ffn, 0 if n or ffn else state) for n, ffn in pairs]
    if arch in _DELTA_NET:
        interval = keys.number("full_attention_interval") or _DEFAULT_FULL_ATTENTION_INTERVAL
        recurrent = [(layer + 1) % interval != 0 for layer in range(n_layers)]
        if keys.get("attention.recurrent_layers"):
            listed = keys.per_layer("attention.recurrent_layers", n_layers, 0)
            recurrent = [bool(flag) for flag in listed]
        # A next-token-prediction block attends, whatever its turn.
        recurrent[n_layers - n_nextn :] = [False] * n_nextn
        state = _mamba_state(keys)
        return [(not is_recurrent, state * is_recurrent) for is_recurrent in recurrent]
    if arch in _MAMBA_WHERE_NO_KV_HEADS:
        state = _mamba_state(keys)
    elif arch in _SHORT_CONVOLUTION:
        state = (keys.need("shortconv.l_cache") - 1) * keys.need("embedding_length")
    elif arch in _DELTA_ATTENTION:
        state = _delta_attention_state(keys, heads[0])
    else:
        _refuse_unknown_state(keys)
        return [(True, 0)] * n_layers
    return [(n > 0, 0 if n else state) for n in kv_heads]


def _refuse_unknown_state(keys: Keys) -> None:
    if keys.arch in _NOT_MODELLED or any(
        keys.get(key) is not None for key in ("ssm.state_size", "wkv.head_size", "kda.head_dim")
    ):
        raise UnsupportedModelError(
            f"the caches of architecture {keys.arch!r} are not modelled, so its memory cannot be "
            "computed"
        )


def _windows(keys: Keys, n_layers: int) -> tuple[int, ...]:
    """Sliding window of each layer in tokens, 0 for full attention."""
    arch = keys.arch
    window = _ALWAYS_WINDOW.get(arch) or keys.number("attention.sliding_window")
    if not window or (arch == "exaone4" and n_layers != _EXAONE4_LAYERS_WITH_WINDOW):
        return (0,) * n_layers
    window = _FIXED_WINDOW.get(arch, window)
    key = "attention.sliding_window_pattern"
    if isinstance(keys.get(key), (tuple, list)):
        slides = [bool(flag) for flag in keys.per_layer(key, n_layers, 0)]
    elif arch == "lfm2" or (keys.get(key) is not None and arch in _NUMBER_MEANS_ALL):
        slides = [True] * n_layers
    else:
        # Without a known pattern every layer is kept at full length.
        period = keys.number(key, _WINDOW_PERIOD.get(arch, 1)) or 1
        full = 0 if arch in _FULL_FIRST else period - 1
        slides = [layer % period != full for layer in range(n_layers)]
    return tuple(window if sliding else 0 for sliding in slides)


def _indexer_widths(keys: Keys, layer: int, v_length: int) -> tuple[int, int]:
    """Elements of the indexer's K and V rows of one layer."""
    width = keys.number("attention.indexer.key_length")
    if keys.arch in _SPARSE_ATTENTION:
        types = keys.per_layer("attention.indexer.types", layer + 1, 1)
        return (width, 0) if types[layer] else (0, 0)
    if keys.arch in _SPARSE_ATTENTION_WITH_VALUES:
        is_sparse = layer >= keys.number("leading_dense_block_count")
        return (width, v_length) if is_sparse else (0, 0)
    return (0, 0)


def _is_cached(keys: Keys, layer: int, n_loaded: int) -> bool:
    """Whether a layer has a cache of its own, not another layer's."""
    if keys.arch == "gemma3n":
        return layer < _GEMMA3N_CACHED_LAYERS
    shared = keys.number("attention.shared_kv_layers")
    return not n_loaded - shared <= layer < n_loaded


def layer_caches(keys: Keys, n_layers: int, n_nextn: int) -> tuple[tuple[LayerCache, ...], int]:
    """Derives what every layer keeps.

    Args:
        keys: The metadata.
        n_layers: Layers, next-token-prediction blocks included.
        n_nextn: Next-token-prediction blocks among them, at the end.

    Returns:
        One entry per layer, and the elements of the widest V row of any layer, which all V rows
        take without flash attention.

    Raises:
        UnsupportedModelError: A key is missing, or the architecture's state is not modelled.
    """
    heads = keys.per_layer("attention.head_count", n_layers, 0)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layers, heads[0])
    head_width = keys.need("embedding_length") // max(heads[0], 1)
    is_latent = keys.get("attention.key_length_mla") is not None
    # A looped model runs its layers several times, each time with a cache.
    loops = keys.number("num_loops", 1) if keys.arch == "nanbeige" else 1
    kinds = _layer_kinds(keys, n_layers, n_nextn, heads, kv_heads)
    caches, widest_v = [], 0
    for layer, window in enumerate(_windows(keys, n_layers)):
        suffix = "_swa" if window else ""
        k_length, v_length = (
            keys.number(f"attention.{part}_length{suffix}")
            or keys.number(f"attention.{part}_length", head_width)
            for part in ("key", "value")
        )
        k_width = kv_heads[layer] * k_length
        v_width = 0 if is_latent else kv_heads[layer] * v_length
        widest_v = max(widest_v, v_width)
        attends, state = kinds[layer]
        if not _is_cached(keys, layer, n_layers - n_nextn):
            attends = False
        indexer_k, indexer_v = _indexer_widths(keys, layer, v_length) if attends else (0, 0)
        caches.append(
            LayerCache(
                attends=attends,
                k_width=loops * k_width * attends,
                v_width=loops * v_width * attends,
                window=window * attends,
                indexer_k_width=indexer_k,
                indexer_v_width=indexer_v,
                state_elements=state,
            )
        )
    return tuple(caches), loops * widest_v
