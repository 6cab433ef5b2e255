"""Whole plans: what they hold, what their flags lead to, and why there may be none."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from quantplan import (
    Device,
    InputError,
    Inventory,
    Machine,
    NoPlanError,
    Plan,
    Workload,
    catalog_names,
    plan,
    policy,
)
from quantplan import read_inventory as read
from quantplan.planner.goal import Goal
from quantplan.planner.problem import build_problem
from quantplan.planner.solve import solve_split
from quantplan.planner.split import split_layers
from tests.support.models import toy_inventory

ONE_GPU = "RTX 4090 + 768GiB@200GB/s"
TWO_GPUS = "2x RTX 3090 + 256GiB@200GB/s"
SEVERAL = [
    ("GLM-4.5-Air", TWO_GPUS),
    ("gemma-4-31B-it", TWO_GPUS),
    ("Qwen3.5-397B-A17B", TWO_GPUS),
    ("Qwen3-4B-Thinking-2507", TWO_GPUS),
    ("GLM-4.7-Flash", "12GiB + 24GiB@936GB/s + 8GiB + 64GiB@80GB/s"),
    ("GLM-4.6", "RTX 4090 + RTX 3090 + 384GiB@400GB/s"),
    ("Qwen3.5-27B", "4GiB@500GB/s + 64GiB@80GB/s"),
    ("GLM-4.5-Air", "4GiB@500GB/s + 128GiB@80GB/s"),
    ("Qwen3.5-9B", "32GiB@80GB/s"),
]
GAP = 1e-4
LIKE_THE_GAP = 2.5 * GAP
# With GPUs the search over the splits stops at 0.1 %.
LIKE_THE_SPLIT_GAP = 1.5e-3

_plans: dict[tuple[str, str], tuple[Inventory, Plan]] = {}


def made_for(model: str, machine: str) -> tuple[Inventory, Plan]:
    """The plan of a catalog model, made once."""
    if (model, machine) not in _plans:
        inventory = read(model)
        _plans[model, machine] = inventory, plan(inventory, Machine.parse(machine), gap=GAP)
    return _plans[model, machine]


PLANNED = [name for name in catalog_names() if not read(name).is_for_ik_only]
every_plan = pytest.mark.parametrize(
    ("model", "machine"), [*((name, ONE_GPU) for name in PLANNED), *SEVERAL]
)


@pytest.mark.parametrize(
    ("vendors", "name", "said"),
    [
        (("nvidia", None), "CUDA1", []),
        (("amd", "amd"), "ROCm1", ["built for ROCm .* write Vulkan in place of ROCm"]),
        (("nvidia", "amd"), "Vulkan1", ["several vendors: .* for a Vulkan build"]),
    ],
)
def test_a_plan_says_which_build_its_names_of_gpus_are_for(
    vendors: tuple[str, str], name: str, said: list[str]
) -> None:
    """Experts go to another GPU by its name in builds for the vendor; a note says which builds."""
    machine = Machine.parse("8GiB@960GB/s + 8GiB@288GB/s + 128GiB@80GB/s")
    gpus = (g.model_copy(update={"vendor": v}) for g, v in zip(machine.gpus, vendors, strict=True))
    made = plan(
        read("GLM-4.5-Air"), machine.model_copy(update={"gpus": tuple(gpus)}), gap=0.05,
        baselines=False,
    )  # fmt: skip
    assert f"={name}" in made.flags[made.flags.index("-ot") + 1]
    notes = [note for note in made.notes if "build" in note or "built" in note]
    assert len(notes) == len(said)
    assert all(re.search(text, note) for text, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (7000, ["older than b10434, .* may refuse -lm, --fit, -fa or .* quantplan run and verify"]),
        (10434, []),
        (11434, []),
        (99999, ["newer than b11434"]),
    ],
)
def test_a_build_that_was_not_checked_is_told(build: int, said: list[str]) -> None:
    """Outside the checked range a note says so, and which flags an older build may refuse."""
    work = Workload(context=1024, llama_cpp_build=build)
    made = plan(read("Qwen3.5-0.8B"), Machine.parse("64GiB@80GB/s"), work, baselines=False)
    notes = [note for note in made.notes if note.startswith("llama.cpp b")]
    assert len(notes) == len(said)
    assert all(re.search(text, note) for text, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("pinned", "said"),
    [
        ("Q4_K", []),
        ("IQ2_XXS", ["IQ2_XXS: to be written with an importance matrix"]),
        ("IQ3_S", ["IQ3_S is predicted for an importance matrix; .* is 1.5 times as large"]),
    ],
)
def test_types_that_want_an_importance_matrix_are_named(pinned: str, said: list[str]) -> None:
    """Some cannot be written without one, and what IQ3_S loses without one is told."""
    rules = policy("free").pin("ffn_up", pinned)
    model, machine = read("Qwen3.5-0.8B"), Machine.parse("64GiB@80GB/s")
    made = plan(model, machine, policy=rules, baselines=False)
    notes = [note for note in made.notes if "importance matrix" in note]
    assert len(notes) == len(said)
    assert all(re.match(text, note) for text, note in zip(said, notes, strict=True))


# What a plan holds.


@every_plan
def test_every_tensor_has_one_assignment(model: str, machine: str) -> None:
    """Every tensor of the model is assigned once, in file order, with its shape."""
    inventory, made = made_for(model, machine)
    expected = [(t.name, t.shape_ne) for t in inventory.tensors]
    assert [(a.tensor, a.shape_ne) for a in made.assignments] == expected


@every_plan
def test_only_what_is_not_loaded_has_no_device(model: str, machine: str) -> None:
    """Tensors are on a device of the machine, except those of blocks that are skipped."""
    inventory, made = made_for(model, machine)
    names = {device.name for device in made.devices}
    for assignment in made.assignments:
        is_loaded = inventory.is_loaded(inventory.by_name[assignment.tensor])
        assert (assignment.device in names) if is_loaded else (assignment.device is None)


@pytest.mark.parametrize("model", PLANNED)
def test_one_gpu_is_planned_to_a_thousandth(model: str) -> None:
    """For one GPU, every model of the catalog has a plan proven to be within 0.1 % of the best,
    wherever its layers are.
    """
    _, made = made_for(model, ONE_GPU)
    assert 0 <= made.gap <= 0.00101


@every_plan
def test_the_status_keeps_to_the_gap_asked_for(model: str, machine: str) -> None:
    """A plan that claims to be within the gap asked for is within it."""
    _, made = made_for(model, machine)
    if made.status == "within_gap":
        assert made.gap <= (LIKE_THE_SPLIT_GAP if len(made.devices) > 1 else LIKE_THE_GAP)
    if made.status == "optimal":
        assert made.gap == 0


@pytest.mark.parametrize("machine", [ONE_GPU, TWO_GPUS])
def test_a_plan_survives_json(machine: str) -> None:
    """A plan read back from its JSON is equal to it."""
    _, made = made_for("GLM-4.5-Air", machine)
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_json_has_the_promised_keys() -> None:
    """The JSON has the keys that are promised to scripts, with values of their kind."""
    _, made = made_for("GLM-4.5-Air", TWO_GPUS)
    data = json.loads(made.model_dump_json())
    promised = ["status", "gap", "devices", "predicted", "assignments", "flags", "provenance"]
    assert set(promised) <= set(data)
    amounts = ["capacity_bytes", "weights_bytes", "kv_bytes", "compute_bytes", "free_bytes"]
    assert [device["name"] for device in data["devices"]] == ["GPU0", "GPU1", "CPU"]
    assert all(type(device[key]) is int for device in data["devices"] for key in amounts)
    assert all(data["predicted"][key] > 0 for key in ("decode_tps", "prefill_tps", "loss_nats"))
    assert all({"tensor", "qtype", "device"} <= set(a) for a in data["assignments"])
    assert all(isinstance(flag, str) for flag in data["flags"])
    assert data["provenance"]["header_sha256"] == read("GLM-4.5-Air").header_sha256


def test_the_same_question_has_the_same_answer() -> None:
    """Two runs give the same plan, to the last digit."""
    inventory, made = made_for("GLM-4.5-Air", TWO_GPUS)
    assert plan(inventory, Machine.parse(TWO_GPUS), gap=GAP) == made


@every_plan
def test_the_summary_names_every_device_and_the_file(model: str, machine: str) -> None:
    """The summary has one line for each device, and the size of the file."""
    _, made = made_for(model, machine)
    text = made.summary()
    assert all(re.search(rf"^ +{d.name} +weights", text, re.MULTILINE) for d in made.devices)
    assert f"{made.predicted.bpw:.2f} bpw" in text


# What the flags lead to.


def value_of(flags: Sequence[str], flag: str) -> str | None:
    """The argument of a flag that may be there once."""
    found = [flags[i + 1] for i, name in enumerate(flags) if name == flag]
    assert len(found) <= 1
    return found[0] if found else None


def placed_by_llama_cpp(
    flags: Sequence[str], inventory: Inventory, gpus: Sequence[str]
) -> dict[str, str | None]:
    """Device of every tensor as llama.cpp works it out from -ngl, -ts and -ot."""
    n_layers = inventory.architecture.n_layers
    ngl = int(value_of(flags, "-ngl") or 0)
    first_on_gpu = max(n_layers + 1 - ngl, 0)
    n_on_gpu = min(ngl, n_layers + 1)
    shares = [np.float32(part) for part in (value_of(flags, "-ts") or "1").split(",")]
    shares += [np.float32(0)] * (len(gpus) - len(shares))
    ends = np.cumsum(np.array(shares, np.float32), dtype=np.float32)
    ends /= ends[-1]

    def home(layer: int) -> str:
        if not gpus or layer < first_on_gpu:
            return "CPU"
        position = np.float32(layer - first_on_gpu) / np.float32(n_on_gpu)
        return gpus[int(np.searchsorted(ends, position, side="right"))]  # std::upper_bound

    ot = (value_of(flags, "-ot") or "").replace("=CUDA", "=GPU")
    rules = [rule.split("=") for rule in ot.split(",") if rule]
    placed: dict[str, str | None] = {}
    for tensor in inventory.tensors:
        if tensor.layer is not None:
            device = home(tensor.layer)
        else:
            device = "CPU" if "token_embd" in tensor.name else home(n_layers)
        matches = (buffer for pattern, buffer in rules if re.search(pattern, tensor.name))
        is_loaded = tensor.layer is None or tensor.layer < inventory.architecture.n_loaded_layers
        placed[tensor.name] = next(matches, device) if is_loaded else None
    return placed


@every_plan
def test_flags_lead_to_the_assignments(model: str, machine: str) -> None:
    """llama.cpp's arithmetic on the flags puts every tensor where the plan says."""
    inventory, made = made_for(model, machine)
    gpus = [gpu.name for gpu in made.machine.gpus]
    assert placed_by_llama_cpp(made.flags, inventory, gpus) == {
        a.tensor: a.device for a in made.assignments
    }


