"""Devices of other hosts: how people write them, where they stand, what the way there costs."""

import pytest

import quantplan as qp
from quantplan.costs.traffic import boundary_transfers
from quantplan.formats.llama_cpp import rpc_flags
from quantplan.hardware.network import Network
from quantplan.units import parse_bytes_per_s, parse_seconds
from tests.support.models import toy_inventory

FAR = "RPC 192.168.1.7:50052 RTX 3090@1Gbit/s,0.2ms"
TEXT = f"RTX 4090 + {FAR} + 64GiB@80GB/s"


def test_devices_of_other_hosts_come_first() -> None:
    """As in llama.cpp, whatever their order in the text; each keeps its address and its network."""
    machine = qp.Machine.parse(
        f"RTX 4090 + 2x {FAR} + RPC b:1 8GiB@200GB/s@10Gbit/s,50us + 1GiB@9GB/s"
    )
    assert [gpu.model for gpu in machine.gpus] == [
        "RTX 3090",
        "RTX 3090",
        "8.00 GiB GPU",
        "RTX 4090",
    ]
    assert machine.gpus[0].network == Network(
        endpoint="192.168.1.7:50052", bytes_per_s=125e6, latency_s=0.2e-3
    )
    assert machine.gpus[2].bandwidth_bytes_per_s == 200e9
    assert machine.gpus[3].network is None
    assert machine.streaming_gpu == machine.gpus[3]
    assert rpc_flags(machine) == ["--rpc", "192.168.1.7:50052,b:1"]
    assert rpc_flags(qp.Machine.parse("RTX 4090 + 64GiB@80GB/s")) == []
    assert "at 192.168.1.7:50052" in machine.describe()
    assert qp.Machine.model_validate_json(machine.model_dump_json()) == machine


def test_a_machine_with_another_order_is_refused() -> None:
    """Devices of other hosts behind those of this one would be numbered otherwise than planned."""
    far, near = qp.Machine.parse(TEXT).gpus
    swapped = (near.model_copy(update={"name": "GPU0"}), far.model_copy(update={"name": "GPU1"}))
    with pytest.raises(qp.MachineError, match="put those with a network in front"):
        qp.Machine(gpus=swapped, ram=qp.Machine.parse(TEXT).ram)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ("RPC RTX 3090@1Gbit/s,0.2ms", "no device of another host"),
        ("RPC a:1 RTX 3090", "no device of another host"),
        ("RPC a:1 RTX 3090@1Gbit/s", "no device of another host"),
        ("RPC a:1 RTX 3090@1Gbit,0.2ms", "is not a bandwidth"),
        ("RPC a:1 RTX 3090@1Gbit/s,fast", "is not a duration"),
        ("RPC a:1 RTX 3090@0Gbit/s,1ms", "greater than 0"),
        ("RPC a:1 RTX 9999X@1Gbit/s,1ms", "unknown GPU"),
    ],
)
def test_what_is_missing_of_a_network_is_told(term: str, says: str) -> None:
    """Address, GPU, rate and ping all have to be there."""
    with pytest.raises(qp.MachineError, match=says):
        qp.Machine.parse(f"{term} + 64GiB@80GB/s")


def test_rates_and_durations_have_their_units() -> None:
    """Networks are sold in bits, pings are read in milliseconds."""
    assert parse_bytes_per_s("2.5 Gbit/s") == 312.5e6
    assert parse_bytes_per_s("100Mbit/s") == 12.5e6
    assert parse_seconds("0.2ms") == pytest.approx(2e-4)
    assert parse_seconds("150us") == pytest.approx(1.5e-4)
    assert parse_seconds("1 s") == 1.0
    with pytest.raises(ValueError, match="is not a duration"):
        parse_seconds("5 min")


def test_transfers_are_counted_at_both_ends() -> None:
    """Activations come from the CPU, and from device to device they go out of one into the next."""
    assert boundary_transfers(["GPU0", "GPU0", "GPU1"], "GPU1") == {"CPU": 1, "GPU0": 2, "GPU1": 1}
    assert boundary_transfers(["CPU", "GPU0"], "GPU0") == {"CPU": 1, "GPU0": 1}


