"""A tiny model of every architecture that llama.cpp loads, and the caches it then allocated.

The data file beside this module was made by `scripts/explore_architectures.py`, which asked
llama.cpp itself which tensors it wants. With it, predictions of cache sizes can be checked without
llama.cpp, and against a newer llama.cpp with `write_toy` and `read_caches`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantplan.runtime.log import Buffers

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by tensor name, in GGUF order: row length first."""

DATA_PATH = Path(__file__).with_suffix(".json.gz")
_DATA: dict[str, Any] = {"llama_cpp": "", "architectures": {}, "refused": {}}
if DATA_PATH.exists():  # it does not while it is made for the first time
    _DATA = json.loads(gzip.decompress(DATA_PATH.read_bytes()))

LLAMA_CPP: str = _DATA["llama_cpp"]
"""The build that was asked."""

ARCHITECTURES: dict[str, dict[str, Any]] = _DATA["architectures"]
"""By name: `metadata`, `tensors` (templates, see `expand`), `measured`, `variants`.

`metadata` has the architecture's keys without its name, and a few complete ones. `measured` lists
what llama.cpp allocated for several workloads: `bytes` of all caches and states together, exactly,
and each cache as `read_caches` reads it from the log. A variant has `metadata` that change those of
the architecture (null removes a key), perhaps `tensors` of its own, and what was `measured` then.
Optional: `vocabulary`, where few tokens do not do; `beside`, the architecture of a target model
without which a draft model makes no context.
"""

REFUSED: dict[str, str] = _DATA["refused"]
"""Why no tiny model of an architecture could be made."""

VOCABULARY = 131
"""Tokens that a tiny model has where that is enough."""

_BYTES_PER_WEIGHT = 4
_ALIGNMENT = 32
_MERGES = ("t h", "h e")
_COMPLETE_KEYS = ("general.", "tokenizer.", "xielu.")


@dataclass(frozen=True)
class Cache:
    """One line of llama.cpp's log about a KV cache, a recurrent state or a compressor's state.

    Attributes:
        kind: `kv`, `state` or `compressor`.
        layers: Those that have a part in it, where the log is detailed enough to tell; else empty.
        n_layers: How many these are.
        cells: Cells of one stream; sequences for a state.
        streams: Separate copies of the cells.
        mib: Bytes in MiB, rounded to 0.01, as printed: K and V; R and S of a state; one number for
            a compressor.
    """

    kind: str
    layers: tuple[int, ...]
    n_layers: int
    cells: int
    streams: int
    mib: tuple[float, ...]


_LAYER_LINE = re.compile(r"(?:llama_\w+): layer +(\d+): dev = |recurrent, layer +(\d+): dev = ")
_SIZE_LINES = {
    "kv": re.compile(
        r"kv_cache: size = +[\d.]+ MiB \( *(?P<cells>\d+) cells, +(?P<layers>\d+) layers, +"
        r"\d+/(?P<streams>\d+) seqs\), K \(\w+\): +([\d.]+) MiB, V \(\w+\): +([\d.]+) MiB"
    ),
    "state": re.compile(
        r"recurrent: size = +[\d.]+ MiB \( *(?P<cells>\d+) cells, +(?P<layers>\d+) layers, +"
        r"\d+ seqs +\d+ rs_seq\), R \(\w+\): +([\d.]+) MiB, S \(\w+\): +([\d.]+) MiB"
    ),
    "compressor": re.compile(
        r"comp_state: \w+ ratio = \d+, state = (?P<cells>\d+) x \d+, streams = (?P<streams>\d+), "
        r"rs_seq = \d+, layers = (?P<layers>\d+), size = +([\d.]+) MiB"
    ),
}


def read_caches(log: str) -> tuple[Cache, ...]:
    """Read every cache and state that llama.cpp says it made, in order.

    Args:
        log: What it printed, from `-lv 4` on. Only with `-lv 5` it also says which layers.
    """
    caches = []
    layers: list[int] = []
    for line in log.splitlines():
        if match := _LAYER_LINE.search(line):
            layers.append(int(match[1] or match[2]))
        for kind, pattern in _SIZE_LINES.items():
            if match := pattern.search(line):
                named = match.groupdict()
                caches.append(
                    Cache(
                        kind=kind,
                        layers=tuple(layers),
                        n_layers=int(named["layers"]),
                        cells=int(named["cells"]),
                        streams=int(named.get("streams", 1)),
                        mib=tuple(float(text) for text in match.groups() if "." in text),
                    )
                )
                layers = []
    return tuple(caches)


