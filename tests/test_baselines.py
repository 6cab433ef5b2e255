"""Plain answers: what they come to by the same predictions, and when one of them is as good."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

import quantplan as qp
from quantplan.configuration import resolve
from quantplan.costs.quality import LossTable
from quantplan.costs.speed import difference_s, predict_speed
from quantplan.planner.baselines import AS_IT_IS, Baseline, find_baselines
from quantplan.planner.goal import Goal
from quantplan.planner.plain import parts_of
from quantplan.planner.problem import build_problem
from tests.support.models import toy_inventory

WORK = qp.Workload(context=16384, kv_type="q8_0")
ONE = "RTX 4090 + 64GiB@80GB/s"
TWO = "2x RTX 3090 + 64GiB@80GB/s"
UNLIKE = "RTX 3090 + 12GiB@300GB/s + 96GiB@80GB/s"
CASES = [
    ("GLM-4.5-Air", ONE),
    ("GLM-4.5-Air", UNLIKE),
    ("GLM-4.5-Air", "128GiB@80GB/s"),
    ("gpt-oss-120b", TWO),
    ("Qwen3.5-27B", "12GiB@500GB/s + 64GiB@80GB/s"),
    ("Qwen3-4B-Thinking-2507", "4GiB@300GB/s + 64GiB@80GB/s"),
    ("Kimi-K2-Thinking", "4x RTX 3090 + 768GiB@300GB/s"),
]
REMOTE = [
    ("Qwen3-30B-A3B", "RPC 192.168.1.7:50052 RTX 3090@1Gbit/s,0.2ms + 64GiB@80GB/s"),
    ("Qwen3-30B-A3B", "RPC a:1 RTX 3090@1Gbit/s,0.2ms + RTX 3060 + 64GiB@80GB/s"),
]


@cache
def baselines_of(
    model: str, machine: str, *, is_quantized: bool = False, goal: Goal | None = None
) -> tuple[Baseline, ...]:
    """Every baseline, beside a plan that leaves all types as they are and everything in RAM."""
    inventory, described = read(model, is_quantized=is_quantized), qp.Machine.parse(machine)
    problem = build_problem(inventory, described, WORK, qp.policy(), goal or Goal())
    ram = described.ram.name
    problem = problem.with_layers((ram,) * problem.n_layers)
    kept = {t.name: (t.qtype, ram) for t in inventory.tensors if inventory.is_loaded(t)}
    return find_baselines(problem, LossTable(inventory), kept)


@cache
def read(model: str, *, is_quantized: bool = False) -> qp.Inventory:
    found = qp.read_inventory(model)
    return found.with_qtypes(qp.stock_mix(found, "Q4_K_M")) if is_quantized else found


def written_as(model: str, types: str) -> qp.Inventory:
    """The model in a stock mix, as llama-quantize makes it."""
    found = read(model)
    has_imatrix = types in {"IQ3_XXS", "IQ2_M"}
    mix = qp.stock_mix(found, types, has_imatrix=has_imatrix)
    kept = {t.name for t in found.tensors if t.qtype not in {"F32", "F16", "BF16"}}
    return found.with_qtypes({name: kind for name, kind in mix.items() if name not in kept})


def predicted(
    inventory: qp.Inventory, machine: qp.Machine, flags: Sequence[str]
) -> tuple[qp.MemoryPrediction, float]:
    """Memory and decode speed of flags, by the ways that do not know of baselines."""
    resolved = resolve(inventory, flags, machine)
    placement = resolved.placement
    placed = {
        name: (inventory.by_name[name].qtype, homes[0]) for name, homes in placement.tensors.items()
    }
    speed = predict_speed(
        inventory,
        placed,
        placement.layers,
        placement.output,
        machine=machine,
        workload=WORK,
    )
    return qp.predict(inventory, flags, machine), speed.decode_tps(WORK.context).expected


# What a row says.


@pytest.mark.parametrize(("model", "machine"), [*CASES, *REMOTE])
def test_rows_are_what_their_flags_lead_to(model: str, machine: str) -> None:
    """Memory and speed of a baseline are those of its flags by `predict` and the speed model."""
    described = qp.Machine.parse(machine)
    rows = [b for b in baselines_of(model, machine) if b.types in {"Q8_0", "Q4_K_M", "IQ2_M"}]
    assert len(rows) >= (3 if described.gpus else 2)
    for row in rows:
        memory, tps = predicted(written_as(model, row.types), described, row.flags)
        used = [use.capacity_bytes - use.free_bytes for use in memory.devices]
        assert (row.vram_bytes, row.ram_bytes) == (sum(used[:-1]), used[-1])
        assert row.fits == memory.fits
        assert row.decode_tps.expected == pytest.approx(tps)
        assert row.decode_tps.low < tps < row.decode_tps.high


def test_stock_rows_have_the_loss_and_the_size_of_their_mix() -> None:
    """Loss and size of a mix are those of the types that llama-quantize gives each tensor."""
    inventory = read("GLM-4.5-Air")
    for name in ("Q6_K", "Q4_K_M", "IQ4_XS", "Q3_K_M"):
        row = next(b for b in baselines_of("GLM-4.5-Air", ONE) if b.types == name)
        mix = qp.stock_mix(inventory, name)
        assert row.loss_nats == pytest.approx(LossTable(inventory).model_kld_nats(mix))
        written = inventory.with_qtypes(mix)
        assert 0 <= row.file_bytes - written.n_bytes < 32 * len(written.tensors)


def test_a_hand_made_recipe_is_among_them() -> None:
    """Mixtures of experts are also compared with hq4k, dense models are not."""
    assert "hq4k" in {b.types for b in baselines_of("GLM-4.5-Air", ONE)}
    dense = {b.types for b in baselines_of("Qwen3.5-27B", "12GiB@500GB/s + 64GiB@80GB/s")}
    assert "hq4k" not in dense
    assert {"Q8_0", "Q4_K_M", "--pure Q4_K"} <= dense


@pytest.mark.parametrize(("model", "machine"), CASES)
def test_answers_come_first_and_the_best_of_them_before_others(model: str, machine: str) -> None:
    """What fits comes first, by loss and the price of time; what does not is still listed."""
    found = baselines_of(model, machine)
    fits = [b.fits for b in found]
    assert fits == sorted(fits, reverse=True)
    objectives = [
        (-1 + math.sqrt(1 + 4 * 0.9511 * b.loss_nats)) / (2 * 0.9511)  # the sum under the link
        + 0.3 / b.decode_tps.expected
        for b in found
        if b.fits
    ]
    assert all(a <= b + 1e-9 for a, b in pairwise(objectives))


# The best of a flag.


@pytest.mark.parametrize(
    ("model", "machine", "flag"),
    [
        ("GLM-4.5-Air", ONE, "--n-cpu-moe"),
        ("GLM-4.5-Air", TWO, "--n-cpu-moe"),
        ("Qwen3.5-27B", "12GiB@500GB/s + 64GiB@80GB/s", "--n-cpu-ffn"),
        ("Qwen3.5-27B", "12GiB@500GB/s + 64GiB@80GB/s", "-ngl"),
    ],
)
def test_no_other_number_is_faster(model: str, machine: str, flag: str) -> None:
    """Of all numbers that a flag may have, the one shown is the fastest that fits."""
    described, inventory = qp.Machine.parse(machine), read(model, is_quantized=True)
    found = baselines_of(model, machine, is_quantized=True)
    row = next((b for b in found if b.placement.startswith(flag) and b.fits), None)
    possible = []
    for n in range(0, inventory.architecture.n_layers + 2, 3 if flag == "--n-cpu-moe" else 4):
        flags = list(row.flags if row else ())
        at = flags.index(flag) + 1
        possible.append([*flags[:at], str(n), *flags[at + 1 :]])
    speeds = [tps for m, tps in (predicted(inventory, described, f) for f in possible) if m.fits]
    assert row is not None
    assert max(speeds, default=0.0) <= row.decode_tps.expected * (1 + 1e-9)


# --fit


def test_fit_leaves_the_first_layer_of_a_model_with_nextn_blocks_in_ram() -> None:
    """`--fit` counts one layer too few where there is a next-token-prediction block."""
    found = [b for b in baselines_of("GLM-4.5-Air", ONE) if b.placement == "--fit" and b.fits]
    assert found
    n_layers = read("GLM-4.5-Air").architecture.n_layers
    for row in found:
        assert int(row.flags[1]) <= n_layers
        placed = resolve(read("GLM-4.5-Air"), row.flags, qp.Machine.parse(ONE)).placement
        assert placed.layers[0] == "CPU"


@pytest.mark.parametrize(("model", "machine"), CASES[:-1])
def test_fit_keeps_the_margin_of_every_gpu(model: str, machine: str) -> None:
    """What `--fit` comes to is never above what a GPU may hold, though the RAM may overflow.

    With more than two GPUs it may be: llama.cpp looks at the GPU that it fills and the next one.
    """
    described = qp.Machine.parse(machine)
    rows = [
        b
        for b in baselines_of(model, machine)
        if b.placement == "--fit" and b.types in {"Q8_0", "Q4_K_M", "IQ2_M"}
    ]
    for row in rows:
        memory, _ = predicted(written_as(model, row.types), described, row.flags)
        assert all(use.free_bytes >= use.margin_bytes for use in memory.devices[:-1])


@pytest.mark.parametrize(
    ("gpus", "second"),
    [
        ("2x RX 7900 XTX", "ROCm1"),
        ("2x RTX 4090", "CUDA1"),
        ("RPC 10.0.0.2:50052 RTX 4090@10Gbit/s,0.2ms + RTX 4090", "CUDA0"),
    ],
)
def test_fit_names_buffers_as_llama_cpp_does(gpus: str, second: str) -> None:
    """The next GPU is what builds for its vendor call it, and other hosts are not counted."""
    rows = baselines_of("GLM-4.5-Air", f"{gpus} + 256GiB@80GB/s")
    rules = [
        rule
        for row in rows
        if row.placement == "--fit" and "-ot" in row.flags
        for rule in row.flags[row.flags.index("-ot") + 1].split(",")
    ]
    assert {rule.rpartition("=")[2] for rule in rules} == {"CPU", second}


def test_fit_leaves_a_model_that_fits_alone() -> None:
    """A model that is small enough is on the GPU whole, under the name of the plainest flags."""
    found = [b for b in baselines_of("Qwen3-4B-Thinking-2507", ONE) if b.fits]
    in_vram = [b for b in found if b.types == "Q8_0"]
    assert in_vram[0].placement == "-ngl 37"
    assert not any(b.placement == "--fit" for b in in_vram)


def test_parts_are_told_by_the_patterns_of_llama_cpp() -> None:
    """`--n-cpu-moe` moves exactly the tensors that llama.cpp's pattern names, shared ones not."""
    machine = qp.Machine.parse(ONE)
    row = next(b for b in baselines_of("GLM-4.5-Air", ONE) if b.placement == "--cpu-moe")
    tensors = resolve(read("GLM-4.5-Air"), row.flags, machine).placement.tensors
    moved = {name for name, homes in tensors.items() if homes == ("CPU",)} - {"token_embd.weight"}
    assert {name.split(".")[2] for name in moved} == {"ffn_up_exps", "ffn_gate_exps",
                                                      "ffn_down_exps"}  # fmt: skip
    assert len(parts_of()) == 3 * len(parts_of(stems=["down"]))


