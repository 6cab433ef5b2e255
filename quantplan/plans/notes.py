"""What a person should know about a plan beside its numbers, one sentence each."""

from collections.abc import Sequence

from quantplan.costs import load_data
from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import kld_nats, link
from quantplan.formats.args_notes import build_note, context_notes
from quantplan.formats.llama_cpp import YOUNG_FLAGS, gpu_backend
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.llama_cpp import BACKENDS, COMMON_BACKEND, OLDEST_KNOWN_BUILD
from quantplan.planner.baselines import Baseline
from quantplan.planner.held_out import HeldOutGain
from quantplan.planner.problem import Problem
from quantplan.planner.resampled import TypeChanges
from quantplan.planner.solution import Solution
from quantplan.qtypes import qtype
from quantplan.recipe import RecipeTensor
from quantplan.workload import Workload

# Errors of types that grow by less without an importance matrix are not worth a note.
_MUCH_WORSE = 1.3
_BUILT_FOR = {"ROCm": "ROCm", "SYCL": "SYCL", "MTL": "Metal"}


def plan_notes(machine: Machine, problem: Problem, solution: Solution) -> tuple[str, ...]:
    """What is unusual about the context, the GPUs, the layers, the types, the loss or the proof."""
    notes = [*context_notes(problem.workload, problem.inventory.architecture.context_length)]
    asked_for = len(machine.gpus)
    if problem.machine.gpus != machine.gpus:
        notes.append(
            f"{len(problem.machine.gpus)} of {asked_for} GPUs are used: more are no better"
        )
    n_cpu = solution.layer_devices.count(problem.machine.ram.name) if problem.machine.gpus else 0
    if n_cpu:
        notes.append(f"attention and KV cache of the first {n_cpu} layers are in RAM")
    if kld_nats(solution.loss_nats) > link().valid_kld_nats:
        notes.append("the predicted loss is beyond what the loss model holds for: expect nonsense")
    if solution.status == "time_limit":
        notes.append("the time was up before the gap was closed; the gap is what was proved")
    elif not solution.is_closed:
        notes.append(
            f"nothing better than this was found, and the proofs left a gap of {solution.gap:.1%}"
        )
    return tuple(notes)


def source_notes(assignments: tuple[RecipeTensor, ...], inventory: Inventory) -> tuple[str, ...]:
    """Says of a model that is quantized already, or in part, whether its types are kept."""
    matrices = {t.name: t.qtype for t in inventory.tensors if t.is_quantizable}
    open_ones = {name for name, kind in matrices.items() if qtype(kind).is_float}
    if len(open_ones) == len(matrices) and matrices:
        return ()
    n_changed = sum(a.qtype != matrices.get(a.tensor, a.qtype) for a in assignments)
    if not n_changed:
        return ("the model is quantized already: types are kept, only places were chosen",)
    return (
        f"the model is quantized in part: {n_changed} of its {len(open_ones)} unquantized matrices "
        "get another type, so the file has to be written anew; the rule .=SOURCE (--pin) keeps all",
    )


def backend_notes(machine: Machine, flags: Sequence[str]) -> tuple[str, ...]:
    """Says which build of llama.cpp the names of GPUs in the flags are for, where it is not CUDA's.

    Args:
        machine: The machine.
        flags: The plan's flags.
    """
    backend = gpu_backend(machine)
    if backend == COMMON_BACKEND:
        return (
            f"the GPUs are of several vendors: the flags are for a {backend} build of llama.cpp, "
            "which uses them all; see that llama-server --list-devices has them in this order",
        )
    if backend == BACKENDS["nvidia"] or not any(f"={backend}" in word for word in flags):
        return ()
    return (
        f"-ot names GPUs as llama.cpp built for {_BUILT_FOR[backend]} does, {backend}0 and so on; "
        f"for a Vulkan build write Vulkan in place of {backend} (quantplan run and verify use the "
        "names of the build)",
    )


def build_notes(workload: Workload, flags: Sequence[str]) -> tuple[str, ...]:
    """Says that the build was not checked, and which flags an older one may refuse."""
    said = build_note(workload.llama_cpp_build)
    if said is None or workload.llama_cpp_build >= OLDEST_KNOWN_BUILD:
        return (said,) if said else ()
    young = ", ".join(flag for flag in YOUNG_FLAGS if flag in flags)
    return (
        f"{said}, and it may refuse {young} or the value; quantplan run and verify ask the program "
        "which flags it has, and say the same in its words",
    )


def baseline_notes(baselines: tuple[Baseline, ...]) -> tuple[str, ...]:
    """Says which plain answer is as good, if one is."""
    plain = next((baseline for baseline in baselines if baseline.is_as_good), None)
    if plain is None:
        return ()
    floors = f"; below the policy's floors: {', '.join(plain.below_floor)}"
    return (
        f"{plain.describe()} is as good as far as the models can tell "
        f"({plain.decode_tps.expected:.1f} tokens/s, loss {plain.loss_nats:.4f}): prefer it, it is "
        f"simpler{floors if plain.below_floor else ''}",
    )


def text_notes(held_out: HeldOutGain | None, changes: TypeChanges | None) -> tuple[str, ...]:
    """Says what of the plan hangs on the text that losses were measured on."""
    return tuple(found.describe() for found in (held_out, changes) if found)


def imatrix_notes(
    assignments: tuple[RecipeTensor, ...], inventory: Inventory, evidence: Evidence | None
) -> tuple[str, ...]:
    """Names the types that need an importance matrix, and those that are much worse without one."""
    kept = {t.name: t.qtype for t in inventory.tensors}
    types = sorted({a.qtype for a in assignments if a.qtype != kept[a.tensor]})
    notes = []
    needing = [name for name in types if qtype(name).needs_imatrix]
    if needing:
        notes.append(
            f"{', '.join(needing)}: to be written with an importance matrix, by llama-quantize"
        )
    # Errors on the weights are of quantizing them as it will be done.
    if not (evidence and evidence.weight_errors):
        errors = load_data("type_error.json")
        with_one, without = errors["relative_squared_error"], errors["without_imatrix"]
        factors = {q: without[q] / with_one[q] for q in types if q in without}
        notes += [
            f"{name} is predicted for an importance matrix; without one its error is {f:.1f} times "
            "as large"
            for name, f in factors.items()
            if f >= _MUCH_WORSE
        ]
    return tuple(notes)


def evidence_notes(evidence: Evidence | None) -> tuple[str, ...]:
    """Says what was measured of the losses."""
    return (f"losses use {evidence.describe()}",) if evidence else ()
