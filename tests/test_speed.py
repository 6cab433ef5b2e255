"""Seconds per token and per prompt: reading, unpacking, attention, and how sure that is."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import Device, Inventory, Machine, Workload, plan
from quantplan import read_inventory as read
from quantplan.costs import load_data
from quantplan.costs.decode import decode_s, read_s
from quantplan.costs.factors import shipped
from quantplan.costs.prefill import prefill_s
from quantplan.costs.speed import SpeedPrediction, predict_speed, predict_traffic
from quantplan.costs.traffic import Read, Traffic, collect, crossing_shares, read_of
from quantplan.qtypes import Runtime
from tests.support.models import toy_inventory

AIR = read("GLM-4.5-Air")
HYBRID = Machine.parse("RTX 4090 + 128GiB@80GB/s")
RUNTIMES: tuple[Runtime, ...] = ("llama.cpp", "ik_llama.cpp")
untimed = settings(max_examples=50, deadline=None)
RATES = st.floats(1e9, 1e13)


@pytest.mark.parametrize(
    ("tensor", "qtype", "n_bytes"),
    [
        ("blk.1.ffn_up_exps.weight", "Q8_0", 8 * 4096 * 1408 * 34 / 32),
        ("blk.1.ffn_down_exps.weight", "Q5_0", 8 * 4096 * 1408 * 22 / 32),
        ("blk.1.ffn_up_shexp.weight", "Q8_0", 4096 * 1408 * 34 / 32),
        ("blk.1.attn_q.weight", "F16", 4096 * 12288 * 2),
        ("blk.0.ffn_gate.weight", "Q4_K", 4096 * 10944 * 144 / 256),
        ("token_embd.weight", "Q6_K", 4096 * 210 / 256),
        ("output.weight", "Q6_K", 4096 * 151552 * 210 / 256),
    ],
)
def test_a_token_reads_what_it_uses(tensor: str, qtype: str, n_bytes: float) -> None:
    """A token reads 8 of 128 experts, one row of the embedding, and all of everything else."""
    assert read_of(AIR, AIR.by_name[tensor], qtype).n_bytes == n_bytes


def test_the_active_weights_are_those_of_the_models_name() -> None:
    """GLM-4.5-Air, which is sold with 12 billion active weights, multiplies about so many."""
    loaded = [t for t in AIR.tensors if AIR.is_loaded(t)]
    assert sum(read_of(AIR, t, "BF16").n_weights for t in loaded) == pytest.approx(12e9, rel=0.08)


def placed(inventory: Inventory, *, experts_on: str, rest_on: str, qtype: str = "BF16") -> Traffic:
    """The traffic of a model with its experts (feed-forward matrices) on another device."""
    assignment = {}
    for tensor in inventory.tensors:
        is_ffn = tensor.is_expert or tensor.role_class == "ffn"
        name = tensor.qtype if tensor.qtype == "F32" else qtype
        device = "CPU" if tensor.role == "token_embd" else experts_on if is_ffn else rest_on
        assignment[tensor.name] = (name, device)
    layers = [rest_on] * inventory.architecture.n_layers
    return collect(inventory, assignment, layers, rest_on)


def test_a_layer_whose_experts_are_in_ram_costs_one_hop() -> None:
    """A layer with its experts, or its dense feed-forward network, in RAM is one hop and back."""
    assert placed(AIR, experts_on="CPU", rest_on="GPU0").n_crossings == pytest.approx(46)
    assert placed(AIR, experts_on="GPU0", rest_on="GPU0").n_crossings == 0
    shares = crossing_shares(AIR)
    assert {name for name in shares if ".ffn_" in name and "_exps" not in name} == {
        f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")
    }


def matrix(qtype: str, n_weights: float, bpw: float) -> Read:
    """A dense matrix."""
    n_bytes = n_weights * bpw / 8
    return Read(qtype, False, True, n_bytes, n_weights, n_bytes, n_weights, 1)


@untimed
@given(RATES, RATES, st.sampled_from(["Q4_K", "IQ3_S", "Q8_0"]))
def test_reading_and_unpacking_overlap(bandwidth: float, flops: float, qtype: str) -> None:
    """A product takes the longer of reading and unpacking, and at most a little more than that."""
    device = Device.gpu(0, 2**30, bandwidth, flops_per_s=flops, vector_flops_per_s=flops)
    f, read = shipped(), matrix(qtype, 1e8, 4.5)
    reading = read.n_bytes / bandwidth * f.gpu_read
    unpacking = read.n_weights * f.operations_of("gpu", qtype) * f.gpu_unpack / flops
    found = read_s(device, read) - f.gpu_launch_s
    assert max(reading, unpacking) <= found * (1 + 1e-9)
    assert found <= max(reading, unpacking) * 2 ** (1 / f.overlap) * (1 + 1e-9)


def test_types_that_are_slow_to_unpack_are_slow_on_few_cores() -> None:
    """On two cores IQ3_S, of fewer bytes, takes longer than Q4_K; on sixteen it does not."""
    few, many = (Device.ram(2**36, 60e9, cores=cores) for cores in (2, 16))
    q4, iq3 = matrix("Q4_K", 7e9, 4.5), matrix("IQ3_S", 7e9, 3.44)
    assert read_s(few, iq3) > 1.5 * read_s(few, q4)
    assert read_s(many, iq3) < 1.05 * read_s(many, q4)


@pytest.mark.parametrize(("gpu", "tps"), [("RTX 4080", 123.71), ("RTX 3090", 138.01)])
def test_an_8b_model_in_q4_k_is_as_fast_as_published(gpu: str, tps: float) -> None:
    """Llama-3.1-8B in Q4_K decodes at 124 tokens/s on an RTX 4080 and at 138 on a 3090."""
    # 7.5e9 weights in 225 matrices.
    read = replace(matrix("Q4_K", 7.5e9, 4.5), n_matrices=225)
    (device,) = Machine.parse(f"{gpu} + 1GiB@1GB/s").gpus
    assert 1 / (read_s(device, read) + shipped().fixed_s) == pytest.approx(tps, rel=0.1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_factor_is_positive_and_finite(runtime: Runtime) -> None:
    """Nothing is free, and nothing takes for ever."""
    f = shipped(runtime)
    numbers = [getattr(f, name) for name in f.__slots__ if name != "operations"]
    tables = [value for table in f.operations.values() for value in table.values()]
    assert all(0 < number < math.inf for number in [*numbers, *tables])


@untimed
@given(st.integers(0, 10**5), st.integers(1, 10**5), st.sampled_from(["f16", "q8_0"]))
def test_a_deeper_context_is_never_faster(depth: int, more: int, kv_type: str) -> None:
    """Every token in the context takes time, decoding and prefilling."""
    traffic, workload = placed(AIR, experts_on="CPU", rest_on="GPU0"), Workload(kv_type=kv_type)
    for seconds in (decode_s, prefill_s):
        shallow, deep = (seconds(traffic, HYBRID, workload, d) for d in (depth, depth + more))
        assert shallow < deep


def test_sliding_windows_stop_growing() -> None:
    """Where every layer slides, a token costs the same from the full window on."""
    gemma = read("gemma-4-31B-it")
    traffic = placed(gemma, experts_on="GPU0", rest_on="GPU0")
    sliding = replace(
        traffic,
        architecture=gemma.architecture.model_copy(
            update={"caches": tuple(c for c in gemma.architecture.caches if c.window)}
        ),
    )
    sliding = replace(sliding, cache_homes=sliding.cache_homes[: len(sliding.architecture.caches)])
    machine = Machine.parse("RTX PRO 6000 Blackwell + 64GiB@80GB/s")
    times = [decode_s(sliding, machine, Workload(), depth) for depth in (512, 1024, 4096, 65536)]
    assert times[0] < times[1] == times[2] == times[3]
    whole = [decode_s(sliding, machine, Workload(swa_full=True), d) for d in (4096, 65536)]
    assert times[3] < whole[0] < whole[1]


@untimed
@given(st.floats(1e9, 1e12), st.floats(1.01, 10))
def test_a_faster_link_speeds_streamed_experts_up(link: float, factor: float) -> None:
    """Prefill with experts in RAM becomes faster with the link over which they are streamed."""
    traffic, ram = placed(AIR, experts_on="CPU", rest_on="GPU0"), Device.ram(2**40, 1e11)
    slow, fast = (
        prefill_s(
            traffic,
            Machine(gpus=(Device.gpu(0, 2**35, 1e12, link_bytes_per_s=rate),), ram=ram),
            Workload(),
            0,
        )
        for rate in (link, link * factor)
    )
    assert slow > fast


@untimed
@given(st.integers(32, 1024))
def test_a_larger_ubatch_shares_the_stream_among_more_tokens(ubatch: int) -> None:
    """Prefill with experts in RAM becomes faster per token with the ubatch for which they come."""
    traffic = placed(AIR, experts_on="CPU", rest_on="GPU0")
    once = prefill_s(traffic, HYBRID, Workload(ubatch=ubatch), 0) / ubatch
    twice = prefill_s(traffic, HYBRID, Workload(ubatch=2 * ubatch), 0) / (2 * ubatch)
    assert twice < once < 2 * twice


def test_small_batches_and_no_op_offload_compute_on_the_cpu() -> None:
    """Weights in RAM stay there below 32 tokens, or where streaming is switched off."""
    traffic = placed(AIR, experts_on="CPU", rest_on="GPU0")
    links = [
        Machine(gpus=(Device.gpu(0, 2**35, 1e12, link_bytes_per_s=r),), ram=HYBRID.ram)
        for r in (1e9, 1e11)
    ]
    for n_tokens, op_offload, is_streamed in (
        (31, True, False),
        (512, False, False),
        (32, True, True),
    ):
        slow, fast = (
            prefill_s(traffic, m, Workload(), 0, n_tokens=n_tokens, op_offload=op_offload)
            for m in links
        )
        assert (slow > fast) == is_streamed


def predicted(context: int = 32768) -> SpeedPrediction:
    """GLM-4.5-Air with its experts in RAM."""
    traffic = placed(AIR, experts_on="CPU", rest_on="GPU0", qtype="Q8_0")
    return predict_traffic(traffic, HYBRID, Workload(context=context))


def test_the_curve_goes_through_the_model() -> None:
    """At any depth of the curve the speed is that of the model, which is linear between windows."""
    found = predicted()
    traffic = placed(AIR, experts_on="CPU", rest_on="GPU0", qtype="Q8_0")
    assert [p.depth for p in found.points] == sorted({p.depth for p in found.points})
    for depth in (0, 1000, 5000, 32768):
        seconds = decode_s(traffic, HYBRID, Workload(context=32768), depth)
        assert found.decode_tps(depth).expected == pytest.approx(1 / seconds)
    assert found.where == "hybrid"


def test_intervals_surround_the_prediction_and_calibration_narrows_them() -> None:
    """The interval holds the prediction; a calibrated machine's is inside that of the others."""
    found = predicted().decode_tps(0)
    assert found.low < found.expected < found.high
    known = HYBRID.model_copy(update={"speed_log_sd": 0.02})
    traffic = placed(AIR, experts_on="CPU", rest_on="GPU0", qtype="Q8_0")
    narrow = predict_traffic(traffic, known, Workload(context=32768)).decode_tps(0)
    assert found.low < narrow.low < found.expected < narrow.high < found.high


