"""Memory of given llama.cpp flags, without a plan."""

from pathlib import Path

import pytest

import quantplan as qp
from tests.support.buffers import BUILD, assert_buffers
from tests.support.llama_cpp import llama_server, needs_llama_cpp, rpc_server
from tests.support.models import smollm2_path, toy_moe

AIR = qp.read_inventory("GLM-4.5-Air")
GPU = "RTX 4090 + 512GiB@80GB/s"
TWO = "2x RTX 3090 + 512GiB@80GB/s"


@pytest.mark.parametrize("model", ["GLM-4.5-Air", "gemma-4-31B-it", "Qwen3.5-4B", "GLM-4.7-Flash"])
@pytest.mark.parametrize(
    "machine",
    [
        "24GiB + 64GiB@80GB/s",
        "12GiB + 24GiB@936GB/s + 96GiB@80GB/s",
        "6GiB@360GB/s + 128GiB@80GB/s",
        "128GiB@80GB/s",
    ],
)
def test_flags_of_a_plan_lead_to_the_bytes_of_the_plan(model: str, machine: str) -> None:
    """Reading the planned flags as llama.cpp does gives back the plan's own devices."""
    inventory, described = qp.read_inventory(model), qp.Machine.parse(machine)
    plan = qp.plan(inventory, described, qp.Workload(context=16384, kv_type="q8_0"))
    written = inventory.with_qtypes({a.tensor: a.qtype for a in plan.assignments})
    assert qp.predict(written, plan.flags, described).devices == plan.devices


@needs_llama_cpp
@pytest.mark.parametrize(
    ("flags", "n_gpus"),
    [
        ("-ngl 99 -c 1024 -np 1", 1),
        ("-ngl 0 -c 1024 -np 1", 1),
        ("-ngl 12 -c 700 -np 2 -ctk q8_0 -ctv q8_0 -fa on", 1),
        ("-ngl 99 -c 2048 -np 3 -kvu -ctk q5_1", 1),
        ("-c 2048", 1),
        ("-ngl 99 -c 1024 -np 1 -ot ffn=CPU", 1),
        (r"-ngl 99 -c 1024 -np 1 -ot blk\.[0-4]\.ffn_(up|down)=CPU,blk\.[0-9]\.ffn=CPU", 1),
        ("-ngl 99 -c 1024 -np 1 -ot token_embd=CPU", 1),
        ("-ngl 99 -c 1024 -np 1 -ts 3,1", 2),
        ("-ngl 25 -c 1024 -np 1 -ts 1,2 -ot ffn_up=CPU", 2),
        ("-ngl 99 -c 1024 -np 1 -ts 0,1", 2),
    ],
)
def test_dense_model_takes_what_was_predicted(flags: str, n_gpus: int) -> None:
    """SmolLM2 as published takes the predicted bytes of weights and KV cache on every device."""
    path = smollm2_path()
    assert path is not None
    check(path, flags, n_gpus)


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ["glm4moe", "qwen3moe"])
@pytest.mark.parametrize(
    ("flags", "n_gpus"),
    [
        ("-ngl 99 --cpu-moe -c 1024 -np 1", 1),
        ("-ngl 99 -ncmoe 2 -c 1024 -np 1", 1),
        ("-ngl 3 -ncmoe 4 -c 1024 -np 1", 1),
        ("-ngl 99 -ot shexp=CPU,exps=CPU -c 1024 -np 1 -ts 1,1", 2),
        ("-ngl 99 -ot output=CPU -c 1024 -np 1", 1),
    ],
)
def test_experts_take_what_was_predicted(
    tmp_path: Path, architecture: str, flags: str, n_gpus: int
) -> None:
    """A mixture of experts takes the predicted bytes, whichever flags move its experts."""
    check(toy_moe(tmp_path / "toy.gguf", architecture), flags, n_gpus)