# The plan beside them.


def test_a_plan_that_wins_clearly_says_nothing() -> None:
    """GLM-4.5-Air at 10 tokens/s on 24 GB has under half the loss of the best plain answer."""
    made = qp.plan(read("GLM-4.5-Air"), qp.Machine.parse(ONE), WORK, min_decode_tps=10)
    assert made.plain_answer is None
    best = made.baselines[0]
    assert best.is_answer
    assert best.loss_nats > 2 * made.predicted.loss_nats
    assert not any("as good" in note for note in made.notes)


def test_a_model_that_fits_is_told_to_be_plain() -> None:
    """Where a plain answer is as good, the plan names it, and says so in words."""
    made = qp.plan(read("Qwen3-4B-Thinking-2507"), qp.Machine.parse(ONE), WORK)
    plain = made.plain_answer
    assert plain is not None
    assert plain.is_answer
    assert made.notes[0].startswith(f"{plain.types} with {plain.placement} is as good")


def test_answers_that_are_too_slow_are_no_answers() -> None:
    """With a speed target only baselines that reach it may be preferred, or come first."""
    found = baselines_of("GLM-4.5-Air", ONE, goal=Goal(min_decode_tps=12))
    assert {b.reaches_speed for b in found} == {True, False}
    assert all(b.reaches_goal == b.reaches_speed for b in found)
    for row in found:
        assert row.reaches_speed == (row.decode_tps.expected >= 12)
        assert row.is_answer or not row.is_as_good
    assert found[0].is_answer


