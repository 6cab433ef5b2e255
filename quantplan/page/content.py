"""What the page shows, as data: the page's script draws everything from it."""

import datetime
from collections.abc import Sequence

from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable
from quantplan.costs.speed import SpeedEstimate
from quantplan.inventory import Inventory
from quantplan.page.assumptions import Assumption, assumptions
from quantplan.page.loss import LossInterval, loss_interval
from quantplan.planner.baselines import Baseline
from quantplan.plans.result import Plan
from quantplan.qtypes import qtype
from quantplan.recipe import Recipe
from quantplan.schema import Frozen
from quantplan.usage import PARTS, memory_maps
from quantplan.version import __version__


class ShownDevice(Frozen):
    """What holds the memory of one device; see `MemoryMap`."""

    name: str
    model: str
    capacity_bytes: int
    margin_bytes: int
    parts: dict[str, int]


class ShownDepth(Frozen):
    """Speed with so many tokens in the context."""

    depth: int
    decode_tps: SpeedEstimate
    prefill_tps: SpeedEstimate


class ShownPlan(Frozen):
    """One plan on the page.

    Attributes:
        command: Command line of llama-server.
        status: ``optimal``, ``within_gap``, ``gap_left`` or ``time_limit``.
        gap: Proven relative gap of the objective.
        context: Tokens of context.
        file_bytes: Tensor data of the file.
        bpw: Bits per weight of the file.
        loss_nats: Predicted loss, with its 80 % interval where the model's tensors are known.
        speed: Speeds at rising depths, with 80 % intervals.
        devices: What holds the memory.
        types: Index in `Content.qtypes` of every tensor's type.
        places: Index in `Content.places` of every tensor's device; -1 where it is not loaded.
        notes: What a person should know.
        recipe: The recipe without its tensors, which `types` and `places` have.
    """

    command: str
    status: str
    gap: float
    context: int
    file_bytes: int
    bpw: float
    loss_nats: LossInterval | float
    speed: tuple[ShownDepth, ...]
    devices: tuple[ShownDevice, ...]
    types: tuple[int, ...]
    places: tuple[int, ...]
    notes: tuple[str, ...]
    recipe: dict[str, object]


class ShownType(Frozen):
    """A type, and the bits that one of its weights takes."""

    name: str
    bpw: float


class ShownTensor(Frozen):
    """A tensor, and what of it no plan changes."""

    name: str
    role: str
    layer: int | None
    shape_ne: tuple[int, ...]
    is_quantizable: bool


class Content(Frozen):
    """Everything on the page.

    Attributes:
        version: Version of quantplan.
        date: Day on which the page was made.
        model: Name of the model.
        source: Where its tensors were read from.
        machine: The machine, for people.
        workload: What it is asked to do, for people.
        parts: Words for what holds memory; see `usage.PARTS`.
        qtypes: Types that occur.
        places: Devices by name.
        tensors: All tensors, in file order.
        plans: The plan and other points of the frontier, from the slowest to the fastest.
        chosen: Index of the plan among them.
        without_frontier: Why there are no other points; None where there are, or may be.
        baselines: Plain answers, the best first.
        assumptions: What the numbers rest on.
    """

    version: str
    date: str
    model: str
    source: str
    machine: str
    workload: str
    parts: dict[str, str]
    qtypes: tuple[ShownType, ...]
    places: tuple[str, ...]
    tensors: tuple[ShownTensor, ...]
    plans: tuple[ShownPlan, ...]
    chosen: int
    without_frontier: str | None
    baselines: tuple[Baseline, ...]
    assumptions: tuple[Assumption, ...]


def page_content(
    plan: Plan,
    others: Sequence[Plan] = (),
    *,
    inventory: Inventory | None = None,
    evidence: Evidence | None = None,
    without_frontier: str | None = None,
    date: datetime.date | None = None,
) -> Content:
    """Gathers what the page shows of a plan.

    Args:
        plan: The plan.
        others: Plans for the same model, machine and workload: other points of the frontier.
        inventory: The model, for the interval of the loss.
        evidence: What was measured of the model's losses and the plan was made with.
        without_frontier: Why there are no others.
        date: Day to put on the page; today by default.
    """
    plans = sorted([plan, *others], key=lambda p: p.predicted.decode_tps)
    names = sorted({a.qtype for p in plans for a in p.assignments}, key=_by_size)
    places = tuple(device.name for device in plan.devices)
    table = None if inventory is None else LossTable(inventory, evidence)
    shown = []
    for each in plans:
        types = {a.tensor: a.qtype for a in each.assignments}
        loss: LossInterval | float = each.predicted.loss_nats
        if inventory is not None and table is not None:
            loss = loss_interval(table, inventory, types)
        shown.append(_shown(each, loss, names, places))
    return Content(
        version=__version__,
        date=(date or datetime.date.today()).isoformat(),
        model=plan.model,
        source=plan.provenance.source,
        machine=plan.machine.describe(),
        workload=_workload(plan),
        parts=dict(PARTS),
        qtypes=tuple(ShownType(name=name, bpw=qtype(name).bpw) for name in names),
        places=places,
        tensors=tuple(
            ShownTensor(
                name=t.name,
                role=t.role,
                layer=t.layer,
                shape_ne=t.shape_ne,
                is_quantizable=t.is_quantizable,
            )
            for t in plan.recipe.inventory_tensors
        ),
        plans=tuple(shown),
        chosen=plans.index(plan),
        without_frontier=without_frontier,
        baselines=plan.baselines,
        assumptions=assumptions(plan),
    )


def _by_size(name: str) -> tuple[float, str]:
    return (qtype(name).bpw, name)


def _shown(
    plan: Plan, loss: LossInterval | float, names: Sequence[str], places: Sequence[str]
) -> ShownPlan:
    of_type = {name: i for i, name in enumerate(names)}
    of_place = {name: i for i, name in enumerate(places)}
    recipe: Recipe = plan.recipe
    return ShownPlan(
        command=plan.llama_server_command("model.gguf"),
        status=plan.status,
        gap=plan.gap,
        context=plan.workload.context,
        file_bytes=plan.predicted.file_bytes,
        bpw=plan.predicted.bpw,
        loss_nats=loss,
        speed=tuple(
            ShownDepth(depth=p.depth, decode_tps=p.decode_tps, prefill_tps=p.prefill_tps)
            for p in plan.speed.points
        ),
        devices=tuple(
            ShownDevice(
                name=m.name,
                model=m.model,
                capacity_bytes=m.capacity_bytes,
                margin_bytes=m.margin_bytes,
                parts=m.parts,
            )
            for m in memory_maps(plan.devices, plan.assignments)
        ),
        types=tuple(of_type[a.qtype] for a in plan.assignments),
        places=tuple(-1 if a.device is None else of_place[a.device] for a in plan.assignments),
        notes=plan.notes,
        recipe=recipe.model_dump(mode="json", exclude={"tensors"}),
    )


def _workload(plan: Plan) -> str:
    work, asked = plan.workload, plan.provenance.min_decode_tps
    kv = (
        work.kv_type_k if work.kv_type_k == work.kv_type_v else f"{work.kv_type_k}/{work.kv_type_v}"
    )
    said = [f"{work.context} tokens of context", f"KV cache {kv}"]
    if work.slots > 1:
        said.append(f"{work.slots} slots")
    if asked is not None:
        said.append(f"at least {asked:g} tokens/s asked for")
    return ", ".join(said)
