"""What must hold before a byte is written; every fault is found in one go."""

import os
import shutil
from collections import Counter
from pathlib import Path

from quantplan.errors import RecipeError, SourceError
from quantplan.inventory import Tensor
from quantplan.inventory.header import TensorEntry
from quantplan.qtypes import QTYPES, QType
from quantplan.quantize.layout import Files, Layout, lay_out
from quantplan.recipe import Recipe, RecipeTensor
from quantplan.units import mib


def checked_layout(recipe: Recipe, files: Files, target: Path) -> Layout:
    """Checks a recipe against a source and a place to write to.

    Args:
        recipe: What to do.
        files: Files of the source, in order.
        target: File to write; no symbolic link.

    Raises:
        SourceError: The source is big-endian.
        RecipeError: The recipe does not fit the source, or the target cannot be written there; all
            faults are named.
    """
    swapped = [str(path) for path, header in files if header.byte_order != "<"]
    if swapped:
        raise SourceError(f"{path} is big-endian; convert it for little-endian" for path in swapped)
    faults = _tensor_faults(recipe, files)
    target_faults = _target_faults(files, target)
    if faults:
        raise RecipeError([*faults, *target_faults])
    layout = lay_out(files, {t.tensor: QTYPES[t.qtype.upper()] for t in recipe.tensors})
    if target.parent.is_dir():
        target_faults += _space_faults(layout, target.parent)
    if target_faults:
        raise RecipeError(target_faults)
    return layout


def _tensor_faults(recipe: Recipe, files: Files) -> list[str]:
    counts = Counter(t.tensor for t in recipe.tensors)
    faults = [f"the recipe names {name} {n} times" for name, n in counts.items() if n > 1]
    wanted = {t.tensor: t for t in recipe.tensors}
    present = {t.name: t for _, header in files for t in header.tensors}
    if not present:
        return [f"{files[0][0]} holds no tensors, only metadata; name the file with the weights"]
    faults += [
        f"the recipe lacks {name}, a tensor of the source; plan again from this source"
        for name in present.keys() - wanted.keys()
    ]
    faults += [
        f"the source lacks {name}, a tensor of the recipe; plan again from this source"
        for name in wanted.keys() - present.keys()
    ]
    both = (_tensor_fault(present[n], wanted[n]) for n in present if n in wanted)
    return [*sorted(faults), *(fault for fault in both if fault)]


def _tensor_fault(source: TensorEntry, wanted: RecipeTensor) -> str | None:
    if wanted.shape_ne != source.shape_ne:
        return (
            f"{source.name} has the shape {source.shape_ne}, but the recipe was made for "
            f"{wanted.shape_ne}; plan again from this source"
        )
    qtype = QTYPES.get(wanted.qtype.upper())
    if qtype is None:
        return f"{source.name}: there is no type {wanted.qtype!r}"
    if qtype == source.qtype:
        return None
    fault = _type_fault(source, qtype)
    return fault and f"{source.name} cannot become {qtype.name}: {fault}"


def _type_fault(source: TensorEntry, qtype: QType) -> str | None:
    if not source.qtype.is_float:
        return (
            f"it is {source.qtype.name} in the source, and only F32, F16 and BF16 can be "
            "converted; start from such a file"
        )
    if "llama.cpp" not in qtype.runtimes or not qtype.is_file_target:
        return "llama.cpp's quantizer writes no such file; for ik_llama.cpp use its llama-quantize"
    if qtype.needs_imatrix:
        return (
            "the type needs an importance matrix, which quantplan cannot pass on yet; choose "
            "another type, or run llama-quantize --imatrix"
        )
    tensor = Tensor(name=source.name, shape_ne=source.shape_ne, qtype=source.qtype.name)
    if not qtype.is_float and not tensor.is_quantizable:
        return "llama.cpp loads this tensor only as floating-point numbers"
    if source.shape_ne[0] % qtype.block:
        return (
            f"its rows have {source.shape_ne[0]} weights, which is not a multiple of the block of "
            f"{qtype.block}"
        )
    return None


def _target_faults(files: Files, target: Path) -> list[str]:
    folder = target.parent
    if not folder.is_dir():
        return [f"{folder} is no directory; create it, or write {target.name} elsewhere"]
    faults = []
    if not os.access(folder, os.W_OK | os.X_OK):
        faults.append(f"{folder} is not writable; write {target.name} elsewhere")
    if target.is_dir():
        faults.append(f"{target} is a directory; name a file")
    elif target.exists() and not target.is_file():
        faults.append(f"{target} is no regular file, but a device or a pipe; name a file")
    elif target.exists() and any(target.samefile(path) for path, _ in files):
        faults.append(f"{target} is a file of the source; name another file")
    return faults


def _space_faults(layout: Layout, folder: Path) -> list[str]:
    free = shutil.disk_usage(folder).free
    if layout.n_bytes <= free:
        return []
    return [
        f"{folder} has {mib(free)} free, but the file takes "
        f"{mib(layout.n_bytes)}; free some space or write elsewhere"
    ]
