"""Stock mixes: the types that llama-quantize gives the tensors of a model for an ftype.

An ftype such as ``Q4_K_M`` has a base type and, for some families of tensors, rules which of them
deviate from it. The rules are facts about llama.cpp (``src/llama-quant.cpp`` of b10434), without
the options that name types of single tensors, ``--pure`` and ``--keep-split``.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantplan.errors import InputError
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.keys import Keys
from quantplan.qtypes import QTYPES, fitting_qtype

_Family = Literal[
    "output", "embedding", "attn_v", "attn_k", "attn_q", "attn_output",
    "ffn_up", "ffn_gate", "ffn_down", "other",
]  # fmt: skip

_FAMILY_BY_NAME: dict[str, _Family] = {
    "output.weight": "output",
    "token_embd.weight": "embedding",
    "per_layer_token_embd.weight": "embedding",
}
# Of the other names a part decides; the first that is found. `attn_v` is all that holds V.
_FAMILY_BY_PART: dict[str, _Family] = {
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
class _Model:
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
class _Place:
    """What the rules ask about a tensor: it is number ``index``, from 0, of ``total``."""

    model: _Model
    index: int
    total: int


_Condition = Callable[[_Place], bool]
_Rules = tuple[tuple[str, *tuple[_Condition, ...]], ...]
"""Types, each with what must hold for it. The first one whose conditions hold is it, else base."""


def _first(count: int) -> _Condition:
    return lambda place: place.index < count


def _first_part(part: int) -> _Condition:
    """The first 1/part, rounded down."""
    return lambda place: place.index < place.total // part


def _middle(place: _Place) -> bool:
    """All but the first and the last eighth."""
    return place.total // 8 <= place.index < 7 * place.total // 8


def _exposed(place: _Place) -> bool:
    """The first and the last eighth, and every third between them."""
    return not _middle(place) or (place.index - place.total // 8) % 3 == 2


def _wide_gqa(place: _Place) -> bool:
    return place.model.n_gqa >= 4


def _many_experts(place: _Place) -> bool:
    return place.model.n_expert >= 4


def _eight_experts(place: _Place) -> bool:
    return place.model.n_expert == 8


def _imatrix(place: _Place) -> bool:
    return place.model.has_imatrix


def _no_imatrix(place: _Place) -> bool:
    return not place.model.has_imatrix


@dataclass(frozen=True, slots=True)
class _Mix:
    """The rules of an ftype.

    Attributes:
        base: Type of all that no rule is about.
        rules: What deviates, by family.
        output: Type of the output matrix, and of a tied embedding.
        embedding: Type of an embedding that is not tied; None for the base type.
        is_low: One of the mixes below 3 bits, which give 70B models nothing more.
    """

    base: str
    rules: Mapping[_Family, _Rules] = field(default_factory=dict)
    output: str = "Q6_K"
    embedding: str | None = None
    is_low: bool = False

    @property
    def goes_by_layer(self) -> bool:
        """Whether the FFN of a mixture of experts is numbered by layer, not as it comes."""
        return not self.is_low and self.base != "MXFP4"


def _low_mix(base: str, *, better: str, embedding: str, attn_output: str | None = None) -> _Mix:
    """A mix below 3 bits; ``better`` is for the first layers and for V."""
    rules: dict[_Family, _Rules] = {
        "attn_v": (("Q4_K", _wide_gqa), ("Q4_K", _many_experts), (better,)),
        "ffn_down": ((better, _first_part(8)),),
    }
    if attn_output:
        rules["attn_output"] = ((attn_output,),)
    return _Mix(base, rules, output="Q5_K", embedding=embedding, is_low=True)


_EXPOSED_Q6_K: Mapping[_Family, _Rules] = {
    "attn_v": (("Q6_K", _exposed),),
    "ffn_down": (("Q6_K", _exposed),),
}
_IQ4: Mapping[_Family, _Rules] = {
    "attn_v": (("Q5_K", _wide_gqa),),
    "ffn_down": (("Q5_K", _no_imatrix, _first_part(8)),),
}
_MIXES = {
    "F32": _Mix("F32"),
    "F16": _Mix("F16"),
    "BF16": _Mix("BF16"),
    "Q8_0": _Mix("Q8_0", output="Q8_0"),
    "Q6_K": _Mix("Q6_K"),
    "Q5_K_M": _Mix("Q5_K", _EXPOSED_Q6_K),
    "Q5_K_S": _Mix("Q5_K"),
    "Q5_1": _Mix("Q5_1"),
    "Q5_0": _Mix("Q5_0", {"ffn_down": (("Q5_1", _imatrix, _first_part(8)),)}),
    "Q4_K_M": _Mix("Q4_K", _EXPOSED_Q6_K),
    "Q4_K_S": _Mix(
        "Q4_K", {"attn_v": (("Q5_K", _first(4)),), "ffn_down": (("Q5_K", _first_part(8)),)}
    ),
    "Q4_1": _Mix("Q4_1"),
    "Q4_0": _Mix("Q4_0", {"ffn_down": (("Q4_1", _imatrix, _first_part(8)),)}),
    "MXFP4_MOE": _Mix("MXFP4", output="Q8_0"),
    "IQ4_NL": _Mix("IQ4_NL", _IQ4),
    "IQ4_XS": _Mix("IQ4_XS", _IQ4),
    "Q3_K_L": _Mix("Q3_K", dict.fromkeys(("attn_v", "attn_output", "ffn_down"), (("Q5_K",),))),
    "Q3_K_M": _Mix(
        "Q3_K",
        {
            "attn_v": (("Q5_K", _first(2)), ("Q4_K",)),
            "attn_output": (("Q4_K",),),
            "ffn_down": (("Q5_K", _first_part(16)), ("Q4_K",)),
        },
    ),
    "Q3_K_S": _Mix("Q3_K"),
    "IQ3_M": _Mix(
        "IQ3_S",
        {
            "attn_v": (("Q4_K",),),
            "attn_output": (("Q4_K",),),
            "ffn_down": (("Q4_K", _first_part(8)), ("Q4_K", _eight_experts, _exposed)),
        },
    ),
    "IQ3_S": _Mix("IQ3_S", {"attn_v": (("Q4_K", _wide_gqa),)}),
    "IQ3_XS": _Mix(
        "IQ3_S",
        {
            "attn_v": (("Q4_K", _wide_gqa),),
            **dict.fromkeys(("attn_q", "attn_k"), (("IQ3_XXS",),)),
            **dict.fromkeys(("ffn_up", "ffn_gate"), (("IQ3_XXS", _middle),)),
        },
    ),
    "IQ3_XXS": _Mix(
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
    "Q2_K": _Mix(
        "Q2_K",
        {
            "attn_v": (("Q4_K", _wide_gqa), ("Q3_K",)),
            **dict.fromkeys(("attn_output", "ffn_down"), (("Q3_K",),)),
        },
    ),
    "Q2_K_S": _Mix(
        "Q2_K", {"attn_v": (("Q4_K", _wide_gqa),), "ffn_down": (("Q4_K", _first_part(8)),)}
    ),
    "IQ2_M": _low_mix("IQ2_S", better="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    "IQ2_S": _low_mix("IQ2_XS", better="IQ3_S", embedding="IQ3_S", attn_output="IQ3_S"),
    "IQ2_XS": _low_mix("IQ2_XS", better="Q2_K", embedding="Q2_K"),
    "IQ2_XXS": _low_mix("IQ2_XXS", better="Q2_K", embedding="Q2_K"),
    "IQ1_M": _low_mix("IQ1_M", better="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    "IQ1_S": _low_mix("IQ1_S", better="Q2_K", embedding="Q2_K", attn_output="IQ2_XXS"),
    "TQ2_0": _Mix("TQ2_0", embedding="Q4_K"),
    "TQ1_0": _Mix("TQ1_0", embedding="Q4_K"),
}
# What is different for Falcon.
_FALCON: dict[str, Mapping[_Family, _Rules]] = {
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

# Layers of the models whose size llama.cpp calls 70B, by architecture.
_LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
# Of these, without grouped queries it calls them 65B.
_65B_WITHOUT_GQA = {"llama", "llama-embed"}

FTYPES = tuple(_MIXES)
"""Every known ftype, roughly from most to fewest bits."""


def stock_mix(inventory: Inventory, ftype: str, *, has_imatrix: bool = False) -> dict[str, str]:
    """The type that llama-quantize gives each tensor, row fallbacks included.

    Args:
        inventory: The model. Types of the source matter only for tensors that no quantizer touches.
        ftype: One of ``quantplan.ftypes.FTYPES``, in any case.
        has_imatrix: Whether an importance matrix is given, which changes some types. Without one,
            llama-quantize refuses mixes with types that need one, and Q2_K_S; the types are then
            those of its ``--dry-run``.

    Returns:
        Types of all tensors by name, in file order.

    Raises:
        InputError: There is no such ftype, or llama-quantize would stop with an error: a type that
            has no substitute does not divide a row, or experts are outside the layers.
        UnsupportedModelError: The metadata hold no number of layers, or impossible counts.
    """
    name = ftype.upper()
    mix = _MIXES.get(name)
    if mix is None:
        raise InputError(f"unknown ftype {ftype!r}; known are {', '.join(FTYPES)}")
    chosen = _chosen_types(inventory, name, mix, has_imatrix=has_imatrix)
    qtypes, faults = {}, []
    for tensor in inventory.tensors:
        wanted = chosen.get(tensor.name)
        if wanted is None:
            qtypes[tensor.name] = tensor.qtype
            continue
        fitting = fitting_qtype(wanted, tensor.shape_ne[0])
        if fitting is None:
            faults.append(
                f"llama-quantize has no type for {tensor.name} in {name}: its rows of "
                f"{tensor.shape_ne[0]} weights are no multiple of {wanted}'s block of "
                f"{QTYPES[wanted].block}; choose F16"
            )
        else:
            qtypes[tensor.name] = fitting.name
    if faults:
        raise InputError(faults)
    return qtypes


def _chosen_types(
    inventory: Inventory, ftype: str, mix: _Mix, *, has_imatrix: bool
) -> dict[str, str]:
    """Types of all tensors that can be quantized, before row fallbacks.

    Raises:
        InputError: A tensor of the experts is outside the layers.
    """
    tensors = sorted((t for t in inventory.tensors if t.is_quantizable), key=_file_order)
    if QTYPES[mix.base].is_float:
        return {t.name: mix.base for t in tensors}
    model = _read_model(inventory, has_imatrix=has_imatrix)
    counts: Counter[_Family] = Counter()
    n_attn_v = sum(_family(t.name) == "attn_v" for t in inventory.tensors)
    chosen, faults = {}, []
    for tensor in tensors:
        family = _family(tensor.name)
        index = counts[family]
        counts[family] += 1
        if family.startswith("ffn_") and model.n_expert > 1 and mix.goes_by_layer:
            if tensor.layer is None or tensor.layer >= model.n_layers:
                faults.append(
                    f"llama-quantize stops at {tensor.name}: it is in none of the "
                    f"{model.n_layers} layers of this mixture of experts"
                )
                continue
            index = tensor.layer
        place = _Place(model, index, n_attn_v if family == "attn_v" else model.n_layers)
        chosen[tensor.name] = _mix_type(ftype, mix, tensor, family, place)
    if faults:
        raise InputError(faults)
    return chosen


def _mix_type(ftype: str, mix: _Mix, tensor: Tensor, family: _Family, place: _Place) -> str:
    """The type that a mix names for a tensor."""
    model = place.model
    is_output = family == "output" or (family == "embedding" and model.is_tied)
    if ftype == "MXFP4_MOE":
        is_stack = len(tensor.shape_ne) > 2 and tensor.shape_ne[2] > 1
        return "MXFP4" if is_stack and not is_output else "Q8_0"
    if is_output:
        fits = tensor.shape_ne[0] % QTYPES[mix.base].block == 0
        return mix.output if fits and model.arch != "falcon" else "Q8_0"
    if family == "embedding":
        return mix.embedding or mix.base
    rules = _rules(ftype, mix, family, model)
    wanted = next((q for q, *conditions in rules if all(c(place) for c in conditions)), mix.base)
    if family == "attn_v" and model.is_70b and not mix.is_low and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return wanted


def _rules(ftype: str, mix: _Mix, family: _Family, model: _Model) -> _Rules:
    """The rules of a mix for a family, or those that a model has instead."""
    if model.n_expert == 8:  # Mixtral: attention is small beside eight experts
        if family in ("attn_v", "attn_k"):
            return (("Q4_K" if mix.is_low else "Q8_0",),)
        if family == "attn_output":
            return (("Q5_K",),) if ftype in _EIGHT_EXPERTS_ATTN_OUTPUT else ()
    rules = mix.rules.get(family, ())
    return _FALCON.get(ftype, {}).get(family, rules) if model.arch == "falcon" else rules


def _family(name: str) -> _Family:
    """Which rules are about a tensor."""
    if name in _FAMILY_BY_NAME:
        return _FAMILY_BY_NAME[name]
    return next((family for part, family in _FAMILY_BY_PART.items() if part in name), "other")


def _file_order(tensor: Tensor) -> tuple[int, str]:
    """The order in which llama-quantize works: by layer, then by name."""
    return -1 if tensor.layer is None else tensor.layer, tensor.name


def _read_model(inventory: Inventory, *, has_imatrix: bool) -> _Model:
    """Reads what the rules ask about a model.

    Raises:
        UnsupportedModelError: The number of layers is missing, or a count in the metadata is none.
    """
    keys = Keys(inventory.metadata)
    n_layers = keys.need("block_count")
    n_head = keys.per_layer("attention.head_count", n_layers, 0)[0]
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head)[0]
    n_counted = n_layers
    if keys.arch == "nanbeige":  # runs its layers several times
        n_counted = n_layers * keys.number("num_loops", 1)
    if keys.arch == "graniteswitch":  # the switch has a cache, as if it were a layer
        n_counted = n_layers + 1
    return _Model(
        arch=keys.arch,
        n_layers=n_counted,
        n_gqa=n_head // n_head_kv if n_head_kv else 0,
        n_expert=keys.number("expert_count"),
        is_70b=_LAYERS_OF_70B.get(keys.arch) == n_layers
        and (keys.arch not in _65B_WITHOUT_GQA or n_head != n_head_kv),
        is_tied=inventory.has_tied_output,
        has_imatrix=has_imatrix,
    )
