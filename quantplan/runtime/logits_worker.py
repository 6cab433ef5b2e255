"""Runs a model over chunks of a text through llama.cpp's library; a program of its own.

llama.cpp may end its process and brings its own ggml, so this runs in a child: ``python
logits_worker.py JOB.json``. It knows nothing of quantplan but this file.

Positions are those of llama-perplexity: the text is cut into chunks, each starts with the token
that begins a text where the model wants one, and the second half of each chunk is judged.

Parameter structs are named only as far as they are set; the rest is passed on as llama.cpp filled
it in. What it filled in also tells whether the named fields are where they are expected.
"""

import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Log probabilities are kept as roots in 16 bits, so that the likely tokens are the most precise: to
# 1e-5 at p = 0.99, 1.5e-4 at p = 0.1, 6e-4 at p = 1e-7. Below exp(-48) all are alike.
_LOWEST, _LEVELS = 48.0, 65535.0
# llama_context_default_params begins with these, as llama.h has since 2023.
_CONTEXT_DEFAULTS = (512, 2048, 512)
_LAYER_SPLIT = 1  # LLAMA_SPLIT_MODE_LAYER, the default, follows n_gpu_layers


def judged(chunk_tokens: int) -> slice:
    """Positions of a chunk whose next token is judged, as llama-perplexity has them."""
    return slice(chunk_tokens // 2, chunk_tokens - 1)


def encode(log_p: Floats) -> NDArray[np.uint16]:
    """Log probabilities in 16 bits."""
    code = np.sqrt(np.minimum(-log_p, _LOWEST) / _LOWEST)
    return np.rint(code * _LEVELS).astype(np.uint16)


def decode(code: NDArray[np.uint16]) -> Floats:
    """Log probabilities, a row per position, that `encode` kept; each row sums to one again."""
    root = code.astype(np.float32) / np.float32(_LEVELS)
    return log_softmax(-np.float32(_LOWEST) * root**2)


def log_softmax(logits: Floats) -> Floats:
    """Logarithms of probabilities, a row per position."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def compare(base: Floats, log_p: Floats, nexts: NDArray[np.int32]) -> dict[str, Any]:
    """What a chunk shows of a model.

    Args:
        base: Log probabilities of the base, a row per position.
        log_p: Those of the model.
        nexts: The token that really follows each position.
    """
    right = np.arange(len(nexts))
    kld = (np.exp(base) * (base - log_p)).sum(axis=1)
    return {
        "kld_nats": [float(f"{value:.6g}") for value in kld],
        "same_top": (base.argmax(axis=1) == log_p.argmax(axis=1)).astype(int).tolist(),
        "ln_ppl": float(-log_p[right, nexts].mean(dtype=np.float64)),
        "base_ln_ppl": float(-base[right, nexts].mean(dtype=np.float64)),
    }


def keep(folder: Path, chunk: int, log_p: Floats) -> None:
    """Saves the base's log probabilities of a chunk, whole or not at all."""
    partial = folder / f".{chunk}.{os.getpid()}.npy"
    np.save(partial, encode(log_p))
    partial.replace(base_path(folder, chunk))


def record(
    folder: Path, journal: Path, chunk: int, log_p: Floats, nexts: NDArray[np.int32]
) -> None:
    """Appends what a chunk shows of a model to its journal."""
    found = compare(decode(np.load(base_path(folder, chunk))), log_p, nexts)
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"chunk": chunk, **found}) + "\n")


def base_path(folder: Path, chunk: int) -> Path:
    """Where the base's log probabilities of a chunk are."""
    return folder / f"{chunk}.npy"


def agree(folder: Path, tokens: NDArray[np.int32], n_vocab: int, n_chunks: int) -> None:
    """Holds the tokens of a text against those of the base, which come first.

    Raises:
        ValueError: They differ, so the models cannot be compared.
    """
    found = {
        "n_chunks": n_chunks,
        "n_vocab": n_vocab,
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    path = folder / "text.json"
    if not path.exists():
        partial = folder / f".text.{os.getpid()}.json"
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(path)
    elif json.loads(path.read_text(encoding="utf-8")) != found:
        raise ValueError("the model cuts the text into other tokens than its base does")


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 488),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 500),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _ModelParams]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _ContextParams]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_vocab_get_add_bos": (ctypes.c_bool, [ctypes.c_void_p]),
    "llama_vocab_bos": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_tokenize": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
         ctypes.c_int32, ctypes.c_bool, ctypes.c_bool],
    ),
    "llama_batch_init": (_Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
}  # fmt: skip