def check(path: Path, flags: str, n_gpus: int) -> None:
    gpus = "24GiB + " * n_gpus
    machine = qp.Machine.parse(f"{gpus}64GiB@80GB/s")
    predicted = qp.predict(qp.read_inventory(path), flags, machine, llama_cpp_build=BUILD)
    with rpc_server() as first, rpc_server() as second:
        endpoints = [first, second][:n_gpus]
        arguments = [*flags.split(), "-lm", "none", "--fit", "off"]
        with llama_server(path, arguments, endpoints) as server:
            assert_buffers(predicted.devices, server.buffers, endpoints)


def test_a_rule_that_matches_nothing_is_pointed_out() -> None:
    """A pattern without a match comes with similar tensor names."""
    found = qp.predict(AIR, "-ot ffn_dwon_exps=CPU", qp.Machine.parse(GPU))
    assert len(found.warnings) == 1
    assert "matches no tensor" in found.warnings[0]
    assert "ffn_down_exps" in found.warnings[0]


def test_a_rule_that_matches_too_much_is_pointed_out() -> None:
    """`output` also matches every `attn_output`; the anchored pattern does not."""
    loose = qp.predict(AIR, "-ot output=CPU", qp.Machine.parse(GPU))
    assert "46 tensors such as blk.0.attn_output.weight" in loose.warnings[0]
    tight = qp.predict(AIR, [*["-ot"], r"^output\.weight$=CPU"], qp.Machine.parse(GPU))
    assert tight.warnings == ()


def test_a_rule_that_comes_too_late_is_pointed_out() -> None:
    """The first match wins, so a rule whose matches are all taken is named."""
    found = qp.predict(AIR, "--cpu-moe -ot ffn_up_exps=CUDA0", qp.Machine.parse(GPU))
    assert "has no effect" in found.warnings[0]


def test_fitting_means_within_the_margin() -> None:
    """GLM-4.5-Air in BF16 does not fit a 24 GB card whole, but does with its experts in RAM."""
    machine = qp.Machine.parse(GPU)
    assert not qp.predict(AIR, "-ngl 99 -c 4096", machine).fits
    assert qp.predict(AIR, "-ngl 99 -c 4096 --cpu-moe", machine).fits


def test_without_slots_the_server_takes_four() -> None:
    """llama-server's defaults are four slots over one cache, and the trained context."""
    machine = qp.Machine.parse(GPU)
    default = qp.predict(AIR, "--cpu-moe --fit off", machine)
    explicit = qp.predict(AIR, "--cpu-moe --fit off -np 4 -kvu -c 131072 -ngl all", machine)
    assert default.devices == explicit.devices


def test_flags_that_are_not_modelled_are_named() -> None:
    """A person learns which flags played no part."""
    found = qp.predict(AIR, "--cpu-moe --jinja -mm v.gguf --fit on", qp.Machine.parse(GPU))
    text = " ".join(found.notes)
    assert all(flag in text for flag in ("--jinja", "--mmproj", "--fit"))


@pytest.mark.parametrize(
    ("flags", "machine", "says"),
    [
        ("-ngl many", GPU, "-ngl 'many'"),
        ("-ts 1,2,3", TWO, "3 proportions for 2 GPUs"),
        ("-ts 1,x", TWO, "proportions such as"),
        ("-ts 0,0", TWO, "no proportion above 0"),
        ("-ot exps", GPU, "pattern=buffer"),
        ("-ot (=CPU", GPU, "no regular expression"),
        ("-ot exps=CUDA3", TWO, "not among the 2 GPUs"),
        ("-ot exps=CPU2", GPU, "unknown buffer type"),
        ("-sm none -mg 2", TWO, "there are 2 GPUs"),
        ("-ctv q8_0 -fa off", GPU, "needs flash attention"),
        ("-ctk q9_0", GPU, "kv_type_k"),
        ("-c many", GPU, "-c"),
        ("-ot " + ",".join(f"a{i}=CPU" for i in range(4096)), GPU, "4096 overrides"),
    ],
)
def test_impossible_flags_are_refused(flags: str, machine: str, says: str) -> None:
    """Flags that llama.cpp refuses, or that the machine cannot follow, are named."""
    with pytest.raises(qp.InputError, match="(?s)" + says.replace("(", r"\(")):
        qp.predict(AIR, flags, qp.Machine.parse(machine))
