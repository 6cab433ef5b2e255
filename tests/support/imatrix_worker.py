"""Collects an importance matrix with llama.cpp's library: mean squares of activations.

llama-imatrix is in no Python package. This runs the same graph, and llama.cpp calls back with every
product of matrices; a program of its own, as llama.cpp may end its process.
"""

import ctypes
import json
import struct
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantplan.runtime.logits_worker import Runner, load_library

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
# llama_context_params: what is before the callback and its argument, both null, and what follows.
_BEFORE, _AFTER = struct.pack("<f", -1.0), struct.pack("<ii", 1, 1)
# ggml_tensor: its type, its lengths, and what it is computed from.
_NE, _SOURCES = 16, 152


class Collector(Runner):
    """A loaded model that sums the squares of what its matrices are multiplied by."""

    def __init__(self, llama: Any, job: dict[str, Any]) -> None:
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._callback = _CALLBACK(self._on_tensor)
        for name, result, arguments in (
            ("ggml_op_desc", ctypes.c_char_p, [ctypes.c_void_p]),
            ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
            ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
            ("ggml_backend_tensor_get", None,
             [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
        ):  # fmt: skip
            function = getattr(llama, name)
            function.restype, function.argtypes = result, arguments
        super().__init__(llama, job)

    def _context_params(self) -> Any:
        params = super()._context_params()
        raw = bytes(params)
        nulls = _BEFORE + bytes(16) + _AFTER
        if raw.count(nulls) != 1:
            raise ValueError("llama_context_params has an unknown layout")
        address = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
        at = raw.index(nulls) + len(_BEFORE)
        changed = raw[:at] + struct.pack("<Q", address) + raw[at + 8 :]
        return type(params).from_buffer_copy(changed)

    def _on_tensor(self, tensor: int, ask: bool, _: object) -> bool:
        if self._llama.ggml_op_desc(tensor) != b"MUL_MAT":
            return not ask
        weight, activations = (ctypes.c_uint64.from_address(tensor + _SOURCES + 8 * i).value
                               for i in (0, 1))  # fmt: skip
        name = self._llama.ggml_get_name(weight).decode()
        # As llama-imatrix: matrices of the layers only.
        is_wanted = name.startswith("blk.") and name.endswith(".weight")
        if ask or not is_wanted:
            return is_wanted or not ask
        n_columns = ctypes.c_int64.from_address(activations + _NE).value
        n_bytes = self._llama.ggml_nbytes(activations)
        values = np.empty(n_bytes // 4, dtype=np.float32)
        self._llama.ggml_backend_tensor_get(activations, values.ctypes.data, 0, n_bytes)
        squares = values.reshape(-1, n_columns).astype(np.float64) ** 2
        self.sums[name] = self.sums[name] + squares.sum(axis=0)
        self.counts[name] += len(squares)
        return True


def main() -> None:
    """Reads a job, runs the chunks, and writes a GGUF as llama-imatrix does."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    collector = Collector(load_library(Path(job["library"])), job)
    for chunk in range(min(job["chunks"], collector.n_chunks)):
        collector.log_probabilities(chunk)
    writer = gguf.GGUFWriter(job["target"], "imatrix")
    writer.add_type("imatrix")
    for name, sums in collector.sums.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[collector.counts[name]]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
