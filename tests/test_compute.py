"""Compute buffers: estimates with intervals, against what the real llama.cpp lays out."""

import json
from collections.abc import Iterator
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import Device, Inventory, Machine, Workload, predict
from quantplan import read_inventory as read
from quantplan.costs.compute import BytesEstimate, Work, estimate
from quantplan.placement import Launch
from quantplan.predict import MemoryPrediction
from quantplan.runtime.find import find_llama_cpp
from quantplan.runtime.memory import measure_memory
from tests.support.buffers import BUILD
from tests.support.llama_cpp import needs_llama_cpp, rpc_server

MIB = 2**20
untimed = settings(max_examples=60, deadline=None)
DATA = json.loads(files("quantplan.costs").joinpath("data/compute.json").read_text())
MODELS = {
    name: read(name)
    for name in (
        "GLM-4.5-Air",
        "DeepSeek-V3.1-Terminus",
        "GLM-5.1",
        "Qwen3-4B-Instruct-2507",
        "Qwen3.5-35B-A3B",
        "gemma-4-31B-it",
    )
}
AIR = MODELS["GLM-4.5-Air"]

# What the graphs are like: works and workloads at random.
INVENTORIES = st.sampled_from(list(MODELS.values()))
WORKS = st.builds(
    Work,
    device_kind=st.sampled_from(["gpu", "cpu"]),
    has_layers=st.booleans(),
    has_experts=st.booleans(),
    has_output=st.booleans(),
    streamed_bytes=st.sampled_from([0, 300 * MIB]),
    n_input_copies=st.sampled_from([1, 4]),
    is_first=st.booleans(),
    streams=st.booleans(),
)
WORKLOADS = st.builds(
    Workload,
    context=st.integers(1, 200_000),
    slots=st.integers(1, 8),
    ubatch=st.integers(1, 2048),
    flash_attention=st.booleans(),
    llama_cpp_build=st.sampled_from([5300, BUILD, 11434]),
)


def buffer(inventory: Inventory, workload: Workload, work: Work) -> BytesEstimate:
    """The estimate for llama.cpp."""
    return estimate(inventory.architecture, inventory.n_vocab, Launch(workload=workload), work)


@untimed
@given(INVENTORIES, WORKLOADS, WORKS)
def test_estimates_are_ordered(inventory: Inventory, workload: Workload, work: Work) -> None:
    """The best guess lies between the ends of its interval, whatever is computed on what."""
    found = buffer(inventory, workload, work)
    assert 0 <= found.low <= found.expected <= found.high


@untimed
@given(INVENTORIES, WORKLOADS, WORKS, st.integers(1, 2048))
def test_a_larger_ubatch_needs_no_smaller_buffer(
    inventory: Inventory, workload: Workload, work: Work, other: int
) -> None:
    """No end of an estimate shrinks when the ubatch grows."""
    small, large = (
        buffer(inventory, workload.model_copy(update={"ubatch": ubatch}), work)
        for ubatch in sorted((workload.ubatch, other))
    )
    assert small.low <= large.low
    assert small.expected <= large.expected
    assert small.high <= large.high


# The flags are none of those that the factors were fitted to.
LAID_OUT = [
    ("Qwen3-4B-Instruct-2507", "-ngl 99 -c 24576 -ub 384 -np 1 -fa on", 1),
    ("Qwen3-32B", "-ngl 99 -c 12288 -ub 768 -np 2 -kvu -fa on", 1),
    ("GLM-4.5-Air", "-ngl 99 --cpu-moe -c 24576 -ub 384 -np 1 -fa on", 1),
    ("GLM-4.5-Air", "-ngl 99 --n-cpu-moe 10 -c 40960 -ub 1536 -np 1 -fa on -ts 1,1", 2),
    ("DeepSeek-V3.1-Terminus", "-ngl 99 --cpu-moe -c 24576 -ub 384 -np 1 -fa on", 1),
    ("gemma-4-31B-it", "-ngl 99 -c 24576 -ub 384 -np 1 -fa on", 1),
    ("Qwen3.5-9B", "-ngl 99 -c 24576 -ub 384 -np 1 -fa on", 1),
    ("Qwen3.5-35B-A3B", "-ngl 99 --cpu-moe -c 24576 -ub 768 -np 3 -fa on", 1),
    ("gpt-oss-120b", "-ngl 99 --cpu-moe -c 24576 -ub 384 -np 1 -fa on", 1),
    ("Qwen3-32B", "-ngl 20 -c 24576 -ub 384 -np 1 -fa off", 1),
]


@pytest.fixture(scope="module")
def rpc() -> Iterator[tuple[str, str]]:
    """Two devices which llama.cpp takes for GPUs."""
    with rpc_server() as first, rpc_server() as second:
        yield first, second


def laid_out(inventory: Inventory, flags: str, endpoints: tuple[str, ...]) -> list[int]:
    """Compute buffers of the GPUs and the host, as llama.cpp lays them out."""
    measured = measure_memory(
        find_llama_cpp(), inventory, ["--rpc", ",".join(endpoints), *flags.split()]
    )
    return [device.compute_bytes for device in measured.devices]


def predicted(inventory: Inventory, flags: str, n_gpus: int) -> MemoryPrediction:
    """The same, predicted; an RPC device does not take weights from RAM for large batches."""
    gpus = tuple(Device.gpu(index, 2**42, 1e12) for index in range(n_gpus))
    machine = Machine(gpus=gpus, ram=Device.ram(2**42, 1e11))
    return predict(inventory, f"{flags} --no-op-offload", machine, llama_cpp_build=BUILD)


