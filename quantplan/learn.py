"""What a verification measured goes into the machine's profile, so that the next plan knows it."""

import contextlib
import shutil
from pathlib import Path

from quantplan.calibrate import calibrate_machine
from quantplan.errors import InputError
from quantplan.hardware import Machine
from quantplan.inventory import Inventory
from quantplan.recipe import Recipe
from quantplan.verification import Verification


def learn(
    machine: Machine, inventory: Inventory, recipe: Recipe, verification: Verification
) -> Machine:
    """The machine with speed factors that agree with a verification.

    The profile says what was measured, when and by which build.

    Args:
        machine: As it is known so far.
        inventory: The file that was verified.
        recipe: Its recipe, whose flags it ran with.
        verification: What was measured.

    Raises:
        InputError: No speed was measured.
    """
    if verification.speed is None:
        raise InputError(
            "no speed was measured, so there is nothing to learn: leave --no-speed out"
        )
    when = verification.time.date().isoformat()
    tool = f"{verification.speed.tool} of {verification.llama_cpp}, {when}"
    results = verification.speed.results
    return calibrate_machine(machine, inventory, results, recipe.flags, tool=tool)


def save_profile(machine: Machine, path: Path) -> Path | None:
    """Writes a profile; one of that name is kept beside it, so that nothing learned is final.

    Args:
        machine: What to write.
        path: Where.

    Returns:
        Where the profile of before is now; None where there was none.

    Raises:
        MachineError: The file cannot be written.
    """
    before = path.with_name(f"{path.stem}.before{path.suffix}")
    kept = None
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(path, before)
        kept = before
    machine.save(path)
    return kept