@every_plan
def test_patterns_are_ones_that_llama_cpp_can_read(model: str, machine: str) -> None:
    """Patterns are anchored, few, and match no tensor twice."""
    inventory, made = made_for(model, machine)
    rules = (value_of(made.flags, "-ot") or "").split(",")
    patterns = [rule.split("=")[0] for rule in rules if rule]
    assert all(re.fullmatch(r"\^[a-z0-9_.()|\[\]\\?*+-]+\$", pattern) for pattern in patterns)
    assert len(patterns) < 100
    for tensor in inventory.tensors:
        assert sum(bool(re.search(p, tensor.name)) for p in patterns) <= 1


def test_flags_state_the_workload() -> None:
    """Everything of the workload that memory depends on is stated by a flag."""
    workload = Workload(
        context=12345, slots=3, kv_unified=False, batch=999, ubatch=77,
        kv_type_k="q8_0", kv_type_v="bf16", flash_attention=False,
    )  # fmt: skip
    made = plan(toy_inventory([64, 64]), Machine.parse("24GiB + 64GiB@80GB/s"), workload)
    wanted = {
        "-c": "12345", "-np": "3", "-b": "999", "-ub": "77", "-ctk": "q8_0", "-ctv": "bf16",
        "-fa": "off", "--fit": "off",
    }  # fmt: skip
    assert {flag: value_of(made.flags, flag) for flag in wanted} == wanted
    assert "-no-kvu" in made.flags


