"""The command line: parses, calls the API, prints."""

import signal
import sys
from typing import Annotated

import typer

from quantplan.cli import (
    machines,
    measuring,
    models,
    planning,
    quantizing,
    recipes,
    reporting,
    running,
)
from quantplan.errors import InputError, QuantplanError
from quantplan.version import __version__

app = typer.Typer(
    name="quantplan",
    help="Choose the quant type and the device of every tensor of a GGUF model, together.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SHOWN_FAULTS = 10


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"quantplan {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


# In the order of the help page.
for _command in (
    planning.plan,
    planning.frontier,
    planning.predict,
    machines.machine,
    machines.calibrate,
    quantizing.measure_weights,
    measuring.measure,
    planning.explain,
    planning.show,
    recipes.diff,
    recipes.export,
    quantizing.quantize,
    running.doctor,
    running.verify,
    running.run,
    reporting.report,
    reporting.ui,
    reporting.schema,
):
    app.command()(_command)
app.command(name="import")(recipes.import_)
app.command()(models.models)
app.add_typer(models.catalog)


def _exit_on_signals() -> None:
    """Lets a command that is told to end remove its temporary files first."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP, nohup ignores it
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def main() -> None:
    """Runs the command line; quantplan's errors become one message and an exit code.

    Exit codes: 2 for input that cannot be used, 1 where there is no plan or writing failed, 128 and
    the signal's number where a signal ended it.
    """
    _exit_on_signals()
    try:
        app()
    except InputError as error:
        faults = list(error.faults[:_SHOWN_FAULTS])
        if len(error.faults) > _SHOWN_FAULTS:
            faults.append(f"… and {len(error.faults) - _SHOWN_FAULTS} more")
        typer.echo("quantplan: " + "\n".join(faults), err=True)
        sys.exit(2)
    except QuantplanError as error:
        typer.echo(f"quantplan: {error}", err=True)
        sys.exit(1)
