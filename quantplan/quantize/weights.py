"""Measures what each type does to the real weights, on a sample of rows."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from quantplan.costs import load_data
from quantplan.errors import InputError, QuantizeError, SourceError
from quantplan.inventory.header import Header, TensorEntry
from quantplan.inventory.roles import is_quantizable, split_layer
from quantplan.inventory.sources import read_headers
from quantplan.qtypes import QTYPES, fitting_qtype
from quantplan.quantize.check import is_written_by, refuse_big_endian
from quantplan.quantize.convert import MAX_MAGNITUDE
from quantplan.quantize.ggml import ggml
from quantplan.quantize.imatrix import Importance, importance_fault
from quantplan.schema import Frozen, read_saved

# What rounding to F16 does; a type that hits weights exactly counts as having that error.
_LEAST_ERROR = 2.0**-22 / 3
# What a row counts at most, in times the median row. With it the errors rank the losses of single
# matrices better (benchmarks/order_matrices.py); thirty instead of ten are as good.
_MOST_OF_MEDIAN = 10.0
# Rows below so much of the largest one, squared, are dead: scales of blocks in F16 cannot tell them
# from zeros.
_DEAD = 1e-12


class WeightErrors(Frozen):
    """Relative squared errors on the real weights of a model.

    Attributes:
        schema_version: Version of this format.
        source: File that was measured.
        library: What quantized.
        rows_per_tensor: Rows sampled from each tensor.
        has_imatrix: Whether errors are weighted by an importance matrix.
        errors: ``|w' - w|^2 / |w|^2`` of a row, by tensor name and type: the mean over the rows,
            which count by ``|w|^2``, the columns of matrices in the layers weighted by importance.
            No row counts more than ten times the median row: the few outputs that carry a model's
            massive activations would hide all others, and a sample would hang on whether it has
            them. Rows of next to nothing do not count, tensors of nothing else are not there, and
            no error is below that of rounding to F16.
        shapes: Shapes of these tensors in GGUF order, row length first; empty in files of versions
            that did not keep them.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    schema_version: Literal[1] = 1
    source: str
    library: str
    rows_per_tensor: int
    has_imatrix: bool
    errors: dict[str, dict[str, float]]
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``quantplan measure-weights`` saved.

        Raises:
            SourceError: The file cannot be read, or holds something else.
        """
        return read_saved(cls, path, "file of `quantplan measure-weights`", SourceError)

    def ratios(self) -> dict[tuple[str, str], float]:
        """Errors over those on Gaussian rows, as `quantplan.costs.evidence.Evidence` takes them."""
        gaussian = load_data("type_error.json")["relative_squared_error"]
        return {
            (tensor, name): error / gaussian[name]
            for tensor, found in self.errors.items()
            for name, error in found.items()
            if name in gaussian and error > 0
        }


def measure_weights(
    source: str | Path,
    types: Iterable[str],
    *,
    imatrix: Importance | None = None,
    rows_per_tensor: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> WeightErrors:
    """Quantizes a sample of each tensor's rows to each type, with ggml's own kernels.

    Rows are spread evenly over the tensor, and so over its experts. Where a row does not fit a
    type, the type that would be written instead is measured.

    Outside the layers, errors are not weighted by importance: embeddings are looked up, not
    multiplied, and what a few large columns add to all logits alike, the softmax does not see.

    Args:
        source: An F32, F16 or BF16 GGUF, or any shard of one.
        types: Wanted types.
        imatrix: Importance of columns by tensor name.
        rows_per_tensor: Rows to sample.
        progress: Is told after each tensor how many are done, and how many there are.

    Raises:
        InputError: A type is unknown, none that ggml quantizes to, or needs an importance matrix
            that is not given, the number of rows is below 1, or the importance matrix is another
            model's.
        SourceError: The source cannot be read, is big-endian, or is quantized already.
        QuantizeError: The library cannot be used, or a sampled weight is not finite.
    """
    wanted = [name.upper() for name in types]
    faults = [
        f"{name!r} is no type that the bundled ggml quantizes to"
        for name in wanted
        if name not in QTYPES or not is_written_by(None, QTYPES[name]) or QTYPES[name].is_float
    ]
    faults += [
        f"{name} needs an importance matrix; give one with --imatrix"
        for name in wanted
        if name in QTYPES and QTYPES[name].needs_imatrix and imatrix is None
    ]
    if rows_per_tensor < 1:
        faults.append(f"{rows_per_tensor} rows per tensor; it must be at least 1")
    if faults:
        raise InputError(faults)
    errors: dict[str, dict[str, float]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    files = read_headers(Path(source))
    refuse_big_endian(files)
    misfits = [
        importance_fault(entry.name, entry.shape_ne, imatrix[entry.name])
        for _, header in files
        for entry in header.tensors
        if imatrix is not None and entry.name in imatrix
    ]
    if any(misfits):
        raise InputError(filter(None, misfits))
    n_tensors = sum(len(header.tensors) for _, header in files)
    n_done = 0
    for path, header in files:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        for entry in header.tensors:
            if is_quantizable(entry.name, entry.shape_ne) and entry.qtype.is_float:
                rows, which = _sample(header, entry, content, rows_per_tensor)
                weights = (imatrix or {}).get(entry.name)
                is_weighted = split_layer(entry.name)[0] is not None
                found = _errors(rows, which, wanted, weights, is_weighted)
                if found:
                    errors[entry.name] = found
                    shapes[entry.name] = entry.shape_ne
            n_done += 1
            if progress is not None:
                progress(n_done, n_tensors)
    if not errors:
        raise SourceError(
            f"{source} has no matrices of F32, F16 or BF16 to measure: it is quantized already"
        )
    return WeightErrors(
        source=str(source),
        library=f"ggml {ggml().version}",
        rows_per_tensor=rows_per_tensor,
        has_imatrix=imatrix is not None,
        errors=errors,
        shapes=shapes,
    )


def _sample(
    header: Header, entry: TensorEntry, content: NDArray[np.uint8], n_rows: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows of a tensor in single precision, and the expert of each."""
    n_columns, rows_per_expert = entry.shape_ne[0], entry.shape_ne[1]
    total = math.prod(entry.shape_ne[1:])
    which = np.unique(np.linspace(0, total - 1, min(n_rows, total)).round().astype(np.int64))
    row_bytes = entry.qtype.row_bytes(n_columns)
    begin = header.data_offset + entry.offset
    data = content[begin : begin + total * row_bytes].reshape(total, row_bytes)
    raw = np.ascontiguousarray(data[which]).reshape(-1)
    floats = np.empty(len(which) * n_columns, dtype=np.float32)
    rows = ggml().to_float32(entry.qtype, raw, floats).reshape(len(which), n_columns)
    if not (np.isfinite(rows).all() and (np.abs(rows) <= MAX_MAGNITUDE).all()):
        raise QuantizeError(
            f"{entry.name} has weights that are not finite or above {MAX_MAGNITUDE:.0e}"
        )
    return rows, which // rows_per_expert


