"""The optimiser, compared with counting every choice out."""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from quantplan import (
    Device,
    Inventory,
    Machine,
    NoPlanError,
    Plan,
    Tensor,
    Workload,
    plan,
    policy,
)
from quantplan import read_inventory as read
from quantplan.costs import memory
from quantplan.costs.compute import Work, estimate
from quantplan.placement import Launch
from quantplan.planner import linear
from quantplan.planner.linear import LinearProgram
from quantplan.planner.problem import Problem
from quantplan.planner.search import Limits
from quantplan.planner.search import solve as search
from quantplan.planner.solution import Solution
from quantplan.planner.solve import solve_split
from tests.support.compute import graph_bytes
from tests.support.counting import (
    FACTORS,
    OFFLOAD_MIN_BATCH,
    Task,
    attention_s,
    best,
    boundary_seconds,
    bytes_on,
    every_choice,
    hop_seconds,
    is_tied,
    raw_bytes,
    seconds,
)
from tests.support.models import toy_inventory

GAP = 1e-4
# The solver and the fastest placement of its types may each stop at the gap.
SLACK = 1 + 2.5 * GAP
# With several GPUs the search over the splits stops at a gap of 0.1 %.
SPLIT_SLACK = 1 + 2.5e-3
NATS = 1e-8
solving = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# Small random problems.

CANDIDATES = st.sampled_from(["Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K"])
# Three decisions a layer in a dense model, two with experts.
# Numbers of layers and of types, from and to, and the number of experts.
MODELS = [((1, 2), (2, 2), 0), ((1, 3), (2, 2), 4), ((2, 2), (3, 3), 4)]


@st.composite
def tasks(draw: st.DrawFn, n_gpus: Sequence[int] = (1, 2, 1, 0)) -> Task:
    """A model of a few MB on GPUs that hold a part of it."""
    (fewest, most), (low, high), experts = draw(st.sampled_from(MODELS))
    n_layers = draw(st.integers(fewest, most))
    same = draw(st.booleans())
    width = st.integers(1, 24).map(lambda n: 32 * n)
    widths = draw(st.lists(width, min_size=n_layers, max_size=n_layers))
    inventory = toy_inventory(
        widths[:1] * n_layers if same else widths,
        experts=experts,
        has_tied_output=draw(st.booleans()),
    )
    types = draw(st.lists(CANDIDATES, min_size=low, max_size=high, unique=True))
    rules = policy().model_copy(update={"candidates": tuple(types)})
    workload = Workload(
        context=draw(st.sampled_from([256, 1000, 4096])),
        slots=draw(st.sampled_from([1, 2])),
        ubatch=draw(st.sampled_from([16, 64])),
    )
    share = st.integers(1, 30).map(lambda n: n / 20)
    rate = st.integers(1, 100).map(lambda n: n * 1e7)
    on_gpu, in_ram = (graph_bytes(inventory, workload, k) + 2**16 for k in ("gpu", "cpu"))
    n_bytes = inventory.n_bytes // 2 + sum(memory.cache_bytes(inventory.architecture, workload))
    machine = Machine(
        gpus=tuple(
            Device.gpu(
                d, on_gpu + int(draw(share) * n_bytes), draw(rate), margin_bytes=draw(MARGINS)
            )
            for d in range(draw(st.sampled_from(n_gpus)))
        ),
        ram=Device.ram(in_ram + int((draw(share) + 0.3) * n_bytes), draw(rate) / 4, margin_bytes=0),
    )
    names = [device.name for device in (machine.ram, *machine.gpus)]
    layers = draw(st.lists(st.sampled_from(names), min_size=n_layers, max_size=n_layers))
    task = Task(inventory, machine, workload, rules, tuple(sorted(layers, key=names.index)))
    if draw(st.booleans()):
        return task
    found = every_choice(task)
    if not found.fits.any():
        return task
    wanted_s = float(np.quantile(found.seconds[found.fits], draw(st.floats(0, 1))))
    target = draw(st.sampled_from([1.0, 1.01])) / wanted_s
    return Task(inventory, machine, workload, rules, task.layers, target)