def test_the_command_starts_the_server_with_the_flags() -> None:
    """The command line is llama-server with the model and the flags, safe in a shell."""
    _, made = made_for("GLM-4.5-Air", ONE_GPU)
    command = made.llama_server_command("my model.gguf")
    assert command.startswith("llama-server -m 'my model.gguf' -ngl ")
    assert f"'{value_of(made.flags, '-ot')}'" in command


# Why there may be no plan.


def test_nothing_fits() -> None:
    """Where nothing fits, the error says what is needed, what there is, and what to do."""
    with pytest.raises(NoPlanError, match="smaller model") as caught:
        plan(read("Kimi-K2-Thinking"), Machine.parse("RTX 4090 + 64GiB@80GB/s"))
    error = caught.value
    assert error.required_bytes is not None
    assert error.available_bytes is not None
    assert error.required_bytes > error.available_bytes > 80 * 2**30
    for n_bytes in (error.required_bytes, error.available_bytes):
        assert f"{n_bytes / 2**30:.2f} GiB" in str(error)


def test_what_was_missing_is_enough() -> None:
    """With the memory that the error asks for, and a little for rounding, there is a plan."""
    inventory = read("Qwen3.5-35B-A3B")
    machine = Machine(gpus=(), ram=Device.ram(2**33, 1e11, margin_bytes=0))
    with pytest.raises(NoPlanError) as caught:
        plan(inventory, machine)
    assert caught.value.required_bytes is not None
    enough = caught.value.required_bytes + 2**20
    larger = Machine(gpus=(), ram=Device.ram(enough, 1e11, margin_bytes=0))
    assert plan(inventory, larger).predicted.bpw < 4


