"""Commands about machines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplan.cli.options import (
    MachineOption,
    ModelArgument,
    check_targets,
    json_option,
    parse_machine,
    read_model,
    read_text,
    tell,
)
from quantplan.cli.progress import working
from quantplan.errors import InputError

if TYPE_CHECKING:
    from quantplan.hardware.machine import Machine
    from quantplan.inventory import Inventory


def machine(
    measure: Annotated[
        bool, typer.Option(help="Measure the RAM's bandwidth, on all cores.")
    ] = True,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save it as a profile for --machine.")
    ] = None,
    json_output: Annotated[bool, json_option("machine")] = False,
) -> None:
    """Describe this machine: GPUs, CPU, RAM and how fast it is read."""
    from quantplan.hardware.detect import detect  # noqa: PLC0415

    check_targets(save)
    with working("looking at this machine"):
        found = detect(measure=measure)
    if save is not None:
        found.save(save)
    tell(found, found.summary(), json_output)


def calibrate(
    model: ModelArgument,
    save: Annotated[Path, typer.Option(metavar="FILE", help="The profile to write.")],
    machine: MachineOption = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Output of llama-bench or llama-sweep-bench; without, the llama.cpp of this "
            "machine runs the model.",
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run the llama.cpp in this folder."),
    ] = None,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="Flags that it ran or is to run with, after --."),
    ] = None,
    json_output: Annotated[bool, json_option("machine")] = False,
) -> None:
    """Narrow a machine's speed factors by what is measured on it."""
    from quantplan.calibrate import calibrate_machine  # noqa: PLC0415

    if bench is not None and llama_cpp is not None:
        raise InputError("give --bench or --llama-cpp, not both: one reads what the other measures")
    check_targets(save, read=(model, bench))
    described, inventory = parse_machine(machine, None), read_model(model)
    if bench is not None:
        found = calibrate_machine(described, inventory, read_text(bench), flags or ())
    else:
        found = _run(described, inventory, llama_cpp, flags or [])
    found.save(save)
    tell(found, found.summary(), json_output)


def _run(
    machine: "Machine", inventory: "Inventory", folder: Path | None, flags: list[str]
) -> "Machine":
    """The machine, calibrated with a llama.cpp that runs the model now."""
    from quantplan.calibrate import calibrate_machine  # noqa: PLC0415
    from quantplan.runtime import find_llama_cpp, measure_with_any  # noqa: PLC0415

    path = Path(inventory.source)
    if not path.is_file():
        raise InputError(f"{inventory.source} is no file that can be run: give a GGUF, or --bench")
    llama_cpp = find_llama_cpp(folder)
    has_gpu = bool(llama_cpp.devices) or "--rpc" in flags
    if bool(machine.gpus) != has_gpu:
        listed = ", ".join(llama_cpp.devices) or "no GPU"
        raise InputError(
            f"{llama_cpp.server} has {listed} here, but the machine has {len(machine.gpus)}: "
            "calibrate on the machine itself, or give what was measured there with --bench"
        )
    with working(f"running {path.name}"):
        measured = measure_with_any(llama_cpp, path, flags)
    typer.echo(measured.summary(), err=True)
    tool = f"{measured.tool}, {llama_cpp}"
    return calibrate_machine(machine, inventory, measured.results, flags, tool=tool)
