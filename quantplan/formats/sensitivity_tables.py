"""Reads published tables of per-tensor measurements: KLD of the whole model, tensor by tensor.

Three layouts are understood, plain or gzipped:

- wide, as GGUF-Tool-Suite writes it: a column ``QTYPE``, then one column per tensor or group;
- plain: ``tensor,qtype,kld``, where ``all`` is the whole model, and where three more columns may
  follow, as `append_measurement` writes them: ``standard_error``; ``group``, which names tensors of
  any layers that were measured together; and ``chunks``, the KLD of every chunk in the first row
  of a measurement, with ``|`` between texts;
- long: ``scope,tensor_or_group,bench_group,qtype,metric,value,flag``, where ``bench_group`` names
  tensors that were measured together and ``scope`` tells single tensors from whole models.

``404`` and empty values are unmeasured, and names of columns may be written in any case. Tensors
measured together share one value and count once: where the layout does not say so, equal values
within a layer do, in several layers.
"""

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantplan.costs.evidence import ByChunk, Evidence, Measurement
from quantplan.costs.resampling import on_half
from quantplan.errors import SourceError
from quantplan.inventory.roles import split_layer
from quantplan.qtypes import QTYPES

_UNMEASURED = 404.0
_GZIP = b"\x1f\x8b"
# ik_llama.cpp's row-interleaved copies of a type: the same numbers in another order.
_REPACKED = re.compile(r"_R(?:4|8|16)$")
# A mean over tokens may come out this far below zero where nothing changed.
_ROUNDING_NATS = 1e-3
PLAIN_COLUMNS = ("tensor", "qtype", "kld", "standard_error", "group", "chunks")
_LONG_COLUMNS = {"scope", "tensor_or_group", "qtype", "metric", "value"}
_COLUMNS = {*PLAIN_COLUMNS, *_LONG_COLUMNS, "bench_group", "flag"}
_WHOLE = re.compile(r"group\d+|ffn_all|all", re.IGNORECASE)
_FEWEST_EQUAL_LAYERS = 3


@dataclass(frozen=True)
class SensitivityTable:
    """Measurements of one model.

    Attributes:
        singles: A few tensors at a low type, everything else at the baseline.
        curve: The whole model at one type, by type.
        n_unmeasured: Entries without a value.
        curve_by_chunk: The whole model at one type for every chunk of the text, where it is known.
    """

    singles: tuple[Measurement, ...]
    curve: dict[str, float]
    n_unmeasured: int
    curve_by_chunk: dict[str, ByChunk] = field(default_factory=dict)

    @property
    def baseline(self) -> str | None:
        """The quantized type that KLDs are relative to, whose own is zero; else None."""
        zero = [name for name, kld in self.curve.items() if kld == 0]
        return next((n for n in zero if n in QTYPES and not QTYPES[n].is_float), None)

    @property
    def evidence(self) -> Evidence:
        """The measurements as `quantplan.costs.quality.LossTable` takes them.

        What is known of every chunk of a text counts by one half of the chunks; the other half is
        held out, to judge what is made of it.
        """
        curve = {name: kld for name, kld in self.curve.items() if kld > 0}
        chunks = {name: found for name, found in self.curve_by_chunk.items() if name in curve}
        whole = Evidence(
            curve=curve, curve_by_chunk=chunks, baseline=self.baseline, singles=self.singles
        )
        return on_half(whole, "fit")


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    group: str
    qtype: str
    value: str
    is_whole: bool
    is_surely_measured: bool
    error: str = ""
    spans_layers: bool = False
    chunks: str = ""


def plain_type(name: str) -> str:
    """Upper-case name of a type, without the suffix of an interleaved copy."""
    return _REPACKED.sub("", name.strip().upper())