def test_an_unreachable_speed_names_the_reachable_one() -> None:
    """A speed out of reach is refused with the speed that can be had, and that one can be had."""
    inventory, machine = read("GLM-4.5-Air"), Machine.parse("RTX 4090 + 128GiB@80GB/s")
    with pytest.raises(NoPlanError, match=r"1000 tokens/s") as caught:
        plan(inventory, machine, min_decode_tps=1000)
    reachable = re.search(r"reaches ([\d.]+) tokens/s", str(caught.value))
    assert reachable is not None
    tps = float(reachable[1])
    made = plan(inventory, machine, min_decode_tps=tps * 0.99)
    assert made.predicted.decode_tps >= tps * 0.99
    with pytest.raises(NoPlanError):
        plan(inventory, machine, min_decode_tps=tps * 1.01)


# Kinds of machines and models.


def test_a_machine_without_a_gpu_holds_everything_in_ram() -> None:
    """Without a GPU every tensor is in RAM and no layer is offloaded."""
    _, made = made_for("Qwen3.5-9B", "32GiB@80GB/s")
    assert {a.device for a in made.assignments} <= {"CPU", None}
    assert [device.name for device in made.devices] == ["CPU"]
    assert value_of(made.flags, "-ngl") == "0"


@pytest.mark.parametrize("machine", ["RTX 4090 + 64GiB@80GB/s", "64GiB@80GB/s"])
@pytest.mark.parametrize("experts", [0, 8])
def test_a_quantized_model_keeps_its_types(machine: str, experts: int) -> None:
    """A model that is quantized already keeps every type and loses nothing; places are chosen."""
    inventory = toy_inventory([512, 512], experts=experts, dtype="Q4_K")
    made = plan(inventory, Machine.parse(machine))
    assert [a.qtype for a in made.assignments] == [t.qtype for t in inventory.tensors]
    assert made.predicted.loss_nats == 0


def test_a_model_that_is_quantized_in_part_says_what_changes() -> None:
    """A plan that changes some matrices of a file with quantized ones says how many."""
    source = toy_inventory([512, 512], experts=8)
    experts = {t.name: "Q4_K" for t in source.tensors if t.is_expert}
    inventory, machine = source.with_qtypes(experts), Machine.parse("64GiB@100MB/s")
    made = plan(inventory, machine)
    pairs = zip(made.assignments, inventory.tensors, strict=True)
    n_changed = sum(a.qtype != t.qtype for a, t in pairs)
    assert n_changed
    assert any(f"quantized in part: {n_changed} of its" in note for note in made.notes)
    kept = plan(inventory, machine, policy=policy().pin(".", "SOURCE"))
    assert any("types are kept, only places were chosen" in note for note in kept.notes)
    assert not any("quantized" in note for note in plan(source, machine).notes)


def test_a_quantized_model_is_as_fast_however_its_file_is_ordered() -> None:
    """Without a GPU too, experts are read at the rate of experts, wherever the file lists them."""
    inventory = toy_inventory([512, 512], experts=8, dtype="Q4_K")
    backwards = inventory.model_copy(update={"tensors": inventory.tensors[::-1]})
    machine = Machine.parse("64GiB@100MB/s")
    first, second = (plan(i, machine).predicted.decode_tps for i in (inventory, backwards))
    assert first == pytest.approx(second)


