"""Memory of given llama.cpp flags, without a plan."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import quantplan as qp
from quantplan.formats.llama_args import parse_flags
from quantplan.runtime.find import known_options
from tests.support.buffers import BUILD, assert_buffers
from tests.support.llama_cpp import (
    llama_server,
    needs_llama_cpp,
    older_folder,
    packaged_folder,
    rpc_server,
)
from tests.support.models import Architecture, smollm2_path, toy_moe

AIR = qp.read_inventory("GLM-4.5-Air")
GPU = "RTX 4090 + 512GiB@80GB/s"
TWO = "2x RTX 3090 + 512GiB@80GB/s"


@needs_llama_cpp
@pytest.mark.parametrize("flag", ["-kvu", "-no-kvu"])
def test_slots_that_llama_server_chooses_share_their_cells(flag: str) -> None:
    """Without -np the cache has no parts, whatever is said of them."""
    path = smollm2_path()
    assert path is not None
    flags = ["-ngl", "0", "-c", "1024", "--fit", "off", flag]
    predicted = qp.predict(qp.read_inventory(path), flags, qp.Machine.parse("64GiB@80GB/s"))
    with llama_server(path, flags) as server:
        assert round(predicted.devices[-1].kv_bytes / 2**20, 2) == sum(server.buffers.kv.values())


@needs_llama_cpp
def test_every_spelling_that_llama_server_takes_counts() -> None:
    """Long names with `_` in place of `-`, and each word that switches attention on, are read."""
    path = smollm2_path()
    assert path is not None
    flags = ["--n_gpu_layers", "0", "--ctx_size", "512", "--parallel", "1", "-fa", "enabled"]
    flags += ["--cache_type_k", "q8_0", "--fit", "off"]
    predicted = qp.predict(qp.read_inventory(path), flags, qp.Machine.parse("64GiB@80GB/s"))
    with llama_server(path, flags) as server:
        assert round(predicted.devices[-1].kv_bytes / 2**20, 2) == sum(server.buffers.kv.values())
    assert (predicted.warnings, predicted.notes) == ((), ())


@pytest.mark.parametrize("flag", ["--ctx-size=4096", "-ngl=5", "-np 0"])
def test_what_llama_server_refuses_is_refused(flag: str) -> None:
    """A value behind `=` and no slots are errors, not another configuration."""
    with pytest.raises(qp.InputError, match=flag):
        qp.predict(AIR, flag, qp.Machine.parse(GPU))


def test_a_rule_places_both_copies_of_a_tied_embedding() -> None:
    """Where an architecture always copies its tied embedding, a rule moves the copy along."""
    for name, n_copies in (("gemma-4-31B-it", 2), ("gemma-3-27b-it", 1)):
        model = qp.read_inventory(name)
        flags = ["-ngl", "99", "-ot", "token_embd=CPU", "-c", "1024"]
        ram = qp.predict(model, flags, qp.Machine.parse(GPU)).devices[-1]
        assert ram.weights_bytes == n_copies * model.by_name["token_embd.weight"].n_bytes


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


@pytest.mark.parametrize("qtype", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("machine", ["128GiB@80GB/s", "24GiB + 64GiB@80GB/s"])
def test_a_tied_embedding_is_counted_alike(machine: str, qtype: str) -> None:
    """Plan, its flags and its devices lead to the same bytes, whether the embedding is copied."""
    inventory, described = qp.read_inventory("Qwen3.5-4B"), qp.Machine.parse(machine)
    rules = qp.policy("quality").pin(r"^token_embd\.weight$", qtype)
    plan = qp.plan(inventory, described, qp.Workload(context=4096), policy=rules)
    written = inventory.with_qtypes({a.tensor: a.qtype for a in plan.assignments})
    assert qp.predict(written, plan.flags, described).devices == plan.devices
    homes = qp.predict(inventory, plan.assignments, described, plan.workload).devices
    assert [u.weights_bytes for u in homes] == [u.weights_bytes for u in plan.devices]


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
    tmp_path: Path, architecture: Architecture, flags: str, n_gpus: int
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


@pytest.mark.parametrize(
    ("flags", "machine", "says"),
    [
        ("-sm none -ts 1,2", TWO, "-ts 1,2 has no effect with -sm none"),
        ("-cmoe -ncmoe 4", GPU, "--n-cpu-moe has no effect beside --cpu-moe"),
        ("-ncmoe 4 -cmoe", GPU, "--n-cpu-moe has no effect beside --cpu-moe"),
        ("-ub 4096", GPU, "-ub 4096 is larger than -b 2048"),
        (
            "-ngl 0 -ot exps=CUDA0",
            GPU,
            "KV caches are in RAM although -ot puts 135 tensors on a GPU",
        ),
        ("-ot exps=CPU -ncmoe 4", GPU, "-ncmoe 4 has no effect"),
        ("-ncffn 1 -ot ffn=CPU -ncmoe 1", GPU, "-ncmoe 1 matches no tensor"),
        ("--no-mmap", GPU, "refuses --no-mmap: write -lm none"),
        ("-ctkk q8_0", GPU, "-ctkk is not known, and not counted; did you mean -ctk?"),
        ("--ncpu-moe 9", GPU, "did you mean --n-cpu-moe?"),
    ],
)
def test_contradictions_are_pointed_out(flags: str, machine: str, says: str) -> None:
    """Flags that llama.cpp takes but that do not do what they seem to say come with a warning."""
    found = qp.predict(AIR, f"{flags} -c 4096 --fit off", qp.Machine.parse(machine))
    assert any(says in warning for warning in found.warnings), found.warnings


@needs_llama_cpp
@pytest.mark.parametrize("folder", [packaged_folder, older_folder])
def test_no_flag_of_llama_cpp_is_taken_for_a_slip(folder: Callable[[], Path | None]) -> None:
    """Whatever flag a llama.cpp has, no other one is suggested in its place."""
    found = folder()
    if found is None:
        pytest.skip("no older llama.cpp is installed")
    flags = sorted(known_options(found / "llama-server"))
    assert len(flags) > 300
    for flag in flags:
        with suppress(qp.InputError):  # it wants a value, so it is known
            assert "did you mean" not in " ".join(parse_flags([flag], AIR).warnings)


def test_a_sound_command_has_no_warnings() -> None:
    """Nothing is pointed out where the flags agree with each other."""
    flags = "-ngl 99 -sm layer -ts 1,2 -ncmoe 4 -c 4096 -b 4096 -ub 4096 -fa on "
    flags += "-ctk q8_0 -ctv q8_0 -lm none"
    mixed = AIR.with_qtypes(qp.stock_mix(AIR, "Q4_K_M"))
    found = qp.predict(mixed, f"{flags} --fit off", qp.Machine.parse(TWO))
    assert (found.warnings, found.notes) == ((), ())


def test_a_model_that_is_not_quantized_is_told_to_be_so() -> None:
    """A prediction of a catalog model, which is larger than any file people run, says why."""
    (note,) = qp.predict(AIR, "--cpu-moe --fit off", qp.Machine.parse(GPU)).notes
    assert note.startswith("this is the unquantized model, in BF16")


@needs_llama_cpp
@pytest.mark.parametrize("n_layers", [0, 1, 99])
def test_a_device_of_another_host_computes_what_it_holds(n_layers: int) -> None:
    """Nothing is copied to it from RAM: without layers its buffer is the output's, or none."""
    path = smollm2_path()
    assert path is not None
    flags = ["-ngl", f"{n_layers}", "-c", "1000", "-np", "3", "-kvu", "-ub", "64", "--fit", "off"]
    with rpc_server() as endpoint:
        machine = qp.Machine.parse(f"RPC {endpoint} 8GiB@20GB/s@10Gbit/s,0.1ms + 8GiB@20GB/s")
        found = qp.predict(qp.read_inventory(path), ["--rpc", endpoint, *flags], machine)
        with llama_server(path, flags, [endpoint]) as server:
            on_host = sum(n for name, n in server.buffers.compute.items() if "RPC" not in name)
            measured = (sum(server.buffers.compute.values()) - on_host) * 2**20
    gpu = found.devices[0]
    assert gpu.compute_low_bytes <= measured <= gpu.compute_high_bytes


