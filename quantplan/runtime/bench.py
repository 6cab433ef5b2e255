"""Measures speed with llama-bench, where it stands beside llama-server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantplan.errors import LlamaCppError, RecipeError
from quantplan.formats.bench_flags import bench_flags
from quantplan.formats.llama_bench import BenchResult, parse_bench
from quantplan.inventory.sources import shard_paths
from quantplan.runtime.find import LlamaCpp, known_options
from quantplan.runtime.flags import flags_for
from quantplan.runtime.memory import kept_flags
from quantplan.runtime.process import running
from quantplan.runtime.speed import MeasuredSpeed, SpeedMeasurement, SpeedTests, measure_speed

_TESTS = {"-p", "-n", "-d", "-r", "-o"}


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
    try:
        arguments = bench_flags(flags_for(llama_cpp, kept_flags(flags)), known)
    except RecipeError:
        return None
    return Bench(llama_cpp, program, arguments) if known >= _TESTS else None


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