@untimed
@given(st.integers(0, 10000), st.integers(1, 10000), st.integers(1, 2000))
def test_a_turn_is_the_sum_of_its_parts(depth: int, prompt: int, answer: int) -> None:
    """Waiting for an answer is waiting for the prompt and then for every token."""
    found = predicted()
    whole = found.turn_s(prompt, answer, depth)
    first, second = found.turn_s(prompt, 0, depth), found.turn_s(0, answer, depth + prompt)
    assert whole.expected == pytest.approx(first.expected + second.expected)
    assert whole.low < whole.expected < whole.high
    slowest = found.decode_tps(depth + prompt + answer).expected
    assert second.expected <= answer / slowest * (1 + 1e-9)


def test_a_plans_speed_is_the_models() -> None:
    """The speed that a plan states is the speed predicted for its types and places."""
    workload = Workload(context=16384)
    made = plan(AIR, HYBRID, workload)
    assignment = {a.tensor: (a.qtype, a.device) for a in made.assignments if a.device is not None}
    homes = {
        AIR.by_name[name].layer: device
        for name, (_, device) in assignment.items()
        if name.endswith("attn_norm.weight")
    }
    layers = [homes[layer] for layer in range(AIR.architecture.n_loaded_layers)]
    found = predict_speed(AIR, assignment, layers, "GPU0", machine=HYBRID, workload=workload)
    assert found.points[-1].depth == 16384
    assert made.predicted.decode_tps == pytest.approx(found.points[-1].decode_tps.expected)
    assert made.predicted.prefill_tps == pytest.approx(found.points[0].prefill_tps.expected)


def test_a_tied_embedding_is_read_as_the_output_matrix() -> None:
    """Without an output matrix the embedding is read twice: one row in RAM, all of it as output."""
    tied, untied = (toy_inventory([512], has_tied_output=flag) for flag in (True, False))
    one, other = (placed(i, experts_on="GPU0", rest_on="GPU0", qtype="F16") for i in (tied, untied))
    assert sum(r.n_bytes for r in one.reads["GPU0"]) == sum(r.n_bytes for r in other.reads["GPU0"])


def test_the_constants_say_where_they_are_from() -> None:
    """The data file names script, data, date, credit and the errors of its cross-validation."""
    data = load_data("speed.json")
    assert data["made_by"] == "scripts/fit_speed.py"
    assert all(len(digest) == 64 for digest in data["data_sha256"].values())
    assert data["credit"]
    assert data["date"]
    decode, prefill = (data["cross_validation"][kind] for kind in ("decode", "prefill"))
    assert decode["median_error"] <= 0.15
    assert 0.75 <= decode["coverage80"] <= 0.9
    assert prefill["median_error"] <= 0.35
