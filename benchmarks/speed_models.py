"""Inventories of the models that published speed measurements name.

The catalog's entry where there is one; else an inventory made from the model's dimensions
(``speed_models.json``, each with its source).
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from quantplan import Inventory, Tensor
from quantplan.inventory.catalog import catalog_names, read_catalog

Shapes = dict[str, tuple[int, ...]]
_DIMENSIONS = Path(__file__).parent / "speed_models.json"
# For names that the catalog does not take: the first pattern that is found decides.
_NAMES = (
    (r"draft", "a draft model"),
    (r"distill.*70b", "Llama-3.3-70B-Instruct"),
    (r"distill.*qwen.*32b", "Qwen2.5-32B"),
    (r"r10528qwen38b", "Qwen3-8B"),
    (r"gptoss120b", "gpt-oss-120b"),
    (r"gptoss20b", "gpt-oss-20b"),
    (r"coder.*480b", "Qwen3-Coder-480B-A35B-Instruct"),
    (r"qwen3.*235b", "Qwen3-235B-A22B"),
    (r"qwen3.*30ba3b", "Qwen3-30B-A3B"),
    (r"deepseek(coder)?v2(coder)?lite", "DeepSeek-V2-Lite"),
    (r"moonlight16b", "Moonlight-16B-A3B"),
    (r"deepseekv25", "DeepSeek-V2.5"),
    (r"deepseek(tng)?r1|deepseekv3|r1t2?chimera|^r10528", "DeepSeek-V3.1-Terminus"),
    (r"kimik2", "Kimi-K2-Thinking"),
    (r"glm45air", "GLM-4.5-Air"),
    (r"glm47flash", "GLM-4.7-Flash"),
    (r"glm45", "GLM-4.5"),
    (r"glm46", "GLM-4.6"),
    (r"glm47", "GLM-4.7"),
    (r"glm5", "GLM-5.1"),
    (r"glm(z1|4)(0414)?32b", "GLM-Z1-32B-0414"),
    (r"lingmini", "Ling-mini-2.0"),
    (r"(ling|ring)flash", "Ling-flash-2.0"),
    (r"(ling|ring)1t", "Ling-1T"),
    (r"llama4.*scout", "Llama-4-Scout-17B-16E-Instruct"),
    (r"llama4.*maverick", "Llama-4-Maverick-17B-128E-Instruct"),
    (r"(llama|codellama)v?2?7b", "Llama-2-7B"),
    (r"llama(v2|2)?13b|^llamav2$", "Llama-2-13B"),
    (r"llama31?8b|nemotronnano8b", "Llama-3.1-8B-Instruct"),
    (r"llama3[13]?(instruct)?70b", "Llama-3.3-70B-Instruct"),
    (r"llama32(instruct)?1b", "Llama-3.2-1B"),
    (r"llama32(instruct)?3b", "Llama-3.2-3B"),
    (r"mistralsmall|magistral|devstral", "Mistral-Small-24B"),
    (r"mixtral8x7b", "Mixtral-8x7B"),
    (r"mistral7b", "Mistral-7B"),
    (r"gemma327b", "gemma-3-27b-it"),
    (r"gemma312b", "gemma-3-12b-it"),
    (r"gemma431b", "gemma-4-31B-it"),
    (r"commanda|agatha111b", "c4ai-command-a-03-2025"),
    (r"qwen3[56]35ba3b", "Qwen3.5-35B-A3B"),
    (r"qwen3[5678]27b", "Qwen3.5-27B"),
    (r"qwen35122b", "Qwen3.5-122B-A10B"),
    (r"qwen35397b", "Qwen3.5-397B-A17B"),
    (r"qwen354b", "Qwen3.5-4B"),
    (r"qwen359b", "Qwen3.5-9B"),
    (r"qwen306b", "Qwen3-0.6B"),
    (r"qwen34b", "Qwen3-4B-Instruct-2507"),
    (r"qwen38b", "Qwen3-8B"),
    (r"qwen314b", "Qwen3-14B"),
    (r"qwen332b", "Qwen3-32B"),
    (r"qwen2(5)?(instruct)?7b", "Qwen2.5-7B"),
    (r"qwen2(5)?(instruct)?14b", "Qwen2.5-14B"),
    (r"qwen2(5)?(coder|instruct)?32b", "Qwen2.5-32B"),
    (r"qwen2(5)?(instruct)?72b", "Qwen2.5-72B"),
)


def model_named(text: str) -> Inventory | None:
    """The inventory of a model, by whatever name a person gave it; None where it is unknown."""
    known = read_catalog(text)
    if known is not None:
        return known
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    name = next((name for pattern, name in _NAMES if re.search(pattern, plain)), None)
    return None if name is None else _inventory(name)


@cache
def _inventory(name: str) -> Inventory | None:
    if name in catalog_names():
        return read_catalog(name)
    dimensions = json.loads(_DIMENSIONS.read_text(encoding="utf-8")).get(name)
    return None if dimensions is None else from_dimensions(name, dimensions)


def from_dimensions(name: str, d: dict[str, Any]) -> Inventory:
    """An inventory with the matrices that a model of these dimensions has (norms left out)."""
    arch = d["architecture"]
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": d["n_layers"],
        f"{arch}.embedding_length": d["n_embd"],
        f"{arch}.attention.head_count": d["n_head"],
        f"{arch}.attention.head_count_kv": d["n_head_kv"],
        f"{arch}.attention.key_length": d["head_width"],
        f"{arch}.attention.value_length": d["v_head_width"],
        f"{arch}.expert_count": d["n_expert"],
        f"{arch}.expert_used_count": d["n_expert_used"],
        f"{arch}.attention.sliding_window": d["window"],
    }
    if d["kv_lora_rank"]:
        latent = d["kv_lora_rank"] + d["rope_width"]
        metadata |= {
            f"{arch}.attention.kv_lora_rank": d["kv_lora_rank"],
            f"{arch}.rope.dimension_count": d["rope_width"],
            f"{arch}.attention.head_count_kv": 1,
            f"{arch}.attention.key_length": latent,
            f"{arch}.attention.value_length": d["kv_lora_rank"],
            f"{arch}.attention.key_length_mla": d["head_width"],
            f"{arch}.attention.value_length_mla": d["v_head_width"],
        }
    shapes: Shapes = {"token_embd.weight": (d["n_embd"], d["n_vocab"])}
    for layer in range(d["n_layers"]):
        for role, shape in {**_attention(d), **_feed_forward(d, layer)}.items():
            shapes[f"blk.{layer}.{role}.weight"] = shape
    if not d["has_tied_output"]:
        shapes["output.weight"] = (d["n_embd"], d["n_vocab"])
    return Inventory(
        name=name,
        source=f"dimensions:{name}",
        header_sha256=hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest(),
        metadata=metadata,
        array_lengths={},
        tensors=tuple(Tensor(name=n, shape_ne=s, qtype="BF16") for n, s in shapes.items()),
    )


def _attention(d: dict[str, Any]) -> Shapes:
    n_embd, heads = d["n_embd"], d["n_head"]
    q_width = heads * d["head_width"]
    output: Shapes = {"attn_output": (heads * d["v_head_width"], n_embd)}
    rank = d["kv_lora_rank"]
    if not rank:
        kv = d["n_head_kv"]
        plain: Shapes = {
            "attn_q": (n_embd, q_width),
            "attn_k": (n_embd, kv * d["head_width"]),
            "attn_v": (n_embd, kv * d["v_head_width"]),
        }
        return plain | output
    plain_width = d["head_width"] - d["rope_width"]
    query: Shapes = {"attn_q": (n_embd, q_width)}
    if d["q_lora_rank"]:
        query = {"attn_q_a": (n_embd, d["q_lora_rank"]), "attn_q_b": (d["q_lora_rank"], q_width)}
    latent: Shapes = {
        "attn_kv_a_mqa": (n_embd, rank + d["rope_width"]),
        "attn_k_b": (plain_width, rank, heads),
        "attn_v_b": (rank, d["v_head_width"], heads),
    }
    return query | latent | output


def _feed_forward(d: dict[str, Any], layer: int) -> Shapes:
    n_embd, n_expert = d["n_embd"], d["n_expert"]
    is_sparse = layer >= d["n_dense_lead"] and (layer + 1) % d["expert_period"] == 0
    if not n_expert or not is_sparse:
        up = (n_embd, d["n_ff"])
        return {"ffn_gate": up, "ffn_up": up, "ffn_down": up[::-1]}
    experts = (n_embd, d["n_ff_expert"], n_expert)
    found: Shapes = {
        "ffn_gate_inp": (n_embd, n_expert),
        "ffn_gate_exps": experts,
        "ffn_up_exps": experts,
        "ffn_down_exps": (d["n_ff_expert"], n_embd, n_expert),
    }
    if d["n_ff_shared"]:
        shared = (n_embd, d["n_ff_shared"])
        found |= {
            "ffn_gate_shexp": shared,
            "ffn_up_shexp": shared,
            "ffn_down_shexp": shared[::-1],
        }
    return found