def read_sensitivity_table(path: str | Path) -> SensitivityTable:
    """Reads a table of KLDs.

    Args:
        path: A CSV file in one of the layouts above; one that is gzipped is unpacked.

    Raises:
        SourceError: The file cannot be read, or is in none of the layouts, or a value is no number.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw.startswith(_GZIP) else raw).decode("utf-8-sig")
        # Lines may end as on any system, and without their last columns.
        reader = csv.DictReader(io.StringIO(text, newline=None), restval="")
        reader.fieldnames = columns = [_column(name) for name in reader.fieldnames or ()]
        rows = list(_rows(columns, reader))
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{path} cannot be read: {why}") from error
    if not rows:
        raise SourceError(
            f"{path} has no KLDs; it must have a column QTYPE and one per tensor, or the "
            "columns tensor, qtype and kld"
        )
    faults = [
        f"{path}: {row.name} at {row.qtype}: {word!r} is not a {what}"
        for row in rows
        if not _is_unmeasured(row.value)
        for what, word in _words(row)
        if not _is_kld(word)
    ]
    if faults:
        raise SourceError(faults)
    found = [row for row in rows if not _is_unmeasured(row.value)]
    if found and all(float(row.value) > 1 for row in found):
        raise SourceError(
            f"{path} has no value below 1: these are perplexities, not KLDs in nats per token"
        )
    return SensitivityTable(
        singles=tuple(_singles(row for row in found if not row.is_whole)),
        curve=_curve([row for row in found if row.is_whole]),
        n_unmeasured=len(rows) - len(found),
        curve_by_chunk={
            row.qtype: _by_chunk(row.chunks) for row in found if row.is_whole and row.chunks
        },
    )


def append_measurement(path: Path, measurement: Measurement, group: str) -> None:
    """Adds a measurement to a table in the plain layout, all of it in one write.

    Args:
        path: The table; it is begun where there is none.
        measurement: What was measured; tensors of the whole model are left out.
        group: Name of the tensors; ``all`` for the whole model.
    """
    is_whole = bool(_WHOLE.fullmatch(group))
    names = [group] if is_whole else list(measurement.tensors)
    value = f"{measurement.kld_nats:.8g},{measurement.standard_error_nats:.4g}"
    shared = "" if is_whole else group
    chunks = "|".join(" ".join(f"{n:.6g}" for n in text) for text in measurement.by_chunk)
    rows = [
        f"{name},{measurement.qtype},{value},{shared},{'' if i else chunks}\n"
        for i, name in enumerate(names)
    ]
    with path.open("a+b") as file:
        if not file.tell():
            rows.insert(0, ",".join(PLAIN_COLUMNS) + "\n")
        else:  # editors may leave the last line without an end
            file.seek(-1, os.SEEK_END)
            rows.insert(0, "" if file.read(1) == b"\n" else "\n")
        file.write("".join(rows).encode())


def _is_unmeasured(value: str) -> bool:
    try:
        return not value or float(value) == _UNMEASURED
    except ValueError:
        return False


def _is_kld(value: str) -> bool:
    try:
        return math.isfinite(float(value)) and float(value) > -_ROUNDING_NATS
    except ValueError:
        return False


def _column(name: str) -> str:
    """Name of a column as this module writes it; names of tensors keep their case."""
    own = name.strip()
    return own.lower() if own.lower() in _COLUMNS else own


def _words(row: _Row) -> list[tuple[str, str]]:
    """What a row says in numbers, each with what it is."""
    chunks = row.chunks.replace("|", " ").split()
    error = [("standard error of a KLD", row.error)] if row.error else []
    return [("KLD", row.value), *error, *(("KLD of a chunk", word) for word in chunks)]


def _by_chunk(text: str) -> ByChunk:
    """KLDs of chunks as `append_measurement` writes them."""
    return tuple(tuple(map(float, part.split())) for part in text.split("|")) if text else ()


def _rows(columns: list[str], reader: Iterable[dict[str, str]]) -> Iterator[_Row]:
    if set(columns) >= _LONG_COLUMNS:
        for row in reader:
            if row["metric"] == "kld":
                name, scope = row["tensor_or_group"], row["scope"]
                value = "" if row.get("flag") else row["value"].strip()
                # Rows of the plain group mix measured values with interpolated ones.
                sure = name.endswith(":measured_only")
                group = row.get("bench_group", "")
                whole = scope != "tensor"
                yield _Row(name, group, plain_type(row["qtype"]), value, whole, sure)
    elif {"tensor", "qtype", "kld"} <= set(columns):
        for row in reader:
            name, value = row["tensor"].strip(), row["kld"].strip()
            whole = bool(_WHOLE.fullmatch(name))
            error, group, chunks = (row.get(column, "").strip() for column in PLAIN_COLUMNS[3:])
            kind = plain_type(row["qtype"])
            yield _Row(name, group, kind, value, whole, False, error, True, chunks)
    elif "qtype" in columns:
        for row in reader:
            for name in columns:
                if name != "qtype":
                    whole = bool(_WHOLE.fullmatch(name))
                    kind, value = plain_type(row["qtype"]), row[name].strip()
                    yield _Row(name, "", kind, value, whole, False)


def _singles(rows: Iterable[_Row]) -> Iterator[Measurement]:
    """One measurement per bundle; repeated ones and interleaved copies are averaged in ln."""
    found = list(rows)
    silent = _silent_bundles(found)
    bundles: dict[tuple[str, object], dict[str, list[float]]] = defaultdict(dict)
    errors: dict[tuple[str, object], float] = {}
    chunks: dict[tuple[str, object], str] = {}
    for row in found:
        layer, role = split_layer(row.name)
        together = silent.get((row.qtype, layer, row.value), frozenset())
        if row.group:
            key: object = row.group if row.spans_layers else (layer, row.group)
        else:
            key = (layer, together) if role in together else row.name
        bundles[row.qtype, key].setdefault(row.name, []).append(float(row.value))
        errors[row.qtype, key] = float(row.error or 0)
        chunks[row.qtype, key] = chunks.get((row.qtype, key)) or row.chunks
    for (kind, key), members in bundles.items():
        kld = _mean([v for vs in members.values() for v in vs])
        by_chunk = _by_chunk(chunks[kind, key])
        yield Measurement(tuple(members), kind, kld, errors[kind, key], by_chunk)


def _silent_bundles(rows: list[_Row]) -> dict[tuple[str, int | None, str], frozenset[str]]:
    """Roles that were measured together although no column says so.

    Their values are equal, to the last digit, in at least half of the layers that have them, and in
    three: fewer may have been rounded to the same digits.
    """
    roles: dict[tuple[str, int | None, str], set[str]] = defaultdict(set)
    layers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in rows:
        layer, role = split_layer(row.name)
        if layer is not None and not row.group:
            roles[row.qtype, layer, row.value].add(role)
            layers[row.qtype, role].add(layer)
    equal = {key: frozenset(found) for key, found in roles.items() if len(found) > 1}
    often = Counter((kind, found) for (kind, _, _), found in equal.items())
    return {
        (kind, layer, value): found
        for (kind, layer, value), found in equal.items()
        if often[kind, found] >= _FEWEST_EQUAL_LAYERS
        and 2 * often[kind, found] >= max(len(layers[kind, role]) for role in found)
    }


def _curve(rows: list[_Row]) -> dict[str, float]:
    sure = [row for row in rows if row.is_surely_measured]
    values: dict[str, list[float]] = defaultdict(list)
    for row in sure or rows:
        values[row.qtype].append(float(row.value))
    # A zero is the baseline's own, and stays one beside repeated runs that show noise.
    return {kind: _mean(found) if min(found) > 0 else 0.0 for kind, found in values.items()}


def _mean(values: list[float]) -> float:
    """Geometric mean; the arithmetic one where any value is not above zero."""
    if min(values) <= 0:
        return max(0.0, float(np.mean(values)))
    return float(np.exp(np.mean(np.log(values))))