def solve(problem: Problem, gap: float = 1e-4) -> Solution | None:
    """The solution for the problem's own split of the layers."""
    return solve_split(problem, gap, 60.0)


MARGINS = st.sampled_from([0, 1000])


def slack(task: Task) -> float:
    """How much larger than the best an answer may be."""
    return SPLIT_SLACK if len(task.machine.gpus) > 1 else SLACK


@solving
@given(tasks())
def test_a_solution_is_as_good_as_counting_every_choice_out(task: Task) -> None:
    """The objective is within the gap of the best of all combinations of types and places."""
    solution = solve(task.problem, gap=GAP)
    if solution is None:
        assert not every_choice(task).fits_easily.any()
        return
    # With several GPUs the layers may have moved to a better split.
    same_split = replace(task, layers=solution.layer_devices)
    assert solution.objective_nats >= best(same_split) - NATS
    assert solution.objective_nats <= best(same_split, easily=True) * slack(task) + NATS


@solving
@given(tasks())
def test_no_solution_means_that_there_is_none(task: Task) -> None:
    """None is returned where no combination fits, and only there."""
    found = every_choice(task)
    assume(found.fits.any() == found.fits_easily.any())  # else the held-back bytes decide
    assert (solve(task.problem) is not None) == found.fits.any()


@solving
@given(tasks(n_gpus=(1, 2)))
def test_types_are_on_the_fastest_places_that_hold_them(task: Task) -> None:
    """No other placement of the chosen types is faster by more than the gap."""
    solution = solve(task.problem, gap=GAP)
    assume(solution is not None)
    assert isinstance(solution, Solution)
    groups = zip(task.problem.groups, solution.choices, strict=True)
    types = {
        tensor.name: qtype
        for group, (option, _) in groups
        for tensor, qtype in zip(group.tensors, option.qtypes, strict=True)
    }
    same_split = replace(task, layers=solution.layer_devices)
    found = every_choice(same_split, only=types)
    fastest = found.seconds[found.fits_easily].min(initial=math.inf)
    assert solution.decode_s <= fastest * slack(task)


def splits(task: Task) -> list[tuple[str, ...]]:
    """Every contiguous split with as many layers in RAM, over the GPUs up to the output's."""
    n_cpu = task.layers.count("CPU")
    gpus = task.machine.gpus
    names = [gpu.name for gpu in gpus[: gpus.index(task.last) + 1]]
    n_layers = len(task.layers) - n_cpu
    return [
        ("CPU",) * n_cpu + on_gpus for on_gpus in combinations_with_replacement(names, n_layers)
    ]


def is_unequal(machine: Machine) -> bool:
    """Whether the first GPU is unlike the last."""
    first, last = (machine.gpus[d].model_copy(update={"name": ""}) for d in (0, -1))
    return first != last


@solving
@given(tasks(n_gpus=(2,)))
def test_the_bound_holds_over_every_split(task: Task) -> None:
    """No split of the layers, with the output on any GPU, has a solution below the bound."""
    solution = search(task.problem, Limits(GAP, time.monotonic() + 60))
    assume(solution is not None)
    assert isinstance(solution, Solution)
    gpus = task.machine.gpus if is_unequal(task.machine) else task.machine.gpus[-1:]
    everywhere = min(
        best(replace(task, layers=layers, output=gpu.name), easily=True)
        for gpu in gpus
        for layers in splits(replace(task, output=gpu.name))
    )
    assert solution.bound_nats <= everywhere + NATS
    assert solution.bound_nats <= solution.objective_nats


@solving
@given(tasks(n_gpus=(0, 1)))
def test_the_status_is_what_the_gap_says(task: Task) -> None:
    """With time enough the gap is no larger than asked for, and `optimal` means none at all."""
    solution = solve(task.problem, gap=GAP)
    assume(solution is not None)
    assert isinstance(solution, Solution)
    assert 0 <= solution.gap <= SLACK - 1
    assert (solution.status == "optimal") == (solution.gap == 0)
    assert solution.is_closed


