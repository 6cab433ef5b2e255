"""Measures speed with llama-bench, where it stands beside llama-server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantplan.errors import LlamaCppError
from quantplan.formats.llama_bench import BenchResult, parse_bench
from quantplan.formats.llama_cpp import options
from quantplan.inventory.sources import shard_paths
from quantplan.runtime.find import LlamaCpp, known_options
from quantplan.runtime.flags import flags_for
from quantplan.runtime.memory import kept_flags
from quantplan.runtime.process import running
from quantplan.runtime.speed import MeasuredSpeed, SpeedMeasurement, SpeedTests, measure_speed

# Flags of llama-server and what llama-bench calls them.
_NAMES = {
    name: names[0]
    for names in (
        ("-rpc", "--rpc"),
        ("-dev", "--device"),
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
        ("-lm", "--load-mode"),
    )
    for name in names
}
# Both join several of these; llama-bench keeps the comma for alternatives.
_JOINS = {"-ot": ";", "-ts": "/", "-dev": "/"}
_ALL_LAYERS = "999"
_VALUES = {
    "-fa": {"on": "1", "auto": "1", "off": "0"},
    "-ngl": {"all": _ALL_LAYERS, "auto": _ALL_LAYERS},
}
# Flags of llama-server that stand alone, and what says the same.
_SWITCHES = {
    **dict.fromkeys(["-nkvo", "--no-kv-offload"], ("-nkvo", "1")),
    **dict.fromkeys(["-nr", "--no-repack"], ("--repack", "0")),
    "--no-op-offload": ("-nopo", "1"),
    "--no-host": ("--no-host", "1"),
    "--no-mmap": ("-mmp", "0"),
    "--mmap": ("-mmp", "1"),
    "--direct-io": ("-dio", "1"),
}
# What stood for -lm before llama-bench knew it.
_LOAD_MODES = {"none": ("-mmp", "0"), "mmap": ("-mmp", "1"), "auto": ("-mmp", "1")}
# llama-bench makes its contexts as long as needed, for one request; it warms up by itself.
_ITS_OWN = {
    *("-c", "--ctx-size", "-np", "--parallel", "-kvu", "--kv-unified", "-no-kvu"),
    *("--no-kv-unified", "--warmup", "--no-warmup"),
}
# What llama-server does by itself; llama-bench of some builds does not.
_DEFAULTS = {"-fa": "1", "-ngl": _ALL_LAYERS}
_TESTS = {"-p", "-n", "-d", "-r", "-o"}
# Devices of other hosts must be known before tensors are put on them.
_FIRST = ("-rpc", "-dev")


@dataclass(frozen=True)
class Bench:
    """A llama-bench, and the flags of a llama-server in its words.

    Attributes:
        llama_cpp: The llama.cpp that it belongs to.
        program: Its path.
        arguments: The flags.
    """

    llama_cpp: LlamaCpp
    program: Path
    arguments: tuple[str, ...]

    def measure(self, gguf: Path, tests: SpeedTests, limit_s: float) -> SpeedMeasurement:
        """Runs a model.

        Args:
            gguf: The model's file, or any shard of it.
            tests: What to measure.
            limit_s: Seconds for all of it, loading included.

        Raises:
            LlamaCppError: It failed, took longer, or did not measure what it was asked for.
        """
        command = [str(self.program), "-m", str(shard_paths(gguf)[0].resolve())]
        command += ["-p", str(tests.n_prompt), "-n", str(tests.n_tokens)]
        command += ["-d", ",".join(map(str, tests.depths)), "-r", str(tests.repetitions)]
        with running([*command, "-o", "jsonl", *self.arguments]) as process:
            process.wait_until(lambda: process.popen.poll() == 0, limit_s)
            results = parse_bench(process.log)
        return SpeedMeasurement(
            llama_cpp=self.llama_cpp,
            tool="llama-bench",
            flags=self.arguments,
            decode=self._at(tests, results, lambda result: result.n_generated),
            prefill=self._at(tests, results, lambda result: result.n_prompt),
        )

    def _at(
        self,
        tests: SpeedTests,
        results: Sequence[BenchResult],
        n_of: Callable[[BenchResult], int],
    ) -> tuple[MeasuredSpeed, ...]:
        """The results of one kind, depth by depth."""
        found = {result.depth: result for result in results if n_of(result)}
        if missing := [depth for depth in tests.depths if depth not in found]:
            raise LlamaCppError(
                f"{self.program} did not measure at depth {', '.join(map(str, missing))} what it "
                f"was asked for; it measured {', '.join(map(str, results)) or 'nothing'}"
            )
        return tuple(
            MeasuredSpeed(
                n_prompt=found[depth].n_prompt,
                n_generated=found[depth].n_generated,
                depth=depth,
                repetitions=found[depth].samples_tps or (found[depth].tps,),
            )
            for depth in tests.depths
        )


def find_bench(llama_cpp: LlamaCpp, flags: Sequence[str]) -> Bench | None:
    """The llama-bench beside a llama-server; None without one that has words for all flags.

    Args:
        llama_cpp: The llama.cpp.
        flags: Flags of llama-server, of any generation.

    Raises:
        LlamaCppError: llama-server itself has no such flag, or llama-bench does not run.
    """
    program = llama_cpp.tool("llama-bench")
    if program is None:
        return None
    known = known_options(program)
    arguments = bench_flags(flags_for(llama_cpp, kept_flags(flags)), known)
    if arguments is None or not known >= _TESTS:
        return None
    return Bench(llama_cpp, program, arguments)


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
    bench = find_bench(llama_cpp, flags)
    if bench is None:
        return measure_speed(llama_cpp, gguf, flags, limit_s=limit_s / 2)
    return bench.measure(gguf, SpeedTests(), limit_s)


def bench_flags(flags: Sequence[str], known: frozenset[str]) -> tuple[str, ...] | None:
    """Flags of llama-server in llama-bench's words; None where it has none for one of them.

    Args:
        flags: The flags.
        known: Those that llama-bench's help names.
    """
    found: dict[str, str] = {}
    for flag, *values in options(flags):
        if flag in _ITS_OWN:
            continue
        words = _words(flag, values, known)
        if words is None or words[0] not in known:
            return None
        name, value = words
        again = name in found and name in _JOINS
        found[name] = f"{found[name]}{_JOINS[name]}{value}" if again else value
    found = {name: found[name] for name in _FIRST if name in found} | _DEFAULTS | found
    return tuple(part for pair in found.items() for part in pair)


def _words(flag: str, values: Sequence[str], known: frozenset[str]) -> tuple[str, str] | None:
    """One flag in llama-bench's words; None where it has none."""
    if not values:
        return _SWITCHES.get(flag)
    name = _NAMES.get(flag)
    if name is None or len(values) > 1:
        return None
    if name == "-lm" and name not in known:
        return _LOAD_MODES.get(values[0])
    value = _VALUES.get(name, {}).get(values[0], values[0])
    return name, value.replace(",", _JOINS.get(name, ","))
