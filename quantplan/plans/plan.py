"""Makes a plan: from a model, a machine and a workload to types and places."""

from dataclasses import replace
from typing import Literal

from quantplan.costs import data_hashes
from quantplan.costs.calibration import for_model
from quantplan.costs.evidence import Evidence
from quantplan.costs.quality import LossTable, type_errors
from quantplan.formats.args_notes import PROMPT_CACHE_MIB, kernel_notes, prompt_cache_notes
from quantplan.ftypes.mixes import published_mix
from quantplan.given import check_given
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.planner.baselines import Baseline, find_baselines
from quantplan.planner.decisions import Open, best_solution
from quantplan.planner.goal import Goal
from quantplan.planner.held_out import held_out_gain
from quantplan.planner.linear import solver_name, solver_options
from quantplan.planner.outcome import Outcome
from quantplan.planner.problem import Problem, build_problem
from quantplan.planner.resampled import TypeChanges, type_changes
from quantplan.planner.search import reachable_gap
from quantplan.planner.solution import Solution
from quantplan.plans.checks import check_input
from quantplan.plans.notes import (
    backend_notes,
    baseline_notes,
    build_notes,
    evidence_notes,
    imatrix_notes,
    plan_notes,
    source_notes,
    text_notes,
)
from quantplan.plans.result import Plan
from quantplan.policy import Policy
from quantplan.policy import policy as policy_preset
from quantplan.recipe import Provenance
from quantplan.version import __version__
from quantplan.workload import Workload


def plan(
    inventory: Inventory,
    machine: Machine,
    workload: Workload | None = None,
    *,
    min_decode_tps: float | None = None,
    max_turn_s: float | None = None,
    max_loss_nats: float | None = None,
    no_worse_than: str | None = None,
    context: Literal["max"] | None = None,
    kv_type: Literal["auto"] | None = None,
    ubatch: Literal["auto"] | None = None,
    n_gpus: Literal["auto"] | None = None,
    policy: Policy | str = "quality",
    evidence: Evidence | None = None,
    gap: float = 1e-4,
    time_limit_s: float = 60.0,
    compute_buffers: Literal["high", "expected"] = "high",
    baselines: bool = True,
    resamples: int = 0,
) -> Plan:
    """Chooses the type and the device of every tensor together.

    With a limit on the loss the plan is the fastest one within it. Otherwise it has the least loss
    that keeps to the limits on speed and time; where there are none, time has the price that the
    policy states. With ``context="max"`` the context is first made as long as all limits allow.
    What is left open may be decided too; docs/explanation/mathematics.md says by which rules.

    Attention and KV cache are on the GPUs, layer by layer from the last; the first layers move to
    RAM whole where they do not fit or where that is better.

    Args:
        inventory: The model.
        machine: The devices.
        workload: Context, slots, batch and KV types; by default 4096 tokens in F16.
        min_decode_tps: Least decode speed in tokens per second, with the context full.
        max_turn_s: Longest time in seconds for the workload's prompt and answer, from an empty
            context.
        max_loss_nats: Largest predicted loss of the model, in nats per token.
        no_worse_than: A mix of llama-quantize, such as ``Q4_K_M``, whose predicted loss is the
            largest that is allowed; with an importance matrix where llama-quantize demands one.
        context: ``max`` for the longest context, up to the one that the model was trained for.
        kv_type: ``auto`` to choose between F16 and Q8_0.
        ubatch: ``auto`` to choose between 2048 and 128 tokens.
        n_gpus: ``auto`` to choose how many GPUs to use: the first so many.
        policy: Rules about types and places, or the name of a preset.
        evidence: What was measured of the model's losses; combined with what metadata say.
        gap: Relative gap at which the search may stop; with GPUs at least 0.1 %.
        time_limit_s: Time for the whole search, in seconds.
        compute_buffers: Which end of their estimate to reckon with; with ``expected`` about half
            of all plans leave less than the margin free.
        baselines: Whether to work out what plain answers come to.
        resamples: For how many resamples of the chunks that losses were measured on to plan again,
            to see which types hang on the text; within another ``time_limit_s``.

    Raises:
        InputError: A number is out of range, llama.cpp does not load the model's types, a rule of
            the policy about single tensors does not fit the model, or a name was given in place
            of the model or the machine.
        WorkloadError: The model cannot have the KV types.
        NoPlanError: Nothing fits, or the speed is out of reach; the message says by how much.
        UnsupportedModelError: The memory of the architecture is not known.
        SolverError: The solver failed.
    """
    check_given(("model", inventory, Inventory), ("machine", machine, Machine))
    machine = for_model(machine, inventory.architecture)
    task = workload or Workload()
    if no_worse_than is not None:
        mix = published_mix(inventory, no_worse_than)
        mix_nats = LossTable(inventory, evidence).model_kld_nats(mix)
        max_loss_nats = mix_nats if max_loss_nats is None else min(max_loss_nats, mix_nats)
    goal = Goal.within(min_decode_tps, max_turn_s, max_loss_nats)
    if context == "max" and max_turn_s is not None:
        turn = task.prompt_tokens + task.answer_tokens
        task = task.model_copy(update={"context": max(task.context, turn)})
    check_input(inventory, goal, task, gap, time_limit_s)
    rules = policy_preset(policy) if isinstance(policy, str) else policy
    rules.check(inventory, priced=type_errors())

    problem = build_problem(inventory, machine, task, rules, goal, evidence=evidence)
    problem, solution = best_solution(
        replace(problem, plans_with_high_end=compute_buffers == "high"),
        Open(context == "max", kv_type == "auto", ubatch == "auto", n_gpus == "auto"),
        gap=gap,
        time_limit_s=time_limit_s,
    )
    outcome = Outcome(machine, problem, solution)
    plain: tuple[Baseline, ...] = ()
    if baselines:
        plain = find_baselines(
            problem, LossTable(inventory, evidence), outcome.placed, outcome.expected_losses
        )
    gap = reachable_gap(problem, gap)
    changes = None
    if resamples:
        changes = type_changes(problem, solution, resamples, gap=gap, time_limit_s=time_limit_s)
    provenance = _provenance(problem, solution, gap, time_limit_s)
    return _plan_of(outcome, plain, changes, provenance)