# Plans, audited from their assignments.


def output_device(made: Plan) -> str:
    """The last GPU with a share of the layers by the plan's own flags, or the CPU."""
    names = [device.name for device in made.machine.gpus]
    if "-ts" not in made.flags:
        return names[0] if names else "CPU"
    shares = made.flags[made.flags.index("-ts") + 1].split(",")
    return [name for name, share in zip(names, shares, strict=True) if share != "0"][-1]


def audit(made: Plan, inventory: Inventory) -> dict[str, dict[str, int]]:
    """Recompute what a plan puts on each device from its assignments alone."""
    gpus = [device.name for device in made.machine.gpus]
    last = output_device(made)
    found: dict[str, dict[str, int]] = {name: defaultdict(int) for name in (*gpus, "CPU")}
    layer_device: dict[int, str] = {}
    streamed = 0
    for assignment in made.assignments:
        tensor = inventory.by_name[assignment.tensor]
        if assignment.device is None:
            continue
        copies = [assignment.device]
        if is_tied(inventory, tensor) and gpus:
            copies.append(last)
        for name in copies:
            kind = "cpu" if name == "CPU" else "gpu"
            found[name]["buffer"] += bytes_on(kind, tensor, assignment.qtype)
            found[name]["weights"] += bytes_on("cpu", tensor, assignment.qtype)
        if tensor.layer is not None and tensor.role == "attn_norm":
            layer_device[tensor.layer] = assignment.device
        if tensor.layer is not None and assignment.device == "CPU":
            streamed = max(streamed, bytes_on("cpu", tensor, assignment.qtype))
    caches = memory.cache_bytes(inventory.architecture, made.workload)
    for layer, n_bytes in enumerate(caches):
        found[layer_device.get(layer, last)]["kv"] += n_bytes
    is_moved = any(
        assignment.device not in (None, layer_device.get(tensor.layer))
        for assignment in made.assignments
        for tensor in [inventory.by_name[assignment.tensor]]
        if tensor.layer is not None
    )
    is_pipeline = len(gpus) > 1 and not streamed and not is_moved
    streams = made.workload.ubatch >= OFFLOAD_MIN_BATCH
    for name, use in found.items():
        homes = [a for a in made.assignments if a.device == name]
        is_first = name == made.machine.devices[0].name
        work = Work(
            "cpu" if name == "CPU" else "gpu",
            has_layers=bool(use["kv"]),
            has_experts=any("_exps" in a.tensor for a in homes),
            has_output=name == last,
            streamed_bytes=streamed if name != "CPU" and is_first and streams else 0,
            n_input_copies=4 if is_pipeline else 1,
            is_first=is_first,
            streams=name != "CPU" and is_first and streams,
        )
        launch = Launch(workload=made.workload)
        buffer = estimate(inventory.architecture, inventory.n_vocab, launch, work)
        use |= {"low": buffer.low, "expected": buffer.expected, "high": buffer.high}
    return {name: dict(use) for name, use in found.items()}


def check_budgets(made: Plan, inventory: Inventory) -> None:
    """Hold every device of a plan against the audit and against its budget."""
    audited = audit(made, inventory)
    for device in made.devices:
        use = defaultdict(int, audited[device.name])
        assert device.weights_bytes == use["weights"]
        assert device.weights_bytes + device.padding_bytes == use["buffer"]
        assert device.kv_bytes == use["kv"]
        assert device.compute_low_bytes == use["low"]
        assert device.compute_bytes == use["expected"]
        assert device.compute_high_bytes == use["high"]
        used = use["buffer"] + use["kv"] + use["high"]
        assert device.free_bytes == device.capacity_bytes - used
        assert used <= device.capacity_bytes - device.margin_bytes


