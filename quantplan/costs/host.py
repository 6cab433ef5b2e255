"""What weights in RAM take beside their bytes: a mapped file, matrices in another layout.

Rules of llama.cpp b10434 to b11434, checked against the buffer sizes that it prints.
"""

from collections.abc import Collection

from quantplan.costs.memory import BUFFER_ALIGNMENT, pad
from quantplan.inventory import Architecture, Inventory, Tensor
from quantplan.inventory.sources import is_split

# Types that the CPU backend holds in another layout on x86 with AVX2 (ggml-cpu's repack.cpp), for
# matrices whose rows come in groups of so many.
_REPACKED = {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
_ROW_GROUP = 8
_MATRIX_AXES = (2, 3)


def is_repacked(tensor: Tensor, n_copies: int = 1) -> bool:
    """Whether the CPU backend makes a copy of a matrix in its own layout, of as many bytes.

    It does so only where no GPU offers a buffer in RAM, so on machines without a GPU.

    Args:
        tensor: It.
        n_copies: How often it is in RAM; the second time, an embedding is the output matrix.
    """
    is_multiplied = tensor.role_class not in ("embedding", "norm") or n_copies > 1
    return is_multiplied and _has_layout(tensor, tensor.qtype)


def copies_tied_output(
    architecture: Architecture, embedding: Tensor, qtype: str, *, on_gpu: bool, repacks: bool
) -> bool:
    """Whether a tied embedding is held once more, as the output matrix.

    Without a GPU llama.cpp reads it where it is, unless the CPU wants a matrix in its own layout:
    rows of embeddings cannot be read there.

    Args:
        architecture: Of the model.
        embedding: The embedding.
        qtype: Its type.
        on_gpu: Whether the output is on a GPU.
        repacks: Whether the CPU holds matrices in its own layout.
    """
    is_repacked_copy = repacks and _has_layout(embedding, qtype)
    return on_gpu or is_repacked_copy or architecture.always_copies_tied_output


def _has_layout(matrix: Tensor, qtype: str) -> bool:
    """Whether the CPU has a layout of its own for a matrix."""
    rows = matrix.shape_ne[1] if len(matrix.shape_ne) in _MATRIX_AXES else 1
    return qtype in _REPACKED and rows % _ROW_GROUP == 0


def mapped_bytes(inventory: Inventory, names: Collection[str]) -> int | None:
    """Bytes from the first to the last of some tensors in the file, all in between included.

    Args:
        inventory: The model.
        names: The tensors that are read where they are in the mapped file.

    Returns:
        None where the file is not known to be one: from the catalog, or split.
    """
    if is_split(inventory.source) or not inventory.source.endswith(".gguf"):
        return None
    alignment = int(inventory.metadata.get("general.alignment") or BUFFER_ALIGNMENT)
    begin, end, offset = None, 0, 0
    for tensor in inventory.tensors:
        if tensor.name in names:
            begin = offset if begin is None else begin
            end = offset + tensor.n_bytes
        offset = pad(offset + tensor.n_bytes, alignment)
    return end - (begin or 0)