@needs_llama_cpp
def test_llama_cpp_lays_out_what_was_estimated(rpc: tuple[str, str]) -> None:
    """For at least 8 of 10 models and flags that played no part in the fit, the buffers of all
    devices are within their intervals.
    """
    missed = []
    for model, flags, n_gpus in LAID_OUT:
        inventory = read(model)
        uses = predicted(inventory, flags, n_gpus).devices
        buffers = laid_out(inventory, flags, rpc[:n_gpus])
        assert len(buffers) == len(uses)
        pairs = zip(uses, buffers, strict=True)
        if not all(u.compute_low_bytes <= n <= u.compute_high_bytes for u, n in pairs):
            missed.append((model, flags, buffers))
    assert len(missed) <= 2, missed


@needs_llama_cpp
def test_a_gpu_with_the_output_alone_needs_little(rpc: tuple[str, str]) -> None:
    """The last GPU, left without layers, holds no more than logits and rows to make them from."""
    flags = "-ngl 99 -ts 47,1 -c 16384 -np 1 -ub 512 -fa on --cpu-moe"
    _, last, _ = predicted(AIR, flags, 2).devices
    assert last.kv_bytes == 0
    assert laid_out(AIR, flags, rpc)[1] <= last.compute_high_bytes < 64 * MIB


def test_a_gpu_with_experts_alone_needs_their_rows() -> None:
    """A further GPU that holds experts and no layer needs no attention mask."""
    machine = Machine.parse("2x RTX 3090 + 512GiB@80GB/s")
    flags = r"-ngl 99 -ts 1,0 -np 1 -ot blk\.1\.ffn_.*_exps=CUDA1,exps=CPU --fit off"
    short, long = (predict(AIR, f"{flags} -c {c}", machine).devices for c in (4096, 131072))
    assert 0 < short[1].compute_bytes == long[1].compute_bytes
    assert short[0].compute_bytes < long[0].compute_bytes


def test_the_first_gpu_streams() -> None:
    """Large batches copy experts from RAM to the first GPU alone, whole tensors at a time."""
    machine = Machine.parse("2x RTX 3090 + 512GiB@80GB/s")
    flags = "-ngl 99 -ts 1,1 --cpu-moe -c 8192 -np 1 --fit off"
    streaming = predict(AIR, flags, machine).devices
    staying = predict(AIR, f"{flags} --no-op-offload", machine).devices
    experts = AIR.by_name["blk.1.ffn_up_exps.weight"].n_bytes
    assert streaming[0].compute_low_bytes >= experts > staying[0].compute_high_bytes
    assert streaming[1] == staying[1]
    # Fewer than 32 tokens are computed where the weights are.
    small = predict(AIR, f"{flags} -ub 31", machine).devices
    assert small[0].compute_high_bytes < experts


def test_inputs_are_copied_for_a_pipeline_alone() -> None:
    """GPUs that hold every tensor of the layers keep four masks, however the model is given."""
    machine = Machine.parse("2x RTX 3090 + 512GiB@80GB/s")
    flags = "-ngl 99 -ts 1,1 -c 131072 -np 1 --fit off"
    model = MODELS["Qwen3-4B-Instruct-2507"]
    pipeline = predict(model, flags, machine)
    broken = predict(model, f"{flags} -ot blk.0.ffn_up=CPU --no-op-offload", machine)
    assert pipeline.devices[1].compute_bytes > 2 * broken.devices[1].compute_bytes
    work = Workload(context=131072)
    n_layers = model.architecture.n_layers
    homes: dict[str, tuple[str, str | None]] = {
        t.name: (t.qtype, "CPU" if t.role == "token_embd" else _half(t.layer, n_layers))
        for t in model.tensors
    }
    assert predict(model, homes, machine, work).devices == pipeline.devices
    moved = homes | {"blk.0.ffn_up.weight": ("F16", "CPU")}
    less = predict(model, moved, machine, work).devices[1]
    assert less.compute_bytes == broken.devices[1].compute_bytes


def _half(layer: int | None, n_layers: int) -> str:
    return "GPU0" if layer is not None and layer < (n_layers + 1) / 2 else "GPU1"


def test_the_high_end_decides_what_fits() -> None:
    """A model fits where weights, caches, margin and the high end of the buffer do, to a byte."""
    flags = "-ngl 99 --cpu-moe -c 32768 -np 1 --fit off"
    ram = Device.ram(2**42, 1e11)

    def on(capacity: int) -> MemoryPrediction:
        gpu = Device.gpu(0, capacity, 1e12, margin_bytes=1000)
        return predict(AIR, flags, Machine(gpus=(gpu,), ram=ram))

    use = on(2**40).devices[0]
    assert use.compute_bytes < use.compute_high_bytes
    held = use.weights_bytes + use.padding_bytes + use.kv_bytes
    needed = held + use.compute_high_bytes + 1000
    assert (on(needed).fits, on(needed - 1).fits) == (True, False)


def test_the_factors_say_where_they_come_from() -> None:
    """The data file names its script, date and data, and every fit its count and errors."""
    provenance = DATA["provenance"]
    assert provenance["script"] == "scripts/fit_compute.py"
    assert provenance["date"] >= "2026-11-23"
    assert provenance["data_sha256"]
    assert all(len(digest) == 64 for digest in provenance["data_sha256"].values())
    for fits in DATA["fits"].values():
        for fit in fits.values():
            assert {"n", "median_error", "p90_error"} <= set(fit)
            low, high = fit["interval"]
            assert 0 < low <= 1 <= high
            assert all(factor >= 0 for row in fit["factors"] for factor in row.values())
