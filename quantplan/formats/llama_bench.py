"""Reads what llama-bench and llama-sweep-bench print: JSON, JSON lines, or Markdown tables."""

import json
import re
from typing import Any

from quantplan.errors import InputError
from quantplan.schema import Frozen

_TEST = re.compile(r"(?:pp ?(?P<pp>\d+))?\+?(?:tg ?(?P<tg>\d+))?(?:\s*@\s*d(?P<depth>\d+))?")
_SWEEP = ("PP", "TG", "N_KV", "S_PP t/s", "S_TG t/s")


class BenchResult(Frozen):
    """One measured speed.

    Attributes:
        n_prompt: Prompt tokens; 0 where tokens were generated.
        n_generated: Tokens generated; 0 where a prompt was processed.
        depth: Tokens in the context before.
        tps: Tokens per second.
        flags: Flags of llama.cpp that the tool states for this run.
        samples_tps: Tokens per second of each repetition, where the tool states them.
    """

    n_prompt: int
    n_generated: int
    depth: int
    tps: float
    flags: tuple[str, ...] = ()
    samples_tps: tuple[float, ...] = ()


def parse_bench(text: str) -> tuple[BenchResult, ...]:
    """Reads the output of llama-bench (``-o json``, ``jsonl`` or ``md``) or llama-sweep-bench.

    Runs that mix prompt and generation (``-pg``) are left out.

    Raises:
        InputError: Nothing was recognised, or a number is not one.
    """
    try:
        found = _from_json(text) or _from_tables(text)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the benchmark's output cannot be read: {error!r}") from error
    usable = tuple(r for r in found if (r.n_prompt == 0) != (r.n_generated == 0) and r.tps > 0)
    if not usable:
        raise InputError(
            "no speeds were found: give the output of llama-bench (-o json, jsonl or md) or of "
            "llama-sweep-bench"
        )
    return usable


def _from_json(text: str) -> list[BenchResult]:
    """Rows of JSON, or of lines of it; [] where the text is neither."""
    stripped = text.strip()
    if stripped.startswith("["):
        rows = json.loads(stripped)
    else:
        lines = [line for line in stripped.splitlines() if line.lstrip().startswith("{")]
        rows = [json.loads(line) for line in lines]
    found = []
    for row in rows:
        if "avg_ts" in row:
            found.append(_from_bench(row))
        elif "speed_pp" in row:
            found += _pair(row["pp"], row["tg"], row["n_kv"], row["speed_pp"], row["speed_tg"])
    return found


def _from_bench(row: dict[str, Any]) -> BenchResult:
    flags = []
    for name, flag in (
        ("n_gpu_layers", "-ngl"),
        ("n_cpu_moe", "-ncmoe"),
        ("n_batch", "-b"),
        ("n_ubatch", "-ub"),
        ("type_k", "-ctk"),
        ("type_v", "-ctv"),
    ):
        if row.get(name) not in (None, 0) or (name == "n_gpu_layers" and row.get(name) == 0):
            flags += [flag, str(row[name])]
    overrides = row.get("tensor_buft_overrides")
    if overrides and overrides != "none":
        flags += ["-ot", str(overrides).replace(";", ",")]
    return BenchResult(
        n_prompt=row["n_prompt"],
        n_generated=row["n_gen"],
        depth=row.get("n_depth", 0),
        tps=row["avg_ts"],
        flags=tuple(flags),
        samples_tps=tuple(row.get("samples_ts", ())),
    )


def _pair(
    n_prompt: Any, n_generated: Any, depth: Any, pp_tps: Any, tg_tps: Any
) -> list[BenchResult]:
    """The two speeds of one step of a sweep."""
    return [
        BenchResult(n_prompt=int(n_prompt), n_generated=0, depth=int(depth), tps=float(pp_tps)),
        BenchResult(n_prompt=0, n_generated=int(n_generated), depth=int(depth), tps=float(tg_tps)),
    ]


def _from_tables(text: str) -> list[BenchResult]:
    found: list[BenchResult] = []
    columns: list[str] = []
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if set(_SWEEP) <= set(cells) or {"test", "t/s"} <= set(cells):
            columns = cells
        elif columns and not set(line) <= set("|-: "):
            row = dict(zip(columns, cells, strict=False))
            found += _pair(*(row[c] for c in _SWEEP)) if "N_KV" in row else _from_row(row)
    return found


def _from_row(row: dict[str, str]) -> list[BenchResult]:
    match = _TEST.fullmatch(row["test"])
    if match is None:
        return []
    flags: list[str] = []
    for name, flag in (
        ("ngl", "-ngl"),
        ("n_ubatch", "-ub"),
        ("type_k", "-ctk"),
        ("type_v", "-ctv"),
    ):
        if row.get(name):
            flags += [flag, row[name]]
    return [
        BenchResult(
            n_prompt=int(match["pp"] or 0),
            n_generated=int(match["tg"] or 0),
            depth=int(match["depth"] or 0),
            tps=float(row["t/s"].split("±")[0]),
            flags=tuple(flags),
        )
    ]
