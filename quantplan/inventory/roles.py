"""Tensor names: which role a tensor plays, in which layer, and what a quantizer never touches."""

import re
from typing import Literal

RoleClass = Literal[
    "embedding",
    "output",
    "attention",
    "recurrent",
    "indexer",
    "ffn",
    "shared_experts",
    "up_gate_experts",
    "down_experts",
    "router",
    "nextn",
    "norm",
    "other",
]

EXPERT_CLASSES: tuple[RoleClass, ...] = ("up_gate_experts", "down_experts")
"""Classes of tensors of which a token reads some matrices only."""

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_EXPERTS = re.compile(r"ffn_(up|gate|gate_up|down)_(?:ch)?exps")
_FFN = re.compile(r"ffn_(?:up|gate|down)(?:_shexp)?")

# Matrices that llama-quantize leaves alone whatever it is asked for. Substrings of the full name,
# as there (llama-quant.cpp of b11434), so that new members of a family are covered too.
_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2")),
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_NEVER_QUANTIZED_NAMES = {"position_embd.weight", "token_types.weight"}


def split_layer(name: str) -> tuple[int | None, str]:
    """Splits a tensor name into its layer (None outside the layers) and the rest."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def split_name(name: str) -> tuple[int | None, str]:
    """Splits a tensor name into layer and role.

    Args:
        name: Full name, such as ``blk.3.ffn_down_exps.weight``.

    Returns:
        The layer (llama.cpp's block index; None outside the layers) and the role: the name without
        layer and ``.weight``, such as ``ffn_down_exps``. Other suffixes stay (``attn_q.bias``),
        since a bias is another tensor of the same layer.
    """
    layer, rest = split_layer(name)
    return layer, rest.removesuffix(".weight")


def role_class(role: str) -> RoleClass:  # noqa: PLR0911 (a flat table of prefixes reads best)
    """Sorts a role into the classes that policies and cost models speak of."""
    if role.startswith("nextn."):
        return "nextn"
    if role.endswith("_norm") or role.endswith((".bias", ".scale")):
        return "norm"
    if role in ("token_embd", "per_layer_token_embd"):
        return "embedding"
    if role == "output":
        return "output"
    if role.startswith("ffn_gate_inp"):
        return "router"
    experts = _EXPERTS.fullmatch(role)
    if experts:
        return "down_experts" if experts[1] == "down" else "up_gate_experts"
    if _FFN.fullmatch(role):
        return "shared_experts" if role.endswith("_shexp") else "ffn"
    if role.startswith("indexer."):
        return "indexer"
    if role.startswith("attn_"):
        return "attention"
    if role.startswith(("ssm_", "time_mix_", "shortconv.")):
        return "recurrent"
    return "other"


def is_quantizable(name: str, shape_ne: tuple[int, ...]) -> bool:
    """Whether a quantizer may change the tensor's type.

    One-dimensional tensors, names that do not end in ``weight``, norms, routers and a list of small
    matrices keep the type they have in the source.

    Args:
        name: Full tensor name.
        shape_ne: Shape in GGUF order; trailing ones do not count as dimensions.
    """
    n_dims = max((i + 1 for i, n in enumerate(shape_ne) if n > 1), default=1)
    return (
        n_dims >= 2
        and name.endswith("weight")
        and name not in _NEVER_QUANTIZED_NAMES
        and not any(part in name for part in _NEVER_QUANTIZED)
    )
