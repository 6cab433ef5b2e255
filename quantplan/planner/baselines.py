"""The plain answers that a plan is measured against, under the same predictions.

Types that people use without a planner (stock mixes as llama-quantize assigns them, ``hq4k``, one
type for all) in the best placements that plain flags make (``--fit``, ``--cpu-moe``,
``--n-cpu-moe N``, ``--n-cpu-ffn N``, ``-ngl N``).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from quantplan.costs.quality import LossTable, type_errors
from quantplan.costs.speed import Z80, SpeedEstimate, difference_s, interval, predict_traffic
from quantplan.costs.traffic import Where, collect
from quantplan.errors import InputError
from quantplan.formats.llama_cpp import workload_flags
from quantplan.ftypes.mixes import published_mix
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory, RoleClass
from quantplan.planner.fit import fit
from quantplan.planner.plain import N_PARTS, Layouts, Outcomes, PlainCosts, TypedModel, parts_of
from quantplan.planner.problem import Problem
from quantplan.policy import SOURCE, policy
from quantplan.qtypes import QTYPES, fitting_qtype, qtype
from quantplan.schema import Frozen

# The mixes that are published for most models.
_STOCK_MIXES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "MXFP4_MOE", "IQ4_XS", "Q3_K_L",
    "Q3_K_M", "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_M",
)  # fmt: skip
AS_IT_IS = "as it is"
# Part of the speed below which a difference is no reason for anything: repeated runs of llama-bench
# scatter by a few percent.
_NOTICEABLE = 0.05
# A limit may be a mix's own loss, through the link and back.
_SAME_LOSS = 1e-6


class Baseline(Frozen):
    """A plain answer and what to expect of it.

    Attributes:
        types: Name of the mix, ``--pure`` and a type, ``hq4k``, or ``as it is``.
        placement: The flags that make the placement; ``--fit`` stands for what it comes to.
        fits: Whether every device keeps its margin.
        reaches_speed: Whether it decodes as fast as the plan was asked to.
        reaches_goal: Whether it keeps to every limit that the plan was asked to keep to.
        is_as_good: Whether the plan is better by no more than its uncertainty: the models are less
            than 90 % sure that it has less loss, and that it is faster, or that is below 5 %.
        below_floor: Classes of tensors whose types are below the floors of the plan's policy.
        file_bytes: Tensor data of the file.
        vram_bytes: Memory used on all GPUs, compute buffers included.
        ram_bytes: The same in RAM.
        decode_tps: Tokens per second of one request with the context full, with its interval.
        loss_nats: Mean KL divergence from the unquantized model, nats per token.
        flags: Flags for llama.cpp, one argument each.
    """

    types: str
    placement: str
    fits: bool
    reaches_speed: bool
    reaches_goal: bool
    is_as_good: bool
    below_floor: tuple[RoleClass, ...]
    file_bytes: int
    vram_bytes: int
    ram_bytes: int
    decode_tps: SpeedEstimate
    loss_nats: float
    flags: tuple[str, ...]

    @property
    def is_answer(self) -> bool:
        """Whether it does what the plan was asked to do."""
        return self.fits and self.reaches_goal

    def describe(self) -> str:
        """Types and placement in a few words."""
        return f"{self.types} with {self.placement}"


@dataclass(frozen=True)
class _TypeSet:
    """What does not depend on the placement."""

    name: str
    summed_loss_nats: float
    expected_nats: float
    file_bytes: int
    below_floor: tuple[RoleClass, ...]


@dataclass(frozen=True)
class _Placed:
    """One placement of a model in given types: number ``index`` of some that were evaluated."""

    name: str
    flags: tuple[str, ...]
    model: TypedModel
    layouts: Layouts
    outcomes: Outcomes
    index: int

    @property
    def where(self) -> Where:
        """Whether GPUs, the CPU or both multiply weights."""
        return self.model.where(self.layouts, self.index)

    @property
    def seconds_by_type(self) -> dict[tuple[str, str], float]:
        """Decode seconds by device name and type."""
        costs = self.model.costs
        parts, homes = self.layouts.parts[self.index], self.layouts.homes[self.index]
        return self.model.seconds_by_type(parts[costs.part, costs.layer], homes)

    @property
    def homes(self) -> bytes:
        """What tells placements apart."""
        homes, parts = self.layouts.homes[self.index], self.layouts.parts[self.index]
        return bytes(homes.tobytes() + parts.tobytes())


def find_baselines(
    problem: Problem,
    losses: LossTable,
    chosen: Mapping[str, tuple[str, str]],
    expected: LossTable | None = None,
) -> tuple[Baseline, ...]:
    """Every plain answer, the best first.

    Args:
        problem: Model, machine, workload, policy, speed target and layers of the plan.
        losses: The loss table that the plan was made with.
        chosen: The plan's type and device name of each loaded tensor.
        expected: The table of expected losses, where the plan was made against their upper end.

    Returns:
        Answers that fit and are fast enough first, by the plan's objective, then by speed.
    """
    inventory = problem.inventory
    costs = PlainCosts(
        inventory,
        problem.machine,
        problem.workload,
        plans_with_high_end=problem.plans_with_high_end,
    )
    types = {name: kind for name, (kind, _) in chosen.items()}
    plan_s = _plan_seconds(problem, costs, chosen)
    found = []
    expected = expected or losses
    for name, qtypes in type_sets(inventory).items():
        typed = _typed(problem, costs, losses, name, qtypes, expected=expected)
        difference, sd = expected.difference_nats(types, qtypes)
        has_less_loss = difference < -Z80 * sd
        for placed in _placements(TypedModel(costs, qtypes)):
            made = _baseline(problem, typed, placed)
            if made.is_answer and not has_less_loss:
                is_as_good = not _is_faster(problem.machine, plan_s, placed.seconds_by_type)
                made = made.model_copy(update={"is_as_good": is_as_good})
            seconds = 1 / made.decode_tps.expected
            objective = problem.loss_weight * typed.summed_loss_nats
            objective += problem.decode_price_nats_per_s * seconds
            found.append((not made.is_answer, objective, seconds, made))
    found.sort(key=lambda entry: entry[:3])
    return tuple(made for *_, made in found)


def _plan_seconds(
    problem: Problem, costs: PlainCosts, chosen: Mapping[str, tuple[str, str]]
) -> dict[tuple[str, str], float]:
    index = {device.name: d for d, device in enumerate(problem.machine.devices)}
    devices = [index[chosen[tensor.name][1]] for tensor in costs.in_layers]
    homes = [index[name] for name in (*problem.layer_devices, problem.output_device.name)]
    typed = TypedModel(costs, {name: kind for name, (kind, _) in chosen.items()})
    return typed.seconds_by_type(np.array(devices, np.intp), np.array(homes, np.intp))


def _is_faster(
    machine: Machine,
    seconds: Mapping[tuple[str, str], float],
    others: Mapping[tuple[str, str], float],
) -> bool:
    """Whether decoding is noticeably faster, and by more than the model is unsure of."""
    difference, sd = difference_s(seconds, others, machine)
    return -difference > max(Z80 * sd, _NOTICEABLE * sum(seconds.values()))


def type_sets(inventory: Inventory) -> dict[str, dict[str, str]]:
    """Types by full tensor name, by the name of the mix; equal ones once."""
    changeable = [t for t in inventory.tensors if t.is_quantizable and qtype(t.qtype).is_float]
    sets: dict[str, dict[str, str]] = {AS_IT_IS: {}}
    if not changeable:
        return sets
    names = {t.name for t in changeable}
    for name in _STOCK_MIXES:
        try:
            mix = published_mix(inventory, name)
        except InputError:  # llama-quantize stops at this model, or its metadata are not known
            continue
        sets[name] = {tensor: kind for tensor, kind in mix.items() if tensor in names}
    hand_made, rules = policy("hq4k"), policy()
    if inventory.architecture.n_expert:
        sets[hand_made.name] = {
            t.name: hand_made.candidates_for(t, is_loaded=inventory.is_loaded(t))[0]
            for t in changeable
        }
    for name in rules.candidates:
        if name != SOURCE:
            fitting = {t.name: fitting_qtype(name, t.shape_ne[0]) for t in changeable}
            sets[f"--pure {name}"] = {
                t.name: fits.name if (fits := fitting[t.name]) else t.qtype for t in changeable
            }
    unique: dict[tuple[str, ...], str] = {}
    for name, types in sets.items():
        key = tuple(types.get(t.name, t.qtype) for t in changeable)
        if set(key) <= type_errors().keys() | {t.qtype for t in changeable}:
            unique.setdefault(key, name)
    return {name: sets[name] for name in unique.values()}


def _placements(model: TypedModel) -> Iterator[_Placed]:
    """The best placement of each kind of flags; equal ones once, under the simplest name."""
    seen = set()
    for placed in _all_placements(model):
        if placed.homes not in seen:
            seen.add(placed.homes)
            yield placed


def _all_placements(model: TypedModel) -> Iterator[_Placed]:
    costs = model.costs
    n_all = costs.n_layers + 1
    if not costs.machine.gpus:
        yield _best(model, costs.layouts([costs.homes(0)]), lambda n: ("-ngl", str(n)))
        return
    everywhere = costs.all_homes
    yield _best(model, costs.layouts(everywhere), lambda n: ("-ngl", str(n)))
    is_moe = costs.inventory.architecture.n_expert > 0
    moved = np.full((N_PARTS, costs.n_layers), -1)
    moved[parts_of(kinds=["experts"] if is_moe else ["dense"])] = costs.ram
    if is_moe:
        layouts = costs.layouts(everywhere, [moved] * len(everywhere))
        yield _best(model, layouts, lambda n: ("-ngl", str(n), "--cpu-moe"))
    flag = "--n-cpu-moe" if is_moe else "--n-cpu-ffn"
    layers = np.arange(costs.n_layers)
    of_first = [np.where(layers < n, moved, -1) for n in range(n_all)]
    layouts = costs.layouts([everywhere[-1]] * n_all, of_first)
    yield _best(model, layouts, lambda n: ("-ngl", str(n_all), flag, str(n)))
    fitted = fit(model)
    yield _Placed("--fit", fitted.flags, model, fitted.layout, fitted.outcome, 0)


def _best(model: TypedModel, layouts: Layouts, flags: Callable[[int], tuple[str, ...]]) -> _Placed:
    """The best one of the placements that a flag makes with the numbers from 0."""
    outcomes = model.evaluate(layouts)
    made = flags(outcomes.best)
    # What puts all layers on GPUs goes without saying, as it does for llama.cpp.
    is_all = made[1] == str(model.costs.n_layers + 1)
    name = " ".join(made[2:] if is_all and made[2:] else made)
    return _Placed(name, made, model, layouts, outcomes, outcomes.best)


def _typed(
    problem: Problem,
    costs: PlainCosts,
    losses: LossTable,
    name: str,
    qtypes: Mapping[str, str],
    *,
    expected: LossTable,
) -> _TypeSet:
    inventory = problem.inventory
    by_name = inventory.by_name
    return _TypeSet(
        name=name,
        summed_loss_nats=sum(losses.loss_nats(by_name[t], kind) for t, kind in qtypes.items()),
        expected_nats=expected.model_kld_nats(qtypes),
        # A file aligns tensors as a buffer in RAM does.
        file_bytes=sum(
            costs.price(t, qtypes.get(t.name, t.qtype)).n_bytes for t in inventory.tensors
        ),
        below_floor=_below_floor(problem, qtypes),
    )


def _baseline(problem: Problem, typed: _TypeSet, placed: _Placed) -> Baseline:
    used = [int(n) for n in placed.outcomes.n_bytes[placed.index]]
    decode_s = float(placed.outcomes.decode_s[placed.index])
    target = problem.goal.min_decode_tps
    reaches_speed = target is None or decode_s * target <= 1
    return Baseline(
        types=typed.name,
        placement=placed.name,
        fits=not placed.outcomes.over_bytes[placed.index],
        reaches_speed=reaches_speed,
        reaches_goal=reaches_speed and _keeps_to_limits(problem, typed, placed),
        is_as_good=False,
        below_floor=typed.below_floor,
        file_bytes=typed.file_bytes,
        vram_bytes=sum(used[:-1]),
        ram_bytes=used[-1],
        decode_tps=interval("decode", placed.where, problem.machine, 1 / decode_s),
        loss_nats=typed.expected_nats,
        flags=(*placed.flags, *workload_flags(problem.workload)),
    )


def _keeps_to_limits(problem: Problem, typed: _TypeSet, placed: _Placed) -> bool:
    """Whether loss, size and turn are within the limits of the plan's goal."""
    goal, most = problem.goal, problem.max_summed_loss_nats
    if most is not None and typed.summed_loss_nats > most * (1 + _SAME_LOSS):
        return False
    if goal.max_file_bytes is not None and typed.file_bytes > goal.max_file_bytes:
        return False
    return goal.max_turn_s is None or _turn_s(problem, placed) <= goal.max_turn_s


