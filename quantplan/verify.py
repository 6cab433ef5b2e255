"""Predicted against measured: runs a recipe's file and compares what was promised."""

import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from quantplan.errors import InputError, LlamaCppError, RecipeError
from quantplan.hardware import Machine
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.predict import DeviceUse, MemoryPrediction, predict
from quantplan.recipe import Recipe, write_whole
from quantplan.runtime.find import LlamaCpp, find_llama_cpp
from quantplan.runtime.flags import flags_for
from quantplan.runtime.log import HOST
from quantplan.runtime.memory import MeasuredDevice, read_loaded
from quantplan.runtime.perplexity import Divergence, measure_divergence
from quantplan.runtime.server import LOAD_LIMIT_S, Server, serving
from quantplan.runtime.speed import SpeedMeasurement, measure_speed
from quantplan.schema import Frozen
from quantplan.version import __version__
from quantplan.workload import NEWEST_KNOWN_BUILD

CACHE = Path("quantplan-kld")
"""Folder of the unquantized model's log probabilities."""

_PROMPT = "The capital of France is"
_ANSWER_TOKENS = 16
_SPEED_TOKENS = 32
# Room for a prompt and an answer behind the deepest measurement.
_SPARE_CELLS = 64
_DEEPEST = 8192
_MIB = 2**20
_NAMED = 3

What = Literal["weights", "KV", "compute", "decode", "prefill", "KLD"]
_UNITS: dict[What, str] = {
    "weights": "MiB", "KV": "MiB", "compute": "MiB",
    "decode": "tokens/s", "prefill": "tokens/s", "KLD": "nats/token",
}  # fmt: skip


class Check(Frozen):
    """One number that was predicted, and what it turned out to be.

    Attributes:
        what: ``weights``, ``KV`` and ``compute`` in bytes, ``decode`` and ``prefill`` in tokens per
            second, ``KLD`` in nats per token.
        where: The device, or the depth.
        predicted: The prediction.
        low: Least value that keeps the promise; None where nothing is promised.
        high: Largest value that keeps it.
        measured: What was measured.
    """

    what: What
    where: str
    predicted: float
    low: float | None
    high: float | None
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else None

    @property
    def held(self) -> bool:
        """Whether the promise was kept."""
        above = self.low is None or self.low <= self.measured
        return above and (self.high is None or self.measured <= self.high)

    def line(self) -> str:
        """One row of a table."""
        unit = _UNITS[self.what]
        scale = _MIB if unit == "MiB" else 1
        digits = {"MiB": 2, "tokens/s": 1, "nats/token": 4}[unit]
        numbers = [f"{value / scale:12.{digits}f}" for value in (self.predicted, self.measured)]
        ratio = "      -" if self.ratio is None else f"{self.ratio:7.3f}"
        broken = ""
        if not self.held:
            bounds = [f"{(x or 0) / scale:.{digits}f}" for x in (self.low, self.high)]
            broken = f"  BROKEN: promised {' to '.join(bounds)}"
        return f"  {self.what:8}{self.where:12}{numbers[0]}{numbers[1]} {ratio} {unit}{broken}"


class Loss(Frozen):
    """What a text shows of the quantized model beside the unquantized one.

    Attributes:
        base: The unquantized model.
        n_chunks: Chunks of the text that were judged.
        kld_nats: Mean KL divergence, nats per token.
        kld_error_nats: Its standard error over chunks.
        kld_p99_nats: 99th percentile over tokens.
        same_top_share: Share of tokens whose most likely token is the same.
        ppl: Perplexity of the quantized model.
        ppl_ratio: That over the unquantized model's.
        ppl_ratio_error: Its standard error.
    """

    base: str
    n_chunks: int
    kld_nats: float
    kld_error_nats: float
    kld_p99_nats: float
    same_top_share: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_error: float

    @classmethod
    def of(cls, base: Path, found: Divergence) -> Self:
        """The figures of a measured divergence."""
        ratio = math.exp(found.ln_ppl_ratio.value)
        return cls(
            base=str(base),
            n_chunks=len(found.kld_nats),
            kld_nats=found.kld.value,
            kld_error_nats=found.kld.standard_error,
            kld_p99_nats=found.kld_p99.value,
            same_top_share=found.same_top_share.value,
            ppl=math.exp(found.ln_ppl.value),
            ppl_ratio=ratio,
            ppl_ratio_error=ratio * found.ln_ppl_ratio.standard_error,
        )

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"  KLD {self.kld_nats:.5f} ± {self.kld_error_nats:.5f} nats/token, 99th percentile "
            f"{self.kld_p99_nats:.4f}, same top token {self.same_top_share:.2%}, PPL "
            f"{self.ppl:.4f}, ratio {self.ppl_ratio:.5f} ± {self.ppl_ratio_error:.5f} "
            f"({self.n_chunks} chunks)"
        )