def decode_s(made: Plan, inventory: Inventory) -> float:
    """Seconds per token of a plan, recomputed from its assignments."""
    devices = {device.name: device for device in made.machine.devices}
    last = devices[output_device(made)]
    depth = made.workload.context / made.workload.n_streams
    layers = [a.device for a in made.assignments if a.tensor.endswith("attn_norm.weight")]
    assert all(layers)
    names = [str(name) for name in layers]
    total = float(FACTORS["fixed_s"]) + boundary_seconds(names, last.name)
    for assignment in made.assignments:
        tensor = inventory.by_name[assignment.tensor]
        if assignment.device is not None:
            home = devices[assignment.device]
            total += seconds(inventory, tensor, assignment.qtype, home, last)
            total += hop_seconds(inventory, tensor, home, names)
            if tensor.layer is not None and tensor.role == "attn_norm":
                total += attention_s(inventory, home, depth)
    return total


def try_plan(
    task: Task, machine: Machine | None = None, min_decode_tps: float | None = None
) -> Plan | None:
    """A plan, or None where there is none."""
    try:
        return plan(
            task.inventory,
            machine or task.machine,
            task.workload,
            min_decode_tps=min_decode_tps or task.min_decode_tps,
            policy=task.rules,
            gap=GAP,
        )
    except NoPlanError:
        return None


@solving
@given(tasks())
def test_plans_keep_within_their_budgets(task: Task) -> None:
    """Every device holds what a plan puts there, and every byte stated is found in the audit."""
    made = try_plan(task)
    assume(made is not None)
    assert isinstance(made, Plan)
    check_budgets(made, task.inventory)


@solving
@given(tasks())
def test_plans_reach_the_speed_asked_for(task: Task) -> None:
    """The stated speed is that of the assignments, and no less than asked for."""
    made = try_plan(task)
    assume(made is not None)
    assert isinstance(made, Plan)
    assert 1 / made.predicted.decode_tps == pytest.approx(decode_s(made, task.inventory))
    assert made.predicted.decode_tps >= (task.min_decode_tps or 0)


REAL = ["GLM-4.5-Air", "DeepSeek-V3.1-Terminus", "Qwen3-4B-Instruct-2507", "gemma-4-31B-it"]


@pytest.mark.parametrize("machine", ["RTX 4090 + 256GiB@200GB/s", "2x RTX 3090 + 256GiB@80GB/s"])
@pytest.mark.parametrize("model", REAL)
def test_plans_of_real_models_keep_within_their_budgets(model: str, machine: str) -> None:
    """The same holds for models of the catalog."""
    inventory = read(model)
    workload = Workload(context=16384, kv_type="q8_0", slots=2)
    check_budgets(plan(inventory, Machine.parse(machine), workload), inventory)


# More of anything does no harm.


def with_more(machine: Machine, what: str, factor: float) -> Machine:
    """A machine with more of one thing."""
    key = "capacity_bytes" if "memory" in what else "bandwidth_bytes_per_s"
    device = machine.ram if what.startswith("RAM") else machine.gpus[0]
    value = getattr(device, key) * factor
    more = device.model_copy(update={key: int(value) if "memory" in what else value})
    if what.startswith("RAM"):
        return machine.model_copy(update={"ram": more})
    return machine.model_copy(update={"gpus": (more, *machine.gpus[1:])})


def is_no_worse(more: Plan | None, less: Plan | None) -> bool:
    """Whether the first plan's objective is no worse than the second's, the gap aside.

    Layers must be on the GPU if they fit, which is no gain with a GPU that is hardly faster than
    RAM. Plans are compared only where the GPU is, and where as many layers are in RAM.
    """
    if less is None:
        return True
    gpus, ram = less.machine.gpus, less.machine.ram
    assume(all(gpu.bandwidth_bytes_per_s > 2 * ram.bandwidth_bytes_per_s for gpu in gpus))
    if more is None:
        return False
    assume(more.flags[:2] == less.flags[:2])  # -ngl
    found, known = more.provenance.objective_nats, less.provenance.objective_nats
    assert found is not None
    assert known is not None
    return found <= known * SLACK + NATS


