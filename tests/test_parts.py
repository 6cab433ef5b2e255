"""What is in memory beside the model: draft contexts, draft models, projectors, the mapped file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import quantplan as qp
from quantplan.costs.memory import weight_bytes
from quantplan.inventory import Inventory, Tensor
from tests.support.architectures import (
    ARCHITECTURES,
    VOCABULARY,
    expand,
    metadata_of,
    write_model,
    write_toy,
)
from tests.support.buffers import BUILD, assert_buffers
from tests.support.llama_cpp import llama_server, needs_llama_cpp, rpc_server
from tests.support.models import smollm2_path, toy_moe
from tests.support.quantizer import recipe_for

AIR = qp.read_inventory("GLM-4.5-Air")
GPU = qp.Machine.parse("RTX 4090 + 512GiB@80GB/s")
NO_GPU = qp.Machine.parse("64GiB@80GB/s")
DRAFTS = "--spec-type draft-mtp"


def as_it_is() -> qp.Policy:
    """A policy that quantizes nothing."""
    return qp.policy("quality").model_copy(update={"candidates": ("SOURCE",)})


def check(path: Path, flags: Sequence[str]) -> None:
    """Predicted devices equal what llama.cpp printed for one GPU, all models and contexts."""
    machine = qp.Machine.parse("24GiB + 64GiB@80GB/s")
    flags = [*flags, "-lm", "none", "--fit", "off"]
    predicted = qp.predict(qp.read_inventory(path), flags, machine, llama_cpp_build=BUILD)
    with rpc_server() as endpoint, llama_server(path, flags, [endpoint]) as server:
        assert_buffers(predicted.devices, server.buffers, [endpoint], n_lines=3)


@needs_llama_cpp
@pytest.mark.parametrize(
    "flags",
    [
        f"-ngl 99 -c 1024 -np 1 {DRAFTS}",
        f"-ngl 3 -c 1024 -np 2 {DRAFTS} -ctkd q8_0 -ctvd q8_0 -fa on",
    ],
)
def test_draft_context_caches_every_layer_where_it_did(tmp_path: Path, flags: str) -> None:
    """b10434 makes a second cache of all layers for glm4moe, and leaves the weights out."""
    check(toy_moe(tmp_path / "toy.gguf"), flags.split())


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ["deepseek2", "glm-dsa", "hy_v3", "step35"])
def test_draft_context_caches_its_own_layers(tmp_path: Path, architecture: str) -> None:
    """The draft context has a cache for the blocks that predict, and these are loaded."""
    path = write_toy(architecture, tmp_path / "toy.gguf", "prediction")
    check(path, f"-ngl 3 -c 512 -np 1 {DRAFTS}".split())


@needs_llama_cpp
@pytest.mark.parametrize("flags", ["-ngl 3 -np 1", "-ngl 99 -np 2 --spec-draft-n-max 5"])
def test_recurrent_layers_keep_a_state_for_each_drafted_token(tmp_path: Path, flags: str) -> None:
    """A hybrid model can step back over what was drafted, by default three tokens."""
    tensors = expand(ARCHITECTURES["qwen35"]["variants"]["prediction"]["tensors"])
    attending = {n.replace("blk.3.", "blk.8."): ne for n, ne in tensors.items() if "blk.3." in n}
    settings = metadata_of("qwen35", "prediction")
    path = write_model(tmp_path / "toy.gguf", settings, attending | tensors, VOCABULARY)
    check(path, f"{flags} -c 512 {DRAFTS}".split())


def test_newer_builds_load_the_block_and_cache_it_once() -> None:
    """From b11434 on multi-token prediction costs the last block's weights and one cached layer."""
    flags = "-ngl 99 --cpu-moe -c 8192 -np 1 --fit off"
    without, drafting = (qp.predict(AIR, f"{flags} {x}", GPU) for x in ("", DRAFTS))
    block = [t for t in AIR.tensors if t.layer == 46]
    added = sum(d.weights_bytes for d in drafting.devices) - sum(
        d.weights_bytes for d in without.devices
    )
    assert added == sum(weight_bytes(t, t.qtype) for t in block)
    assert drafting.devices[0].kv_bytes - without.devices[0].kv_bytes == 8192 * 2 * 8 * 128 * 2


@needs_llama_cpp
@pytest.mark.parametrize(
    "flags",
    [
        "-ngl 99 -c 1024 -np 2 -ngld 5 -ctkd q8_0",
        "-ngl 12 -c 1024 -np 1 -ngld 99 -otd ffn=CPU -nkvo",
    ],
)
def test_draft_model_is_on_the_same_devices(flags: str) -> None:
    """A draft model adds its weights and its cache, by its own flags."""
    path = smollm2_path()
    assert path is not None
    check(path, [*flags.split(), "-md", str(path)])


@needs_llama_cpp
@pytest.mark.parametrize("flags", ["-ngl 99 -ot ffn_up=CPU", "-ngl 12", "-ngl 99"])
def test_mapped_file_reaches_from_the_first_to_the_last_tensor(flags: str) -> None:
    """With a mapped file llama.cpp prints its length between the tensors in RAM."""
    path = smollm2_path()
    assert path is not None
    machine = qp.Machine.parse("24GiB + 64GiB@80GB/s")
    arguments = f"{flags} -c 512 -np 1 --fit off".split()
    ram = qp.predict(qp.read_inventory(path), arguments, machine).devices[-1]
    with rpc_server() as endpoint, llama_server(path, arguments, [endpoint]) as server:
        assert mib(ram.mapped_bytes) == server.buffers.model["CPU_Mapped"]