@needs_llama_cpp
@pytest.mark.parametrize("flag", ["--embedding", "--reranking"])
def test_embeddings_have_logits_of_every_token(flag: str) -> None:
    """A server that embeds reserves logits of a whole ubatch, not of one token per slot."""
    path = smollm2_path()
    assert path is not None
    flags = ["-ngl", "99", "-c", "2048", "--fit", "off", flag]
    with rpc_server() as endpoint:
        machine = qp.Machine.parse(f"RPC {endpoint} 8GiB@20GB/s@10Gbit/s,0.1ms + 64GiB@20GB/s")
        found = qp.predict(qp.read_inventory(path), ["--rpc", endpoint, *flags], machine)
        with llama_server(path, flags, [endpoint]) as server:
            measured = max(server.buffers.compute.values()) * 2**20
    gpu = found.devices[0]
    assert gpu.compute_low_bytes <= measured <= gpu.compute_high_bytes
    assert gpu.compute_bytes == pytest.approx(measured, rel=0.1)
    assert found.notes == ()


def test_a_context_beyond_the_trained_one_is_noted() -> None:
    """Only where a slot has more context than the model was trained for there is a note of it, as
    llama-server leaves the rest empty: shares of a longer one are no more than that each.
    """
    notes = {
        flags: [n for n in qp.predict(AIR, flags, qp.Machine.parse(GPU)).notes if "trained" in n]
        for flags in ("-c 200000", "-c 200000 -np 2", "-c 200000 -np 2 -kvu")
    }
    assert notes["-c 200000 -np 2"] == []
    (note,) = notes["-c 200000"]
    assert "200000 tokens in a slot is longer than the 131072" in note
    assert notes["-c 200000 -np 2 -kvu"] == [note]