@pytest.mark.parametrize("what", ["RAM memory", "RAM bandwidth", "GPU memory", "GPU bandwidth"])
@solving
@given(task=tasks(n_gpus=(1,)), factor=st.floats(1.0, 3.0))
def test_a_better_machine_has_no_worse_plan(what: str, task: Task, factor: float) -> None:
    """With the same layers in RAM, more memory or bandwidth never makes the objective worse."""
    better = with_more(task.machine, what, factor)
    assert is_no_worse(try_plan(task, better), try_plan(task))


@solving
@given(tasks(n_gpus=(0, 1)), st.floats(0.3, 1.0))
def test_a_lower_target_has_no_worse_plan(task: Task, factor: float) -> None:
    """With the same layers in RAM, a lower speed target never makes the objective worse."""
    target = task.min_decode_tps or 20.0
    lower = try_plan(task, min_decode_tps=target * factor)
    assert is_no_worse(lower, try_plan(task, min_decode_tps=target))


@solving
@given(tasks(n_gpus=(1,)), st.integers(0, 2**16))
def test_smaller_caches_have_no_worse_plan(task: Task, context: int) -> None:
    """With the same layers in RAM, a shorter context never makes the objective worse."""
    longer = task.workload.model_copy(update={"context": task.workload.context + context})
    more = Task(**{**vars(task), "workload": longer})
    assert is_no_worse(try_plan(task), try_plan(more))


# What a plan keeps to.


def by_name(made: Plan) -> dict[str, tuple[str, str | None]]:
    """Type and device of each tensor."""
    return {a.tensor: (a.qtype, a.device) for a in made.assignments}


@solving
@given(tasks(), st.randoms(use_true_random=False))
def test_the_order_of_the_tensors_plays_no_part(task: Task, random: "np.random.Generator") -> None:
    """A model whose file lists its tensors in another order gets the same plan."""
    made = try_plan(task)
    tensors = list(task.inventory.tensors)
    random.shuffle(tensors)
    shuffled = task.inventory.model_copy(update={"tensors": tuple(tensors)})
    again = try_plan(Task(**{**vars(task), "inventory": shuffled}))
    assert (made is None) == (again is None)
    if made is not None and again is not None:
        objectives = made.provenance.objective_nats, again.provenance.objective_nats
        assert objectives[0] == pytest.approx(objectives[1], rel=1e-12)
        assert by_name(made) == by_name(again)


@pytest.mark.parametrize("model", REAL)
def test_the_order_of_the_tensors_plays_no_part_in_real_models(model: str) -> None:
    """The same holds for models of the catalog, listed backwards."""
    inventory = read(model)
    backwards = inventory.model_copy(update={"tensors": inventory.tensors[::-1]})
    machine = Machine.parse("RTX 4090 + 256GiB@200GB/s")
    assert by_name(plan(backwards, machine)) == by_name(plan(inventory, machine))


@solving
@given(tasks())
def test_up_and_gate_experts_of_a_layer_are_alike(task: Task) -> None:
    """Up and gate experts of a layer have one type and one device."""
    made = try_plan(task)
    assume(made is not None)
    assert isinstance(made, Plan)
    found = by_name(made)
    pairs = [(n, n.replace("_up_", "_gate_")) for n in found if "_up_exps" in n]
    assert all(found[up] == found[gate] for up, gate in pairs)


@pytest.mark.parametrize("model", REAL)
def test_attention_keeps_at_least_q8_0(model: str) -> None:
    """However little memory there is, attention has 8 bits or more."""
    inventory = read(model)
    # Just enough for less than 6 bits per weight, the caches and the compute buffers.
    machine = Machine.parse(f"{inventory.n_weights * 0.62 / 0.95 + 2**30:.0f}B@200GB/s")
    made = plan(inventory, machine)
    attention = {
        a.qtype
        for a in made.assignments
        if inventory.by_name[a.tensor].role_class == "attention" and a.device
    }
    assert attention
    assert all(raw_bytes(EIGHT_BITS, qtype) >= 34 * 8 for qtype in attention)
    assert made.predicted.bpw < 6


