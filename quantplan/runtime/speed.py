"""Measures decode and prefill speed with a llama.cpp of this machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from quantplan.errors import InputError, LlamaCppError
from quantplan.formats.llama_bench import BenchResult
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.memory import kept_flags
from quantplan.runtime.server import Server, serving
from quantplan.schema import Frozen

DEPTHS = (0, 2048)
# Repetitions on a machine that does nothing else differ by less.
_UNSTEADY = 0.25
# Two tokens are generated behind a prompt, and llama-server keeps one cell free.
SPARE_CELLS = 8
"""Cells that a context needs beside what is measured."""

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
        prefill: Speed at which a prompt was processed at each depth.
    """

    llama_cpp: LlamaCpp
    tool: Literal["llama-server", "llama-bench"]
    flags: tuple[str, ...]
    decode: tuple[MeasuredSpeed, ...]
    prefill: tuple[MeasuredSpeed, ...]

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
            for speed in (*self.decode, *self.prefill)
        )

    def summary(self) -> str:
        """One line a speed."""
        lines = [f"measured with {self.tool}, {self.llama_cpp}:"]
        for speed in (*self.decode, *self.prefill):
            what = "decode" if speed.n_generated else f"prefill of {speed.n_prompt} tokens"
            n = len(speed.repetitions)
            said = f"  {what} at depth {speed.depth}: {speed.tps:.1f} tokens/s"
            lines.append(f"{said} (median of {n}, spread {speed.spread:.0%})" if n > 1 else said)
        if max(speed.spread for speed in (*self.decode, *self.prefill)) > _UNSTEADY:
            lines.append(
                "  These vary much: something else uses this machine. Measure again later."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class SpeedTests:
    """What is to be measured.

    Attributes:
        depths: Tokens in the context before.
        n_tokens: Tokens to generate at each depth, at least 2.
        n_prompt: Tokens of the prompt at each depth.
        repetitions: How often to measure.

    Raises:
        InputError: A number is out of range; all of them are named.
    """

    depths: tuple[int, ...] = DEPTHS
    n_tokens: int = 32
    n_prompt: int = 512
    repetitions: int = 3

    def __post_init__(self) -> None:
        """Checks the numbers."""
        faults = [
            f"{what} is {value}: it must be at least {least}"
            for what, value, least in (
                ("n_tokens", self.n_tokens, 2),
                ("n_prompt", self.n_prompt, 1),
                ("repetitions", self.repetitions, 1),
                ("the number of depths", len(self.depths), 1),
                *(("a depth", depth, 0) for depth in self.depths),
            )
            if value < least
        ]
        if faults:
            raise InputError(faults)

    @property
    def n_cells(self) -> int:
        """Cells that a context needs."""
        return max(self.depths) + max(self.n_tokens, self.n_prompt) + SPARE_CELLS

    def within(self, cells: int, *, keep_depths: bool = False) -> "SpeedTests":
        """The same where a context has room for it; else at half of the context, if at any depth.

        Args:
            cells: Of the context.
            keep_depths: Whether only the prompt may be shortened.
        """
        if self.n_cells <= cells:
            return self
        depths, half = self.depths, cells // 2
        if not keep_depths:
            has_room = half + self.n_tokens + SPARE_CELLS <= cells
            depths = tuple(dict.fromkeys(min(d, half) for d in depths)) if has_room else (0,)
        room = cells - SPARE_CELLS - max(depths)
        return replace(self, depths=depths, n_prompt=max(1, min(self.n_prompt, room)))


def measure_speed(
    llama_cpp: LlamaCpp,
    gguf: Path,
    flags: Sequence[str] = (),
    *,
    depths: Sequence[int] | None = None,
    n_tokens: int = 32,
    n_prompt: int = 512,
    repetitions: int = 3,
    limit_s: float = 600.0,
) -> SpeedMeasurement:
    """Measures how fast llama-server runs a model, one request at a time.

    Args:
        llama_cpp: Which llama.cpp.
        gguf: The model's file, or any shard of it.
        flags: Flags of llama-server. Those that name a model, a port or a log are left out, and so
            is ``--fit``; where they state no context it is as long as needed, where they state no
            slots there is one.
        depths: Tokens in the context before tokens are generated, or a prompt is processed; by
            default none and 2048, or half of a context that is too short for that.
        n_tokens: Tokens to generate at each depth, at least 2.
        n_prompt: Tokens of the prompt whose speed is measured at each depth.
        repetitions: How often to measure.
        limit_s: Seconds to load the model, and again to measure.

    Raises:
        InputError: A number is out of range.
        LlamaCppError: The server failed or refused, its context is too short, or the time was up.
    """
    tests = SpeedTests(
        depths=DEPTHS if depths is None else tuple(depths),
        n_tokens=n_tokens,
        n_prompt=n_prompt,
        repetitions=repetitions,
    )
    arguments = list(kept_flags(flags))
    if not {"-c", "--ctx-size"} & set(arguments):
        arguments += ["-c", str(tests.n_cells)]
    if not {"-np", "--parallel"} & set(arguments):
        arguments += ["-np", "1"]
    with serving(llama_cpp, gguf, arguments, limit_s=limit_s) as server:
        if depths is None:
            tests = tests.within(slot_context(server, limit_s))
        return time_requests(server, llama_cpp, arguments, tests, limit_s)


def slot_context(server: Server, limit_s: float) -> int:
    """The most tokens of a slot: its part of ``-c``, but no more than the model was trained for.

    Args:
        server: The server.
        limit_s: Seconds to wait for its answer.

    Raises:
        LlamaCppError: It does not say.
    """
    told = server.ask("/props", limit_s=limit_s).get("default_generation_settings")
    n_ctx = told.get("n_ctx") if isinstance(told, dict) else None
    if not isinstance(n_ctx, int):
        raise LlamaCppError(f"{server.process.name} does not say how long its context is")
    return n_ctx


def time_requests(
    server: Server, llama_cpp: LlamaCpp, flags: Sequence[str], tests: SpeedTests, limit_s: float
) -> SpeedMeasurement:
    """Measures a llama-server that runs.

    A request that is not counted goes first. The times are the server's own, without those of
    HTTP, sampling of the first token and tokenizer. What stands before a prompt, or before the
    tokens that are generated, is in the slot's cache already. Where time gets short, repetitions
    after the first one are left out.

    Args:
        server: The server; its slot 0 is used.
        llama_cpp: Which llama.cpp it is of.
        flags: Its flags.
        tests: What to measure.
        limit_s: Seconds for all of it.

    Raises:
        LlamaCppError: The server failed or refused, its context is too short, or the time was up.
    """
    slot = _Slot(server, time.monotonic() + limit_s)
    _check_context(slot_context(server, limit_s), tests)
    stream = slot.tokens(tests.n_cells)
    slot.complete(stream[: tests.n_prompt], 2, reuse=False)  # warms up
    measured: dict[bool, list[MeasuredSpeed]] = {False: [], True: []}
    jobs = [(depth, is_prefill) for depth in tests.depths for is_prefill in (True, False)]
    for n_done, (depth, is_prefill) in enumerate(jobs):
        share_s = (slot.deadline - time.monotonic()) / (len(jobs) - n_done)
        before, prompt = stream[:depth], stream[depth:][: tests.n_prompt]
        once = (
            partial(slot.prefill_tps, before, prompt)
            if is_prefill
            else partial(slot.decode_tps, before or stream[:1], tests.n_tokens)
        )
        measured[is_prefill].append(
            MeasuredSpeed(
                n_prompt=tests.n_prompt if is_prefill else 0,
                n_generated=0 if is_prefill else tests.n_tokens,
                depth=depth,
                repetitions=_repeated(once, tests.repetitions, share_s),
            )
        )
    return SpeedMeasurement(
        llama_cpp=llama_cpp,
        tool="llama-server",
        flags=tuple(flags),
        decode=tuple(measured[False]),
        prefill=tuple(measured[True]),
    )


def _check_context(n_ctx: int, tests: SpeedTests) -> None:
    """Refuses depths for which a slot has no room."""
    if n_ctx < tests.n_cells:
        raise LlamaCppError(
            f"a slot has a context of {n_ctx} tokens, but {tests.n_cells} are needed to measure at "
            f"depth {max(tests.depths)}: measure smaller depths, or state a larger -c where the "
            "model was trained for more"
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


class _Timings(BaseModel):
    """What llama-server says of one request, in tokens and milliseconds."""

    prompt_n: int
    prompt_ms: float = Field(gt=0)
    predicted_n: int
    predicted_ms: float


@dataclass(frozen=True)
class _Slot:
    """The slot of a llama-server that is measured.

    Attributes:
        server: The server.
        deadline: When all must be done, on the monotonic clock.
    """

    server: Server
    deadline: float

    def prefill_tps(self, before: Sequence[int], prompt: Sequence[int]) -> float:
        """Tokens per second of a prompt behind tokens that are in the cache.

        Raises:
            LlamaCppError: The server processed other tokens than those of the prompt.
        """
        if before:
            self.complete(before, 0)
        timings = self.complete([*before, *prompt], 2, reuse=bool(before))
        if timings.prompt_n != len(prompt):
            raise LlamaCppError(
                f"{self.server.process.name} processed {timings.prompt_n} tokens for a prompt of "
                f"{len(prompt)} behind {len(before)} that it had in its cache: it does not keep "
                "the cache of this model, so its speed there cannot be measured"
            )
        return 1e3 * timings.prompt_n / timings.prompt_ms

    def decode_tps(self, before: Sequence[int], n_tokens: int) -> float:
        """Tokens per second that are generated behind others.

        Raises:
            LlamaCppError: The server did not generate them.
        """
        timings = self.complete(before, n_tokens)
        # The first token comes out of the prompt: the clock starts with it.
        return 1e3 * (timings.predicted_n - 1) / timings.predicted_ms

    def tokens(self, n: int) -> list[int]:
        """So many tokens of a text."""
        found = self._ask("/tokenize", {"content": _TEXT}).get("tokens")
        if not isinstance(found, list) or not found:
            raise LlamaCppError(f"{self.server.process.name} makes no tokens of a text")
        return list(islice(cycle(found), n))

    def complete(self, prompt: Sequence[int], n_tokens: int, *, reuse: bool = True) -> _Timings:
        """Lets the server continue a prompt, and returns its timings.

        Args:
            prompt: Tokens.
            n_tokens: To generate; with 0 the prompt is put into the cache.
            reuse: Whether tokens that are in the cache need not be processed again.
        """
        answer = self._ask(
            "/completion",
            {"prompt": list(prompt), "n_predict": n_tokens, "ignore_eos": True, "id_slot": 0}
            | {"temperature": 0, "cache_prompt": reuse},
        )
        try:
            timings = _Timings.model_validate(answer.get("timings"))
        except ValidationError as error:
            fault = error.errors()[0]
            raise LlamaCppError(
                f"{self.server.process.name} states no timings that are understood: "
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            ) from error
        if timings.predicted_n < n_tokens or (n_tokens and timings.predicted_ms <= 0):
            raise LlamaCppError(
                f"{self.server.process.name} generated {timings.predicted_n} tokens instead of "
                f"{n_tokens}: the context is full, or a flag limits answers"
            )
        return timings

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise LlamaCppError(
                f"{self.server.process.name} has not finished within the time limit: allow more "
                "time, or measure fewer tokens or smaller depths"
            )
        return self.server.ask(path, body, limit_s=left_s)