def test_earlier_prompts_are_told_where_they_may_fill_the_ram() -> None:
    """llama-server keeps up to 8 GiB of them in RAM; where less is left than it is allowed, a note
    says what to allow, of a plan too.
    """
    notes = {
        (capacity, flag, build): [
            note
            for note in qp.predict(
                AIR,
                f"--cpu-moe -c 4096 --fit off {flag}",
                qp.Machine.parse(f"RTX 4090 + {capacity}GiB@80GB/s"),
                llama_cpp_build=build,
            ).notes
            if "-cram" in note
        ]
        for capacity, flag, build in (
            (195, "", 11434), (512, "", 11434), (195, "-cram 0", 11434), (512, "-cram -1", 11434),
            (195, "", 6000), (150, "", 11434),
        )
    }  # fmt: skip
    assert [bool(found) for found in notes.values()] == [True, False, False, True, False, False]
    ((note,), *_) = notes.values()
    assert "up to 8.00 GiB" in note
    limit = int(note.rsplit("-cram ", 1)[1].split()[0])
    assert 0 < limit < 8192
    machine = qp.Machine.parse("RTX 4090 + 64GiB@80GB/s")
    tight = qp.plan(AIR, machine, min_decode_tps=10, baselines=False)
    assert any("-cram" in note for note in tight.notes)


def test_caches_stay_in_ram_when_told_so() -> None:
    """`-nkvo` keeps the caches of layers that are on a GPU in RAM."""
    flags = "-ngl 99 -c 4096 -np 1 --fit off"
    on_gpu, in_ram = (
        [use.kv_bytes for use in qp.predict(AIR, f"{flags} {x}", qp.Machine.parse(GPU)).devices]
        for x in ("", "-nkvo")
    )
    assert in_ram == [0, on_gpu[0]]


def test_caches_in_ram_are_read_there() -> None:
    """With `-nkvo` attention is the CPU's, at the rate of RAM, where layers are on a GPU too."""
    flags, machine = "-ngl 99 --cpu-moe -c 65536 -np 1 --fit off", qp.Machine.parse(GPU)
    on_gpu, in_ram = (
        1 / qp.predict(AIR, f"{flags} {x}", machine).speed.decode_tps(65536).expected
        for x in ("", "-nkvo")
    )
    caches = qp.predict(AIR, f"{flags} -nkvo", machine).devices[1].kv_bytes
    assert in_ram - on_gpu > caches / machine.ram.bandwidth_bytes_per_s


