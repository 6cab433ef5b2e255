"""Measures speed with llama-bench, where it stands beside llama-server."""

from collections.abc import Sequence
from pathlib import Path

from quantplan.errors import LlamaCppError
from quantplan.formats.llama_bench import parse_bench
from quantplan.inventory.sources import shard_paths
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.memory import kept_flags
from quantplan.runtime.process import running
from quantplan.runtime.speed import DEPTHS, MeasuredSpeed, SpeedMeasurement, measure_speed

# Flags of llama-server and what llama-bench calls them.
_NAMES = {
    name: names[0]
    for names in (
        ("-ngl", "--gpu-layers", "--n-gpu-layers"),
        ("-ncmoe", "--n-cpu-moe"),
        ("-ot", "--override-tensor"),
        ("-ts", "--tensor-split"),
        ("-sm", "--split-mode"),
        ("-mg", "--main-gpu"),
        ("-ctk", "--cache-type-k"),
        ("-ctv", "--cache-type-v"),
        ("-fa", "--flash-attn"),
        ("-t", "--threads"),
        ("-b", "--batch-size"),
        ("-ub", "--ubatch-size"),
    )
    for name in names
}
# Both join several of these; llama-bench keeps the comma for alternatives.
_JOINS = {"-ot": ";", "-ts": "/"}
_VALUES = {"-fa": {"on": "1", "auto": "1", "off": "0"}, "-ngl": {"all": "99", "auto": "99"}}
# llama-bench makes its contexts as long as needed, for one request.
_ITS_OWN = {"-c", "--ctx-size", "-np", "--parallel"}
# What llama-server does by itself; llama-bench of some builds does not.
_DEFAULTS = {"-fa": "1", "-ngl": "99"}


def measure_with_any(
    llama_cpp: LlamaCpp, gguf: Path, flags: Sequence[str] = (), *, limit_s: float = 1200.0
) -> SpeedMeasurement:
    """Measures with llama-bench if it is there and knows the flags, else with llama-server.

    Args:
        llama_cpp: Which llama.cpp.
        gguf: The model's file, or any shard of it.
        flags: Flags of llama-server.
        limit_s: Seconds for all of it, loading included.

    Raises:
        LlamaCppError: See `measure_speed`.
    """
    program = llama_cpp.server.with_name("llama-bench" + llama_cpp.server.suffix)
    arguments = bench_flags(kept_flags(flags))
    if not program.is_file() or arguments is None:
        return measure_speed(llama_cpp, gguf, flags, limit_s=limit_s)
    return _run_bench(llama_cpp, program, gguf, arguments, limit_s)


def bench_flags(flags: Sequence[str]) -> tuple[str, ...] | None:
    """Flags of llama-server in llama-bench's words; None where it has none for one of them."""
    found: dict[str, str] = {}
    rest = iter(flags)
    for flag in rest:
        name = _NAMES.get(flag)
        if name is None and flag not in _ITS_OWN:
            return None
        value = next(rest, None)
        if value is None or value.startswith("-"):
            return None
        if name is not None:
            value = _VALUES.get(name, {}).get(value, value).replace(",", _JOINS.get(name, ","))
            again = name in found and name in _JOINS
            found[name] = f"{found[name]}{_JOINS[name]}{value}" if again else value
    return tuple(part for pair in (_DEFAULTS | found).items() for part in pair)


def _run_bench(
    llama_cpp: LlamaCpp, program: Path, gguf: Path, arguments: tuple[str, ...], limit_s: float
) -> SpeedMeasurement:
    tests = ["-p", "512", "-n", "32", "-d", ",".join(map(str, DEPTHS)), "-r", "3", "-o", "jsonl"]
    command = [str(program), "-m", str(shard_paths(gguf)[0].resolve()), *tests, *arguments]
    with running(command) as process:
        process.wait_until(lambda: process.popen.poll() == 0, limit_s)
        results = parse_bench(process.log)
    speeds = [
        MeasuredSpeed(
            n_prompt=result.n_prompt,
            n_generated=result.n_generated,
            depth=result.depth,
            repetitions=result.samples_tps or (result.tps,),
        )
        for result in results
    ]
    decode = tuple(speed for speed in speeds if speed.n_generated)
    prefill = [speed for speed in speeds if speed.n_prompt and not speed.depth]
    if not decode or not prefill:
        raise LlamaCppError(f"{program} measured no decode or no prefill speed: {results}")
    return SpeedMeasurement(
        llama_cpp=llama_cpp,
        tool="llama-bench",
        flags=arguments,
        decode=decode,
        prefill=prefill[0],
    )
