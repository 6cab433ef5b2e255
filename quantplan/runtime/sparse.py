"""A GGUF with a model's true dimensions whose weights are a hole in the file."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantplan.costs.memory import pad
from quantplan.errors import LlamaCppError
from quantplan.inventory import Inventory
from quantplan.qtypes import qtype
from quantplan.units import gib

_ALIGNMENT = 32
# Rows of the segment embedding of BERT-like models; the rest of the tokenizer is left out.
_SEGMENTS = "tokenizer.ggml.token_type_count"


def write_sparse(inventory: Inventory, path: Path) -> Path:
    """Writes what llama.cpp needs to know of a model's memory; all weights read as zero.

    The file takes less than 1 MB on the disk, whatever its size: of the vocabulary there is the
    length alone, and the data section is never written.

    Args:
        inventory: The model, in the types that it has.
        path: Where to write; the file system must know sparse files.

    Returns:
        `path`.

    Raises:
        LlamaCppError: The file system refuses a file of that size.
    """
    metadata = inventory.metadata
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == _SEGMENTS or not key.startswith(("general.", "tokenizer.")):
            _add(writer, key, value)
    writer.add_tokenizer_model("none")
    if f"{writer.arch}.vocab_size" not in metadata:
        writer.add_vocab_size(inventory.n_vocab)
    hole = 0
    for tensor in inventory.tensors:
        shape, kind = tensor.shape_ne[::-1], qtype(tensor.qtype).ggml_id
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=kind
        )
        hole += pad(tensor.n_bytes, _ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    try:
        os.truncate(path, pad(path.stat().st_size, _ALIGNMENT) + hole)
    except OSError as error:
        raise LlamaCppError(
            f"{path.parent} cannot hold a file with a hole of {gib(hole)} ({error.strerror}): set "
            "TMPDIR to a folder on a file system that knows sparse files"
        ) from error
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a key with the type that llama.cpp wants: counts unsigned, lists of them signed."""
    if isinstance(value, tuple):
        if value:
            writer.add_array(key, list(value))
        return
    kind = gguf.GGUFValueType.get_type(value)
    if kind == gguf.GGUFValueType.INT32 and value >= 0:
        kind = gguf.GGUFValueType.UINT32
    writer.add_key_value(key, value, kind)
