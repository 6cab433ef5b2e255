"""What a verification measured goes into the machine's profile, so that the next plan knows it."""

import shutil
from pathlib import Path

from quantplan.calibrate import calibrate_machine
from quantplan.costs.calibration import model_key
from quantplan.errors import InputError
from quantplan.hardware.machine import ComputeMeasurement, Machine
from quantplan.inventory import Inventory
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.predict import predict
from quantplan.verification.result import Verification


def learn(machine: Machine, inventory: Inventory, verification: Verification) -> Machine:
    """The machine with speed factors and compute buffers that agree with a verification.

    The profile says what was measured, when and by which build.

    Args:
        machine: As it is known so far.
        inventory: The file that was verified.
        verification: What was measured.
    """
    runtime, when = verification.llama_cpp, verification.time.date().isoformat()
    found = _with_compute(machine, inventory, verification, f"{runtime}, {when}")
    speed = verification.speed
    if speed is None:
        return found
    tool = f"{speed.tool} of {runtime}, {when}"
    return calibrate_machine(found, inventory, speed.results, verification.flags, tool=tool)


def _with_compute(
    machine: Machine, inventory: Inventory, verification: Verification, by: str
) -> Machine:
    """The machine with the compute buffers that were measured; newer ones replace older ones."""
    runtime = verification.llama_cpp
    predicted = predict(
        inventory,
        verification.flags,
        machine.model_copy(update={"compute": ()}),
        engine=runtime.runtime,
        llama_cpp_build=runtime.build or NEWEST_KNOWN_BUILD,
    )
    measured = {
        check.where: check.measured for check in verification.checks if check.what == "compute"
    }
    kinds = {device.name: device.kind for device in machine.devices}
    model = model_key(inventory.architecture)
    new = {
        (model, kinds[use.name], use.compute_bytes): round(measured[use.name])
        for use in predicted.devices
        if use.compute_bytes and use.name in measured
    }
    older = [c for c in machine.compute if (c.model, c.kind, c.predicted_bytes) not in new]
    learned = [
        ComputeMeasurement(
            model=name, kind=kind, predicted_bytes=expected, measured_bytes=n_bytes, by=by
        )
        for (name, kind, expected), n_bytes in new.items()
    ]
    return machine.model_copy(update={"compute": (*older, *learned)})


def save_profile(machine: Machine, path: Path) -> Path | None:
    """Writes a profile; one of that name is kept beside it, so that nothing learned is final.

    Args:
        machine: What to write.
        path: Where.

    Returns:
        Where the profile of before is now; None where there was none.

    Raises:
        InputError: The file cannot be written.
    """
    before = path.with_name(f"{path.stem}.before{path.suffix}")
    kept = None
    try:
        shutil.copyfile(path, before)
        kept = before
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path} cannot be kept: {error.strerror or error}") from error
    machine.save(path)
    return kept