def test_a_model_that_is_not_to_be_quantized_is_placed_only() -> None:
    """A policy that offers nothing but the source's types moves tensors, and changes none."""
    inventory = toy_inventory([512] * 4, experts=8)
    rules = policy().model_copy(update={"candidates": ("SOURCE",)})
    machine = Machine(
        gpus=(Device.gpu(0, 12 * 2**20, 1e9, margin_bytes=0),), ram=Device.ram(2**30, 1e8)
    )
    made = plan(inventory, machine, Workload(context=256, ubatch=64), policy=rules)
    assert [a.qtype for a in made.assignments] == [t.qtype for t in inventory.tensors]
    assert {a.device for a in made.assignments} == {"GPU0", "CPU"}


def test_layers_move_to_ram_only_if_the_caches_need_it() -> None:
    """Layers are in RAM whole only when the caches of all do not fit on the GPU."""
    inventory = read("Qwen3-4B-Instruct-2507")
    machine = Machine.parse("8GiB@500GB/s + 64GiB@80GB/s")
    n_layers = inventory.architecture.n_layers
    all_on_gpu, some = (
        plan(inventory, machine, Workload(context=context)) for context in (16384, 65536)
    )
    assert value_of(all_on_gpu.flags, "-ngl") == str(n_layers + 1)
    assert 0 < int(value_of(some.flags, "-ngl") or 0) <= n_layers


def test_a_faster_plan_costs_quality() -> None:
    """A higher speed target is met with a loss that is no smaller."""
    inventory, machine = read("GLM-4.5-Air"), Machine.parse("RTX 3090 + 128GiB@80GB/s")
    plans = [plan(inventory, machine, min_decode_tps=tps) for tps in (4, 8, 12, 16)]
    losses = [made.predicted.loss_nats for made in plans]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


@pytest.mark.parametrize(
    ("machine", "context", "target"),
    [
        ("4GiB@192GB/s + 64GiB@60GB/s", 131072, 8.0),
        ("2GiB@200GB/s + 64GiB@60GB/s", 32768, None),
    ],
)
def test_no_other_number_of_layers_in_ram_is_better(
    machine: str, context: int, target: float | None
) -> None:
    """Where a GPU is nearly full, the plan is as good as the best of all numbers of RAM layers."""
    inventory, work = read("Qwen3.5-35B-A3B"), Workload(context=context, kv_type="q8_0")
    made = plan(inventory, Machine.parse(machine), work, min_decode_tps=target)
    problem = build_problem(
        inventory, Machine.parse(machine), work, policy(), Goal(min_decode_tps=target)
    )
    found = [
        solve_split(problem.with_layers(split_layers(problem, n)), 1e-4, 10.0)
        for n in range(problem.n_layers + 1)
    ]
    best = min(solution.objective_nats for solution in found if solution)
    proof = made.provenance
    assert proof.objective_nats is not None
    assert proof.bound_nats is not None
    assert proof.objective_nats <= best * 1.003
    assert proof.bound_nats <= best


@pytest.mark.parametrize(
    "numbers",
    [
        {"min_decode_tps": 0.0},
        {"min_decode_tps": -5.0},
        {"min_decode_tps": math.nan},
        {"gap": 1.0},
        {"gap": -0.1},
        {"gap": math.nan},
        {"time_limit_s": 0.0},
    ],
)
def test_impossible_numbers_are_refused(numbers: dict[str, Any]) -> None:
    """A speed, gap or time that makes no sense is refused before anything is solved."""
    machine = Machine.parse("24GiB + 64GiB@80GB/s")
    with pytest.raises(InputError, match="must be"):
        plan(read("Qwen3.5-2B"), machine, **numbers)


def test_types_that_llama_cpp_does_not_load_are_refused() -> None:
    """A model in ik_llama.cpp's types gets no flags for llama.cpp."""
    inventory = read("Qwen3.5-2B").with_qtypes({"blk.0.ffn_up.weight": "IQ4_K"})
    with pytest.raises(InputError, match="IQ4_K"):
        plan(inventory, Machine.parse("24GiB + 64GiB@80GB/s"))


def test_a_recipe_remembers_the_question() -> None:
    """Machine, workload and speed asked for are part of the provenance."""
    machine, work = Machine.parse("24GiB + 64GiB@80GB/s"), Workload(context=2048)
    made = plan(read("Qwen3.5-2B"), machine, work, min_decode_tps=5.0).recipe
    asked = made.provenance
    assert (asked.machine, asked.workload, asked.min_decode_tps) == (machine, work, 5.0)
