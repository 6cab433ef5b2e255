"""JSON Schemas of everything that ``--json`` prints and that files hold."""

from types import MappingProxyType
from typing import Any

from quantplan.costs.quality import Explanation
from quantplan.difference import RecipeDifference
from quantplan.errors import InputError
from quantplan.frontier import Frontier
from quantplan.hardware import Machine
from quantplan.inventory import Inventory
from quantplan.plan import Plan
from quantplan.predict import MemoryPrediction
from quantplan.recipe import Recipe
from quantplan.schema import Frozen

SCHEMAS = MappingProxyType[str, type[Frozen]](
    {
        "plan": Plan,
        "recipe": Recipe,
        "prediction": MemoryPrediction,
        "frontier": Frontier,
        "machine": Machine,
        "inventory": Inventory,
        "difference": RecipeDifference,
        "explanation": Explanation,
    }
)
"""Values by the name of their schema."""


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a value as it is printed.

    Args:
        name: A key of `SCHEMAS`.

    Raises:
        InputError: There is no such schema.
    """
    if name not in SCHEMAS:
        raise InputError(f"there is no schema {name!r}; known are {', '.join(SCHEMAS)}")
    schema = SCHEMAS[name].model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
