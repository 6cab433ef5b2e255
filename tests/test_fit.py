"""`--fit` as it is followed here, against the real llama.cpp."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

import quantplan as qp
from quantplan.planner.fit import fit
from quantplan.planner.plain import PlainCosts, TypedModel
from quantplan.runtime.process import free_port, isolated_environment, running
from quantplan.runtime.sparse import write_sparse
from tests.support.llama_cpp import needs_llama_cpp, packaged_folder, portable_cpu, rpc_server

_MARGIN_BYTES = 2**30
_LIMIT_S = 120.0
_NAMES = {"UP": "(gate|gate_up|down).*", "GATE": "down.*", "ATTN": "(up|gate|gate_up|down).*"}
_FREE = re.compile(r"([0-9]+) MiB of free device memory")
_SET = re.compile(r"set ngl_per_device\[(\d)\]\.(.*)")
WORK = qp.Workload(context=8192, kv_type="q8_0", llama_cpp_build=10434)
FLAGS = ["-c", "8192", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on", "-np", "1", "--no-warmup"]


def fit_log(model: Path, addresses: Sequence[str], margins_mib: Sequence[int]) -> str:
    """What llama-server says while it fits; it is ended before it loads anything."""
    command = [str(packaged_folder() / "llama-server"), "-m", str(model), "-lv", "5", *FLAGS]
    command += ["--rpc", ",".join(addresses), "--port", str(free_port())]
    command += ["-fitt", ",".join(map(str, margins_mib))]
    folder = model.parent / f"run{margins_mib[0]}"
    folder.mkdir()
    environment = isolated_environment(folder) | portable_cpu(folder)
    with running(command, environment) as process:
        process.wait_until(lambda: "fitting params to free memory took" in process.log, _LIMIT_S)
        return process.log


def last_settings(log: str) -> dict[int, tuple[int, int, str]]:
    """Layers, layers without their experts, and what the first of these keeps, by device."""
    found: dict[int, tuple[int, int, str]] = {}
    for device, text in _SET.findall(log):
        layers, part, kept = found.get(int(device), (0, 0, "MOE"))
        if match := re.match(r"n_layer=(\d+)", text):
            layers = int(match[1])
        elif match := re.match(r"\(n_layer, n_part\)=\((\d+), (\d+)\)", text):
            layers, part, kept = int(match[1]), int(match[2]), "MOE"
        elif match := re.match(r"\(n_layer, n_part, overflow_type\)=\((\d+), (\d+), (\w+)\)", text):
            layers, part, kept = int(match[1]), int(match[2]), match[3]
        found[int(device)] = (layers, part, kept)
    return found


@needs_llama_cpp
@pytest.mark.parametrize(
    ("model", "gpus_gib"),
    [("GLM-4.5-Air", [23]), ("Qwen3-32B", [12]), ("Qwen3-30B-A3B", [4, 6])],
)
def test_fit_comes_to_what_llama_cpp_says(model: str, gpus_gib: list[int], tmp_path: Path) -> None:
    """The layers of each device, and the part of the last one, are those that llama.cpp chooses.

    Devices are RPC servers, to which nothing is streamed from RAM; `-fitt` takes all but the size
    of a GPU from their memory.
    """
    inventory = qp.read_inventory(model)
    inventory = inventory.with_qtypes(qp.stock_mix(inventory, "Q4_K_M"))
    path = write_sparse(inventory, tmp_path / "model.gguf")
    with ExitStack() as stack:
        addresses = [stack.enter_context(rpc_server()) for _ in gpus_gib]
        free = _FREE.search(fit_log(path, addresses, [1] * len(gpus_gib)))
        assert free is not None
        each_mib = int(free[1]) // len(gpus_gib)
        log = fit_log(path, addresses, [each_mib - 1024 * gib for gib in gpus_gib])
    described = " + ".join(f"{gib + 1}GiB@900GB/s" for gib in gpus_gib)
    machine = qp.Machine.parse(f"{described} + 512GiB@80GB/s", margin_bytes=_MARGIN_BYTES)
    costs = PlainCosts(inventory, machine, WORK, plans_with_high_end=False, op_offload=False)
    flags = " ".join(fit(TypedModel(costs, {})).flags)
    said = last_settings(log)
    counts = [said[d][0] for d in range(len(gpus_gib))]
    assert flags.startswith(f"-ngl {sum(counts)}")
    assert len(gpus_gib) == 1 or f"-ts {','.join(map(str, counts))}" in flags
    n_named = sum(part for _, part, _ in said.values())
    named = re.findall(r"blk\\\.\(([\d|]+)\)", flags)
    assert sum(len(layers.split("|")) for layers in named) == n_named
    for _, _, kept in said.values():
        assert kept == "MOE" or f"ffn_{_NAMES[kept]}=" in flags
