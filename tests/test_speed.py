"""Seconds per token: what is read for a token, and how fast."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import Device, Inventory, Machine, Workload
from quantplan import read_inventory as read
from quantplan.costs import speed
from tests.support.models import toy_inventory

AIR = read("GLM-4.5-Air")
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
    assert speed.active_bytes(AIR, AIR.by_name[tensor], qtype) == n_bytes


def test_the_active_weights_are_those_of_the_models_name() -> None:
    """GLM-4.5-Air, which is sold with 12 billion active weights, multiplies about so many."""
    active = sum(speed.active_weights(AIR, t) for t in AIR.tensors if AIR.is_loaded(t))
    assert active == pytest.approx(12e9, rel=0.08)


@untimed
@given(RATES, RATES)
def test_more_bandwidth_reads_faster(bandwidth: float, other: float) -> None:
    """The rate of a device is a fixed share, below 1, of its nominal bandwidth."""
    for make in (lambda rate: Device.gpu(0, 2**30, rate), lambda rate: Device.ram(2**30, rate)):
        for experts in (True, False):
            rates = [speed.read_rate(make(b), experts=experts) for b in (bandwidth, other)]
            assert 0 < rates[0] < bandwidth
            assert rates[0] * other == pytest.approx(rates[1] * bandwidth)


def test_scattered_experts_are_slower_to_read_from_ram() -> None:
    """RAM reads experts more slowly than whole matrices; a GPU does not care."""
    ram, gpu = Device.ram(2**30, 1e11), Device.gpu(0, 2**30, 1e12)
    assert speed.read_rate(ram, experts=True) < speed.read_rate(ram, experts=False)
    assert speed.read_rate(gpu, experts=True) == speed.read_rate(gpu, experts=False)


def prefill(
    inventory: Inventory, machine: Machine, workload: Workload, expert_bytes: float
) -> float:
    """Prefill speed with experts in RAM and everything else on the first GPU."""
    weights: dict[str, float] = {"GPU0": 0.0, "CPU": 0.0}
    for tensor in inventory.tensors:
        name = "CPU" if speed.is_expert(tensor) or not machine.gpus else "GPU0"
        weights[name] += speed.active_weights(inventory, tensor)
    return speed.prefill_tps(machine, workload, weights, expert_bytes)


@untimed
@given(st.floats(1e9, 1e12), st.floats(1.01, 10))
def test_a_faster_link_speeds_streamed_experts_up(link: float, factor: float) -> None:
    """Prefill with experts in RAM becomes faster with the link over which they are streamed."""
    ram = Device.ram(2**40, 1e11)
    slow, fast = (
        prefill(
            AIR,
            Machine(gpus=(Device.gpu(0, 2**35, 1e12, link_bytes_per_s=rate),), ram=ram),
            Workload(),
            50e9,
        )
        for rate in (link, link * factor)
    )
    assert slow < fast


@untimed
@given(st.integers(32, 1024))
def test_a_larger_ubatch_shares_the_stream_among_more_tokens(ubatch: int) -> None:
    """Prefill with experts in RAM becomes faster with the ubatch, for which they come once."""
    machine = Machine.parse("RTX 4090 + 128GiB@80GB/s")
    small, large = (prefill(AIR, machine, Workload(ubatch=u), 50e9) for u in (ubatch, 2 * ubatch))
    assert small < large < 2 * small


def test_the_flops_limit_prefill_without_experts_in_ram() -> None:
    """With nothing to stream, the time of a prompt token is its operations over the GPU's rate."""
    inventory = toy_inventory([512, 512])
    gpu = Device.gpu(0, 2**30, 1e12, flops_per_s=1e12)
    machine = Machine(gpus=(gpu,), ram=Device.ram(2**30, 1e11))
    weights = sum(t.n_weights for t in inventory.tensors if t.role != "token_embd")
    per_token = prefill(inventory, machine, Workload(), 0.0) * 2 * weights
    assert 0.1 * gpu.flops_per_s < per_token < gpu.flops_per_s


def test_nothing_but_the_fixed_part_is_free() -> None:
    """Every token costs a positive, finite time beside what it reads."""
    assert 0 < speed.fixed_s() < math.inf