def test_floors_that_a_plain_answer_breaks_are_named() -> None:
    """Q4_K_M has attention below the floor of the policy, Q8_0 has nothing below it."""
    rows = {b.types: b for b in baselines_of("GLM-4.5-Air", ONE)}
    assert "attention" in rows["Q4_K_M"].below_floor
    assert rows["Q8_0"].below_floor == ()
    assert rows["hq4k"].below_floor == ()


@pytest.mark.parametrize(
    ("model", "machine"),
    [
        ("GLM-4.5-Air", ONE),
        ("GLM-4.5-Air", TWO),
        ("GLM-4.5-Air", "12GiB@500GB/s + 96GiB@80GB/s"),
        ("Qwen3.5-27B", "12GiB@500GB/s + 64GiB@80GB/s"),
        ("Qwen3-235B-A22B", "RTX 5090 + 192GiB@90GB/s"),
    ],
)
def test_quantized_models_are_placed_no_slower_than_by_plain_flags(
    model: str, machine: str
) -> None:
    """Of a quantized model only places are chosen, and no plain flags reach a higher speed."""
    inventory = read(model, is_quantized=True)
    made = qp.plan(inventory, qp.Machine.parse(machine), WORK)
    assert {b.types for b in made.baselines} == {AS_IT_IS}
    assert {a.tensor: a.qtype for a in made.assignments} == {
        t.name: t.qtype for t in inventory.tensors
    }
    best = max(b.decode_tps.expected for b in made.baselines if b.fits)
    assert made.predicted.decode_tps >= best * (1 - max(made.gap, 1e-3))
    is_close = made.predicted.decode_tps < 1.05 * best
    assert (made.plain_answer is not None) >= is_close


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_is_narrow(width: int) -> None:
    """The plan and three plain answers of different types have a line each, however narrow."""
    made = qp.plan(read("GLM-4.5-Air"), qp.Machine.parse(ONE), WORK)
    lines = made.summary(width).splitlines()
    start = next(i for i, line in enumerate(lines) if "beside plain answers" in line)
    table = lines[start : start + 6]
    assert all(len(line) <= width for line in table[1:])
    assert table[1].split() == ["types", "placement", "file", "VRAM", "RAM", "t/s", "loss"]
    assert table[2].split()[:2] == ["this", "plan"]
    assert len({line.split("  ")[2] for line in table[3:]}) == 3