def cache_mib(log: str) -> tuple[float, float]:
    """Sum up a log: MiB of all KV caches and of all recurrent states, rounded line by line.

    Compressor states, which only `deepseek4` has, count as KV cache.
    """
    buffers = Buffers.parse(log)
    compressors = sum(sum(cache.mib) for cache in read_caches(log) if cache.kind == "compressor")
    return sum(buffers.kv.values()) + compressors, sum(buffers.recurrent.values())


def metadata_of(architecture: str, variant: str | None = None) -> dict[str, Any]:
    """Return the metadata of a tiny model as its file has them, without the vocabulary.

    Args:
        architecture: One of `ARCHITECTURES`.
        variant: One of its `variants`; None for the plain one.
    """
    entry = ARCHITECTURES[architecture]
    settings = dict(entry["metadata"])
    if variant is not None:
        settings |= entry["variants"][variant]["metadata"]
    return qualified(settings, architecture)


def qualified(settings: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Complete the keys of `settings` with the name of the architecture; leave nulls out."""
    named = {
        key if key.startswith(_COMPLETE_KEYS) else f"{architecture}.{key}": value
        for key, value in settings.items()
        if value is not None
    }
    return {"general.architecture": architecture, **named}


def write_toy(architecture: str, path: Path, variant: str | None = None) -> Path:
    """Write a tiny model whose weights are all zero.

    The weights are a hole in the file, so that writing takes no time and next to no space.

    Args:
        architecture: One of `ARCHITECTURES`.
        path: Where to write.
        variant: One of its `variants`; None for the plain one.

    Returns:
        `path`.
    """
    entry = ARCHITECTURES[architecture]
    chosen = entry if variant is None else entry | entry["variants"][variant]
    tensors = expand(chosen.get("tensors", entry["tensors"]))
    settings = metadata_of(architecture, variant)
    return write_model(path, settings, tensors, entry.get("vocabulary", VOCABULARY))


def write_model(
    path: Path, metadata: Mapping[str, Any], tensors: Shapes, vocabulary: int = VOCABULARY
) -> Path:
    """Write a model with F32 weights that are all zero.

    Args:
        path: Where to write.
        metadata: With complete keys. Integers become UINT32, lists of integers INT32.
        tensors: Their shapes.
        vocabulary: Number of tokens.

    Returns:
        `path`.
    """
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            kind = gguf.GGUFValueType.get_type(value)
            if kind == gguf.GGUFValueType.INT32:
                kind = gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
    _add_vocabulary(writer, vocabulary)
    hole = 0
    for name, ne in tensors.items():
        n_bytes = _BYTES_PER_WEIGHT * prod(ne)
        writer.add_tensor_info(name, ne[::-1], np.dtype(np.float32), n_bytes)
        hole += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT
    os.truncate(path, start + hole)
    return path


def expand(templates: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Spell out tensor templates: `blk.0-2,5.attn_q.weight` is there once for each layer named."""
    return {
        name: tuple(shape) for template, shape in templates.items() for name in _names(template)
    }


def compress(tensors: Shapes) -> dict[str, list[int]]:
    """Shorten a list of tensors to templates, the inverse of `expand` but for the order."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    templates = {}
    for name, shape in tensors.items():
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            layers.setdefault((match[2], tuple(shape)), []).append(int(match[1]))
        else:
            templates[name] = list(shape)
    for (role, shape), numbers in layers.items():
        templates[f"blk.{_spans(numbers)}.{role}"] = list(shape)
    return templates


def _names(template: str) -> Iterator[str]:
    """List the tensors that a template stands for."""
    match = re.fullmatch(r"blk\.([\d,-]+)\.(.+)", template)
    if not match:
        yield template
        return
    for span in match[1].split(","):
        first, _, last = span.partition("-")
        for layer in range(int(first), int(last or first) + 1):
            yield f"blk.{layer}.{match[2]}"


def _spans(numbers: list[int]) -> str:
    """Write numbers as `0-2,5`."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    spans = []
    for _, run in runs:
        first, *_, last = [number for _, number in run] * 2
        spans.append(f"{first}-{last}" if first != last else str(first))
    return ",".join(spans)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add a vocabulary as GPT-2 spells it: ASCII, two merges, fillers and an end."""
    tokens = [chr(code if 32 < code < 127 else 256 + code) for code in range(128)]
    tokens += [merge.replace(" ", "") for merge in _MERGES]
    tokens += [f"<{number}>" for number in range(len(tokens), size - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<|endoftext|>"])
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL]
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(list(_MERGES))
    writer.add_eos_token_id(len(tokens))
