"""Published speed measurements -> what the speed model needs to predict them.

A case is one JSON object per line: ``model``, ``quant``, ``tensor_types``, ``file_size_gib``,
``engine``, ``placement``, ``flags``, ``hardware`` (``cpu``, ``ram``, ``ram_bw_gbs``, ``gpus``),
``pp`` and ``tg`` (``n``, ``depth``, ``tps``) and ``sweep`` ([[depth, prefill, decode], ...]).
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.speed_machines import machine_of
from benchmarks.speed_models import model_named
from benchmarks.speed_recipes import size_factor, types_from_counts, types_from_name
from quantplan import Inventory, Machine, Workload
from quantplan.costs.traffic import Read, Traffic, Where, collect
from quantplan.errors import QuantplanError
from quantplan.placement import Launch, Override, place
from quantplan.qtypes import Runtime

_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_CURVE_POINTS = 5
_MAX_SIZE_MISMATCH = 1.6
_KV = re.compile(r"-ct([kv])[ =]+(\w+)")
_THREADS = re.compile(r"(?:-t|-tb|--threads|--threads-batch)[ =]+(\d+)")
_GIB = 2**30


class UnusableError(Exception):
    """A case that cannot be predicted; the message is the reason."""


@dataclass(frozen=True)
class Measured:
    """One measured speed.

    Attributes:
        depth: Tokens in the context, at the middle of what was measured.
        tps: Tokens per second.
        n_tokens: Tokens of a ubatch; 1 for decoding.
    """

    depth: float
    tps: float
    n_tokens: int = 1


@dataclass(frozen=True)
class Case:
    """A published measurement and all that predicts it.

    Attributes:
        id: As in the file.
        thread: Where it was published; measurements of one thread are left out together.
        rig: The hardware in the words of the source.
        model: Name of the model.
        quant: What the source calls the quant.
        where: Whether GPUs, the CPU or both do the work.
        runtime: Which program was measured.
        traffic: What a token needs where.
        machine: The hardware.
        workload: Ubatch and cache types.
        op_offload: Whether weights in RAM are streamed to a GPU for prompts.
        decode: Measured decode speeds by depth; the first is the one that is stated.
        prefill: Measured prefill speeds by depth.
        doubt: Why the measurement is not to be fitted; empty where it is.
    """

    id: str
    thread: str
    rig: str
    model: str
    quant: str
    where: Where
    runtime: Runtime
    traffic: Traffic
    machine: Machine
    workload: Workload
    op_offload: bool
    decode: tuple[Measured, ...]
    prefill: tuple[Measured, ...]
    doubt: str


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the speed cases of a JSON-lines file, gzipped or not."""
    raw = path.read_bytes()
    text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    rows = [json.loads(line) for line in text.decode().splitlines() if line.strip()]
    return [row for row in rows if row.get("kind", "speed") == "speed"]


def read_cases(rows: Iterable[dict[str, Any]]) -> tuple[list[Case], list[tuple[str, str]]]:
    """Turns rows into cases.

    Returns:
        The cases, and (id, reason) of every row that cannot be used.
    """
    cases, unusable = [], []
    for row in rows:
        try:
            cases.append(read_case(row))
        except UnusableError as error:
            unusable.append((str(row.get("id")), str(error)))
        except (QuantplanError, ValueError, KeyError, TypeError) as error:
            unusable.append((str(row.get("id")), f"{type(error).__name__}: {error}"[:160]))
    return cases, unusable


def read_case(row: dict[str, Any]) -> Case:
    """Turns one row into a case.

    Raises:
        UnusableError: The model, quant, placement or hardware is not known well enough.
    """
    inventory = model_named(str(row.get("model")))
    if inventory is None:
        raise UnusableError(f"unknown model {row.get('model')!r}")
    words = {
        key: str(row.get(key) or "") for key in ("engine", "flags", "placement", "note", "quant")
    }
    hardware = row.get("hardware") or {}
    runtime: Runtime = "ik_llama.cpp" if "ik_llama" in words["engine"] else "llama.cpp"
    n_step = (row.get("pp") or {}).get("n") if row.get("sweep") else None
    launch = launch_of(inventory, words, bool(hardware.get("gpus")), n_step)
    machine = machine_of(
        hardware,
        needs_ram=launch.n_gpu_layers is not None or bool(launch.overrides),
        n_threads=max(map(int, _THREADS.findall(words["flags"])), default=None),
    )
    if isinstance(machine, str):
        raise UnusableError(machine)
    decode, prefill = _measured(row, launch.workload)
    if not decode and not prefill:
        raise UnusableError("no speed is given")
    traffic = _traffic(inventory, row, words, machine, launch)
    return Case(
        id=str(row.get("id")),
        thread=thread_of(str(row.get("source"))),
        rig=f"{hardware.get('gpus')} | {hardware.get('cpu')}",
        model=inventory.name,
        quant=words["quant"],
        where=traffic.where,
        runtime=runtime,
        traffic=traffic,
        machine=machine,
        workload=launch.workload,
        op_offload=launch.op_offload and _streams(inventory, words, runtime, launch.workload),
        decode=decode,
        prefill=prefill,
        doubt=_doubt(row, words),
    )


