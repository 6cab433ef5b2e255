"""Where every byte of the target's files goes; the recipe and the source's headers settle it."""

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from quantplan.costs.memory import pad
from quantplan.inventory.header import DEFAULT_ALIGNMENT, MAGIC, Header, TensorEntry
from quantplan.inventory.ranges import Location, open_ranges
from quantplan.qtypes import QType
from quantplan.quantize.imatrix import Importance

_VERSION = 3
_ALIGNMENT = "general.alignment"
_FILE_TYPE = "general.file_type"
_QUANTIZATION_VERSION = "general.quantization_version"
# Named mixes stand for the types that are not an ftype by themselves.
_FTYPE_NAMES = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}
# llama.h has it, the gguf package of the same time has not.
_LATER_FTYPES = {"MOSTLY_Q2_0": 41}

Files = Sequence[tuple[Location, Header]]
"""The files of a model in order, with their headers."""

Metadata = Mapping[str, str]
"""Text to state in the header, by key."""


@dataclass(frozen=True, slots=True)
class TensorMove:
    """One tensor's way from the source to the target.

    Attributes:
        location: Source file.
        begin: Where the tensor's data starts in the source file, in bytes.
        source: Entry in the source's header.
        target: Entry in the target's header.
        importance: Weights of the columns, shape (experts, columns), where they are known.
    """

    location: Location
    begin: int
    source: TensorEntry
    target: TensorEntry
    importance: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def is_copy(self) -> bool:
        """Whether the data stays as it is."""
        return self.source.qtype == self.target.qtype


@dataclass(frozen=True, slots=True)
class Layout:
    """A target file, apart from the tensors' data.

    Attributes:
        path: The file.
        header: Everything before the data section, padding included.
        moves: Tensors in file order.
        n_bytes: Size of the whole file; the last tensor is padded as well.
    """

    path: Path
    header: bytes
    moves: tuple[TensorMove, ...]
    n_bytes: int


def lay_out(
    files: Files,
    target: Path,
    qtypes: Mapping[str, QType],
    *,
    importance: Importance | None = None,
    metadata: Metadata | None = None,
    split_max_bytes: int | None = None,
) -> tuple[Layout, ...]:
    """Lays the target out, with the source's metadata and tensor order.

    Args:
        files: Source files; the metadata come from the first.
        target: Name of the file; shards get their number before its suffix.
        qtypes: Target type by tensor name.
        importance: Importance of the columns by tensor name.
        metadata: Keys to add.
        split_max_bytes: Start another shard rather than have more tensor data in one, as
            llama-gguf-split does. A tensor that is larger has a shard to itself.

    Returns:
        One file, or the shards in order.
    """
    location, first = files[0]
    alignment = first.alignment
    sources = [(place, header, t) for place, header in files for t in header.tensors]
    shards: list[list[TensorMove]] = [[]]
    offset = 0
    for place, header, source in sources:
        qtype = qtypes[source.name]
        n_bytes = qtype.tensor_bytes(source.shape_ne)
        if split_max_bytes and shards[-1] and offset + pad(n_bytes, alignment) > split_max_bytes:
            shards.append([])
            offset = 0
        entry = TensorEntry(source.name, source.shape_ne, qtype, offset, n_bytes)
        begin = header.data_offset + source.offset
        own = None if source.qtype == qtype else (importance or {}).get(source.name)
        own = None if own is None else own.reshape(-1, source.shape_ne[0])
        shards[-1].append(TensorMove(place, begin, source, entry, own))
        offset += pad(n_bytes, alignment)
    ftype = file_type(move.target for moves in shards for move in moves)
    entries = _metadata(location, first, ftype, metadata or {})
    layouts = []
    for index, moves in enumerate(shards):
        path = target
        if split_max_bytes:
            path = target.with_name(f"{target.stem}-{index + 1:05d}-of-{len(shards):05d}.gguf")
            if index:
                entries = [] if alignment == DEFAULT_ALIGNMENT else [_uint32(_ALIGNMENT, alignment)]
            entries = [*entries, *_split_entries(index, len(shards), len(sources))]
        layouts.append(_file(path, entries, moves, alignment))
    return tuple(layouts)


def _file(
    path: Path, entries: Sequence[bytes], moves: Sequence[TensorMove], alignment: int
) -> Layout:
    head = b"".join(
        (
            MAGIC,
            struct.pack("<IQQ", _VERSION, len(moves), len(entries)),
            *entries,
            *(_tensor_info(move.target) for move in moves),
        )
    )
    head = head.ljust(pad(len(head), alignment), b"\0")
    last = moves[-1].target
    return Layout(path, head, tuple(moves), len(head) + last.offset + pad(last.n_bytes, alignment))


def _split_entries(index: int, n_shards: int, n_tensors: int) -> list[bytes]:
    """What llama.cpp wants to know of a shard, in the types that it wants."""
    kinds = gguf.GGUFValueType
    return [
        _string("split.no") + struct.pack("<IH", kinds.UINT16, index),
        _string("split.count") + struct.pack("<IH", kinds.UINT16, n_shards),
        _string("split.tensors.count") + struct.pack("<Ii", kinds.INT32, n_tensors),
    ]


def file_type(tensors: Iterable[TensorEntry]) -> int:
    """The ftype to state: of the quantized type with most bytes, or of the float type with most.

    A file with one type per tensor has no ftype of its own; runtimes only display the number.
    """
    n_bytes: Counter[QType] = Counter()
    for tensor in tensors:
        n_bytes[tensor.qtype] += tensor.n_bytes
    main = max(n_bytes, key=lambda qtype: (not qtype.is_float, n_bytes[qtype]))
    name = _FTYPE_NAMES.get(main.name, f"MOSTLY_{main.name}")
    ftypes = {**_LATER_FTYPES, **gguf.LlamaFileType.__members__}
    return int(ftypes.get(name, gguf.LlamaFileType.GUESSED))


def _metadata(location: Location, header: Header, ftype: int, added: Metadata) -> list[bytes]:
    """The target's key-value entries: the source's, byte for byte, but for what changes."""
    changed = {
        _FILE_TYPE: _uint32(_FILE_TYPE, ftype),
        _QUANTIZATION_VERSION: _uint32(_QUANTIZATION_VERSION, int(gguf.GGML_QUANT_VERSION)),
        **{key: _text(key, value) for key, value in added.items()},
    }
    entries = []
    with open_ranges(location) as file:
        for key, (begin, end) in header.spans.items():
            if key.startswith("split."):
                continue
            entries.append(changed.pop(key, b"") or file.read_at(begin, end - begin))
    return [*entries, *changed.values()]


def _uint32(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", gguf.GGUFValueType.UINT32, value)


def _text(key: str, value: str) -> bytes:
    return _string(key) + struct.pack("<I", gguf.GGUFValueType.STRING) + _string(value)


def _tensor_info(tensor: TensorEntry) -> bytes:
    n_dims = len(tensor.shape_ne)
    return _string(tensor.name) + struct.pack(
        f"<I{n_dims}QIQ", n_dims, *tensor.shape_ne, tensor.qtype.ggml_id, tensor.offset
    )


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