def _turn_s(problem: Problem, placed: _Placed) -> float:
    """Seconds for the workload's prompt and answer."""
    costs, qtypes = placed.model.costs, placed.model.qtypes
    names = [device.name for device in problem.machine.devices]
    parts = placed.layouts.parts[placed.index][costs.part, costs.layer].tolist()
    *layers, output = (names[d] for d in placed.layouts.homes[placed.index].tolist())
    places = {tensor.name: names[d] for tensor, d in zip(costs.in_layers, parts, strict=True)}
    for tensor in costs.outside:
        in_ram = tensor.role_class == "embedding"
        places[tensor.name] = problem.machine.ram.name if in_ram else output
    by_name = problem.inventory.by_name
    assignment = {t: (qtypes.get(t, by_name[t].qtype), device) for t, device in places.items()}
    traffic = collect(problem.inventory, assignment, layers[: problem.n_layers], output)
    speed = predict_traffic(traffic, problem.machine, problem.workload)
    work = problem.workload
    return speed.turn_s(work.prompt_tokens, work.answer_tokens).expected


def _below_floor(problem: Problem, qtypes: Mapping[str, str]) -> tuple[RoleClass, ...]:
    by_name, rules = problem.inventory.by_name, problem.policy
    pairs = {(by_name[tensor].role_class, kind) for tensor, kind in qtypes.items()}
    return tuple(
        sorted(
            {
                role_class
                for role_class, kind in pairs
                if (floor := rules.rule(role_class).floor) and QTYPES[kind].bpw < QTYPES[floor].bpw
            }
        )
    )