def _errors(
    rows: NDArray[np.float32],
    experts: NDArray[np.int64],
    wanted: list[str],
    importance: NDArray[np.float32] | None,
    is_weighted: bool,
) -> dict[str, float]:
    n_columns = rows.shape[1]
    by_expert = None if importance is None else importance.reshape(-1, n_columns)
    found: dict[str, float] = {}
    for name in wanted:
        kind = fitting_qtype(name, n_columns)
        if kind is None or kind.is_float or kind.name in found:
            continue
        if kind.needs_imatrix and by_expert is None:
            continue
        ggml().prepare(kind, has_imatrix=by_expert is not None)
        squares: list[NDArray[np.float64]] = []  # of errors and of weights, by row
        for expert in np.unique(experts):
            own = np.ascontiguousarray(rows[experts == expert])
            weight = None if by_expert is None else by_expert[expert]
            difference = ggml().round_trip(kind, own, weight) - own
            columns = np.ones(n_columns)
            if weight is not None and is_weighted:
                columns = weight.astype(np.float64)
            both = np.stack([difference, own]).astype(np.float64)
            squares.append(both**2 @ columns)
        lost, total = np.hstack(squares)
        if total.any():
            found[kind.name] = max(_LEAST_ERROR, _mean_error(lost, total))
    return found


def _mean_error(lost: NDArray[np.float64], total: NDArray[np.float64]) -> float:
    """Mean of the rows' relative errors, which count by their capped squared norms.

    Rows of zeros, or that no text ever reached, do not count.

    Args:
        lost: Squared error of each row.
        total: Squared norm of each row; some are above zero.
    """
    alive = total > _DEAD * total.max()
    lost, total = lost[alive], total[alive]
    weight = np.minimum(total, _MOST_OF_MEDIAN * np.median(total))
    return float(weight @ (lost / total) / weight.sum())
