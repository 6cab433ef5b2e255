"""Metadata -> the numbers that the cost models need: layers, experts, caches.

Key names are those of the GGUF standard; what llama.cpp fixes per architecture in its source
(window patterns, which layers are recurrent) is named here, in one place.
"""

from collections.abc import Mapping
from typing import Any

from quantplan.errors import UnsupportedModelError
from quantplan.schema import Frozen

# Layer il slides where il % period < period - 1. Fixed in llama.cpp's model code (b11434) for
# architectures whose files need not say so.
_WINDOW_PERIOD = {
    "gemma2": 2,
    "gpt-oss": 2,
    "gemma3n": 5,
    "gemma3": 6,
    "cohere2": 4,
    "afmoe": 4,
    "llama4": 4,
}
# Full attention every `full_attention_interval` layers (4 where the file does not say),
# a gated delta net in between.
_DELTA_NET = {"qwen3next", "qwen35", "qwen35moe"}
_DEFAULT_FULL_ATTENTION_INTERVAL = 4
# Without a GPU llama.cpp reads a tied embedding as the output matrix where it is; for these
# architectures it makes a second copy even so (seen in b10434).
_ALWAYS_COPIES_TIED_OUTPUT = {"gemma4"}
# LLAMA_MAX_LAYERS
_MAX_LAYERS = 512


class LayerCache(Frozen):
    """What one layer keeps per sequence or per cell.

    Attributes:
        k_width: Elements of the K row per cell, all heads; 0 where the layer has no KV cache.
        v_width: Elements of the V row per cell; 0 also for MLA, whose values are part of K.
        window: Sliding window in tokens; 0 for full attention.
        indexer_width: Elements of a sparse-attention indexer's K row per cell.
        state_elements: F32 elements of recurrent state per sequence.
    """

    k_width: int = 0
    v_width: int = 0
    window: int = 0
    indexer_width: int = 0
    state_elements: int = 0


class Architecture(Frozen):
    """The dimensions of a model.

    Attributes:
        name: ``general.architecture``.
        n_layers: ``block_count``, next-token-prediction blocks included.
        n_nextn: Trailing next-token-prediction (MTP) blocks, not loaded for plain decoding.
        n_embd: Width of the residual stream.
        n_expert: Experts per layer; 0 in dense models.
        n_expert_used: Experts that one token activates.
        context_length: Longest context that the model was trained for, in tokens.
        n_head: Attention heads (of the first layer).
        q_width: Elements of one token's query row, all heads.
        convolved_width: Channels that a recurrent layer convolves; 0 without such layers.
        caches: One entry per layer, next-token-prediction blocks included.
    """

    name: str
    n_layers: int
    n_nextn: int
    n_embd: int
    n_expert: int
    n_expert_used: int
    context_length: int
    n_head: int
    q_width: int
    convolved_width: int
    caches: tuple[LayerCache, ...]

    @property
    def n_loaded_layers(self) -> int:
        """Layers without the next-token-prediction blocks."""
        return self.n_layers - self.n_nextn

    @property
    def always_copies_tied_output(self) -> bool:
        """Whether a tied embedding is held twice even where one device holds both uses."""
        return self.name in _ALWAYS_COPIES_TIED_OUTPUT

    @property
    def active_share(self) -> float:
        """Share of each expert tensor that one token reads (``n_expert_used / n_expert``)."""
        return self.n_expert_used / self.n_expert if self.n_expert else 1.0