def test_slots_with_caches_of_their_own_share_the_context_out() -> None:
    """No slot gets deeper than its part of the context, and speed is predicted down to there."""
    flags, machine = "-ngl 99 --cpu-moe -c 131072 -np 8 --fit off", qp.Machine.parse(GPU)
    for shared, deepest in (("-kvu", 131072), ("-no-kvu", 16384)):
        speed = qp.predict(AIR, f"{flags} {shared}", machine).speed
        assert speed.points[-1].depth == deepest


def test_one_gpu_of_several_does_all_of_a_gpus_work() -> None:
    """With `-sm none` the main GPU, whichever it is, has every buffer, and others have nothing."""
    flags, machine = "-ngl 99 --cpu-moe -c 32768 --fit off -sm none", qp.Machine.parse(TWO)
    first, second = (qp.predict(AIR, f"{flags} -mg {n}", machine).devices for n in (0, 1))
    assert first[0].compute_bytes == second[1].compute_bytes
    assert first[1].compute_bytes == second[0].compute_bytes == 0


@pytest.mark.parametrize("machine", ["24GiB + 64GiB@80GB/s", "128GiB@80GB/s"])
def test_every_form_of_a_plan_takes_the_bytes_of_the_plan(machine: str) -> None:
    """A plan, its recipe, its assignments and the same as a mapping are one configuration."""
    inventory, described = qp.read_inventory("gemma-4-31B-it"), qp.Machine.parse(machine)
    work = qp.Workload(context=8192, kv_type="q8_0", slots=2)
    plan = qp.plan(inventory, described, work)
    mapping = {a.tensor: (a.qtype, a.device) for a in plan.assignments}
    assert qp.predict(inventory, plan, described).devices == plan.devices
    assert qp.predict(inventory, plan.recipe, described).devices == plan.devices
    assert qp.predict(inventory, plan.assignments, described, work).devices == plan.devices
    assert qp.predict(inventory, mapping, described, work).devices == plan.devices


def test_faults_of_an_assignment_are_gathered() -> None:
    """Unknown tensors, devices and types are all named, with what comes near."""
    machine = qp.Machine.parse(GPU)
    homes: dict[str, tuple[str, str | None]] = {t.name: (t.qtype, "GPU0") for t in AIR.tensors}
    wrong_names = homes | {
        "blk.0.ffn_dwon.weight": ("F16", "GPU0"),
        "output.weight": ("Q4K", "CPU"),
    }
    with pytest.raises(qp.InputError) as names:
        qp.predict(AIR, wrong_names, machine)
    assert len(names.value.faults) == 2
    assert all(word in str(names.value) for word in ("blk.0.ffn_down.weight", "Q4_K"))
    wrong_places = homes | {"output.weight": ("F16", "GPU7")}
    del wrong_places["blk.0.attn_q.weight"]
    with pytest.raises(qp.InputError) as places:
        qp.predict(AIR, wrong_places, machine)
    assert len(places.value.faults) == 2
    assert all(word in str(places.value) for word in ("GPU7", "1 tensors have no device"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workload": qp.Workload()}, "flags state the workload already"),
        ({"engine": "vllm"}, "unknown engine 'vllm': use llama.cpp or ik_llama.cpp"),
    ],
)
def test_options_that_do_not_go_with_flags_are_refused(options: Any, says: str) -> None:
    """A workload beside flags, or an engine that nobody knows, is refused."""
    with pytest.raises(qp.InputError, match=says):
        qp.predict(AIR, "-c 4096", qp.Machine.parse(GPU), **options)


