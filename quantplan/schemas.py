"""JSON Schemas of everything that ``--json`` prints and that files hold."""

import contextlib
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantplan.costs.explanation import Explanation
from quantplan.difference import RecipeDifference
from quantplan.errors import InputError
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.plans.frontier import Frontier
from quantplan.plans.prices import Prices
from quantplan.plans.result import Plan
from quantplan.predict import MemoryPrediction
from quantplan.printed import DryRun, ListedModel, MeasuredLosses, WrittenFile
from quantplan.quantize.weights import WeightErrors
from quantplan.recipe import Recipe
from quantplan.runtime.doctor import Diagnosis
from quantplan.verification.result import Verification

SCHEMAS = MappingProxyType[str, Any](
    {
        "plan": Plan,
        "recipe": Recipe,
        "prediction": MemoryPrediction,
        "frontier": Frontier,
        "prices": Prices,
        "machine": Machine,
        "inventory": Inventory,
        "difference": RecipeDifference,
        "explanation": Explanation,
        "weight-errors": WeightErrors,
        "measured-losses": MeasuredLosses,
        "written-file": WrittenFile,
        "diagnosis": Diagnosis,
        "verification": Verification,
        "dry-run": DryRun,
        "model": ListedModel,
        "models": tuple[ListedModel, ...],
    }
)
"""Types of values by the name of their schema."""


def schema_of(document: bytes) -> str | None:
    """Name of the schema that a document follows; None where it follows none.

    Args:
        document: JSON, or anything else.
    """
    for name, kind in SCHEMAS.items():
        with contextlib.suppress(ValidationError, InputError):  # the latter of machines
            TypeAdapter(kind).validate_json(document)
            return name
    return None


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a value as it is printed.

    Args:
        name: A key of `SCHEMAS`.

    Raises:
        InputError: There is no such schema.
    """
    if name not in SCHEMAS:
        raise InputError(f"there is no schema {name!r}; known are {', '.join(SCHEMAS)}")
    schema = TypeAdapter(SCHEMAS[name]).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
