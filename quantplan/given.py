"""What a caller gives where a value is wanted that is read first."""

from quantplan.errors import InputError
from quantplan.schema import Frozen, shortened

_READ = {
    "Inventory": "read it with quantplan.read_inventory",
    "Machine": "read it with quantplan.Machine.parse",
    "Plan": "read it with quantplan.Plan.load",
    "Recipe": "read it with quantplan.Recipe.load, or give the recipe of a plan",
}


def check_given(*given: tuple[str, object, type[Frozen]]) -> None:
    """Refuses names and texts in place of the values that they stand for.

    Args:
        given: What each is called, what was given, and what is wanted.

    Raises:
        InputError: Some are of another kind; all of them are named.
    """
    faults = [
        f"the {what} is {shortened(repr(value))}, a {type(value).__name__} and no "
        f"{kind.__name__}: {_READ[kind.__name__]}"
        for what, value, kind in given
        if not isinstance(value, kind)
    ]
    if faults:
        raise InputError(faults)
