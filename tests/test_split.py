"""Which layer is on which device before the types are chosen."""

from itertools import accumulate, groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import Device, Inventory, Machine, Workload, policy
from quantplan.planner.goal import Goal
from quantplan.planner.problem import Problem, build_problem
from quantplan.planner.split import least_layer_bytes, neighbours, split_layers
from tests.support.models import toy_inventory

MIB = 2**20
untimed = settings(max_examples=50, deadline=None)
N_LAYERS = 12
WORKLOAD = Workload(context=4096, ubatch=64)
INVENTORY = toy_inventory([512] * N_LAYERS)
UNEQUAL = toy_inventory([64 * (1 + layer % 5) for layer in range(N_LAYERS)], experts=4)


def problem(*gpu_mib: float, inventory: Inventory = INVENTORY) -> Problem:
    """A problem on GPUs of the given sizes."""
    gpus = tuple(
        Device.gpu(d, int(mib * MIB), 1e12, margin_bytes=0) for d, mib in enumerate(gpu_mib)
    )
    machine = Machine(gpus=gpus, ram=Device.ram(2**30, 1e11))
    return build_problem(inventory, machine, WORKLOAD, policy(), Goal())


SIZES = st.lists(st.floats(0, 64), min_size=1, max_size=4)
INVENTORIES = st.sampled_from([INVENTORY, UNEQUAL])


@untimed
@given(SIZES, st.integers(0, N_LAYERS), INVENTORIES)
def test_every_layer_has_a_device_in_order(
    gpu_mib: list[float], n_cpu: int, inventory: Inventory
) -> None:
    """The first layers asked for are in RAM, and all others on GPUs in ascending order."""
    layers = split_layers(problem(*gpu_mib, inventory=inventory), n_cpu)
    assert len(layers) == N_LAYERS
    assert layers[:n_cpu] == ("CPU",) * n_cpu
    gpus = [int(name.removeprefix("GPU")) for name in layers[n_cpu:]]
    assert gpus == sorted(gpus)
    assert all(0 <= gpu < len(gpu_mib) for gpu in gpus)


@untimed
@given(
    st.lists(st.floats(2, 64), min_size=2, max_size=4), st.integers(0, N_LAYERS - 1), INVENTORIES
)
def test_layers_are_spread_in_proportion_to_the_room(
    gpu_mib: list[float], n_cpu: int, inventory: Inventory
) -> None:
    """The first GPUs hold the share of the bytes that is their share of the room, to a layer."""
    made = problem(*gpu_mib, inventory=inventory)
    layers = split_layers(made, n_cpu)
    sizes = least_layer_bytes(made)
    output = sum(group.options[-1].n_bytes for group in made.groups if group.place == "output")
    room = [
        gpu.usable_bytes - made.compute_bytes(gpu) - (output if gpu is gpus[-1] else 0)
        for gpus in [made.machine.gpus]
        for gpu in gpus
    ]
    held = [
        sum(n for n, name in zip(sizes, layers, strict=True) if name == gpu.name)
        for gpu in made.machine.gpus
    ]
    for held_so_far, room_so_far in zip(accumulate(held), accumulate(room), strict=True):
        wanted = sum(held) * room_so_far / sum(room)
        assert held_so_far == pytest.approx(wanted, abs=max(sizes[n_cpu:]) / 2 + 1)


def test_equal_gpus_get_equal_runs() -> None:
    """Three GPUs with equal room for layers get a third of them each."""
    made = problem(16, 16, 16)
    output = sum(group.options[-1].n_bytes for group in made.groups if group.place == "output")
    made = problem(16, 16, 16 + output / MIB + 136 * 4 / MIB)
    runs = [(name, len(list(run))) for name, run in groupby(split_layers(made, 0))]
    assert runs == [("GPU0", 4), ("GPU1", 4), ("GPU2", 4)]


def test_without_a_gpu_all_layers_are_in_ram() -> None:
    """A machine without a GPU holds all layers in RAM, whatever is asked for."""
    assert split_layers(problem(), 0) == ("CPU",) * N_LAYERS


def test_a_layer_needs_its_cache_and_what_cannot_leave() -> None:
    """The bytes that a layer needs are those of its cache and of its attention at Q8_0."""
    cache = 4096 * 2 * (2 * 64) * 2
    norms = 256 * 4
    attention = (2 * 512 + 2 * 128) * 256 * 34 // 32
    assert least_layer_bytes(problem(64)) == [cache + norms + attention] * N_LAYERS


@untimed
@given(st.integers(1, 4), st.data())
def test_neighbours_move_one_boundary(n_gpus: int, data: st.DataObject) -> None:
    """Neighbours are all splits, and only those, in which one boundary is a layer further, or the
    one to RAM four layers.
    """
    names = ["CPU", *(f"GPU{d}" for d in range(n_gpus))]
    drawn = st.lists(st.sampled_from(range(n_gpus + 1)), min_size=N_LAYERS, max_size=N_LAYERS)
    layers = sorted(data.draw(drawn))
    before = [sum(device <= boundary for device in layers) for boundary in range(n_gpus)]
    expected = set()
    for boundary in range(n_gpus):
        for step in (-4, -1, 1, 4) if boundary == 0 else (-1, 1):
            after = [cut + step * (b == boundary) for b, cut in enumerate(before)]
            bounds = [0, *after, N_LAYERS]
            if all(a <= b for a, b in pairwise(bounds)):
                runs = zip(names, pairwise(bounds), strict=True)
                expected.add(tuple(name for name, (a, b) in runs for _ in range(b - a)))
    found = list(neighbours(problem(*[64] * n_gpus), tuple(names[device] for device in layers)))
    assert len(found) == len(set(found))
    assert set(found) == expected
