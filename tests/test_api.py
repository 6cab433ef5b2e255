"""The public namespace."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantplan
from quantplan import errors


def test_namespace_equals_all() -> None:
    """Every public name of the package is in __all__, and nothing else is."""
    modules = {path.stem for path in Path(quantplan.__file__).parent.iterdir()}
    public = {name for name in dir(quantplan) if not name.startswith("_")} - {"TYPE_CHECKING"}
    assert public - modules <= set(quantplan.__all__) - {"__version__"}
    assert all(hasattr(quantplan, name) for name in quantplan.__all__)


def test_all_is_sorted() -> None:
    """A reader finds a name in __all__ where the alphabet puts it."""
    assert quantplan.__all__ == sorted(quantplan.__all__)


def test_every_error_is_a_quantplan_error() -> None:
    """One except clause catches everything that quantplan raises on purpose."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    exceptions = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(exceptions) >= 10
    assert all(issubclass(kind, errors.QuantplanError) for kind in exceptions)


def test_import_does_not_print() -> None:
    """Importing the package writes nothing, so that JSON output stays JSON."""
    code = "import quantplan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.parametrize(
    "ask",
    [
        quantplan.plan,
        quantplan.frontier,
        lambda inventory, machine: quantplan.predict(inventory, "-ngl 99", machine),
    ],
)
def test_names_in_place_of_what_they_stand_for_are_refused(ask: Callable[..., Any]) -> None:
    """Who gives the name of a model and the text of a machine is told what reads both."""
    with pytest.raises(quantplan.InputError) as caught:
        ask("GLM-4.5-Air", "RTX 4090 + 64GiB@80GB/s")
    model, machine = caught.value.faults
    assert "'GLM-4.5-Air', a str and no Inventory: read it with quantplan.read_inventory" in model
    assert "a str and no Machine: read it with quantplan.Machine.parse" in machine


@pytest.mark.parametrize("given", ["NAME", Path("NAME"), None])
@pytest.mark.parametrize(
    ("ask", "reader"),
    [
        (lambda given: quantplan.stock_mix(given, "Q4_K_M"), "read_inventory"),
        (lambda given: quantplan.import_recipe(given, "types.txt"), "read_inventory"),
        (
            lambda given: quantplan.prices(given, quantplan.read_inventory("Qwen3.5-2B")),
            "Plan.load",
        ),
        (lambda given: quantplan.diff_recipes(given, given), "Recipe.load"),
        (lambda given: quantplan.export_recipe(given, "shell"), "Recipe.load"),
        (lambda given: quantplan.quantize(given, "in.gguf", "out.gguf"), "Recipe.load"),
        (lambda given: quantplan.verify(given, "out.gguf"), "Recipe.load"),
    ],
)
def test_what_is_to_be_read_first_is_said_of_every_function(
    ask: Callable[[Any], Any], reader: str, given: Any
) -> None:
    """A name, a path or nothing in place of a value is refused in words, with what reads it."""
    with pytest.raises(quantplan.InputError, match=rf"read it with quantplan\.{reader}"):
        ask(given)
