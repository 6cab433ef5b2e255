"""Where every byte of the target goes; the recipe and the source's headers settle it."""

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from quantplan.costs.memory import pad
from quantplan.inventory.header import MAGIC, Header, TensorEntry
from quantplan.qtypes import QType

_VERSION = 3
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

Files = Sequence[tuple[Path, Header]]
"""The files of a model in order, with their headers."""


@dataclass(frozen=True, slots=True)
class TensorMove:
    """One tensor's way from the source to the target.

    Attributes:
        path: Source file.
        begin: Where the tensor's data starts in the source file, in bytes.
        source: Entry in the source's header.
        target: Entry in the target's header.
    """

    path: Path
    begin: int
    source: TensorEntry
    target: TensorEntry

    @property
    def is_copy(self) -> bool:
        """Whether the data stays as it is."""
        return self.source.qtype == self.target.qtype


@dataclass(frozen=True, slots=True)
class Layout:
    """The target file, apart from the tensors' data.

    Attributes:
        header: Everything before the data section, padding included.
        moves: Tensors in file order.
        alignment: Alignment of tensor data in bytes.
        n_bytes: Size of the whole file; the last tensor is padded as well.
    """

    header: bytes
    moves: tuple[TensorMove, ...]
    alignment: int
    n_bytes: int


def lay_out(files: Files, qtypes: Mapping[str, QType]) -> Layout:
    """Lays the target out as one file, with the source's metadata and tensor order.

    Args:
        files: Source files; the metadata come from the first.
        qtypes: Target type by tensor name.
    """
    path, first = files[0]
    alignment = first.alignment
    moves, offset = [], 0
    for source_path, header in files:
        for source in header.tensors:
            qtype = qtypes[source.name]
            n_bytes = qtype.tensor_bytes(source.shape_ne)
            target = TensorEntry(source.name, source.shape_ne, qtype, offset, n_bytes)
            moves.append(
                TensorMove(source_path, header.data_offset + source.offset, source, target)
            )
            offset += pad(n_bytes, alignment)
    entries = _metadata(path, first, file_type([move.target for move in moves]))
    head = b"".join(
        (
            MAGIC,
            struct.pack("<IQQ", _VERSION, len(moves), len(entries)),
            *entries,
            *(_tensor_info(move.target) for move in moves),
        )
    )
    head = head.ljust(pad(len(head), alignment), b"\0")
    return Layout(head, tuple(moves), alignment, len(head) + offset)


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


def _metadata(path: Path, header: Header, ftype: int) -> list[bytes]:
    """The target's key-value entries: the source's, byte for byte, but for what changes."""
    changed = {_FILE_TYPE: ftype, _QUANTIZATION_VERSION: int(gguf.GGML_QUANT_VERSION)}
    entries = []
    with path.open("rb") as file:
        for key, (begin, end) in header.spans.items():
            if key.startswith("split."):
                continue
            if key in changed:
                entries.append(_uint32_entry(key, changed.pop(key)))
                continue
            file.seek(begin)
            entries.append(file.read(end - begin))
    return entries + [_uint32_entry(key, value) for key, value in changed.items()]


def _uint32_entry(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", gguf.GGUFValueType.UINT32, value)


def _tensor_info(tensor: TensorEntry) -> bytes:
    n_dims = len(tensor.shape_ne)
    return _string(tensor.name) + struct.pack(
        f"<I{n_dims}QIQ", n_dims, *tensor.shape_ne, tensor.qtype.ggml_id, tensor.offset
    )


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
