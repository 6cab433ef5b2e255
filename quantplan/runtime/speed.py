"""Measures decode and prefill speed with a llama.cpp of this machine."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import urllib3

from quantplan.errors import InputError, LlamaCppError
from quantplan.formats.llama_bench import BenchResult
from quantplan.inventory.sources import shard_paths
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.memory import kept_flags
from quantplan.runtime.process import ADDRESS, Process, failure, free_port, running
from quantplan.schema import Frozen

DEPTHS = (0, 2048)
# Repetitions on a machine that does nothing else differ by less.
_UNSTEADY = 0.25
# A prompt needs one token, and llama-server keeps one cell free.
_SPARE_CELLS = 8
# Which experts a token chooses depends on the text, so it should be one.
_TEXT = (
    "The harbour lay still in the early morning. Two men carried nets to a boat, and a third one "
    "counted the baskets on the quay: 48, 49, 50. Nobody spoke, since the engine was loud enough; "
    "only the gulls, which had waited for hours, complained about fish that they would not get.\n"
)


class MeasuredSpeed(Frozen):
    """One speed, measured several times.

    Attributes:
        n_prompt: Prompt tokens; 0 where tokens were generated.
        n_generated: Tokens generated; 0 where a prompt was processed.
        depth: Tokens in the context before.
        repetitions: Tokens per second of each time.
    """

    n_prompt: int
    n_generated: int
    depth: int
    repetitions: tuple[float, ...]

    @property
    def tps(self) -> float:
        """The median of tokens per second."""
        return statistics.median(self.repetitions)

    @property
    def spread(self) -> float:
        """Largest less smallest speed, over the median."""
        return (max(self.repetitions) - min(self.repetitions)) / self.tps


class SpeedMeasurement(Frozen):
    """Speeds of a model under given flags on this machine.

    Attributes:
        llama_cpp: The llama.cpp that ran.
        tool: Its program.
        flags: Flags of the server that was measured.
        decode: Decode speed at each depth.
        prefill: Speed at which a prompt was processed in an empty context.
    """

    llama_cpp: LlamaCpp
    tool: Literal["llama-server", "llama-bench"]
    flags: tuple[str, ...]
    decode: tuple[MeasuredSpeed, ...]
    prefill: MeasuredSpeed

    @property
    def results(self) -> tuple[BenchResult, ...]:
        """The speeds as `quantplan.calibrate.calibrate_machine` takes them."""
        return tuple(
            BenchResult(
                n_prompt=speed.n_prompt,
                n_generated=speed.n_generated,
                depth=speed.depth,
                tps=speed.tps,
            )
            for speed in (*self.decode, self.prefill)
        )

    def summary(self) -> str:
        """One line a speed."""
        lines = [f"measured with {self.tool}, {self.llama_cpp}:"]
        for speed in (*self.decode, self.prefill):
            what = f"decode at depth {speed.depth}" if speed.n_generated else "prefill"
            n = len(speed.repetitions)
            said = f"  {what}: {speed.tps:.1f} tokens/s"
            lines.append(f"{said} (median of {n}, spread {speed.spread:.0%})" if n > 1 else said)
        if max(speed.spread for speed in (*self.decode, self.prefill)) > _UNSTEADY:
            lines.append(
                "  These vary much: something else uses this machine. Measure again later."
            )
        return "\n".join(lines)


def measure_speed(
    llama_cpp: LlamaCpp,
    gguf: Path,
    flags: Sequence[str] = (),
    *,
    depths: Sequence[int] = DEPTHS,
    n_tokens: int = 32,
    n_prompt: int = 512,
    repetitions: int = 3,
    limit_s: float = 600.0,
) -> SpeedMeasurement:
    """Measures how fast llama-server runs a model, one request at a time.

    A request that is not counted goes first. The times are the server's own, without those of
    HTTP, sampling of the first token and tokenizer. Repetitions at one depth share the prompt's
    cache; where time gets short, those after the first one are left out.

    Args:
        llama_cpp: Which llama.cpp.
        gguf: The model's file, or any shard of it.
        flags: Flags of llama-server. Those that name a model, a port or a log are left out, and so
            is ``--fit``; where they state no context it is as long as needed, where they state no
            slots there is one.
        depths: Tokens in the context before tokens are generated.
        n_tokens: Tokens to generate at each depth, at least 2.
        n_prompt: Tokens of the prompt whose speed is measured.
        repetitions: How often to measure.
        limit_s: Seconds for all of it, loading included.

    Raises:
        InputError: A number is out of range.
        LlamaCppError: The server failed or refused, its context is too short, or the time was up.
    """
    faults = [
        f"{what} is {value}: it must be at least {least}"
        for what, value, least in (
            ("n_tokens", n_tokens, 2),
            ("n_prompt", n_prompt, 1),
            ("repetitions", repetitions, 1),
            ("the number of depths", len(depths), 1),
            *(("a depth", depth, 0) for depth in depths),
        )
        if value < least
    ]
    if faults:
        raise InputError(faults)
    deadline = time.monotonic() + limit_s
    n_cells = max(max(depths) + n_tokens, n_prompt) + _SPARE_CELLS
    arguments = _arguments(llama_cpp, flags, n_cells)
    with _serving(llama_cpp, gguf, arguments, deadline) as server:
        server.check_context(n_cells, depths)
        stream = server.tokens(n_cells)
        server.complete(stream[:n_prompt], 2, reuse=False)  # warms up
        share_s = (deadline - time.monotonic()) / (1 + len(depths))

        def prefill_tps() -> float:
            return _prefill_tps(server.complete(stream[:n_prompt], 2, reuse=False))

        def decode_tps(depth: int) -> float:
            return _decode_tps(server.complete(stream[: max(1, depth)], n_tokens))

        prefill = _repeated(prefill_tps, repetitions, share_s)
        decode = [_repeated(partial(decode_tps, d), repetitions, share_s) for d in depths]
    return SpeedMeasurement(
        llama_cpp=llama_cpp,
        tool="llama-server",
        flags=arguments,
        decode=tuple(
            MeasuredSpeed(n_prompt=0, n_generated=n_tokens, depth=depth, repetitions=found)
            for depth, found in zip(depths, decode, strict=True)
        ),
        prefill=MeasuredSpeed(n_prompt=n_prompt, n_generated=0, depth=0, repetitions=prefill),
    )


def _repeated(once: Callable[[], float], repetitions: int, share_s: float) -> tuple[float, ...]:
    """Measures once, and again while that is likely to stay within the time that it may take."""
    start = time.monotonic()
    found = [once()]
    while len(found) < repetitions:
        passed_s = time.monotonic() - start
        if passed_s * (len(found) + 1) / len(found) > share_s:
            break
        found.append(once())
    return tuple(found)


def _arguments(llama_cpp: LlamaCpp, flags: Sequence[str], n_cells: int) -> tuple[str, ...]:
    arguments = kept_flags(flags)
    if not {"-c", "--ctx-size"} & set(arguments):
        arguments += ("-c", str(n_cells))
    if not {"-np", "--parallel"} & set(arguments):
        arguments += ("-np", "1")
    return (*arguments, "--fit", "off") if llama_cpp.has_fit else arguments


def _prefill_tps(timings: dict[str, float]) -> float:
    return 1e3 * timings["prompt_n"] / timings["prompt_ms"]


def _decode_tps(timings: dict[str, float]) -> float:
    """The first token comes out of the prompt: the clock starts with it."""
    return 1e3 * (timings["predicted_n"] - 1) / timings["predicted_ms"]


@dataclass(frozen=True)
class _Server:
    """A llama-server that has loaded its model.

    Attributes:
        process: The program.
        pool: Connections to it.
        deadline: When all must be done, on the monotonic clock.
    """

    process: Process
    pool: urllib3.HTTPConnectionPool
    deadline: float

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that it answers.

        Raises:
            LlamaCppError: It died, refused, or the time was up.
        """
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise self._late()
        try:
            answer = self.pool.request(method, path, json=body, timeout=left_s, retries=False)
        except urllib3.exceptions.TimeoutError as error:
            raise self._late() from error
        except urllib3.exceptions.HTTPError as error:
            fate = f"gave no answer ({type(error).__name__})"
            raise failure(self.process.name, fate, self.process.log) from error
        if answer.status != 200:
            said = answer.data.decode(errors="replace").strip()
            raise LlamaCppError(f"{self.process.name} refused {path} ({answer.status}): {said}")
        return answer.json()

    def _late(self) -> LlamaCppError:
        return LlamaCppError(
            f"{self.process.name} has not finished within the time limit: allow more time, or "
            "measure fewer tokens or smaller depths"
        )

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        try:
            answer = self.pool.request("GET", "/health", timeout=5, retries=False)
        except urllib3.exceptions.HTTPError:  # refused while it starts
            return False
        return answer.status == 200  # 503 while it loads

    def check_context(self, n_cells: int, depths: Sequence[int]) -> None:
        """Refuses depths for which a slot has no room."""
        settings = self.ask("GET", "/props")["default_generation_settings"]
        if settings["n_ctx"] < n_cells:
            raise LlamaCppError(
                f"a slot has a context of {settings['n_ctx']} tokens, but {n_cells} are needed to "
                f"measure at depth {max(depths)}: measure smaller depths, or state a larger -c"
            )

    def tokens(self, n: int) -> list[int]:
        """So many tokens of a text."""
        return list(islice(cycle(self.ask("POST", "/tokenize", {"content": _TEXT})["tokens"]), n))

    def complete(
        self, prompt: Sequence[int], n_tokens: int, *, reuse: bool = True
    ) -> dict[str, float]:
        """Lets it continue a prompt, and returns its timings.

        Args:
            prompt: Tokens.
            n_tokens: To generate.
            reuse: Whether tokens that are in the cache need not be processed again.
        """
        answer = self.ask(
            "POST",
            "/completion",
            {"prompt": list(prompt), "n_predict": n_tokens, "ignore_eos": True, "id_slot": 0}
            | {"temperature": 0, "cache_prompt": reuse},
        )
        timings: dict[str, float] = answer["timings"]
        if timings["predicted_n"] < n_tokens:
            raise LlamaCppError(
                f"{self.process.name} generated {timings['predicted_n']} tokens instead of "
                f"{n_tokens}: the context is full, or a flag limits answers"
            )
        return timings


@contextmanager
def _serving(
    llama_cpp: LlamaCpp, gguf: Path, arguments: Sequence[str], deadline: float
) -> Iterator[_Server]:
    """Runs llama-server on a model until the block ends."""
    port = free_port()
    own = ["-m", str(shard_paths(gguf)[0].resolve()), "--host", ADDRESS, "--port", str(port)]
    pool = urllib3.HTTPConnectionPool(ADDRESS, port)
    with running([str(llama_cpp.server), *arguments, *own]) as process, pool:
        server = _Server(process, pool, deadline)
        process.wait_until(server.is_ready, deadline - time.monotonic())
        yield server
