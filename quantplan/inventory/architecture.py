"""Metadata -> the numbers that the cost models need: layers, experts, caches.

Key names are those of the GGUF standard; what llama.cpp fixes per architecture in its source
(window patterns, which layers are recurrent) is named here, in one place.
"""

from collections.abc import Mapping
from typing import Any

from quantplan.errors import UnsupportedModelError
from quantplan.inventory.caches import (
    LatentAttention,
    LayerCache,
    convolved_width,
    latent_attention,
    layer_caches,
)
from quantplan.inventory.keys import Keys
from quantplan.schema import Frozen

# Without a GPU llama.cpp reads a tied embedding as the output matrix where it is; for these
# architectures it makes a second copy even so (seen in b10434).
_ALWAYS_COPIES_TIED_OUTPUT = {"gemma4"}
# LLAMA_MAX_LAYERS
_MAX_LAYERS = 512


class Architecture(Frozen):
    """The dimensions of a model.

    Attributes:
        name: ``general.architecture``.
        n_layers: ``block_count``, next-token-prediction blocks included.
        n_nextn: Trailing next-token-prediction (MTP) blocks, not loaded for plain decoding.
        n_embd: Width of the residual stream.
        n_expert: Experts per layer; 0 in dense models.
        n_expert_used: Experts that one token activates.
        expert_width: Rows of an expert's up matrix; 0 in dense models.
        ffn_width: Rows of the widest dense feed-forward layer's up matrix.
        context_length: Longest context that the model was trained for, in tokens.
        n_head: Attention heads (of the first layer).
        q_width: Elements of one token's query row, all heads.
        convolved_width: Channels that a recurrent layer convolves; 0 without such layers.
        caches: One entry per layer, next-token-prediction blocks included.
        widest_v_width: Elements of the widest V row, which all V rows take without flash attention.
        latent: Multi-head latent attention; None where keys and values are stored as they are.
    """

    name: str
    n_layers: int
    n_nextn: int
    n_embd: int
    n_expert: int
    n_expert_used: int
    expert_width: int
    ffn_width: int
    context_length: int
    n_head: int
    q_width: int
    convolved_width: int
    caches: tuple[LayerCache, ...]
    widest_v_width: int
    latent: LatentAttention | None = None

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


def read_architecture(metadata: Mapping[str, Any]) -> Architecture:
    """Derives the dimensions of a model from its GGUF metadata.

    Args:
        metadata: Decoded key-value pairs.

    Raises:
        UnsupportedModelError: A key that the memory of the model depends on is missing, or its
            recurrent state is not modelled.
    """
    keys = Keys(metadata)
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
    caches, widest_v = layer_caches(keys, n_layers, n_nextn)
    n_expert = keys.number("expert_count")
    ffn_width = max(keys.per_layer("feed_forward_length", n_layers, 0))
    return Architecture(
        name=keys.arch,
        n_layers=n_layers,
        n_nextn=n_nextn,
        n_embd=n_embd,
        n_expert=n_expert,
        n_expert_used=keys.number("expert_used_count"),
        expert_width=keys.number("expert_feed_forward_length", ffn_width) if n_expert else 0,
        ffn_width=ffn_width,
        context_length=keys.number("context_length"),
        n_head=n_head,
        q_width=n_head * (head_width or n_embd // max(n_head, 1)),
        convolved_width=convolved_width(keys),
        caches=caches,
        widest_v_width=widest_v,
        latent=latent_attention(keys, n_head),
    )
