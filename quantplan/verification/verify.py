"""Predicted against measured: runs a recipe's file and compares what was promised."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from quantplan.errors import InputError, LlamaCppError, RecipeError
from quantplan.formats.llama_args import parse_flags
from quantplan.formats.llama_cpp import options, rpc_flags
from quantplan.given import check_given
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.predict import DeviceUse, MemoryPrediction, predict
from quantplan.recipe import Recipe
from quantplan.runtime.bench import find_bench
from quantplan.runtime.find import LlamaCpp, find_llama_cpp
from quantplan.runtime.log import HOST
from quantplan.runtime.memory import MeasuredDevice, read_loaded
from quantplan.runtime.perplexity import measure_divergence
from quantplan.runtime.server import LOAD_LIMIT_S, Server, serving
from quantplan.runtime.speed import SpeedMeasurement, SpeedTests, slot_context, time_requests
from quantplan.verification.result import Check, Loss, Verification, What

CACHE = Path("quantplan-kld")
"""Folder of the unquantized model's log probabilities."""

_PROMPT = "The capital of France is"
_ANSWER_TOKENS = 16
_DEEPEST = 8192
_NAMED = 3


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
        llama_cpp: What to run; by default the one that `quantplan.runtime.find_llama_cpp` finds.
        machine: The machine that this is; by default the recipe's.
        extra_flags: Flags that the recipe cannot know, such as ``-t 8``. They come first.
        speed: Whether to measure speeds too.
        depths: Tokens in the context at which to measure decode and prefill speed; by default none
            and half of a full context.
        base: The unquantized model; with it KLD and perplexity on ``text`` are measured.
        text: Any text of at least two chunks of 512 tokens.
        chunks: How many chunks of it at most.
        cache: Folder for what is kept of the base, so that it runs once for each text and build.
        limit_s: Seconds to load the model, and again to measure speeds.
        log: Where to keep what llama-server printed.

    Raises:
        InputError: The recipe has no flags or no machine, the file is not the recipe's, or only one
            of ``base`` and ``text`` is given.
        LlamaCppError: llama.cpp is missing, failed, took too long, or has other GPUs than the
            machine.
    """
    check_given(("recipe", recipe, Recipe))
    if (base is None) != (text is None):
        raise InputError("KLD needs both: the unquantized model (base) and a text")
    inventory = read_inventory(os.fspath(gguf))
    machine = _checked_machine(recipe, inventory, machine or recipe.provenance.machine)
    runtime = llama_cpp or find_llama_cpp()
    flags = (*missing_rpc_flags(recipe.flags, machine), *extra_flags, *recipe.flags)
    path = Path(inventory.source)
    workload = parse_flags(flags, inventory, engine=runtime.runtime).workload
    tests = speed_tests(workload.slot_context, workload.ubatch, depths)
    bench = find_bench(runtime, flags) if speed else None
    speeds = None
    with serving(runtime, path, flags, limit_s=limit_s, log=log) as server:
        measured = _devices(server, machine)
        completion = server.complete(_PROMPT, _ANSWER_TOKENS, limit_s)
        command, deprecated = server.command, server.deprecated
        if speed and bench is None:
            cells = slot_context(server, limit_s)  # at most what the model was trained for
            tests = speed_tests(cells, workload.ubatch, depths)
            speeds = time_requests(server, runtime, flags, tests, limit_s)
    if bench is not None:  # not before: there may be no memory for two
        speeds = bench.measure(path, tests, 2 * limit_s)
    predicted = _predicted(inventory, flags, machine, runtime)
    checks = memory_checks(predicted, measured)
    if speeds is not None:
        asked = predicted
        if tests.n_prompt < workload.ubatch:  # no whole ubatch has room
            asked = _predicted(inventory, (*flags, "-ub", str(tests.n_prompt)), machine, runtime)
        checks += speed_checks(asked, speeds)
    loss = None
    if base is not None and text is not None:
        found = measure_divergence(
            runtime,
            path,
            text,
            base=base,
            cache=cache,
            chunks=chunks,
            threads=_threads(flags),
        )
        loss = Loss.of(base, found)
        checks += loss_checks(recipe, loss)
    return Verification(
        time=datetime.datetime.now(datetime.UTC),
        model=inventory.name,
        gguf=str(path),
        header_sha256=inventory.header_sha256,
        llama_cpp=runtime,
        flags=flags,
        command=command,
        devices=tuple(device.name for device in measured if device.name != HOST),
        checks=checks,
        speed=speeds,
        loss=loss,
        completion=completion,
        notes=(*_notes(recipe, runtime, predicted), *deprecated),
    )


def _checked_machine(recipe: Recipe, inventory: Inventory, machine: Machine | None) -> Machine:
    """The machine of a promise; what promises nothing is refused.

    Raises:
        RecipeError: Every fault is named.
    """
    faults = []
    if not recipe.flags:
        faults.append("the recipe has no flags, so it promises nothing: plan, or import a command")
    if machine is None:
        faults.append("the recipe states no machine: name it (--machine)")
    faults += differences(recipe, inventory)
    if faults or machine is None:
        raise RecipeError(faults)
    return machine


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


def missing_rpc_flags(flags: Sequence[str], machine: Machine | None) -> list[str]:
    """Flags that name the machine's other hosts, where the recipe's do not."""
    return [] if machine is None or "--rpc" in flags else rpc_flags(machine)


def _devices(server: Server, machine: Machine) -> tuple[MeasuredDevice, ...]:
    """What llama.cpp said of every device, GPUs in the machine's order.

    Raises:
        LlamaCppError: It uses more or fewer GPUs than the machine has.
    """
    measured = read_loaded(server.process.log)
    names = [device.name for device in measured if device.name != HOST]
    if len(names) != len(machine.gpus):
        have = ", ".join(names) or "no GPU"
        advice = (
            "is one not found? quantplan doctor lists them; a server behind --rpc must run, and be "
            "of the same build"
        )
        if len(names) > len(machine.gpus):
            kept = ",".join(names[: len(machine.gpus)]) or "none"
            advice = f"add -- -dev {kept}, or plan for all"
        raise LlamaCppError(
            f"llama.cpp uses {have} here, but the machine of the recipe has {len(machine.gpus)} "
            f"GPUs: {advice}"
        )
    return measured


def _predicted(
    inventory: Inventory, flags: Sequence[str], machine: Machine, runtime: LlamaCpp
) -> MemoryPrediction:
    return predict(
        inventory,
        flags,
        machine,
        engine=runtime.runtime,
        llama_cpp_build=runtime.build or NEWEST_KNOWN_BUILD,
    )


def speed_tests(slot_cells: float, ubatch: int, depths: Sequence[int] | None = None) -> SpeedTests:
    """What to measure: a prompt of one ubatch, and tokens, at two depths.

    Args:
        slot_cells: Context of a slot, in tokens.
        ubatch: In tokens.
        depths: Tokens in the context before; by default none, and half of a slot's context.
    """
    cells = int(slot_cells)
    chosen = (0, min(cells // 2, _DEEPEST)) if depths is None else tuple(depths)
    tests = SpeedTests(depths=chosen, n_prompt=ubatch)
    return tests.within(cells, keep_depths=depths is not None)


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
    for speed in (*measured.decode, *measured.prefill):
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


def _threads(flags: Sequence[str]) -> int | None:
    """The threads that the flags ask for; None where they do not."""
    given = [v[0] for name, *v in options(flags) if name in ("-t", "--threads") and v]
    return int(given[-1]) if given and given[-1].isdigit() and int(given[-1]) else None


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