class Verification(Frozen):
    """What a recipe promised, and what the real runtime did.

    Attributes:
        schema_version: Version of this format.
        quantplan_version: Version that compared.
        time: When, in UTC.
        model: Name of the model.
        gguf: The file that was run.
        header_sha256: Hash of its header.
        llama_cpp: What ran it.
        command: The command that was checked.
        devices: What llama.cpp called the GPUs of the machine, in order.
        checks: Everything that was compared.
        speed: The speeds as they were measured; None where they were not.
        loss: KLD and perplexity; None where no unquantized model was given.
        completion: How the model went on after "The capital of France is", greedily.
        notes: What a person should know about it.
    """

    schema_version: Literal[1] = 1
    quantplan_version: str = __version__
    time: datetime.datetime
    model: str
    gguf: str
    header_sha256: str
    llama_cpp: LlamaCpp
    command: tuple[str, ...]
    devices: tuple[str, ...]
    checks: tuple[Check, ...]
    speed: SpeedMeasurement | None = None
    loss: Loss | None = None
    completion: str
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether all that was promised and checked is true."""
        return all(check.held for check in self.checks)

    def summary(self) -> str:
        """A table: predicted, measured, ratio."""
        broken = sum(not check.held for check in self.checks)
        said = f"{broken} of {len(self.checks)} promises are BROKEN" if broken else "as promised"
        head = f"  {'':20}{'predicted':>12}{'measured':>12} {'ratio':>7}"
        rows = [f"{self.model} on {self.llama_cpp}: {said}", head]
        rows += [check.line() for check in self.checks]
        rows += [self.loss.line()] if self.loss else []
        rows += [f"  note: {text}" for text in self.notes]
        return "\n".join(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all.

        Raises:
            RecipeError: The file cannot be written.
        """
        write_whole(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
            InputError: The file cannot be read, or is no verification of a known version.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"{os.fspath(path)}: {error.strerror or error}") from error
        except ValidationError as error:
            fault = error.errors()[0]
            raise InputError(
                f"{os.fspath(path)} is no verification that this version reads: "
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            ) from error


