"""What stock mixes consist of: for each ftype a base type, and which tensors deviate from it.

Facts about llama-quantize (``src/llama-quant.cpp`` of b10434).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Family = Literal[
    "output", "embedding", "attn_v", "attn_k", "attn_q", "attn_output",
    "ffn_up", "ffn_gate", "ffn_down", "other",
]  # fmt: skip

_FAMILY_BY_NAME: dict[str, Family] = {
    "output.weight": "output",
    "token_embd.weight": "embedding",
    "per_layer_token_embd.weight": "embedding",
}
# Of the other names a part decides; the first that is found. `attn_v` is all that holds V.
_FAMILY_BY_PART: dict[str, Family] = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask about a model.

    Attributes:
        arch: ``general.architecture``.
        n_layers: Layers as llama.cpp counts them, which is not always ``block_count``.
        n_gqa: Query heads per KV head of the first layer; 0 where it has no KV heads.
        n_expert: Experts per layer; 0 in dense models.
        is_70b: llama.cpp calls the size of the model 70B.
        is_tied: The embedding is the output matrix too.
        has_imatrix: An importance matrix is given.
    """

    arch: str
    n_layers: int
    n_gqa: int
    n_expert: int
    is_70b: bool
    is_tied: bool
    has_imatrix: bool


@dataclass(frozen=True, slots=True)
class Position:
    """What the rules ask about a tensor: it is number ``index``, from 0, of ``total``."""

    model: ModelFacts
    index: int
    total: int


Condition = Callable[[Position], bool]
Rules = tuple[tuple[str, *tuple[Condition, ...]], ...]
"""Types, each with what must hold for it. The first one whose conditions hold is it, else base."""


def _first(count: int) -> Condition:
    return lambda position: position.index < count


def _first_part(part: int) -> Condition:
    """The first 1/part, rounded down."""
    return lambda position: position.index < position.total // part


def _middle(position: Position) -> bool:
    """All but the first and the last eighth."""
    return position.total // 8 <= position.index < 7 * position.total // 8