EIGHT_BITS = Tensor(name="blk.0.attn_q.weight", shape_ne=(256, 1), qtype="Q8_0")


@solving
@given(tasks())
def test_layers_are_contiguous(task: Task) -> None:
    """Attention runs through RAM, then through the GPUs in order."""
    made = try_plan(task)
    assume(made is not None)
    assert isinstance(made, Plan)
    order = ["CPU", *(gpu.name for gpu in task.machine.gpus)]
    found = by_name(made)
    devices = [found[f"blk.{layer}.attn_q.weight"][1] for layer in range(len(task.layers))]
    places = [order.index(device) for device in devices if device]
    assert len(places) == len(task.layers)
    assert places == sorted(places)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is written to file descriptor 1 or 2, whatever the solver thinks of silence."""
    task = Task(
        toy_inventory([256, 512], experts=4),
        Machine(gpus=(Device.gpu(0, 2**23, 1e9),), ram=Device.ram(2**23, 1e8)),
        Workload(context=256, ubatch=64),
        policy(),
        ("GPU0", "GPU0"),
    )
    assert solve(task.problem) is not None
    assert capfd.readouterr() == ("", "")


# Several GPUs.


def plain_machine(*gpus: tuple[float, float], ram: tuple[float, float]) -> Machine:
    """A machine from (bytes, bytes per second) without margins."""
    return Machine(
        gpus=tuple(Device.gpu(d, int(n), rate, margin_bytes=0) for d, (n, rate) in enumerate(gpus)),
        ram=Device.ram(int(ram[0]), ram[1], margin_bytes=0),
    )


def test_a_speed_that_some_split_reaches_is_reached() -> None:
    """With a fast and a slow GPU, a speed that the fast one alone reaches is no refusal."""
    inventory = toy_inventory([512] * 8)
    workload = Workload(context=256, ubatch=64)
    slow_and_fast = plain_machine((2**28, 1e7), (2**28, 1e9), ram=(2**28, 1e7))
    only_fast = plain_machine((2**28, 1e9), ram=(2**28, 1e7))
    alone = plan(inventory, only_fast, workload)
    target = alone.predicted.decode_tps * 0.5
    made = plan(inventory, slow_and_fast, workload, min_decode_tps=target)
    assert made.predicted.decode_tps >= target


def test_layers_stay_on_the_gpus_if_some_split_fits() -> None:
    """Layers are not put into RAM while some split of them fits on the GPUs."""
    inventory = toy_inventory([512, 512])
    workload = Workload(context=256, ubatch=16)
    rules = policy().model_copy(update={"candidates": ("Q8_0", "Q4_K")})
    layer = 2**17 + (2 * 512 + 2 * 128) * 256 * 34 // 32 + 1024  # cache, attention at Q8_0, norm
    compute = graph_bytes(inventory, workload)
    output = 256 * 136 * 34 // 32 + 1024
    # The second GPU takes nine tenths of a layer beside the output, the first one both layers.
    first, second = compute + 2 * layer + 2**15, compute + output + layer * 9 // 10
    machine = plain_machine((first, 1e12), (second, 1e12), ram=(2**28, 1e8))
    for layers in (("GPU0", "GPU0"), ("CPU", "GPU0")):
        task = Task(inventory, machine, workload, rules, layers)
        assert every_choice(task).fits_easily.any()
    found = by_name(plan(inventory, machine, workload, policy=rules))
    assert [found[f"blk.{n}.attn_q.weight"][1] for n in range(2)] == ["GPU0", "GPU0"]


def test_a_solver_that_never_ends_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where HiGHS is blind to its time limit, the answer is that the time is up."""
    program = LinearProgram()
    x = program.add_variable("x", 1, is_integer=True)
    program.minimise({x: 1.0})
    is_over = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr("highspy.Highs.run", lambda _: is_over.wait())
        patched.setattr(linear, "_GRACE_S", 0.01)
        assert program.solve(time_limit_s=0.01).ending == "out_of_time"
    is_over.set()
    assert program.solve(time_limit_s=60.0).ending == "solved"