def verify(
    recipe: Recipe,
    gguf: str | os.PathLike[str],
    *,
    llama_cpp: LlamaCpp | None = None,
    machine: Machine | None = None,
    extra_flags: Sequence[str] = (),
    speed: bool = True,
    depths: Sequence[int] | None = None,
    base: Path | None = None,
    text: str | None = None,
    chunks: int | None = None,
    cache: Path = CACHE,
    limit_s: float = LOAD_LIMIT_S,
    log: Path | None = None,
) -> Verification:
    """Runs a recipe's file with exactly its flags and compares memory and speed with what it said.

    llama-server is started without the user's configuration on a free port of the loopback
    interface and always ended. Weights and caches must equal the prediction to the precision that
    llama.cpp prints; compute buffers and speeds must lie within their intervals.

    Args:
        recipe: The recipe, with flags.
        gguf: The file that was quantized with it, or any shard.
        llama_cpp: What to run; by default the one that `find_llama_cpp` finds.
        machine: The machine that this is; by default the recipe's.
        extra_flags: Flags that the recipe cannot know, such as ``-t 8``. They come first.
        speed: Whether to measure speeds too.
        depths: Tokens in the context at which to measure decode speed; by default none and half
            of a full context.
        base: The unquantized model; with it KLD and perplexity on `text` are measured.
        text: Any text of at least two chunks of 512 tokens.
        chunks: How many chunks of it at most.
        cache: Folder for what is kept of the base, so that it runs once for each text and build.
        limit_s: Seconds to load the model, and again to measure speeds.
        log: Where to keep what llama-server printed.

    Raises:
        InputError: The recipe has no flags or no machine, the file is not the recipe's, or only one
            of `base` and `text` is given.
        LlamaCppError: llama.cpp is missing, failed, took too long, or has other GPUs than the
            machine.
    """
    if (base is None) != (text is None):
        raise InputError("KLD needs both: the unquantized model (base) and a text")
    machine = machine or recipe.provenance.machine
    inventory = read_inventory(os.fspath(gguf))
    _check(recipe, inventory, machine)
    if machine is None:  # refused above
        raise RecipeError("the recipe states no machine")
    runtime = llama_cpp or find_llama_cpp()
    flags = (*extra_flags, *recipe.flags)
    path = Path(inventory.source)
    with serving(runtime, path, flags, limit_s=limit_s, log=log) as server:
        measured = _devices(server, machine)
        completion = server.complete(_PROMPT, _ANSWER_TOKENS, limit_s)
        command, deprecated = server.command, server.deprecated
    predicted = predict(
        inventory,
        flags,
        machine,
        engine=runtime.runtime,
        llama_cpp_build=runtime.build or NEWEST_KNOWN_BUILD,
    )
    checks = memory_checks(predicted, measured)
    speeds = None
    if speed:
        speeds = measure_speed(
            runtime,
            path,
            flags_for(runtime, flags),
            depths=_depths(predicted) if depths is None else depths,
            n_tokens=_SPEED_TOKENS,
            limit_s=limit_s,
        )
        checks += speed_checks(predicted, speeds)
    loss = None
    if base is not None and text is not None:
        found = measure_divergence(runtime, path, text, base=base, cache=cache, chunks=chunks)
        loss = Loss.of(base, found)
        checks += loss_checks(recipe, loss)
    return Verification(
        time=datetime.datetime.now(datetime.UTC),
        model=inventory.name,
        gguf=str(path),
        header_sha256=inventory.header_sha256,
        llama_cpp=runtime,
        command=command,
        devices=tuple(device.name for device in measured if device.name != HOST),
        checks=checks,
        speed=speeds,
        loss=loss,
        completion=completion,
        notes=(*_notes(recipe, runtime, predicted), *deprecated),
    )


def _check(recipe: Recipe, inventory: Inventory, machine: Machine | None) -> None:
    """Refuses what promises nothing.

    Raises:
        RecipeError: Every fault is named.
    """
    faults = []
    if not recipe.flags:
        faults.append("the recipe has no flags, so it promises nothing: plan, or import a command")
    if machine is None:
        faults.append("the recipe states no machine: name it (--machine)")
    faults += differences(recipe, inventory)
    if faults:
        raise RecipeError(faults)


def differences(recipe: Recipe, inventory: Inventory) -> list[str]:
    """What a file has otherwise than a recipe says, one sentence each; nothing where it is its own.

    Args:
        recipe: The recipe.
        inventory: The file.
    """
    wanted = {t.tensor: (t.shape_ne, t.qtype) for t in recipe.tensors}
    found = {t.name: (t.shape_ne, t.qtype) for t in inventory.tensors}
    other = [n for n in wanted if n in found and found[n] != wanted[n]]
    examples = ", ".join(f"{n} is {found[n][1]}, not {wanted[n][1]}" for n in other[:_NAMED])
    said = []
    if missing := [n for n in wanted if n not in found]:
        said.append(f"{inventory.source} lacks {len(missing)} tensors, such as {missing[0]}")
    if more := [n for n in found if n not in wanted]:
        said.append(f"{inventory.source} has {len(more)} tensors more, such as {more[0]}")
    if other:
        said.append(
            f"{len(other)} tensors of {inventory.source} are not as the recipe says: {examples}"
        )
    return said