def _plan_of(
    outcome: Outcome,
    plain: tuple[Baseline, ...],
    changes: TypeChanges | None,
    provenance: Provenance,
) -> Plan:
    machine, problem, solution = outcome.machine, outcome.problem, outcome.solution
    types = {t.tensor: t.qtype for t in outcome.tensors}
    held_out = held_out_gain(problem, types, plain)
    return Plan(
        model=problem.inventory.name,
        machine=machine,
        workload=problem.workload,
        status=solution.status,
        gap=solution.gap,
        devices=outcome.devices,
        predicted=outcome.predicted,
        speed=outcome.speed,
        assignments=outcome.tensors,
        flags=outcome.flags,
        baselines=plain,
        held_out=held_out,
        type_changes=changes,
        notes=(
            *baseline_notes(plain),
            *text_notes(held_out, changes),
            *plan_notes(machine, problem, solution),
            *source_notes(outcome.tensors, problem.inventory),
            *backend_notes(machine, outcome.flags),
            *build_notes(problem.workload, outcome.flags),
            *kernel_notes(problem.workload, problem.machine),
            *prompt_cache_notes(
                outcome.devices[-1].free_bytes - outcome.devices[-1].margin_bytes,
                PROMPT_CACHE_MIB,
                problem.workload.llama_cpp_build,
            ),
            *imatrix_notes(outcome.tensors, problem.inventory, problem.evidence),
            *evidence_notes(problem.evidence),
        ),
        provenance=provenance,
    )


def _provenance(
    problem: Problem, solution: Solution, gap: float, time_limit_s: float
) -> Provenance:
    options = solver_options(gap, time_limit_s)
    return Provenance(
        quantplan_version=__version__,
        source=problem.inventory.source,
        header_sha256=problem.inventory.header_sha256,
        cost_data=data_hashes(),
        evidence=problem.evidence.describe() if problem.evidence else None,
        policy=problem.policy.name,
        tensor_rules=problem.policy.tensor_rules,
        runtime="llama.cpp",
        machine=problem.machine,
        workload=problem.workload,
        min_decode_tps=problem.goal.min_decode_tps,
        max_turn_s=problem.goal.max_turn_s,
        max_loss_nats=problem.goal.max_loss_nats,
        solver=solver_name(),
        solver_options={name: str(value) for name, value in options.items()},
        status=solution.status,
        objective_nats=solution.objective_nats,
        bound_nats=solution.bound_nats,
        gap=solution.gap,
    )
