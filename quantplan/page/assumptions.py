"""What the numbers of a plan rest on, each with its source."""

from collections.abc import Iterator
from typing import Any

from quantplan.costs import load_data
from quantplan.hardware.device import Device
from quantplan.hardware.table import load_hardware
from quantplan.plans.result import Plan
from quantplan.schema import Frozen
from quantplan.units import gb_per_s, gib


class Assumption(Frozen):
    """Something that is taken for granted.

    Attributes:
        what: What it is about.
        value: What is assumed.
        source: Where that comes from.
    """

    what: str
    value: str
    source: str


def assumptions(plan: Plan) -> tuple[Assumption, ...]:
    """What the numbers of a plan rest on: machine, runtime, cost models, policy, search."""
    return (
        Assumption(
            what="Model",
            value=f"{len(plan.assignments)} tensors of {plan.model}",
            source=f"{plan.provenance.source}, SHA-256 of the header "
            f"{plan.provenance.header_sha256[:16]}…",
        ),
        *(_device(device) for device in plan.machine.devices),
        *_machine(plan),
        *_runtime(plan),
        *_costs(plan),
        *_search(plan),
    )


def _device(device: Device) -> Assumption:
    hardware = load_hardware()
    preset: dict[str, Any] = hardware["gpus"].get(device.model, {})
    rate = gb_per_s(device.bandwidth_bytes_per_s)
    value = f"{gib(device.capacity_bytes)}, {gib(device.margin_bytes)} left alone, reads {rate}"
    if device.kind == "gpu":
        value += f", reads RAM at {gb_per_s(device.link_bytes_per_s)}"
        why = hardware["defaults"]["gpu_margin_why"]
    else:
        why = hardware["defaults"]["ram_margin_why"]
    source = "as it was described"
    if preset:
        source = f"{preset['source']}, {preset['date']}"
    elif device.model in hardware["classes"]:
        source = f"typical card of this size, {hardware['date']}"
    return Assumption(
        what=f"{device.name} {device.model}",
        value=value,
        source=f"{source}. Margin: {why.split('. ')[0].rstrip('.')}.",
    )


def _machine(plan: Plan) -> Iterator[Assumption]:
    for text in plan.machine.measured:
        yield Assumption(what="Measured here", value=text, source="this machine's profile")
    for text in plan.machine.assumed:
        yield Assumption(what="Assumed here", value=text, source="not stated and not measured")


def _runtime(plan: Plan) -> Iterator[Assumption]:
    work = plan.workload
    yield Assumption(
        what="Runtime",
        value=f"llama.cpp b{work.llama_cpp_build}, batch {work.batch}, ubatch {work.ubatch}, "
        f"flash attention {'on' if work.flash_attention else 'off'}",
        source="the flags of the command",
    )
    yield Assumption(
        what="Weights and KV cache",
        value="exact",
        source="shapes and types in the header; block sizes of the gguf package",
    )


def _costs(plan: Plan) -> Iterator[Assumption]:
    compute, speed, quality = (load_data(f"{n}.json") for n in ("compute", "speed", "quality"))
    made = compute["provenance"]
    yield Assumption(
        what="Compute buffers",
        value="an interval; the high end is kept free (5 % of the cases are above it)",
        source=f"fitted to published load logs and to dry runs, {made['date']} ({made['script']})",
    )
    share, errors = speed["measured_over_predicted"], speed["cross_validation"]
    low, high = share["decode"][plan.speed.where]
    yield Assumption(
        what="Speed",
        value=f"80 % of measured decode speeds are {low:.0%} to {high:.0%} of the prediction; "
        f"median error {errors['decode']['median_error']:.0%} for decoding and "
        f"{errors['prefill']['median_error']:.0%} for prefill",
        source=f"{speed['credit']}; runs left out of the fit, {speed['date']} ({speed['made_by']})",
    )
    known, new = (quality["ln_sd"][f"scale_{kind}_family"] for kind in ("known", "new"))
    yield Assumption(
        what="Loss",
        value="mean KL divergence from the unquantized model on ordinary text; standard deviation "
        f"of a model's scale {known:.0%} where its family was measured, else {new:.0%}",
        source=f"{quality['credit']}; models left out of the fit, {quality['date']} "
        f"({quality['script']})",
    )
    errors = load_data("type_error.json")
    yield Assumption(
        what="Errors of types",
        value="relative squared error of each type, where no whole model was measured",
        source=f"{errors['library']} on Gaussian rows, {errors['date']} ({errors['script']})",
    )


def _search(plan: Plan) -> Iterator[Assumption]:
    made = plan.provenance
    yield Assumption(
        what="Policy",
        value=made.policy_text,
        source="rules about types and places that the optimiser may not trade away",
    )
    yield Assumption(
        what="Search",
        value=f"{plan.status.replace('_', ' ')}, proven gap {plan.gap:.3%} of the objective",
        source=f"{made.solver}, quantplan {made.quantplan_version}; the answer is recomputed "
        "outside the solver",
    )
