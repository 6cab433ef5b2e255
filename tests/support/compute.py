"""Compute buffers as the cost model estimates them, for tests of what reckons with them."""

from dataclasses import replace

from quantplan import Inventory, Workload
from quantplan.costs import compute
from quantplan.costs.compute import DeviceKind, Work
from quantplan.placement import Launch


def planned_bytes(inventory: Inventory, workload: Workload, work: Work) -> int:
    """The high end of a compute buffer, with experts on the device or without, the larger one."""
    kinds = (False, True) if inventory.architecture.n_expert else (False,)
    return max(
        compute.estimate(
            inventory.architecture,
            inventory.n_vocab,
            Launch(workload=workload),
            replace(work, has_experts=has_experts),
        ).high
        for has_experts in kinds
    )


def around_streamed_bytes(inventory: Inventory, workload: Workload) -> int:
    """The high end of what a GPU holds beside a tensor that is streamed to it."""
    launch = Launch(workload=workload)
    return compute.around_streamed(inventory.architecture, inventory.n_vocab, launch).high


def graph_bytes(inventory: Inventory, workload: Workload, kind: DeviceKind = "gpu") -> int:
    """The high end of the compute buffer of an only device, with all that it may compute."""
    return planned_bytes(inventory, workload, Work(kind, has_output=True))
