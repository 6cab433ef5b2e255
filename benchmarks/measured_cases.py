"""Reads published load logs: which model, which flags, which buffers were printed.

A case is one line of JSON with the fields of the file that the validating benchmarks are given:
``model``, ``engine``, ``flags`` (what the log printed), ``cmd`` (the command line, as posted) and
the buffers in MiB by the name that the log gives them.
"""

import datetime
import gzip
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantplan.errors import InputError, QuantplanError
from quantplan.formats.llama_args import parse_flags
from quantplan.hardware.device import Device
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_named
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.placement import Launch
from quantplan.qtypes import Runtime
from quantplan.workload import Workload

MIB = 2**20
_GPU = re.compile(r"(?:CUDA|Vulkan|ROCm|SYCL|Metal)(\d+)\b")
_KV_TYPE = re.compile(r"(K|V|c\^KV|kv\^T) \((\w+)\)")
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
_SHELL_NUMBER = re.compile(r"\$\(\((\d+)\)\)")
_SHELL_END = {"|", "2>&1", "&&", ";", ">"}
# Logs of mainline llama.cpp before 2026 come from builds around this one.
_BUILD_OF_2025 = 5400
_PLENTY_BYTES = 2**50


@dataclass(frozen=True)
class Case:
    """One published load log.

    Attributes:
        row: The case as it was given.
        inventory: The model; its types are not those of the file.
        launch: Flags, with what the log printed taken before what the command says.
        has_command: Whether the flags include those of the command line.
        machine: GPUs as the log counts them.
    """

    row: Mapping[str, Any]
    inventory: Inventory
    launch: Launch
    has_command: bool
    machine: Machine

    @property
    def has_free_memory(self) -> bool:
        """Whether the log printed the free memory of its GPUs, which shares the layers out."""
        return bool(self.row.get("vram_free_before_mib"))

    def bytes_by_device(self, field: str) -> dict[str, int]:
        """A field in MiB per buffer, as bytes per device of the machine."""
        found: dict[str, int] = {}
        for name, mib in (self.row.get(field) or {}).items():
            if not isinstance(mib, int | float):
                continue
            device = device_of(name)
            found[device] = found.get(device, 0) + round(mib * MIB)
        return found


def device_of(buffer: str) -> str:
    """The device that a buffer of a log is on: ``GPU0``, ... or ``CPU``."""
    match = _GPU.match(buffer)
    return f"GPU{match[1]}" if match else "CPU"