def test_baselines_can_be_left_out() -> None:
    """A caller who wants many plans need not wait for baselines."""
    made = qp.plan(toy_inventory([512] * 3), qp.Machine.parse("8GiB@80GB/s"), baselines=False)
    assert made.baselines == ()
    assert made.plain_answer is None


def test_models_that_llama_quantize_refuses_still_have_baselines() -> None:
    """Rows that are no multiple of 32 rule some types out, not the comparison."""
    made = qp.plan(toy_inventory([520] * 3), qp.Machine.parse("8GiB@80GB/s"))
    assert any(b.types == AS_IT_IS for b in made.baselines)


# How sure a difference is.


def test_the_difference_of_losses_leaves_out_what_is_common() -> None:
    """Two mixes that differ in one class are compared by that class, with either sign."""
    inventory = read("GLM-4.5-Air")
    table = LossTable(inventory)
    mix = qp.stock_mix(inventory, "Q4_K_M")
    better = mix | {name: "Q8_0" for name in mix if "attn_q" in name}
    assert table.difference_nats(mix, mix) == (0, 0)
    difference, sd = table.difference_nats(better, mix)
    other, same_sd = table.difference_nats(mix, better)
    by_hand = sum(
        table.loss_nats(inventory.by_name[n], better[n]) - table.loss_nats(inventory.by_name[n], q)
        for n, q in mix.items()
    )
    assert difference == pytest.approx(by_hand)
    assert other == pytest.approx(-difference)
    assert same_sd == pytest.approx(sd)
    assert 0 < sd < abs(difference)


