"""What is asked of a plan, checked before anything is solved."""

import math

from quantplan.errors import InputError
from quantplan.inventory import Inventory
from quantplan.planner.goal import Goal
from quantplan.qtypes import qtype
from quantplan.workload import Workload


def check_input(
    inventory: Inventory, goal: Goal, workload: Workload, gap: float, time_limit_s: float
) -> None:
    """Refuses what no plan can be made of.

    Args:
        inventory: The model.
        goal: What is to be reached.
        workload: What is served.
        gap: Relative gap at which to stop.
        time_limit_s: Seconds for the search.

    Raises:
        InputError: A number is out of range, or llama.cpp does not load the model; every fault is
            named.
    """
    faults = goal.faults()
    turn = workload.prompt_tokens + workload.answer_tokens
    if goal.max_turn_s is not None and not 0 < turn <= workload.context:
        faults.append(
            f"a turn has {workload.prompt_tokens} tokens of prompt and {workload.answer_tokens} of "
            f"answer; together they must be between 1 and the context of {workload.context} tokens"
        )
    if not 0 <= gap < 1:
        faults.append(f"the gap is {gap}; it must be at least 0 and below 1")
    if not (math.isfinite(time_limit_s) and time_limit_s > 0):
        faults.append(f"the time limit is {time_limit_s} s; it must be above 0")
    if not inventory.tensors:
        faults.append(f"{inventory.name} has no tensors, so there is nothing to plan")
    foreign = {t.qtype for t in inventory.tensors if "llama.cpp" not in qtype(t.qtype).runtimes}
    if foreign:
        faults.append(
            f"{inventory.name} has tensors of the types {', '.join(sorted(foreign))}, which "
            "llama.cpp does not load; they are ik_llama.cpp's"
        )
    if inventory.is_for_ik_only:
        faults.append(
            f"{inventory.name} is laid out for ik_llama.cpp, and llama.cpp does not load it: "
            "convert it for llama.cpp, or ask `quantplan predict --engine ik` about flags"
        )
    if faults:
        raise InputError(faults)