def read_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """The cases of one kind (``memory`` or ``speed``) in a file, gzipped or not."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [row for row in rows if row.get("kind") == kind]


def read_cases(path: Path) -> Iterator[Case | tuple[Mapping[str, Any], str]]:
    """Yields every memory case, or the row with the reason why it cannot be used."""
    for row in read_rows(path, "memory"):
        try:
            yield _case(row)
        except QuantplanError as error:
            yield row, str(error).splitlines()[0]
        except (KeyError, TypeError, ValueError) as error:
            yield row, f"the row is damaged: {error!r}"


def _case(row: Mapping[str, Any]) -> Case:
    inventory = _inventory(row)
    engine: Runtime = "ik_llama.cpp" if "ik_llama" in str(row.get("engine")) else "llama.cpp"
    date = posted(row)
    machine = _machine(row)
    build = NEWEST_KNOWN_BUILD if date.year >= 2026 else _BUILD_OF_2025
    launch, has_command = Launch(workload=Workload()), False
    arguments = _arguments(row.get("cmd") or "")
    for attempt in (arguments, []):
        try:
            launch = parse_flags(
                attempt, inventory, engine=engine, engine_date=date, llama_cpp_build=build
            )
            has_command = bool(attempt)
            break
        except (InputError, QuantplanError):
            continue
    return Case(row, inventory, _as_printed(launch, row), has_command, machine)


def _inventory(row: Mapping[str, Any]) -> Inventory:
    """The model in the layout that the log counts the tensors of, or in the usual one."""
    n_tensors = sum((row.get("tensor_types") or {}).values()) or None
    name = str(row.get("model"))
    try:
        return read_named(name, n_tensors)
    except QuantplanError:
        return read_named(name)


def posted(row: Mapping[str, Any]) -> datetime.date:
    """The day on which a log was posted; the newest if it does not say."""
    found = _DATE.findall(str(row.get("source") or ""))
    return datetime.date(*map(int, found[-1])) if found else datetime.date.max


def _arguments(command: str) -> list[str]:
    """The flags of a posted command line, as far as it can be read."""
    text = _SHELL_NUMBER.sub(r"\1", command.replace("\\\n", " ").replace("`", " "))
    try:
        # Backslashes belong to patterns and to Windows' paths.
        lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
        tokens = list(lexer)
    except ValueError:
        return []
    begin = next((i for i, token in enumerate(tokens) if token.startswith("-")), len(tokens))
    end = next((i for i, t in enumerate(tokens) if i > begin and t in _SHELL_END), len(tokens))
    return tokens[begin:end]


def _as_printed(launch: Launch, row: Mapping[str, Any]) -> Launch:
    """The launch with the values that the log printed."""
    printed = {k: v for k, v in (row.get("flags") or {}).items() if v is not None}
    types = dict(_KV_TYPE.findall(row.get("kv_desc") or ""))
    k_type = types.get("K") or types.get("c^KV")
    v_type = types.get("V") or types.get("kv^T")
    values = {name: getattr(launch.workload, name) for name in Workload.model_fields}
    values |= {
        "context": printed.get("n_ctx", values["context"]),
        "batch": max(printed.get("n_batch", 0), printed.get("n_ubatch", values["ubatch"])),
        "ubatch": printed.get("n_ubatch", values["ubatch"]),
        "kv_type_k": k_type or values["kv_type_k"],
        "kv_type_v": v_type or (k_type if k_type else values["kv_type_v"]),
    }
    if "flash_attn" in printed:
        values["flash_attention"] = str(printed["flash_attn"]) not in ("0", "off", "false")
    update: dict[str, Any] = {"workload": Workload(**values)}
    if re.fullmatch(r"\d+/\d+", str(printed.get("offloaded", ""))):
        update["n_gpu_layers"] = int(printed["offloaded"].split("/")[0])
    if launch.ik is not None:
        ik = {
            "mla": printed.get("mla", launch.ik.mla),
            "attention_max_mib": printed.get("amb", launch.ik.attention_max_mib),
            "fused_experts": bool(printed.get("fmoe", launch.ik.fused_experts)),
        }
        update["ik"] = launch.ik.model_copy(update=ik)
    return launch.model_copy(update=update)


def _machine(row: Mapping[str, Any]) -> Machine:
    """GPUs as many as the log names, of the memory that is known of them."""
    buffers = ("model_buffers_mib", "kv_buffers_mib", "compute_buffers_mib")
    names = {device_of(name) for field in buffers for name in row.get(field) or {}}
    n_gpus = 1 + max((int(name[3:]) for name in names if name != "CPU"), default=-1)
    free = row.get("vram_free_before_mib") or {}
    models = str((row.get("hardware") or {}).get("gpus") or "").split(",")
    gpus = [
        Device.gpu(index, _capacity(index, free, models), 1e12, margin_bytes=0)
        for index in range(n_gpus)
    ]
    return Machine(gpus=tuple(gpus), ram=Device.ram(_PLENTY_BYTES, 1e11, margin_bytes=0))


def _capacity(index: int, free: Mapping[str, int], models: list[str]) -> int:
    if f"CUDA{index}" in free:
        return free[f"CUDA{index}"] * MIB
    try:
        return Machine.parse(f"{models[index].strip()} + 1TiB@1GB/s").gpus[0].capacity_bytes
    except (QuantplanError, IndexError):
        return _PLENTY_BYTES
