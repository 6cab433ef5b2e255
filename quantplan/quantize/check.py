"""What must hold before a byte is written; every fault is found in one go."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import RecipeError, SourceError
from quantplan.inventory import Tensor
from quantplan.inventory.header import TensorEntry
from quantplan.qtypes import QTYPES, QType, Runtime
from quantplan.quantize.imatrix import Importance, importance_fault
from quantplan.quantize.layout import Files, Layout, Metadata, lay_out
from quantplan.quantize.partial import begun_bytes
from quantplan.recipe import Recipe, RecipeTensor
from quantplan.units import mib

# ik_llama.cpp stores so many rows of these types as one, and writes another type for other rows.
_INTERLEAVED = re.compile(r"_R(\d+)$")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def checked_layouts(
    recipe: Recipe,
    files: Files,
    target: Path,
    *,
    importance: Importance | None = None,
    allow_requantize: bool = False,
    metadata: Metadata | None = None,
    split_max_bytes: int | None = None,
    program: Runtime | None = None,
) -> tuple[Layout, ...]:
    """Checks a recipe against a source and a place to write to.

    Args:
        recipe: What to do.
        files: Files of the source, in order.
        target: File to write; no symbolic link.
        importance: Importance of the columns by tensor name.
        allow_requantize: Whether quantized tensors may be converted too.
        metadata: Keys to add to the header.
        split_max_bytes: Most tensor data in one file.
        program: Whose llama-quantize will write; None for the bundled quantizer.

    Raises:
        SourceError: A file of the source is big-endian.
        RecipeError: The recipe does not fit the source, or the target cannot be written there; all
            faults are named.
    """
    refuse_big_endian(files)
    faults = _tensor_faults(recipe, files, importance, allow_requantize, program)
    if faults:
        raise RecipeError([*faults, *_target_faults(files, target)])
    layouts = lay_out(
        files,
        target,
        {t.tensor: QTYPES[t.qtype.upper()] for t in recipe.tensors},
        importance=importance,
        metadata=metadata,
        split_max_bytes=split_max_bytes,
    )
    target_faults = [f for layout in layouts for f in _target_faults(files, layout.path)]
    if target.parent.is_dir():
        target_faults += _space_faults(layouts, target.parent)
    if target_faults:
        raise RecipeError(dict.fromkeys(target_faults))
    return layouts


def refuse_big_endian(files: Files) -> None:
    """Weights are read as this machine writes them.

    Raises:
        SourceError: A file is big-endian; all such files are named.
    """
    swapped = [str(place) for place, header in files if header.byte_order != "<"]
    if swapped:
        raise SourceError(
            f"{place} is big-endian; convert it for little-endian" for place in swapped
        )


def _tensor_faults(
    recipe: Recipe,
    files: Files,
    importance: Importance | None,
    allow_requantize: bool,
    program: Runtime | None,
) -> list[str]:
    counts = Counter(t.tensor for t in recipe.tensors)
    faults = [f"the recipe names {name} {n} times" for name, n in counts.items() if n > 1]
    wanted = {t.tensor: t for t in recipe.tensors}
    present = {t.name: t for _, header in files for t in header.tensors}
    if not present:
        return [f"{files[0][0]} holds no tensors, only metadata; name the file with the weights"]
    lacking = (
        ("recipe", [name for name in present if name not in wanted]),
        ("source", [name for name in wanted if name not in present]),
    )
    if any(names for _, names in lacking):
        said = " and ".join(_lacking(where, names) for where, names in lacking if names)
        faults.append(
            f"the recipe, made for {recipe.model}, and the source do not belong together: {said}; "
            "plan again from this source"
        )
    if importance and not importance.keys() & present.keys():
        faults.append("the importance matrix knows no tensor of the source; it is of another model")
    both = (
        _tensor_fault(entry, wanted[name], (importance or {}).get(name), allow_requantize, program)
        for name, entry in present.items()
        if name in wanted
    )
    return [*faults, *(fault for fault in both if fault)]


def _lacking(where: str, names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"the {where} lacks {names[0]}{others}"


def _tensor_fault(
    source: TensorEntry,
    wanted: RecipeTensor,
    importance: NDArray[np.float32] | None,
    allow_requantize: bool,
    program: Runtime | None,
) -> str | None:
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
    if importance is not None:
        misfit = importance_fault(source.name, source.shape_ne, importance)
        if misfit:
            return misfit
    fault = _source_fault(source, allow_requantize, program) or _type_fault(source, qtype, program)
    if fault is None and qtype.needs_imatrix and importance is None:
        fault = (
            "the type needs an importance matrix, and none is given for this tensor; give one that "
            "covers it, or choose another type"
        )
    return fault and f"{source.name} cannot become {qtype.name}: {fault}"


def _source_fault(
    source: TensorEntry, allow_requantize: bool, program: Runtime | None
) -> str | None:
    if source.qtype.is_float:
        return None
    if not is_written_by(program, source.qtype):
        return (
            f"it is {source.qtype.name} in the source, which only {_other(program)} can read; use "
            "its llama-quantize"
        )
    if not allow_requantize:
        return (
            f"it is {source.qtype.name} in the source, and quantizing twice costs quality; start "
            "from an F32, F16 or BF16 file, or allow it"
        )
    return None


def is_written_by(program: Runtime | None, qtype: QType) -> bool:
    """Whether a quantizer writes a type: that of a runtime, or the bundled one (None)."""
    return qtype.is_file_target and (program or "llama.cpp") in qtype.runtimes


def _other(program: Runtime | None) -> Runtime:
    return "llama.cpp" if program == "ik_llama.cpp" else "ik_llama.cpp"


def _type_fault(source: TensorEntry, qtype: QType, program: Runtime | None) -> str | None:
    if not is_written_by(program, qtype):
        other = _other(program)
        return (
            f"{program or 'llama.cpp'}'s quantizer writes no such file; for {other} use its "
            "llama-quantize"
        )
    tensor = Tensor(name=source.name, shape_ne=source.shape_ne, qtype=source.qtype.name)
    if not qtype.is_float and not tensor.is_quantizable:
        return "llama.cpp loads this tensor only as floating-point numbers"
    if program and not tensor.is_quantizable:
        return "llama-quantize leaves this tensor as it is; use the default backend"
    return qtype.row_fault(source.shape_ne[0]) or _interleaving_fault(source, qtype)


def _interleaving_fault(source: TensorEntry, qtype: QType) -> str | None:
    interleaved = _INTERLEAVED.search(qtype.name)
    if interleaved and source.name in _EMBEDDINGS:
        return "embeddings cannot be stored in interleaved rows"
    if interleaved and source.shape_ne[1] % int(interleaved[1]):
        return f"its {source.shape_ne[1]} rows are no multiple of the {interleaved[1]} of the type"
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
    elif target.exists() and any(
        isinstance(place, Path) and target.samefile(place) for place, _ in files
    ):
        faults.append(f"{target} is a file of the source; name another file")
    return faults


def _space_faults(layouts: Sequence[Layout], folder: Path) -> list[str]:
    free = shutil.disk_usage(folder).free
    # An unfinished file of an earlier run is continued or replaced, so its space counts as free.
    free += sum(begun_bytes(layout.path) for layout in layouts)
    n_bytes = sum(layout.n_bytes for layout in layouts)
    if n_bytes <= free:
        return []
    return [
        f"{folder} has {mib(free)} free, but {layouts[0].path.name} takes "
        f"{mib(n_bytes)}; free some space or write elsewhere"
    ]