def thread_of(source: str) -> str:
    """The thread or page that a case is from."""
    issue = re.match(r"([\w.-]+/[\w.-]+)#(\d+)", source)
    return issue[0] if issue else source.split(" ", maxsplit=1)[0]


def _doubt(row: dict[str, Any], words: dict[str, str]) -> str:
    note = words["note"].lower()
    for word in ("paging", "outlier", "poor pp"):
        if word in note:
            return word
    return "low confidence" if row.get("confidence") == "low" else ""


def launch_of(
    inventory: Inventory, words: dict[str, str], has_gpus: bool, n_step: int | None
) -> Launch:
    """What the flags, or the words about the placement, say.

    Args:
        inventory: The model.
        words: The row's texts.
        has_gpus: Whether the machine has any.
        n_step: Prompt tokens per step of a sweep, which is one ubatch.
    """
    flags, said = words["flags"], words["placement"]
    overrides = list(_overrides(flags)) or list(_overrides(said)) or list(_said_overrides(said))
    layers = re.search(r"(?:-ngl|--n-gpu-layers|--gpu-layers)[ =]+(\d+)", flags)
    n_gpu_layers = int(layers[1]) if layers else None
    lower = said.lower()
    whole = re.search(r"(\d+) whole layers", lower)
    if whole:
        n_gpu_layers = int(whole[1])
    elif not has_gpus or "cpu only" in lower or re.search(r"offloaded 0/", lower):
        n_gpu_layers, overrides = 0, []
    elif (not overrides and not (lower.startswith("all on") or layers or "offloaded" in lower)) or (
        not overrides and re.search(r"not stated|expert|hybrid", lower)
    ):
        raise UnusableError(f"the placement is not known: {said!r}")
    if n_gpu_layers is not None and n_gpu_layers >= inventory.architecture.n_loaded_layers:
        n_gpu_layers = None
    shares = re.search(r"(?:-ts|--tensor-split)[ =]+([\d.,/]+)", flags)
    return Launch(
        n_gpu_layers=n_gpu_layers,
        overrides=tuple(overrides),
        tensor_split=tuple(float(x) for x in re.split(r"[,/]", shares[1]) if x) if shares else (),
        op_offload="no-op-offload" not in flags and " -op " not in f" {flags} {said}",
        workload=_workload(words, n_step),
    )


def _overrides(text: str) -> Iterator[Override]:
    for match in re.finditer(
        r"(?:-ot|--override-tensor)[ =]+(?:\"([^\"]*)\"|'([^']*)'|(\S+))|"
        r"(?:-ncmoe|--n-cpu-moe)[ =]+(\d+)|(-cmoe\b|--cpu-moe)",
        text,
    ):
        if match[4]:
            for layer in range(int(match[4])):
                yield Override(pattern=rf"blk\.{layer}{_EXPERTS}", buffer_type="CPU")
        elif match[5]:
            yield Override(pattern=_EXPERTS, buffer_type="CPU")
        else:
            rules = (match[1] or match[2] or match[3]).split(",")
            trailing = text[match.end() :] if text.startswith("-ot") else ""
            more = re.match(r"((?: ; \S+=\S+)+)", trailing)
            rules += more[1].split(" ; ")[1:] if more else []
            for rule in rules:
                pattern, equals, target = rule.rpartition("=")
                if equals and re.fullmatch(r"[A-Za-z]\w*", target):
                    yield Override(pattern=pattern, buffer_type=target)


def _said_overrides(said: str) -> Iterator[Override]:
    """Overrides from words such as ``ffn of layers 34-47 on CPU``."""
    lower = said.lower()
    on_gpu = re.search(r"layers? (\d+)-(\d+)[^,;]* on gpu", lower)
    span = re.search(r"layers? (\d+)-(\d+)(?: [^,;]*)? on cpu", lower)
    count = re.search(r"(\d+) layers of experts on cpu", lower)
    if count:
        for layer in range(int(count[1])):
            yield Override(pattern=rf"blk\.{layer}{_EXPERTS}", buffer_type="CPU")
    elif span:
        for layer in range(int(span[1]), int(span[2]) + 1):
            yield Override(pattern=rf"blk\.{layer}\.ffn_", buffer_type="CPU")
    elif re.search(r"exp(ert)?s?\b[^,;]*(on |= ?)cpu|experts on cpu", lower):
        if on_gpu:
            for layer in range(int(on_gpu[1]), int(on_gpu[2]) + 1):
                yield Override(pattern=rf"blk\.{layer}\.ffn_", buffer_type="CUDA0")
        yield Override(pattern=_EXPERTS, buffer_type="CPU")