@needs_llama_cpp
def test_repacked_matrices_are_held_beside_the_mapped_file(tmp_path: Path) -> None:
    """Without a GPU the CPU copies Q4_0 and Q4_K matrices, the embedding and Q8_0 not."""
    source, path = toy_moe(tmp_path / "toy.gguf", "qwen3moe"), tmp_path / "out.gguf"
    types = {}
    for tensor in qp.read_inventory(source).tensors:
        if tensor.is_quantizable:
            types[tensor.name] = "Q8_0" if tensor.role == "attn_q" else "Q4_K"
            if tensor.role == "ffn_up_exps":
                types[tensor.name] = "Q4_0"
    qp.quantize(recipe_for(source, types), source, path)
    flags = ["-c", "512", "-np", "1", "--fit", "off"]
    found = qp.predict(qp.read_inventory(path), flags, NO_GPU)
    ram = found.devices[-1]
    with llama_server(path, flags) as server:
        printed = server.buffers
    assert mib(ram.repacked_bytes) == printed.model["CPU_REPACK"]
    assert mib(ram.mapped_bytes) == printed.model["CPU_Mapped"]
    assert "repacked" in " ".join(found.notes)
    read = qp.predict(qp.read_inventory(path), [*flags, "-lm", "none"], NO_GPU).devices[-1]
    assert (read.repacked_bytes, read.mapped_bytes) == (0, None)
    assert read.weights_bytes == ram.weights_bytes


@needs_llama_cpp
@pytest.mark.parametrize("qtype", ["Q4_0", "Q8_0"])
def test_a_tied_embedding_that_the_cpu_repacks_is_held_twice(qtype: str, tmp_path: Path) -> None:
    """Without a GPU the output matrix is a copy where the CPU has a layout for its type."""
    source, path = smollm2_path(), tmp_path / "out.gguf"
    assert source is not None
    plain = qp.read_inventory(source)
    types = {t.name: qtype for t in plain.tensors if t.is_quantizable}
    qp.quantize(recipe_for(source, types), source, path, allow_requantize=True)
    inventory = qp.read_inventory(path)
    made = qp.plan(inventory, NO_GPU, qp.Workload(context=512), policy=as_it_is())
    flags = ["-c", "512", "-np", "1", "--fit", "off", "-lm"]
    read, mapped = (
        qp.predict(inventory, [*flags, mode], NO_GPU).devices[-1] for mode in ("none", "mmap")
    )
    assert made.devices[-1].weights_bytes == read.weights_bytes == mapped.weights_bytes
    with llama_server(path, [*flags, "none"]) as server:
        assert mib(read.weights_bytes) == sum(server.buffers.model.values())
    with llama_server(path, [*flags, "mmap"]) as server:
        assert mib(mapped.mapped_bytes) == server.buffers.model["CPU_Mapped"]
        assert mib(mapped.repacked_bytes) == server.buffers.model.get("CPU_REPACK", 0)


def test_the_mapped_span_of_shards_is_not_known(tmp_path: Path) -> None:
    """Of a model in several files no span from the first to the last tensor is stated."""
    source = toy_moe(tmp_path / "toy.gguf", "qwen3moe")
    qp.quantize(recipe_for(source, {}), source, tmp_path / "out.gguf", split_max_bytes=4 << 20)
    first, *others = sorted(tmp_path.glob("out-*.gguf"))
    assert others
    flags = ["-c", "512", "-np", "1", "--fit", "off"]
    whole = qp.predict(qp.read_inventory(source), flags, NO_GPU).devices[-1]
    split = qp.predict(qp.read_inventory(first), flags, NO_GPU).devices[-1]
    assert whole.mapped_bytes
    assert split.mapped_bytes is None
    assert split.weights_bytes == whole.weights_bytes


def mib(n_bytes: int | None) -> Any:
    """What llama.cpp prints for so many bytes."""
    assert n_bytes is not None
    return pytest.approx(n_bytes / 2**20, abs=0.0051)


def projector() -> Inventory:
    return Inventory(
        name="projector",
        source="mmproj.gguf",
        header_sha256="0" * 64,
        metadata={"general.architecture": "clip"},
        array_lengths={},
        tensors=(Tensor(name="v.blk.0.attn_q.weight", shape_ne=(1024, 1024), qtype="F16"),),
    )


@pytest.mark.parametrize(("flags", "device"), [("", 0), ("--no-mmproj-offload", 1)])
def test_projector_is_on_the_first_gpu(flags: str, device: int) -> None:
    """A projector is whole on the first GPU, or in RAM where it is told so."""
    flags = f"{flags} --cpu-moe -c 4096 --fit off"
    without = qp.predict(AIR, flags, GPU).devices
    with_it = qp.predict(AIR, flags, GPU, projector=projector()).devices
    added = [a.weights_bytes - b.weights_bytes for a, b in zip(with_it, without, strict=True)]
    assert added == [2 * 2**20 * (i == device) for i in range(2)]


def test_files_that_are_not_here_are_named() -> None:
    """A draft model or projector that cannot be read is left out, and a note says so."""
    notes = qp.predict(AIR, "--cpu-moe -md draft.gguf -mm eye.gguf", GPU).notes
    assert any("-md is not counted: draft.gguf" in note for note in notes)
    assert any("--mmproj is not counted: eye.gguf" in note for note in notes)