def _exposed(position: Position) -> bool:
    """The first and the last eighth, and every third between them."""
    return not _middle(position) or (position.index - position.total // 8) % 3 == 2


def _wide_gqa(position: Position) -> bool:
    return position.model.n_gqa >= 4


def _many_experts(position: Position) -> bool:
    return position.model.n_expert >= 4


def _eight_experts(position: Position) -> bool:
    return position.model.n_expert == 8


def _imatrix(position: Position) -> bool:
    return position.model.has_imatrix


def _no_imatrix(position: Position) -> bool:
    return not position.model.has_imatrix


@dataclass(frozen=True, slots=True)
class Mix:
    """The rules of an ftype.

    Attributes:
        base: Type of all that no rule is about.
        rules: What deviates, by family.
        output: Type of the output matrix, and of a tied embedding.
        embedding: Type of an embedding that is not tied; None for the base type.
        is_low: One of the mixes below 3 bits, which give 70B models nothing more.
    """

    base: str
    rules: Mapping[Family, Rules] = field(default_factory=dict)
    output: str = "Q6_K"
    embedding: str | None = None
    is_low: bool = False

    @property
    def goes_by_layer(self) -> bool:
        """Whether the FFN of a mixture of experts is numbered by layer, not as it comes."""
        return not self.is_low and self.base != "MXFP4"


def _low_mix(base: str, *, better: str, embedding: str, attn_output: str | None = None) -> Mix:
    """A mix below 3 bits; ``better`` is for the first layers and for V."""
    rules: dict[Family, Rules] = {
        "attn_v": (("Q4_K", _wide_gqa), ("Q4_K", _many_experts), (better,)),
        "ffn_down": ((better, _first_part(8)),),
    }
    if attn_output:
        rules["attn_output"] = ((attn_output,),)
    return Mix(base, rules, output="Q5_K", embedding=embedding, is_low=True)


_EXPOSED_Q6_K: Mapping[Family, Rules] = {
    "attn_v": (("Q6_K", _exposed),),
    "ffn_down": (("Q6_K", _exposed),),
}
_IQ4: Mapping[Family, Rules] = {
    "attn_v": (("Q5_K", _wide_gqa),),
    "ffn_down": (("Q5_K", _no_imatrix, _first_part(8)),),
}
MIXES = {
    "F32": Mix("F32"),
    "F16": Mix("F16"),
    "BF16": Mix("BF16"),
    "Q8_0": Mix("Q8_0", output="Q8_0"),
    "Q6_K": Mix("Q6_K"),
    "Q5_K_M": Mix("Q5_K", _EXPOSED_Q6_K),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_1": Mix("Q5_1"),
    "Q5_0": Mix("Q5_0", {"ffn_down": (("Q5_1", _imatrix, _first_part(8)),)}),
    "Q4_K_M": Mix("Q4_K", _EXPOSED_Q6_K),
    "Q4_K_S": Mix(
        "Q4_K", {"attn_v": (("Q5_K", _first(4)),), "ffn_down": (("Q5_K", _first_part(8)),)}
    ),
    "Q4_1": Mix("Q4_1"),
    "Q4_0": Mix("Q4_0", {"ffn_down": (("Q4_1", _imatrix, _first_part(8)),)}),
    "MXFP4_MOE": Mix("MXFP4", output="Q8_0"),
    "IQ4_NL": Mix("IQ4_NL", _IQ4),
    "IQ4_XS": Mix("IQ4_XS", _IQ4),
    "Q3_K_L": Mix("Q3_K", dict.fromkeys(("attn_v", "attn_output", "ffn_down"), (("Q5_K",),))),
    "Q3_K_M": Mix(
        "Q3_K",
        {
            "attn_v": (("Q5_K", _first(2)), ("Q4_K",)),
            "attn_output": (("Q4_K",),),
            "ffn_down": (("Q5_K", _first_part(16)), ("Q4_K",)),
        },
    ),
    "Q3_K_S": Mix("Q3_K"),
    "IQ3_M": Mix(
        "IQ3_S",
        {
            "attn_v": (("Q4_K",),),
            "attn_output": (("Q4_K",),),
            "ffn_down": (("Q4_K", _first_part(8)), ("Q4_K", _eight_experts, _exposed)),
        },
    ),
    "IQ3_S": Mix("IQ3_S", {"attn_v": (("Q4_K", _wide_gqa),)}),
    "IQ3_XS": Mix(
        "IQ3_S",
        {
            "attn_v": (("Q4_K", _wide_gqa),),
            **dict.fromkeys(("attn_q", "attn_k"), (("IQ3_XXS",),)),
            **dict.fromkeys(("ffn_up", "ffn_gate"), (("IQ3_XXS", _middle),)),
        },
    ),
    "IQ3_XXS": Mix(
        "IQ3_XXS",
        {
            "attn_v": (("Q4_K", _wide_gqa), ("IQ3_S", _no_imatrix)),
            **dict.fromkeys(("attn_q", "attn_k"), (("IQ2_S",),)),
            "attn_output": (("IQ3_S",),),
            "ffn_down": (("Q4_K", _no_imatrix, _first_part(8)), ("Q3_K", _no_imatrix)),
        },
        output="Q5_K",
        embedding="IQ3_S",
    ),
    "Q2_K": Mix(
        "Q2_K",
        {
            "attn_v": (("Q4_K", _wide_gqa), ("Q3_K",)),
            **dict.fromkeys(("attn_output", "ffn_down"), (("Q3_K",),)),
        },
    ),
    "Q2_K_S": Mix(
        "Q2_K", {"attn_v": (("Q4_K", _wide_gqa),), "ffn_down": (("Q4_K", _first_part(8)),)}
    ),
    "IQ2_M": _low_mix("IQ2_S", better="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    "IQ2_S": _low_mix("IQ2_XS", better="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    "IQ2_XS": _low_mix("IQ2_XS", better="Q2_K", embedding="Q2_K"),
    "IQ2_XXS": _low_mix("IQ2_XXS", better="Q2_K", embedding="Q2_K"),
    "IQ1_M": _low_mix("IQ1_M", better="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    "IQ1_S": _low_mix("IQ1_S", better="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    "TQ2_0": Mix("TQ2_0", embedding="Q4_K"),
    "TQ1_0": Mix("TQ1_0", embedding="Q4_K"),
}
# What is different for Falcon.
_FALCON: dict[str, Mapping[Family, Rules]] = {
    "Q4_K_M": {"ffn_down": (("Q6_K", _first_part(16)), ("Q5_K", _exposed))},
    "Q4_K_S": {"ffn_down": ()},
    "Q3_K_L": {"attn_output": (("Q4_K",),), "ffn_down": (("Q4_K",),)},
    "Q3_K_M": {"attn_output": (), "ffn_down": (("Q5_K", _first_part(16)), ("Q4_K", _exposed))},
    "IQ3_M": {"attn_output": ()},
    "IQ3_XXS": {"attn_output": ()},
    "Q2_K": {"attn_output": ()},
}
# Mixes that give `attn_output` Q5_K where there are eight experts; the others give it their base.
_EIGHT_EXPERTS_ATTN_OUTPUT = {
    "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS",
    "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
}  # fmt: skip


def family_of(name: str) -> Family:
    """Which rules are about a tensor."""
    if name in _FAMILY_BY_NAME:
        return _FAMILY_BY_NAME[name]
    return next((family for part, family in _FAMILY_BY_PART.items() if part in name), "other")


def rules_of(ftype: str, mix: Mix, family: Family, model: ModelFacts) -> Rules:
    """The rules of a mix for a family, or those that a model has instead."""
    if model.n_expert == 8:  # Mixtral: attention is small beside eight experts
        if family in ("attn_v", "attn_k"):
            return (("Q4_K" if mix.is_low else "Q8_0",),)
        if family == "attn_output":
            return (("Q5_K",),) if ftype in _EIGHT_EXPERTS_ATTN_OUTPUT else ()
    rules = mix.rules.get(family, ())
    return _FALCON.get(ftype, {}).get(family, rules) if model.arch == "falcon" else rules