def test_older_builds_kept_values_of_latent_attention() -> None:
    """Before its V cache was dropped, DeepSeek-V3 took 34 MiB per layer at 16384 cells.

    llama.cpp printed it in https://github.com/ikawrakow/ik_llama.cpp/pull/394.
    """
    inventory = qp.read_inventory("DeepSeek-V3.1-Terminus")
    flags = "-c 16384 -np 1 -fa on -ngl 99 --cpu-moe --fit off"
    machine = qp.Machine.parse(GPU)
    older, newer = (
        qp.predict(inventory, flags, machine, llama_cpp_build=build).devices[0].kv_bytes / 2**20
        for build in (5300, 11434)
    )
    assert (older, newer) == (61 * 34, 61 * 18)


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
    flags = "--cpu-moe --jinja -mm v.gguf --fit on --lora a.gguf -dev CUDA0 -sm row --swa-full"
    found = qp.predict(AIR, flags, qp.Machine.parse(GPU))
    text = " ".join(found.notes)
    assert all(flag in text for flag in ("--jinja", "--mmproj", "--fit", "-sm row", "--swa-full"))
    assert all(f"{flag} has an influence" in text for flag in ("--lora a.gguf", "-dev CUDA0"))


def test_a_build_outside_the_checked_range_is_told() -> None:
    """A prediction for a build that nobody looked at says so; one for a known build does not."""
    machine = qp.Machine.parse(GPU)
    said = {
        build: [n for n in qp.predict(AIR, "-fit off", machine, llama_cpp_build=build).notes
                if n.startswith("llama.cpp b")]
        for build in (7000, 10434, 11434, 11435)
    }  # fmt: skip
    assert "older than b10434, the oldest that was checked" in said[7000][0]
    assert said[10434] == said[11434] == []
    assert "newer than b11434" in said[11435][0]


@pytest.mark.parametrize("name", ["CUDA", "ROCm", "SYCL", "MTL", "Vulkan"])
def test_every_builds_names_of_gpus_are_understood(name: str) -> None:
    """-ot may call GPUs as any build does, whatever the machine's GPUs are."""
    machine = qp.Machine.parse("2x RX 7900 XTX + 256GiB@80GB/s")
    flags = "-ngl 99 -ts 1,0 -ot exps={}1"
    wanted = qp.predict(AIR, flags.format("GPU"), machine)
    assert wanted.devices[1].weights_bytes > 0
    assert qp.predict(AIR, flags.format(name), machine).devices == wanted.devices


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
        ("-sm graph", TWO, "invalid choice: 'graph'"),
        ("-sm none -mg -1", TWO, "there are 2 GPUs"),
        ("-c 0 -np -1 -ctvd q8_0 -fa off", GPU, "needs flash attention"),
        ("-fa maybe", GPU, "'maybe' is not on, off or auto"),
        ("-ctk q8_0 -ctv q6_0", GPU, "no KV type q6_0"),
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


@pytest.mark.parametrize(
    ("types", "machine", "says"),
    [
        ("-ctk q5_1 -ctv q5_1", "RTX 4090 + 512GiB@80GB/s", "unless built with"),
        ("-ctk q8_0 -ctv q4_0", "24GiB@900GB/s + 512GiB@80GB/s", "unless built with"),
        ("-ctk iq4_nl -ctv iq4_nl", "RX 7900 XTX + 512GiB@80GB/s", "no kernel for that, and then"),
        ("-ctk q8_0 -ctv q8_0", "RTX 4090 + 512GiB@80GB/s", None),
        ("-ctk q5_1 -ctv q5_1", "512GiB@80GB/s", None),
        ("-ctk q5_1 -ctv q5_1 -nkvo", "RTX 4090 + 512GiB@80GB/s", None),
    ],
)
def test_caches_without_kernels_on_gpus_are_told(
    types: str, machine: str, says: str | None
) -> None:
    """CUDA and ROCm builds attend on the CPU to caches of types that they have no kernel for."""
    described = qp.Machine.parse(machine)
    flags = f"-ngl 99 --cpu-moe -c 4096 -np 1 --fit off {types}"
    found = [n for n in qp.predict(AIR, flags, described).notes if n.startswith("KV cache in")]
    assert bool(found) == (says is not None)
    assert all((says or "") in note for note in found)
