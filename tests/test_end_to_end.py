"""Plan, quantize, serve: the real llama.cpp does exactly what the plan says."""

from pathlib import Path

import pytest

import quantplan as qp
from tests.support.buffers import BUILD, assert_buffers
from tests.support.llama_cpp import llama_server, needs_llama_cpp, rpc_server
from tests.support.models import Architecture, toy_moe

pytestmark = needs_llama_cpp


def serve(plan: qp.Plan, source: Path, n_servers: int = 1) -> str:
    """Quantizes, starts llama-server with exactly the plan's flags, and asks for a completion."""
    target = source.with_name(f"{source.stem}-planned.gguf")
    qp.quantize(plan.recipe, source, target)
    with rpc_server() as first, rpc_server() as second:
        endpoints = [first, second][:n_servers]
        with llama_server(target, plan.flags, endpoints) as server:
            answer = server.complete("The capital of France is", 8)
            assert "offloaded" in server.log
            assert_buffers(plan.devices, server.buffers, endpoints)
    return answer


@pytest.mark.parametrize(
    ("machine", "kv_type", "context"),
    [
        ("24GiB + 4GiB@20GB/s", "f16", 2048),  # everything on the GPU
        ("110MiB@300GB/s + 120MiB@20GB/s", "q8_0", 1000),  # feed-forward matrices in RAM
        ("60MiB@300GB/s + 200MiB@20GB/s", "q8_0", 512),  # whole layers in RAM
    ],
)
def test_dense_model_loads_as_planned_and_answers(
    smollm2: Path, machine: str, kv_type: str, context: int
) -> None:
    """SmolLM2 takes exactly the planned bytes on RPC device and CPU, and still knows Paris."""
    work = qp.Workload(context=context, kv_type=kv_type, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(smollm2), qp.Machine.parse(machine), work)
    assert "Paris" in serve(plan, smollm2)


@pytest.mark.parametrize("architecture", ["glm4moe", "qwen3moe"])
def test_experts_in_ram_load_as_planned(tmp_path: Path, architecture: Architecture) -> None:
    """A mixture-of-experts model with experts on both sides takes exactly the planned bytes."""
    source = toy_moe(tmp_path / "toy.gguf", architecture)
    inventory = qp.read_inventory(source)
    work = qp.Workload(context=1024, kv_type="q8_0", ubatch=32, llama_cpp_build=BUILD)
    budgets = {"glm4moe": "9MiB@300GB/s + 8MiB@20GB/s", "qwen3moe": "7MiB@300GB/s + 6MiB@20GB/s"}
    plan = qp.plan(inventory, qp.Machine.parse(budgets[architecture]), work)
    experts = {a.device for a in plan.assignments if "_exps" in a.tensor}
    assert {"GPU0", "CPU"} <= experts
    serve(plan, source)


def test_two_gpus_hold_contiguous_layers_as_planned(smollm2: Path) -> None:
    """With two RPC devices every layer's weights and KV cache are where the plan put them."""
    work = qp.Workload(context=1024, slots=2, llama_cpp_build=BUILD)
    machine = qp.Machine.parse("60MiB@300GB/s + 100MiB@300GB/s + 200MiB@20GB/s")
    plan = qp.plan(qp.read_inventory(smollm2), machine, work)
    assert {d.name for d in plan.devices if d.weights_bytes} == {"GPU0", "GPU1", "CPU"}
    assert "Paris" in serve(plan, smollm2, n_servers=2)


@pytest.mark.parametrize(("first", "second", "layers"), [(8, 3, "4,1"), (7, 4, "5,0")])
def test_experts_on_another_gpu_than_their_layer_load_as_planned(
    tmp_path: Path, first: int, second: int, layers: str
) -> None:
    """Experts that the plan puts on the second GPU, away from their layers, are there, whether it
    has layers of its own or none.
    """
    source = toy_moe(tmp_path / "toy.gguf", "qwen3moe")
    work = qp.Workload(context=1024, kv_type="q8_0", ubatch=32, llama_cpp_build=BUILD)
    machine = qp.Machine.parse(f"{first}MiB@300GB/s + {second}MiB@30GB/s + 5MiB@0.2GB/s")
    plan = qp.plan(qp.read_inventory(source), machine, work)
    assert plan.flags[plan.flags.index("-ts") + 1] == layers
    overrides = plan.flags[plan.flags.index("-ot") + 1]
    assert "=CUDA1" in overrides
    assert "=CPU" in overrides
    serve(plan, source, n_servers=2)


def test_machine_without_gpu_loads_as_planned(smollm2: Path) -> None:
    """On the CPU alone the model takes exactly the planned bytes of RAM."""
    work = qp.Workload(context=1024, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(smollm2), qp.Machine.parse("300MiB@20GB/s"), work)
    assert plan.flags[:2] == ("-ngl", "0")
    assert "Paris" in serve(plan, smollm2, n_servers=0)