def test_more_of_the_same_is_surely_slower() -> None:
    """Reading more of one type on one device is slower for sure, other types on others are not."""
    machine = qp.Machine.parse(ONE)
    difference, sd = difference_s({("CPU", "Q4_K"): 0.09}, {("CPU", "Q4_K"): 0.1}, machine)
    assert difference == pytest.approx(-0.01)
    assert -difference > 3 * sd
    difference, sd = difference_s({("CPU", "Q4_K"): 0.09}, {("CPU", "IQ3_S"): 0.1}, machine)
    assert -difference < sd
    calibrated = machine.model_copy(update={"speed_log_sd": 0.1})
    _, less = difference_s({("GPU0", "Q4_K"): 0.05}, {("CPU", "Q4_K"): 0.1}, calibrated)
    _, more = difference_s({("GPU0", "Q4_K"): 0.05}, {("CPU", "Q4_K"): 0.1}, machine)
    assert less < more


def test_the_expected_end_of_compute_buffers_counts_where_it_is_asked_for() -> None:
    """Baselines reckon with the same end of the compute buffers' estimate as the plan."""
    inventory, machine = read("GLM-4.5-Air"), qp.Machine.parse(ONE)
    problem = build_problem(inventory, machine, WORK, qp.policy(), Goal())
    problem = problem.with_layers(("CPU",) * problem.n_layers)
    kept = {t.name: (t.qtype, "CPU") for t in inventory.tensors if inventory.is_loaded(t)}
    table = LossTable(inventory)
    expected = find_baselines(replace(problem, plans_with_high_end=False), table, kept)
    high = baselines_of("GLM-4.5-Air", ONE)

    def vram_of(rows: Sequence[Baseline]) -> int:
        return next(b.vram_bytes for b in rows if (b.types, b.placement) == ("Q8_0", "--cpu-moe"))

    assert vram_of(expected) < vram_of(high)


def test_plain_answers_keep_to_the_limits_of_the_goal() -> None:
    """With a longest turn, plain answers count where `predict` of their flags keeps to it."""
    inventory, machine = read("GLM-4.5-Air"), qp.Machine.parse(ONE)
    made = qp.plan(inventory, machine, WORK, max_turn_s=40.0)
    mixes = [b for b in made.baselines if b.fits and b.types in ("Q4_K_M", "Q6_K", "Q3_K_M")]
    assert {b.reaches_goal for b in mixes} == {True, False}
    for row in mixes:
        typed = inventory.with_qtypes(qp.stock_mix(inventory, row.types))
        speed = qp.predict(typed, row.flags, machine).speed
        turn_s = speed.turn_s(WORK.prompt_tokens, WORK.answer_tokens).expected
        assert row.reaches_goal == (turn_s <= 40.0)
    lossy = qp.plan(inventory, machine, WORK, max_loss_nats=0.005)
    assert all(b.loss_nats <= 0.005 for b in lossy.baselines if b.is_answer)


@pytest.mark.parametrize("mix", ["Q5_K_M", "Q4_K_M", "Q3_K_M"])
def test_a_mix_is_no_worse_than_itself(mix: str) -> None:
    """Where a plan may lose as much as a mix, that mix is among the answers, in spite of digits."""
    inventory = read("GLM-4.5-Air")
    most = LossTable(inventory).model_kld_nats(qp.stock_mix(inventory, mix))
    rows = baselines_of("GLM-4.5-Air", ONE, goal=Goal(max_loss_nats=most))
    assert {row.reaches_goal for row in rows if row.types == mix} == {True}


def test_a_plan_is_held_against_the_mix_that_it_is_compared_with() -> None:
    """`no_worse_than` takes a mix as its rows do: with the matrix that llama-quantize demands."""
    machine = qp.Machine.parse("8GiB@300GB/s + 16GiB@60GB/s")
    made = qp.plan(read("Qwen3-4B-Instruct-2507"), machine, no_worse_than="IQ3_XXS")
    assert {row.reaches_goal for row in made.baselines if row.types == "IQ3_XXS"} == {True}
