"""What weights in RAM take beside their bytes: a mapped file, matrices in another layout.

Rules of llama.cpp b10434 to b11434, checked against the buffer sizes that it prints.
"""

from collections.abc import Collection

from quantplan.costs.memory import BUFFER_ALIGNMENT, pad
from quantplan.inventory import Inventory, Tensor

# Types that the CPU backend holds in another layout on x86 with AVX2 (ggml-cpu's repack.cpp), for
# matrices whose rows come in groups of so many.
_REPACKED = {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
_ROW_GROUP = 8
_MATRIX_AXES = (2, 3)


def is_repacked(tensor: Tensor) -> bool:
    """Whether the CPU backend makes a copy of a matrix in its own layout, of as many bytes.

    It does so only where no GPU offers a buffer in RAM, so on machines without a GPU.
    """
    return (
        tensor.role_class not in ("embedding", "norm")
        and tensor.qtype in _REPACKED
        and len(tensor.shape_ne) in _MATRIX_AXES
        and tensor.shape_ne[1] % _ROW_GROUP == 0
    )


def mapped_bytes(inventory: Inventory, names: Collection[str]) -> int | None:
    """Bytes from the first to the last of some tensors in the file, all in between included.

    Args:
        inventory: The model.
        names: The tensors that are read where they are in the mapped file.

    Returns:
        None where the file is not known to be one: from the catalog, or split.
    """
    is_split = int(inventory.metadata.get("split.count") or 1) > 1
    if is_split or not inventory.source.endswith(".gguf"):
        return None
    alignment = int(inventory.metadata.get("general.alignment") or BUFFER_ALIGNMENT)
    begin, end, offset = None, 0, 0
    for tensor in inventory.tensors:
        if tensor.name in names:
            begin = offset if begin is None else begin
            end = offset + tensor.n_bytes
        offset = pad(offset + tensor.n_bytes, alignment)
    return end - (begin or 0)