def _workload(words: dict[str, str], n_step: int | None) -> Workload:
    flags = f"{words['flags']} {words['placement']}"
    kv = {kind: name.lower() for kind, name in _KV.findall(flags)}
    stated = re.search(r"\b(bf16|f16|q8_0|q4_0) kv", f"{words['note']} {flags}".lower())
    if stated:
        kv = {"k": stated[1], "v": stated[1]}
    ubatch = re.search(r"(?:-ub|--ubatch-size)[ =]+(\d+)", flags)
    n_ubatch = int(ubatch[1]) if ubatch else n_step or 512
    return Workload(
        context=2**20,
        batch=max(2048, n_ubatch),
        ubatch=n_ubatch,
        kv_type_k=kv.get("k", "f16"),
        # With multi-head latent attention, and without flash attention, there is no V of a type.
        kv_type_v=kv.get("v", "f16"),
        swa_full="swa-full" in words["engine"] + flags,
    )


def _streams(inventory: Inventory, words: dict[str, str], runtime: str, workload: Workload) -> bool:
    """Whether the program streams weights in RAM to a GPU for this ubatch.

    ik_llama.cpp waits for 32 tokens per expert, never streams what it repacked itself, and files of
    repacked types, as published runs show, only from about 128 tokens per expert.
    """
    if runtime == "llama.cpp":
        return True
    arch = inventory.architecture
    if "-rtr" in words["flags"] + words["placement"]:
        return False
    is_repacked = re.search(r"_R\d", words["quant"].upper())
    return workload.ubatch * arch.active_share >= (128 if is_repacked else 32)


def _traffic(
    inventory: Inventory, row: dict[str, Any], words: dict[str, str], machine: Machine,
    launch: Launch,
) -> Traffic:  # fmt: skip
    counts = row.get("tensor_types")
    types = types_from_counts(inventory, counts) if counts else None
    types = types or types_from_name(inventory, words["quant"])
    types = types or types_from_name(inventory, _file_name(words["flags"]))
    if types is None:
        raise UnusableError(f"the quant is not known: {words['quant']!r}")
    placement = place(inventory, machine, launch)
    assignment = {name: (types[name], homes[0]) for name, homes in placement.tensors.items()}
    traffic = collect(inventory, assignment, placement.layers, placement.output)
    if row.get("file_size_gib"):
        factors = size_factor(inventory, types, float(row["file_size_gib"]) * _GIB)
        if not 1 / _MAX_SIZE_MISMATCH < factors[0] < _MAX_SIZE_MISMATCH:
            raise UnusableError(
                f"{row['file_size_gib']} GiB does not fit {inventory.name} as {words['quant']!r}"
            )
        traffic = _scaled(traffic, *factors)
    held = sum(r.held_bytes for n, rs in traffic.reads.items() if n != "CPU" for r in rs)
    capacity = sum(gpu.capacity_bytes for gpu in machine.gpus)
    if held > 1.05 * capacity:
        raise UnusableError(
            f"{held / _GIB:.0f} GiB of weights do not fit {capacity / _GIB:.0f} GiB of GPU memory"
        )
    return traffic


def _file_name(flags: str) -> str:
    """Name of the model's file in a command line."""
    match = re.search(r"(?:-m|--model)[ =]+(\S+)", flags)
    return match[1].rpartition("/")[2] if match else ""


def _scaled(traffic: Traffic, experts: float, rest: float) -> Traffic:
    """The traffic of a file whose size shows that its types have more or fewer bytes."""

    def scaled(read: Read) -> Read:
        factor = experts if read.is_expert else rest
        return replace(read, n_bytes=read.n_bytes * factor, held_bytes=read.held_bytes * factor)

    reads = {name: tuple(map(scaled, found)) for name, found in traffic.reads.items()}
    return replace(traffic, reads=reads)


def _measured(
    row: dict[str, Any], workload: Workload
) -> tuple[tuple[Measured, ...], tuple[Measured, ...]]:
    """Decode and prefill speeds: the stated ones first, then some of the sweep's."""
    pp, tg = row.get("pp") or {}, row.get("tg") or {}
    n_prompt, n_answer = pp.get("n") or 0, tg.get("n") or 0
    n_tokens = min(n_prompt or workload.ubatch, workload.ubatch)
    before = max(0, (n_prompt - n_tokens) / 2)
    decode, prefill = [], []
    if tg.get("tps"):
        decode.append(Measured((tg.get("depth") or 0) + n_answer / 2, float(tg["tps"])))
    if pp.get("tps"):
        prefill.append(Measured((pp.get("depth") or 0) + before, float(pp["tps"]), n_tokens))
    sweep = [point for point in row.get("sweep") or [] if point[0] is not None]
    last = len(sweep) - 1
    picked = (
        sorted({round(last * i / (_CURVE_POINTS - 1)) for i in range(1, _CURVE_POINTS)})
        if last > 0
        else []
    )
    for index in picked:
        depth, pp_tps, tg_tps = sweep[index][:3]
        if tg_tps:
            decode.append(Measured(depth + n_answer / 2, float(tg_tps)))
        if pp_tps:
            prefill.append(Measured(depth + before, float(pp_tps), n_tokens))
    return tuple(decode), tuple(prefill)
