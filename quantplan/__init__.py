"""quantplan: which quant type should every tensor have, and where should it live?"""

from typing import TYPE_CHECKING

from quantplan import lazy
from quantplan.version import __version__

if TYPE_CHECKING:
    from quantplan.costs.evidence import Evidence
    from quantplan.difference import RecipeDifference, diff_recipes
    from quantplan.errors import (
        Change,
        InputError,
        LlamaCppError,
        MachineError,
        MissingPackageError,
        NoPlanError,
        QuantizeError,
        QuantplanError,
        RecipeError,
        SolverError,
        SourceError,
        UnsupportedModelError,
        WeightError,
        WorkloadError,
    )
    from quantplan.exchange import export_recipe, import_recipe
    from quantplan.folders import catalog_names
    from quantplan.ftypes.mixes import stock_mix
    from quantplan.hardware.device import Device
    from quantplan.hardware.machine import Machine
    from quantplan.inventory import Inventory, Tensor
    from quantplan.inventory.sources import read_inventory
    from quantplan.measure.evidence_files import read_evidence
    from quantplan.planner.baselines import Baseline
    from quantplan.plans.frontier import Frontier, FrontierPoint, frontier
    from quantplan.plans.plan import plan
    from quantplan.plans.prices import Price, Prices, prices
    from quantplan.plans.result import Plan
    from quantplan.policy import Policy, policy
    from quantplan.predict import MemoryPrediction, predict
    from quantplan.quantize import quantize
    from quantplan.recipe import Recipe
    from quantplan.verification.result import Verification
    from quantplan.verification.verify import verify
    from quantplan.workload import Workload

__all__ = [
    "Baseline",
    "Change",
    "Device",
    "Evidence",
    "Frontier",
    "FrontierPoint",
    "InputError",
    "Inventory",
    "LlamaCppError",
    "Machine",
    "MachineError",
    "MemoryPrediction",
    "MissingPackageError",
    "NoPlanError",
    "Plan",
    "Policy",
    "Price",
    "Prices",
    "QuantizeError",
    "QuantplanError",
    "Recipe",
    "RecipeDifference",
    "RecipeError",
    "SolverError",
    "SourceError",
    "Tensor",
    "UnsupportedModelError",
    "Verification",
    "WeightError",
    "Workload",
    "WorkloadError",
    "__version__",
    "catalog_names",
    "diff_recipes",
    "export_recipe",
    "frontier",
    "import_recipe",
    "plan",
    "policy",
    "predict",
    "prices",
    "quantize",
    "read_evidence",
    "read_inventory",
    "stock_mix",
    "verify",
]

# The same names once more for the running program; a test compares them.
_NAMES = {
    "costs.evidence": ("Evidence",),
    "difference": ("RecipeDifference", "diff_recipes"),
    "errors": (
        "Change",
        "InputError",
        "LlamaCppError",
        "MachineError",
        "MissingPackageError",
        "NoPlanError",
        "QuantizeError",
        "QuantplanError",
        "RecipeError",
        "SolverError",
        "SourceError",
        "UnsupportedModelError",
        "WeightError",
        "WorkloadError",
    ),
    "exchange": ("export_recipe", "import_recipe"),
    "folders": ("catalog_names",),
    "ftypes.mixes": ("stock_mix",),
    "hardware.device": ("Device",),
    "hardware.machine": ("Machine",),
    "inventory": ("Inventory", "Tensor"),
    "inventory.sources": ("read_inventory",),
    "measure.evidence_files": ("read_evidence",),
    "planner.baselines": ("Baseline",),
    "plans.frontier": ("Frontier", "FrontierPoint", "frontier"),
    "plans.plan": ("plan",),
    "plans.prices": ("Price", "Prices", "prices"),
    "plans.result": ("Plan",),
    "policy": ("Policy", "policy"),
    "predict": ("MemoryPrediction", "predict"),
    "quantize": ("quantize",),
    "recipe": ("Recipe",),
    "verification.result": ("Verification",),
    "verification.verify": ("verify",),
    "workload": ("Workload",),
}
lazy.bind(__name__, _NAMES)
