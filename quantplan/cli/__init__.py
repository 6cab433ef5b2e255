"""The command line: parses, calls the API, prints."""

import errno
import os
import signal
import sys
from io import TextIOWrapper
from types import MappingProxyType
from typing import Annotated, NoReturn

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
from quantplan.cli.exits import FAILED, INTERNAL, SIGNALLED, UNUSABLE
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
_TRACEBACK = "QUANTPLAN_TRACEBACK"

WITHOUT_JSON = MappingProxyType(
    {
        "export": "what it prints is in another program's format already",
        "report": "it writes a page for people; PLAN, which it takes, is the plan as JSON",
        "ui": "it serves a page for people until it is interrupted",
        "schema": "what it prints is JSON",
        "catalog remove": "it prints the name that it was given, and its exit code says the rest",
    }
)
"""Commands without ``--json``, each with the reason."""


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
    planning.prices,
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
            signal.signal(number, lambda received, _: sys.exit(SIGNALLED + received))


def main() -> None:
    """Runs the command line; errors become one message and an exit code (`quantplan.cli.exits`)."""
    _exit_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # which may speak less than Unicode
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except InputError as error:
        faults = list(error.faults[:_SHOWN_FAULTS])
        if len(error.faults) > _SHOWN_FAULTS:
            faults.append(f"… and {len(error.faults) - _SHOWN_FAULTS} more")
        _end("\n".join(faults), UNUSABLE)
    except QuantplanError as error:
        _end(str(error), FAILED)
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOSPC:
            _end(f"what is printed cannot be written: {error.strerror}; print elsewhere", FAILED)
        _end(str(error), FAILED)
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        _end(
            f"this is a fault of quantplan, not of what it was given: "
            f"{type(error).__name__}: {error}\nPlease report it with what the same command says "
            f"where {_TRACEBACK}=1 is set.",
            INTERNAL,
        )


def _end(message: str, code: int) -> NoReturn:
    typer.echo(f"quantplan: {message}", err=True)
    sys.exit(code)
