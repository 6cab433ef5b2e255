"""Measures what each type does to the real weights, on a sample of rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
# Rows that are always in the sample, those with the largest norms: what a type does to them is no
# sample's business. Of Qwen2.5-1.5B four rows of 1536 have 86 % of what blk.2.ffn_down adds.
_HEAVIEST = 8
# Weights that are read at a time to find them.
_READ_AT_ONCE = 2**24
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
            No row counts more than ten times the median row, as the few outputs that carry a
            model's massive activations would hide all others; but where a type errs more on just
            them (IQ3_S may lose one altogether), the mean without that limit stands. Rows of next
            to nothing do not count, tensors of nothing else are not there, and no error is below
            that of rounding to F16.
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
        """Errors over those on Gaussian rows, as `quantplan.costs.evidence.Evidence` takes them.

        Those on Gaussian rows are with a uniform importance matrix, as published runs of whole
        models have one. Without one, ratios of some types are above one everywhere.
        """
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

    Rows are spread evenly over the tensor, and so over its experts, beside the few with the largest
    norms, for which all rows are read. Where a row does not fit a type, the type that would be
    written instead is measured.

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
            that is not given, the number of rows is below 1, the importance matrix is another
            model's, or no type can be measured on any matrix.
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
    n_done = n_matrices = 0
    for path, header in files:
        content = np.memmap(path, dtype=np.uint8, mode="r")
        for entry in header.tensors:
            if is_quantizable(entry.name, entry.shape_ne) and entry.qtype.is_float:
                n_matrices += 1
                importance = _by_expert(entry, imatrix)
                is_weighted = importance is not None and split_layer(entry.name)[0] is not None
                columns = importance if is_weighted else None
                sample = _Sample.of(_Stored(header, entry, content), columns, rows_per_tensor)
                found = _errors(sample, wanted, importance, columns)
                if found:
                    errors[entry.name] = found
                    shapes[entry.name] = entry.shape_ne
            n_done += 1
            if progress is not None:
                progress(n_done, n_tensors)
    if not errors and n_matrices:
        raise InputError(
            f"no type could be measured on {source}: its matrices are zeros, fit none of the "
            "types, or are not in the importance matrix that the types need"
        )
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


def _by_expert(entry: TensorEntry, imatrix: Importance | None) -> NDArray[np.float32] | None:
    """Importance of columns, ``[expert, column]``; None where it is not known."""
    found = None if imatrix is None else imatrix.get(entry.name)
    return None if found is None else found.reshape(-1, entry.shape_ne[0])


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file, as rows one expert after the other."""

    header: Header
    entry: TensorEntry
    content: NDArray[np.uint8]

    @property
    def n_rows(self) -> int:
        return math.prod(self.entry.shape_ne[1:])

    @property
    def rows_per_expert(self) -> int:
        return self.entry.shape_ne[1]

    def read(self, which: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows in single precision.

        Raises:
            QuantizeError: A weight is not finite, or too large.
        """
        n_columns = self.entry.shape_ne[0]
        row_bytes = self.entry.qtype.row_bytes(n_columns)
        begin = self.header.data_offset + self.entry.offset
        data = self.content[begin : begin + self.n_rows * row_bytes].reshape(-1, row_bytes)[which]
        floats = np.empty(len(data) * n_columns, dtype=np.float32)
        raw = np.ascontiguousarray(data).reshape(-1)
        rows = ggml().to_float32(self.entry.qtype, raw, floats).reshape(-1, n_columns)
        # The largest magnitude of all, and NaN where one of them is.
        if not max(rows.max(), -rows.min()) <= MAX_MAGNITUDE:
            raise QuantizeError(
                f"{self.entry.name} has weights that are not finite or above {MAX_MAGNITUDE:.0e}"
            )
        return rows

    def norms(self, columns: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Squared norm of every row, its columns weighted by ``[expert, column]``."""
        n_columns = self.entry.shape_ne[0]
        step = max(1, _READ_AT_ONCE // n_columns)
        found = np.empty(self.n_rows, dtype=np.float32)
        for first in range(0, self.n_rows, self.rows_per_expert):
            weights = np.ones(n_columns, np.float32)
            if columns is not None:
                weights = columns[first // self.rows_per_expert]
            for begin in range(first, first + self.rows_per_expert, step):
                part = slice(begin, min(begin + step, first + self.rows_per_expert))
                found[part] = np.square(self.read(part)) @ weights
        return found


@dataclass(frozen=True, slots=True)
class _Sample:
    """Rows of a tensor, ``[row, column]``, the expert of each, and how many each stands for."""

    rows: NDArray[np.float32]
    experts: NDArray[np.int64]
    stands_for: NDArray[np.float64]

    @classmethod
    def of(cls, stored: _Stored, columns: NDArray[np.float32] | None, n_rows: int) -> Self:
        """The rows with the largest norms, and others that are spread evenly.

        Args:
            stored: The tensor.
            columns: Weights of the columns in the norms, ``[expert, column]``.
            n_rows: Rows in the sample, if the tensor has so many.
        """
        every = np.arange(stored.n_rows)
        which, stands_for = every, np.ones(stored.n_rows)
        if n_rows < stored.n_rows:
            n_lighter = stored.n_rows - min(_HEAVIEST, n_rows // 2)
            heaviest = np.argsort(stored.norms(columns))[n_lighter:]
            rest = np.setdiff1d(every, heaviest)
            even = np.linspace(0, len(rest) - 1, n_rows - len(heaviest)).round().astype(np.int64)
            which = np.concatenate([rest[even], heaviest])
            stands_for = np.ones(n_rows)
            stands_for[: len(even)] = len(rest) / len(even)
        return cls(stored.read(which), which // stored.rows_per_expert, stands_for)


def _errors(
    sample: _Sample,
    wanted: list[str],
    importance: NDArray[np.float32] | None,
    columns: NDArray[np.float32] | None,
) -> dict[str, float]:
    """Error of each type that fits, by name.

    Args:
        sample: Rows of a tensor.
        wanted: Types.
        importance: What quantizers are given, ``[expert, column]``.
        columns: Weights of the columns in the error, ``[expert, column]``.
    """
    n_columns = sample.rows.shape[1]
    found: dict[str, float] = {}
    for name in wanted:
        kind = fitting_qtype(name, n_columns)
        if kind is None or kind.is_float or kind.name in found:
            continue
        if kind.needs_imatrix and importance is None:
            continue
        ggml().prepare(kind, has_imatrix=importance is not None)
        lost, total = np.empty(len(sample.rows)), np.empty(len(sample.rows))
        for expert in np.unique(sample.experts):
            is_own = sample.experts == expert
            own = np.ascontiguousarray(sample.rows[is_own])
            given = None if importance is None else importance[expert]
            difference = ggml().round_trip(kind, own, given) - own
            weights = np.ones(n_columns) if columns is None else columns[expert].astype(np.float64)
            lost[is_own] = difference.astype(np.float64) ** 2 @ weights
            total[is_own] = own.astype(np.float64) ** 2 @ weights
        if total.any():
            found[kind.name] = max(_LEAST_ERROR, _mean_error(lost, total, sample.stands_for))
    return found


def _mean_error(
    lost: NDArray[np.float64], total: NDArray[np.float64], stands_for: NDArray[np.float64]
) -> float:
    """Mean of the rows' relative errors, which count by their squared norms, capped or not.

    Rows of zeros, or that no text ever reached, do not count.

    Args:
        lost: Squared error of each row.
        total: Squared norm of each row; some are above zero.
        stands_for: How many rows of the tensor each stands for.
    """
    alive = total > _DEAD * total.max()
    lost, total, stands_for = lost[alive], total[alive], stands_for[alive]
    capped = np.minimum(total, _MOST_OF_MEDIAN * _median(total, stands_for))
    return max(
        float(np.average(lost / total, weights=stands_for * norms)) for norms in (capped, total)
    )


def _median(values: NDArray[np.float64], stands_for: NDArray[np.float64]) -> float:
    """The median of values that stand for several each."""
    order = np.argsort(values)
    upto = np.cumsum(stands_for[order])
    middle = [np.searchsorted(upto, upto[-1] / 2, side) for side in ("left", "right")]
    return float(np.mean(values[order][middle]))