def load_library(path: Path) -> Any:
    """Opens llama.cpp's library and checks that it is laid out as this file expects.

    Raises:
        ValueError: It is not; the message says what differs.
    """
    llama: Any = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(llama, name, None)
        if function is None:
            raise ValueError(f"{path} has no {name}: it is older than June 2025, or another fork's")
        function.restype, function.argtypes = result, arguments
    context = llama.llama_context_default_params()
    model = llama.llama_model_default_params()
    begins = (context.n_ctx, context.n_batch, context.n_ubatch)
    if begins != _CONTEXT_DEFAULTS or (model.devices, model.overrides) != (None, None):
        raise ValueError(f"{path} has parameters in an unknown layout: it begins with {begins}")
    if model.split_mode != _LAYER_SPLIT:
        raise ValueError(f"{path} has model parameters in an unknown layout")
    if hasattr(llama, "ggml_backend_load_all_from_path") and not llama.ggml_backend_reg_count():
        llama.ggml_backend_load_all_from_path(str(path.parent).encode())
    llama.llama_backend_init()
    return llama


class Runner:
    """A loaded model and the tokens of a text."""

    def __init__(self, llama: Any, job: dict[str, Any]) -> None:
        """Loads the model and cuts the text into tokens.

        Raises:
            ValueError: llama.cpp refused the model, or the text is too short.
        """
        self._llama, self.size = llama, job["chunk_tokens"]
        params = llama.llama_model_default_params()
        if job["gpu_layers"] is not None:
            params.n_gpu_layers = job["gpu_layers"]
        model = llama.llama_model_load_from_file(job["model"].encode(), params)
        if not model:
            raise ValueError(f"llama.cpp failed to load {job['model']}")
        self._context = llama.llama_init_from_model(model, self._context_params())
        if not self._context:
            raise ValueError(f"llama.cpp failed to make a context of {self.size} tokens")
        llama.llama_set_n_threads(self._context, job["threads"], job["threads"])
        self._vocab = llama.llama_model_get_vocab(model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        self.tokens = self._tokenize(Path(job["text"]).read_bytes())
        self.n_chunks = len(self.tokens) // self.size
        self._batch = llama.llama_batch_init(self.size, 0, 1)
        self._batch.n_tokens = self.size

    def _context_params(self) -> _ContextParams:
        params: _ContextParams = self._llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.size
        return params

    def _tokenize(self, text: bytes) -> NDArray[np.int32]:
        room = len(text) + 8
        tokens = (ctypes.c_int32 * room)()
        n = self._llama.llama_tokenize(self._vocab, text, len(text), tokens, room, True, False)
        if n < 0:
            raise ValueError(f"llama.cpp failed to cut the text into tokens: {n}")
        return np.array(tokens[:n], dtype=np.int32)

    def log_probabilities(self, chunk: int) -> tuple[Floats, NDArray[np.int32]]:
        """Log probabilities at the judged positions of a chunk, and the tokens that follow."""
        llama, batch, own = self._llama, self._batch, judged(self.size)
        tokens = self.tokens[chunk * self.size : (chunk + 1) * self.size]
        nexts = tokens[own.start + 1 : own.stop + 1]
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, own.start <= i < own.stop
        if llama.llama_vocab_get_add_bos(self._vocab):
            batch.token[0] = llama.llama_vocab_bos(self._vocab)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        code = llama.llama_decode(self._context, batch)
        if code:
            raise ValueError(f"llama_decode failed with code {code}")
        raw = llama.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(raw, (own.stop - own.start, self.n_vocab))
        if not np.isfinite(logits).all():
            raise ValueError("the model gives logits that are not finite")
        return log_softmax(logits), nexts


def main() -> None:
    """Does the job of a file: keeps the base's log probabilities, or compares with them."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    base = Path(job["base"])
    try:
        runner = Runner(load_library(Path(job["library"])), job)
        agree(base, runner.tokens, runner.n_vocab, runner.n_chunks)
        for chunk in range(min(job["chunks"] or runner.n_chunks, runner.n_chunks)):
            if os.getppid() != job["parent"]:
                raise ValueError("whoever asked for this has ended")
            if job["journal"] is None:
                if not base_path(base, chunk).exists():
                    keep(base, chunk, runner.log_probabilities(chunk)[0])
            elif chunk not in job["done"]:
                record(base, Path(job["journal"]), chunk, *runner.log_probabilities(chunk))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
