"""quantplan: which quant type should every tensor have, and where should it live?"""

from quantplan.difference import RecipeDifference, diff_recipes
from quantplan.errors import (
    Change,
    InputError,
    LlamaCppError,
    MachineError,
    NoPlanError,
    QuantizeError,
    QuantplanError,
    RecipeError,
    SolverError,
    SourceError,
    UnsupportedModelError,
    WorkloadError,
)
from quantplan.exchange import export_recipe, import_recipe
from quantplan.frontier import Frontier, FrontierPoint, frontier
from quantplan.ftypes import stock_mix
from quantplan.hardware import Device, Machine
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_inventory
from quantplan.plan import Plan, plan
from quantplan.planner.baselines import Baseline
from quantplan.policy import Policy, policy
from quantplan.predict import MemoryPrediction, predict
from quantplan.prices import Price, Prices, prices
from quantplan.quantize import quantize
from quantplan.recipe import Recipe
from quantplan.verification import Verification
from quantplan.verify import verify
from quantplan.version import __version__
from quantplan.workload import Workload

__all__ = [
    "Baseline",
    "Change",
    "Device",
    "Frontier",
    "FrontierPoint",
    "InputError",
    "Inventory",
    "LlamaCppError",
    "Machine",
    "MachineError",
    "MemoryPrediction",
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
    "read_inventory",
    "stock_mix",
    "verify",
]
