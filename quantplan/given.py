"""What a caller gives where a value is wanted that is read first."""

from quantplan.errors import InputError
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.schema import shortened


def check_given(inventory: object, machine: object) -> None:
    """Refuses names and texts in place of the model and the machine that they stand for.

    Args:
        inventory: What was given as the model.
        machine: What was given as the machine.

    Raises:
        InputError: One of them is of another kind; both are named.
    """
    wanted = (
        ("model", inventory, Inventory, "read_inventory"),
        ("machine", machine, Machine, "Machine.parse"),
    )
    faults = [
        f"the {what} is {shortened(repr(given))}, a {type(given).__name__} and no "
        f"{kind.__name__}: read it with quantplan.{reader}"
        for what, given, kind, reader in wanted
        if not isinstance(given, kind)
    ]
    if faults:
        raise InputError(faults)
