"""Builds the catalog entries of models whose dimensions, but no tensor maps, are public.

Usage: python scripts/build_catalog_from_dimensions.py

`catalog_models.json` beside this script holds the metadata that a model's GGUF has, the rows of
its vocabulary, and what a loader printed about it, which `tests/test_catalog.py` compares with the
entry. Here is which tensors each architecture has, as llama.cpp loads them.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).with_name("catalog_models.json")
TARGET = Path(__file__).parent.parent / "quantplan" / "inventory" / "catalog"

Shapes = dict[str, list[int]]
"""Shapes by name, row length first."""

SIGMOID_GATING = 2


class Model:
    """A model of the data file, whose metadata are asked for by keys without the architecture.

    Attributes:
        data: The model as it is in the file.
        n_embd: Width of the residual stream.
        n_head: Attention heads.
        n_head_kv: Heads of keys and values.
        k_length: Elements of a head's key.
        v_length: Elements of a head's value.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        """Derives what most tensors depend on."""
        self.data = data
        self.n_embd = self["embedding_length"]
        self.n_head = self["attention.head_count"]
        self.n_head_kv = self["attention.head_count_kv"]
        self.k_length = self.get("attention.key_length", self.n_embd // self.n_head)
        self.v_length = self.get("attention.value_length", self.n_embd // self.n_head)

    def __getitem__(self, key: str) -> int:
        """A number that must be there."""
        return int(self.data["metadata"][key])

    def get(self, key: str, default: int) -> int:
        """A number that may be absent."""
        return int(self.data["metadata"].get(key, default))

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        step = self.get("interleave_moe_layer_step", 1)
        is_dense = layer < self.get("leading_dense_block_count", 0) or (layer + 1) % step
        return self.get("expert_count", 0) > 0 and not is_dense


Part = Callable[[Model], Shapes]


def norms(*names: str) -> Part:
    """Norms of the residual stream."""
    return lambda model: {f"{name}.weight": [model.n_embd] for name in names}


def attention(model: Model) -> Shapes:
    """Separate queries, keys and values."""
    return {
        "attn_q.weight": [model.n_embd, model.n_head * model.k_length],
        "attn_k.weight": [model.n_embd, model.n_head_kv * model.k_length],
        "attn_v.weight": [model.n_embd, model.n_head_kv * model.v_length],
        "attn_output.weight": [model.n_head * model.v_length, model.n_embd],
    }


def qkv_biases(model: Model) -> Shapes:
    """Biases of queries, keys and values."""
    shapes = attention(model)
    return {f"attn_{part}.bias": shapes[f"attn_{part}.weight"][1:] for part in "qkv"}


def output_bias_and_sinks(model: Model) -> Shapes:
    """The bias of the attention's output, and a logit per head that takes part in the softmax."""
    return {"attn_output.bias": [model.n_embd], "attn_sinks.weight": [model.n_head]}


def joint_attention(model: Model) -> Shapes:
    """Queries, keys and values in one matrix.

    llama.cpp takes the queries to be as wide as the residual stream.
    """
    width = model.n_embd + model.n_head_kv * (model.k_length + model.v_length)
    return {
        "attn_qkv.weight": [model.n_embd, width],
        "attn_output.weight": [model.n_head * model.v_length, model.n_embd],
    }


def head_norms(model: Model) -> Shapes:
    """Norms of each head's query and key."""
    return {f"attn_{part}_norm.weight": [model.k_length] for part in "qk"}


def latent_attention(model: Model) -> Shapes:
    """Keys and values from one latent row.

    Files for MLA hold the matrices that expand keys and values apart, older ones hold both in
    `attn_kv_b`, and those made for ik_llama.cpp before it took either hold all three.
    """
    k_length = model.get("attention.key_length_mla", model.k_length)
    v_length = model.get("attention.value_length_mla", model.v_length)
    rank, rotated = model["attention.kv_lora_rank"], model["rope.dimension_count"]
    q_rank, q_width = model.get("attention.q_lora_rank", 0), model.n_head * k_length
    plain = k_length - rotated
    shapes = {
        "attn_kv_a_mqa.weight": [model.n_embd, rank + rotated],
        "attn_kv_a_norm.weight": [rank],
        "attn_output.weight": [model.n_head * v_length, model.n_embd],
    }
    if q_rank:
        shapes["attn_q_a.weight"] = [model.n_embd, q_rank]
        shapes["attn_q_a_norm.weight"] = [q_rank]
        shapes["attn_q_b.weight"] = [q_rank, q_width]
    else:
        shapes["attn_q.weight"] = [model.n_embd, q_width]
    if "attention.key_length_mla" in model.data["metadata"]:
        shapes["attn_k_b.weight"] = [plain, rank, model.n_head]
        shapes["attn_v_b.weight"] = [rank, v_length, model.n_head]
    else:
        shapes["attn_kv_b.weight"] = [rank, model.n_head * (plain + v_length)]
        if model.data.get("keeps_all_latent_matrices"):
            shapes["attn_k_b.weight"] = [plain, rank * model.n_head]
            shapes["attn_v_b.weight"] = [rank, v_length * model.n_head]
    return shapes


def gated_ffn(model: Model) -> Shapes:
    """A feed-forward network with a gate."""
    return _ffn(model.n_embd, model["feed_forward_length"])


def joint_ffn(model: Model) -> Shapes:
    """A feed-forward network whose gate and up matrices are one."""
    width = model["feed_forward_length"]
    return {
        "ffn_up.weight": [model.n_embd, 2 * width],
        "ffn_down.weight": [width, model.n_embd],
    }


def experts(model: Model) -> Shapes:
    """The router and all experts."""
    count = model["expert_count"]
    matrices = _ffn(model.n_embd, model["expert_feed_forward_length"], "_exps")
    router = {"ffn_gate_inp.weight": [model.n_embd, count]}
    return router | {name: [*shape, count] for name, shape in matrices.items()}


def expert_biases(model: Model) -> Shapes:
    """Biases of the router and of all experts."""
    return {name.replace(".weight", ".bias"): shape[1:] for name, shape in experts(model).items()}


def selection_bias(model: Model) -> Shapes:
    """A bias that takes part in choosing experts, where a sigmoid scores them."""
    is_sigmoid = model.get("expert_gating_func", 0) == SIGMOID_GATING
    return {"exp_probs_b.bias": [model["expert_count"]]} if is_sigmoid else {}


def shared_experts(model: Model) -> Shapes:
    """Experts that every token passes, as one network."""
    width = model["expert_feed_forward_length"] * model.get("expert_shared_count", 1)
    return _ffn(model.n_embd, width, "_shexp")


def _ffn(n_embd: int, width: int, suffix: str = "") -> Shapes:
    return {
        f"ffn_gate{suffix}.weight": [n_embd, width],
        f"ffn_up{suffix}.weight": [n_embd, width],
        f"ffn_down{suffix}.weight": [width, n_embd],
    }


def sublayer_norms(model: Model) -> Shapes:
    """Norms of what goes into the output matrix and into the down matrix."""
    return {
        "attn_sub_norm.weight": [model.n_embd],
        "ffn_sub_norm.weight": [model["feed_forward_length"]],
    }


@dataclass(frozen=True)
class Layout:
    """What the layers of an architecture are made of.

    Attributes:
        every: What all layers have.
        dense: What layers without experts have besides.
        sparse: What layers with experts have besides.
    """

    every: tuple[Part, ...]
    dense: tuple[Part, ...] = (gated_ffn,)
    sparse: tuple[Part, ...] = ()


TWO_NORMS = norms("attn_norm", "ffn_norm")
FOUR_NORMS = norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
LAYOUTS = {
    "bailingmoe2": Layout(
        (joint_attention, head_norms, TWO_NORMS),
        sparse=(experts, selection_bias, shared_experts),
    ),
    "bitnet-25": Layout((attention, TWO_NORMS, sublayer_norms)),
    "cohere2": Layout((attention, norms("attn_norm"))),
    "command-r": Layout((attention, norms("attn_norm"))),
    "deepseek2": Layout(
        (latent_attention, TWO_NORMS), sparse=(experts, selection_bias, shared_experts)
    ),
    "gemma3": Layout((attention, head_norms, FOUR_NORMS)),
    "glm4": Layout((attention, FOUR_NORMS), dense=(joint_ffn,)),
    "gpt-oss": Layout(
        (attention, qkv_biases, output_bias_and_sinks, norms("attn_norm", "post_attention_norm")),
        sparse=(experts, expert_biases),
    ),
    "llama": Layout((attention, TWO_NORMS)),
    "llama4": Layout((attention, TWO_NORMS), sparse=(experts, shared_experts)),
    "qwen2": Layout((attention, qkv_biases, TWO_NORMS)),
    "qwen3": Layout((attention, head_norms, TWO_NORMS)),
    "qwen3moe": Layout((attention, head_norms, TWO_NORMS), sparse=(experts,)),
}


def shapes_of(model: Model) -> Iterator[tuple[str, list[int]]]:
    """All tensors of a model with their shapes."""
    layout = LAYOUTS[model.data["architecture"]]
    vocabulary = [model.n_embd, model.data["n_vocab"]]
    yield "token_embd.weight", vocabulary
    if model.data.get("has_rope_factors"):
        yield "rope_freqs.weight", [model["rope.dimension_count"] // 2]
    for layer in range(model["block_count"]):
        for part in (*layout.every, *(layout.sparse if model.is_sparse(layer) else layout.dense)):
            for name, shape in part(model).items():
                yield f"blk.{layer}.{name}", shape
    yield "output_norm.weight", [model.n_embd]
    if not model.data.get("has_tied_output"):
        yield "output.weight", vocabulary


def qtype_of(architecture: str, name: str, shape: list[int]) -> str:
    """The type in which a model is published: gpt-oss is in MXFP4, all else in BF16."""
    if len(shape) == 1 or name.endswith((".bias", "ffn_gate_inp.weight")):
        return "F32"
    return "MXFP4" if architecture == "gpt-oss" and "_exps" in name else "BF16"


def build(data: dict[str, Any]) -> dict[str, Any]:
    """Turns a model of the data file into a catalog entry."""
    arch = data["architecture"]
    tensors = [[name, shape, qtype_of(arch, name, shape)] for name, shape in shapes_of(Model(data))]
    return {
        "name": data["name"],
        "source": data["source"],
        "metadata": {
            "general.architecture": arch,
            "general.type": "model",
            "general.name": data["name"],
            **{f"{arch}.{key}": value for key, value in data["metadata"].items()},
        },
        "array_lengths": {
            f"tokenizer.ggml.{key}": data["n_vocab"] for key in ("tokens", "token_type")
        },
        "tensors": tensors,
        "printed": data["printed"],
    }


def main() -> None:
    """Builds every model of the data file; the output is the same for the same input."""
    for data in json.loads(MODELS.read_text()):
        entry = build(data)
        text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
        target = TARGET / f"{entry['name']}.json.gz"
        target.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{target.name}: {len(entry['tensors'])} tensors")


if __name__ == "__main__":
    main()