def test_a_network_costs_its_pings_and_bytes() -> None:
    """By hand: in, out, and the logits back, half a ping and the bytes each; one ubatch likewise
    with as many rows as tokens, so that prefill waits for bytes and decoding for pings.
    """
    inventory = toy_inventory([512] * 4)
    near = qp.Machine.parse("24GiB@900GB/s + 24GiB@900GB/s + 64GiB@80GB/s")
    far = qp.Machine.parse("RPC a:1 24GiB@900GB/s@1Gbit/s,2ms + 24GiB@900GB/s + 64GiB@80GB/s")
    flags = "-ngl 99 -ts 3,2 -c 1024 -np 1 -ub 512"
    speeds = [qp.predict(inventory, flags, machine).speed for machine in (near, far)]
    near_s, far_s = (1 / speed.decode_tps(0).expected for speed in speeds)
    row_bytes = 4 * 256
    assert far_s - near_s == pytest.approx(2 * (1e-3 + row_bytes / 125e6))
    near_s, far_s = (512 / speed.prefill_tps(0).expected for speed in speeds)
    assert far_s - near_s == pytest.approx(2 * (1e-3 + 512 * row_bytes / 125e6))
    last = qp.Machine.parse("RPC a:1 24GiB@900GB/s@1Gbit/s,2ms + 64GiB@80GB/s")
    here = qp.Machine.parse("24GiB@900GB/s + 64GiB@80GB/s")
    flags = "-ngl 99 -c 1024 -np 1"
    near_s, far_s = (
        1 / qp.predict(inventory, flags, m).speed.decode_tps(0).expected for m in (here, last)
    )
    logits_bytes = 4 * inventory.n_vocab
    assert far_s - near_s == pytest.approx(2e-3 + (row_bytes + logits_bytes) / 125e6)


def test_weights_in_ram_are_not_streamed_over_a_network() -> None:
    """Large batches stay on the CPU where the only GPU is another host's, and its buffer is small;
    a buffer type with its address is that GPU.
    """
    inventory = toy_inventory([512] * 4, experts=8)
    flags = "-ngl 99 -c 1024 -np 1 -ub 512 --cpu-moe"
    far = qp.Machine.parse("RPC a:1 24GiB@900GB/s@100000Gbit/s,0ms + 64GiB@80GB/s")
    near = qp.Machine.parse("24GiB@900GB/s + 64GiB@80GB/s")
    found, kept, local = (
        qp.predict(inventory, text, machine)
        for text, machine in ((flags, far), (f"{flags} --no-op-offload", near), (flags, near))
    )
    assert found.devices[0].compute_bytes == kept.devices[0].compute_bytes
    assert found.devices[0].compute_bytes < local.devices[0].compute_bytes
    assert found.speed.prefill_tps(0).expected == pytest.approx(
        kept.speed.prefill_tps(0).expected, rel=0.01
    )
    moved = qp.predict(inventory, "-ngl 99 -c 1024 -np 1 -ot exps=RPC0[a:1]", far)
    plain = qp.predict(inventory, "-ngl 99 -c 1024 -np 1", far)
    assert moved.devices[0].weights_bytes == plain.devices[0].weights_bytes


def test_the_bound_knows_the_way_to_the_output() -> None:
    """Where all GPUs are another host's, no plan does without the way there and the logits back."""
    machine = qp.Machine.parse("2x RPC a:1 RTX 3060@1Gbit/s,0.2ms + 64GiB@80GB/s")
    found = qp.plan(qp.read_inventory("Qwen3-30B-A3B"), machine, qp.Workload(context=16384))
    assert found.gap < 0.03


def test_only_servers_that_the_machine_lacks_are_told_not_to_count() -> None:
    """A plan's own ``--rpc`` goes without saying; a server that the machine lacks is told."""
    inventory, machine = toy_inventory([512, 512], experts=0), qp.Machine.parse(TEXT)
    recipe = qp.plan(inventory, machine, baselines=False).recipe
    assert "--rpc" in recipe.flags
    assert not [note for note in qp.predict(inventory, recipe, machine).notes if "--rpc" in note]
    flags = "-ngl 99 --rpc 192.168.1.7:50052,b:1 -fit off"
    (note,) = [note for note in qp.predict(inventory, flags, machine).notes if "--rpc" in note]
    assert note.startswith("--rpc b:1: the machine has no device there")
