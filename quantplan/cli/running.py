"""Commands that run llama.cpp."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantplan.cli.exits import BROKEN, FAILED
from quantplan.cli.options import check_targets, json_option, read_recipe, read_text, tell
from quantplan.cli.progress import working, writing
from quantplan.errors import InputError

LlamaCppOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp", metavar="DIR", help="Folder of llama.cpp; else LLAMA_CPP_DIR, PATH, others."
    ),
]
RecipeArgument = Annotated[Path, typer.Argument(help="A recipe that `quantplan plan` saved.")]
FlagsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- FLAGS", help="Further flags of llama-server, after --."),
]


def doctor(
    llama_cpp: LlamaCppOption = None,
    json_output: Annotated[bool, json_option("diagnosis")] = False,
) -> None:
    """Say which llama.cpp is here, what it can do, and what is missing.

    Exit code 1 where no llama-server runs.
    """
    from quantplan.runtime.doctor import diagnose  # noqa: PLC0415

    with working("asking every llama.cpp"):
        found = diagnose(llama_cpp)
    tell(found, found.summary(), json_output)
    if not found.is_usable:
        raise typer.Exit(FAILED)


def verify(
    recipe: RecipeArgument,
    gguf: Annotated[str, typer.Argument(metavar="GGUF", help="The file quantized with it.")],
    flags: FlagsArgument = None,
    llama_cpp: LlamaCppOption = None,
    machine: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="This machine, or its profile; else the recipe's."),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure decode and prefill speed too.")] = True,
    kld: Annotated[
        Path | None,
        typer.Option(metavar="BASE", help="Measure KLD and PPL too, beside this unquantized GGUF."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text for --kld, any UTF-8 file.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(help="Chunks of 512 tokens of the text; all of it.")
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(
            metavar="PROFILE",
            help="Update this profile (.json) of the machine by what is measured.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to save the result; the log goes beside it.")
    ] = Path("verification.json"),
    limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time to load, and again to measure speeds.")
    ] = 600.0,
    json_output: Annotated[bool, json_option("verification")] = False,
) -> None:
    """Run a quantized model with its recipe's flags and compare with what was promised.

    Weights and caches must be equal to the last digit that llama.cpp prints, compute buffers and
    speeds within their intervals. Exit code 0 where all is as promised, 3 where it is not.
    """
    import quantplan as qp  # noqa: PLC0415
    from quantplan.runtime import find_llama_cpp  # noqa: PLC0415
    from quantplan.verification.learn import learn as learned  # noqa: PLC0415
    from quantplan.verification.learn import save_profile  # noqa: PLC0415

    if (kld is None) != (text is None):
        raise InputError("--kld BASE and --text FILE belong together")
    inputs = (recipe, gguf, kld, text)
    check_targets(output, learn, read=inputs)
    log = output.with_suffix(".log")
    check_targets(log, read=inputs)
    if log == output:
        raise InputError(f"the log goes to {log}: give --output another ending, such as .json")
    promise = read_recipe(recipe)
    here = promise.provenance.machine if machine is None else qp.Machine.parse(machine)
    if learn is not None and learn.exists() and machine is None:
        here = qp.Machine.load(learn)
    content = None if text is None else read_text(text)
    with working(f"running {Path(gguf).name}"):
        found = qp.verify(
            promise,
            gguf,
            llama_cpp=find_llama_cpp(llama_cpp),
            machine=here,
            extra_flags=flags or (),
            speed=speed,
            base=kld,
            text=content,
            chunks=chunks,
            cache=output.with_name("quantplan-kld"),
            limit_s=limit,
            log=log,
        )
    found.save(output)
    tell(found, found.summary(), json_output)
    if learn is not None and here is not None:
        before = save_profile(learned(here, qp.read_inventory(gguf), found), learn)
        kept = f"; the one of before is {before}" if before else ""
        typer.echo(f"{learn}: the machine as it is known now{kept}", err=True)
    if not found.held:
        raise typer.Exit(BROKEN)


def run(
    recipe: RecipeArgument,
    source: Annotated[
        str, typer.Argument(metavar="GGUF", help="The quantized file, or what to quantize.")
    ],
    flags: FlagsArgument = None,
    llama_cpp: LlamaCppOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The quantized file to write; beside the source."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix to quantize with.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command instead of running it.")
    ] = False,
    json_output: Annotated[bool, json_option("dry-run")] = False,
) -> None:
    """Serve a model with its recipe's flags; quantize it first where that was not done."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.printed import DryRun  # noqa: PLC0415
    from quantplan.runtime import find_llama_cpp  # noqa: PLC0415
    from quantplan.serve import prepare, serve  # noqa: PLC0415

    if json_output and not dry_run:
        raise InputError("--json says what --dry-run would do: give both, or neither")
    check_targets(output, read=(recipe, imatrix))
    promise = read_recipe(recipe)
    service = prepare(
        promise,
        source,
        find_llama_cpp(llama_cpp),
        output=output,
        imatrix=imatrix,
        host=host,
        port=port,
        extra_flags=flags or (),
    )
    if dry_run:
        printed = DryRun.of(service, recipe, source, imatrix)
        if json_output:
            typer.echo(printed.model_dump_json(indent=1))
        else:
            typer.echo("\n".join(map(shlex.join, filter(None, (printed.quantize, printed.serve)))))
        return
    if not service.is_written:
        typer.echo(f"quantizing to {service.gguf}", err=True)
        with writing() as report:
            qp.quantize(promise, source, service.gguf, imatrix=imatrix, progress=report)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(serve(service, host, port))
