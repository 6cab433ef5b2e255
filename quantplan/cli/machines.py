"""Commands about machines."""

from pathlib import Path
from typing import Annotated

import typer

from quantplan.cli.options import JsonOption, MachineOption, ModelArgument, say
from quantplan.errors import InputError


def machine(
    measure: Annotated[
        bool, typer.Option(help="Measure the RAM's bandwidth, on all cores.")
    ] = True,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save it as a profile for --machine.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Describe this machine: GPUs, CPU, RAM and how fast it is read."""
    from quantplan.detect import detect  # noqa: PLC0415

    found = detect(measure=measure)
    if save is not None:
        found.save(save)
    if json_output:
        typer.echo(found.model_dump_json(indent=1))
    else:
        say(found.summary())


def calibrate(
    model: ModelArgument,
    machine: MachineOption,
    bench: Annotated[
        Path, typer.Option(metavar="FILE", help="Output of llama-bench or llama-sweep-bench.")
    ],
    save: Annotated[Path, typer.Option(metavar="FILE", help="The profile to write.")],
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="Flags that it ran with, after --."),
    ] = None,
) -> None:
    """Narrow a machine's speed factors by what was measured on it."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.calibrate import calibrate_machine  # noqa: PLC0415

    try:
        output = bench.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{bench} cannot be read: {error}") from error
    found = calibrate_machine(
        qp.Machine.parse(machine), qp.read_inventory(model), output, flags or ()
    )
    found.save(save)
    say(found.summary())