class _Keys:
    """Looks architecture keys up, and says which are missing."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.arch = str(metadata.get("general.architecture", ""))
        self._metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The value of an architecture key, whatever it is."""
        return self._metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int = 0) -> int:
        """A count that may be absent."""
        value = self.get(key)
        return default if value is None else self._count(key, value)

    def _count(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 0:
            raise UnsupportedModelError(
                f"{self.arch}.{key} of this model is {value!r}, which is no count"
            )
        return int(value)

    def need(self, key: str) -> int:
        """A count above 0 that must be there."""
        value = self.get(key)
        if not isinstance(value, int) or value <= 0:
            raise UnsupportedModelError(
                f"the metadata of this {self.arch or 'unknown'} model hold no integer "
                f"{self.arch}.{key} (found {value!r}), without which its memory cannot be computed"
            )
        return value

    def per_layer(self, key: str, n_layers: int, default: int) -> tuple[int, ...]:
        """A count for each layer, from an array or one number for all."""
        value = self.get(key, default)
        if not isinstance(value, (tuple, list)):
            return (self._count(key, value),) * n_layers
        if len(value) < n_layers:
            raise UnsupportedModelError(
                f"{self.arch}.{key} has {len(value)} entries for {n_layers} layers"
            )
        return tuple(self._count(key, v) for v in value[:n_layers])


def _windows(keys: _Keys, n_layers: int) -> tuple[int, ...]:
    """Sliding window of each layer in tokens, 0 for full attention."""
    window = keys.number("attention.sliding_window")
    if not window:
        return (0,) * n_layers
    key = "attention.sliding_window_pattern"
    if isinstance(keys.get(key), (tuple, list)):
        slides = keys.per_layer(key, n_layers, 0)
        return tuple(window if sliding else 0 for sliding in slides)
    pattern = keys.number(key, _WINDOW_PERIOD.get(keys.arch, 0))
    # Without a known pattern every layer is counted at full length, which is never too little.
    return tuple(
        window if pattern and layer % pattern < pattern - 1 else 0 for layer in range(n_layers)
    )


def _convolved_width(keys: _Keys) -> int:
    """Channels that a gated delta net convolves: values, and keys and queries of all groups."""
    return keys.need("ssm.inner_size") + 2 * keys.need("ssm.group_count") * keys.need(
        "ssm.state_size"
    )


def _delta_net_state(keys: _Keys) -> int:
    """F32 elements per sequence of a gated delta net: convolution window and state matrix."""
    window = (keys.need("ssm.conv_kernel") - 1) * _convolved_width(keys)
    return window + keys.need("ssm.state_size") * keys.need("ssm.inner_size")


def _caches(keys: _Keys, n_layers: int) -> tuple[LayerCache, ...]:
    shared = keys.number("attention.shared_kv_layers")
    n_loaded = n_layers - keys.number("nextn_predict_layers")
    if keys.get("attention.key_length_mla") is not None:
        width = keys.need("attention.kv_lora_rank") + keys.need("rope.dimension_count")
        indexer = keys.number("attention.indexer.key_length")
        return (LayerCache(k_width=width, indexer_width=indexer),) * n_layers
    if keys.arch in _DELTA_NET:
        interval = keys.number("full_attention_interval") or _DEFAULT_FULL_ATTENTION_INTERVAL
        recurrent = [(layer + 1) % interval != 0 for layer in range(n_layers)]
        state = _delta_net_state(keys)
    elif any(keys.get(key) is not None for key in ("ssm.state_size", "wkv.head_size")):
        raise UnsupportedModelError(
            f"the recurrent state of architecture {keys.arch!r} is not modelled; recurrent "
            f"architectures known are {', '.join(sorted(_DELTA_NET))}"
        )
    else:
        recurrent, state = [False] * n_layers, 0
    heads = keys.per_layer("attention.head_count", n_layers, 1)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layers, heads[0])
    head_width = keys.need("embedding_length") // max(heads[0], 1)
    layers = []
    for layer, window in enumerate(_windows(keys, n_layers)):
        suffix = "_swa" if window else ""
        k_length, v_length = (
            keys.number(f"attention.{part}_length{suffix}")
            or keys.number(f"attention.{part}_length", head_width)
            for part in ("key", "value")
        )  # fmt: skip
        if recurrent[layer]:
            layers.append(LayerCache(state_elements=state))
        elif n_loaded - shared <= layer < n_loaded:
            layers.append(LayerCache())
        else:
            n_kv = kv_heads[layer]
            layers.append(
                LayerCache(k_width=n_kv * k_length, v_width=n_kv * v_length, window=window)
            )
    return tuple(layers)


def read_architecture(metadata: Mapping[str, Any]) -> Architecture:
    """Derives the dimensions of a model from its GGUF metadata.

    Args:
        metadata: Decoded key-value pairs.

    Raises:
        UnsupportedModelError: A key that the memory of the model depends on is missing, or its
            recurrent state is not modelled.
    """
    keys = _Keys(metadata)
    n_layers = keys.need("block_count")
    if n_layers > _MAX_LAYERS:
        raise UnsupportedModelError(
            f"{keys.arch}.block_count is {n_layers}; llama.cpp loads at most {_MAX_LAYERS} layers"
        )
    n_nextn = keys.number("nextn_predict_layers")
    if n_nextn > n_layers:
        raise UnsupportedModelError(
            f"{keys.arch}.nextn_predict_layers is {n_nextn}, but there are {n_layers} blocks"
        )
    n_embd = keys.need("embedding_length")
    n_head = keys.per_layer("attention.head_count", n_layers, 1)[0]
    head_width = keys.number("attention.key_length_mla") or keys.number("attention.key_length")
    return Architecture(
        name=keys.arch,
        n_layers=n_layers,
        n_nextn=n_nextn,
        n_embd=n_embd,
        n_expert=keys.number("expert_count"),
        n_expert_used=keys.number("expert_used_count"),
        context_length=keys.number("context_length"),
        n_head=n_head,
        q_width=n_head * (head_width or n_embd // max(n_head, 1)),
        convolved_width=_convolved_width(keys) if keys.arch in _DELTA_NET else 0,
        caches=_caches(keys, n_layers),
    )