def _devices(server: Server, machine: Machine) -> tuple[MeasuredDevice, ...]:
    """What llama.cpp said of every device, GPUs in the machine's order.

    Raises:
        LlamaCppError: It uses more or fewer GPUs than the machine has.
    """
    measured = read_loaded(server.process.log)
    names = [device.name for device in measured if device.name != HOST]
    if len(names) != len(machine.gpus):
        have = ", ".join(names) or "no GPU"
        advice = "is one not found? quantplan doctor lists them"
        if len(names) > len(machine.gpus):
            kept = ",".join(names[: len(machine.gpus)]) or "none"
            advice = f"add -- -dev {kept}, or plan for all"
        raise LlamaCppError(
            f"llama.cpp uses {have} here, but the machine of the recipe has {len(machine.gpus)} "
            f"GPUs: {advice}"
        )
    return measured


def memory_checks(
    predicted: MemoryPrediction, measured: Sequence[MeasuredDevice]
) -> tuple[Check, ...]:
    """Compares the memory of every device.

    Args:
        predicted: The prediction.
        measured: What llama.cpp said, device by device in the same order.
    """
    return tuple(
        check
        for use, device in zip(predicted.devices, measured, strict=True)
        for check in _device_checks(use, device)
    )


def _device_checks(use: DeviceUse, device: MeasuredDevice) -> tuple[Check, ...]:
    rounding = device.rounding_bytes
    return (
        Check(
            what="weights",
            where=use.name,
            predicted=use.weights_bytes,
            low=use.weights_bytes - rounding,
            high=use.weights_bytes + use.padding_bytes + rounding,
            measured=device.weights_bytes,
        ),
        Check(
            what="KV",
            where=use.name,
            predicted=use.kv_bytes,
            low=use.kv_bytes - rounding,
            high=use.kv_bytes + rounding,
            measured=device.cache_bytes,
        ),
        Check(
            what="compute",
            where=use.name,
            predicted=use.compute_bytes,
            low=use.compute_low_bytes,
            high=use.compute_high_bytes,
            measured=device.compute_bytes,
        ),
    )


def speed_checks(predicted: MemoryPrediction, measured: SpeedMeasurement) -> tuple[Check, ...]:
    """Compares decode and prefill speeds at the depths that were measured."""
    checks = []
    for speed in (*measured.decode, measured.prefill):
        what: What = "decode" if speed.n_generated else "prefill"
        # The middle of the tokens that were generated or read.
        depth = speed.depth + speed.n_generated // 2
        promised = getattr(predicted.speed, f"{what}_tps")(depth)
        checks.append(
            Check(
                what=what,
                where=f"@{speed.depth}",
                predicted=promised.expected,
                low=promised.low,
                high=promised.high,
                measured=speed.tps,
            )
        )
    return tuple(checks)


def loss_checks(recipe: Recipe, loss: Loss) -> tuple[Check, ...]:
    """Compares the predicted loss, for which nothing is promised: texts differ."""
    if recipe.predicted is None:
        return ()
    return (
        Check(
            what="KLD",
            where="",
            predicted=recipe.predicted.loss_nats,
            low=None,
            high=None,
            measured=loss.kld_nats,
        ),
    )


def _depths(predicted: MemoryPrediction) -> tuple[int, ...]:
    """An empty context, and one that is half full."""
    context = predicted.speed.points[-1].depth
    deep = min(context // 2, _DEEPEST)
    return (0, deep) if deep > 0 and deep + _SPEED_TOKENS + _SPARE_CELLS <= context else (0,)


def _notes(recipe: Recipe, runtime: LlamaCpp, predicted: MemoryPrediction) -> list[str]:
    workload = recipe.provenance.workload
    promised = {use.device: (use.weights_bytes, use.kv_bytes) for use in recipe.memory}
    now = {use.name: (use.weights_bytes, use.kv_bytes) for use in predicted.devices}
    notes = list(predicted.warnings)
    if promised and promised != now:
        planned = f" b{workload.llama_cpp_build}" if workload else ""
        notes.append(
            f"the recipe was planned for llama.cpp{planned}, other flags or another machine: "
            f"compared with the prediction for {runtime} here"
        )
    if runtime.build is None:
        notes.append(f"the build of {runtime.server} is not known: taken for the newest")
    return notes
