"""The command line: parses, calls the API, prints."""

import contextlib
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantplan.errors import InputError, QuantplanError
from quantplan.version import __version__
from quantplan.workload import NEWEST_KNOWN_BUILD, KVType

if TYPE_CHECKING:
    from quantplan.costs.evidence import Evidence
    from quantplan.hardware import Machine
    from quantplan.policy import Policy

EngineName = Literal["llama.cpp", "ik_llama.cpp", "ik"]

app = typer.Typer(
    name="quantplan",
    help="Choose the quant type and the device of every tensor of a GGUF model, together.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SHOWN_FAULTS = 10

MachineOption = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="GPUs and RAM: 'RTX 4090 + 64GiB@80GB/s', '2x 24GiB + 128GiB@200GB/s', or the "
        "profile of a machine (.json).",
    ),
]
LlamaBuildOption = Annotated[
    int, typer.Option(help="Build number of the llama.cpp that will run the model.")
]
MarginOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory to leave free on every GPU, such as 2GiB for a desktop; 10 %, at most 1 GiB.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
MeasuredOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV", help="Measured KLDs of this model, as GGUF-Tool-Suite or `tensor,qtype,kld`."
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="JSON", help="Errors that `quantplan measure-weights` saved."),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A GGUF file, any shard of one, or a catalog name.")
]


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


@app.command()
def plan(
    model: ModelArgument,
    machine: MachineOption,
    ctx: Annotated[int, typer.Option(help="Tokens of context, all slots together.")] = 4096,
    kv: Annotated[KVType, typer.Option(help="Type of the KV cache.")] = "f16",
    slots: Annotated[int, typer.Option(help="Requests served at the same time.")] = 1,
    ubatch: Annotated[int, typer.Option(help="Physical batch in tokens.")] = 512,
    llama_build: LlamaBuildOption = NEWEST_KNOWN_BUILD,
    margin: MarginOption = None,
    min_tps: Annotated[
        float | None, typer.Option(help="Least decode speed in tokens/s, context full.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Rules about types and places: quality, compact, free or hq4k.")
    ] = "quality",
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE,...", help="Types for the tensors whose names match; repeatable."
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=TYPE", help="One type, ahead of --allow; repeatable."),
    ] = None,
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
    gap: Annotated[float, typer.Option(help="Relative gap at which to stop.")] = 1e-4,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the recipe as JSON.")
    ] = None,
    tensor_types: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Save the types for llama-quantize --pure --tensor-type-file."
        ),
    ] = None,
    gguf_name: Annotated[
        str, typer.Option(metavar="FILE", help="Name of the quantized GGUF in the command shown.")
    ] = "model.gguf",
    json_output: JsonOption = False,
) -> None:
    """Choose types and places, and print the flags for llama.cpp."""
    import quantplan as qp  # noqa: PLC0415 (help pages must not wait for the solver)
    from quantplan.recipe import write_whole  # noqa: PLC0415

    inventory = qp.read_inventory(model)
    found = qp.plan(
        inventory,
        _machine(machine, margin),
        qp.Workload(
            context=ctx,
            kv_type=kv,
            slots=slots,
            batch=max(ubatch, 2048),
            ubatch=ubatch,
            llama_cpp_build=llama_build,
        ),
        min_decode_tps=min_tps,
        policy=_policy(policy, pin or [], allow or []),
        evidence=_evidence(measured, weights),
        gap=gap,
    )
    if recipe is not None:
        found.recipe.save(recipe)
    if tensor_types is not None:
        write_whole(tensor_types, found.recipe.tensor_type_file())
    if json_output:
        typer.echo(found.model_dump_json(indent=1))
    else:
        typer.echo(found.summary())
        typer.echo(f"\n{found.llama_server_command(gguf_name)}")


@app.command()
def predict(
    model: ModelArgument,
    machine: MachineOption,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="Flags of llama-server, after --."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A recipe, in place of flags.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Whose flags they are.")] = "llama.cpp",
    engine_date: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d"],
            help="Day of ik_llama.cpp's sources, whose defaults changed; the newest.",
        ),
    ] = None,
    llama_build: LlamaBuildOption = NEWEST_KNOWN_BUILD,
    calibrate: Annotated[
        bool,
        typer.Option(help="Take the compute buffers from the llama.cpp of this machine."),
    ] = False,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Calibrate with the llama.cpp in this folder."),
    ] = None,
    margin: MarginOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say how much memory a model takes with given flags or a recipe, and whether that fits."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.runtime import find_llama_cpp, predict_calibrated  # noqa: PLC0415

    if recipe is not None and flags:
        raise InputError("give flags or --recipe, not both: a recipe has its flags")
    calibrate = calibrate or llama_cpp is not None
    if calibrate and (recipe is not None or engine != "llama.cpp"):
        raise InputError("--calibrate asks llama.cpp about flags: give no recipe, no other engine")
    inventory, described = qp.read_inventory(model), _machine(machine, margin)
    if calibrate:
        found = predict_calibrated(inventory, flags or [], described, find_llama_cpp(llama_cpp))
    else:
        found = qp.predict(
            inventory,
            qp.Recipe.load(recipe) if recipe is not None else flags or [],
            described,
            engine="llama.cpp" if engine == "llama.cpp" else "ik_llama.cpp",
            engine_date=engine_date.date() if engine_date else None,
            llama_cpp_build=llama_build,
        )
    typer.echo(found.model_dump_json(indent=1) if json_output else found.summary())


def _machine(text: str, margin: str | None) -> "Machine":
    """The machine of the command line, with the margin that its user wants."""
    import quantplan as qp  # noqa: PLC0415

    return qp.Machine.parse(text, margin_bytes=_bytes("--margin", margin))


def _bytes(option: str, text: str | None) -> int | None:
    """The bytes that an option states."""
    from quantplan.units import parse_bytes  # noqa: PLC0415

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error


@app.command()
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
    typer.echo(found.model_dump_json(indent=1) if json_output else found.summary())


@app.command()
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
    typer.echo(found.summary())


def _policy(name: str, pins: list[str], allowed: list[str]) -> "Policy":
    """A preset with the rules of the command line; pins come first."""
    from quantplan.policy import parse_rule  # noqa: PLC0415
    from quantplan.policy import policy as preset  # noqa: PLC0415

    found = preset(name)
    faults: list[str] = []
    for text in (*pins, *allowed):
        try:
            pattern, types = parse_rule(text)
            if text in pins and len(types) > 1:
                raise InputError(f"--pin {text} has several types: use --allow")
            found = found.allow(pattern, *types)
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    return found


def _evidence(measured: Path | None, weights: Path | None) -> "Evidence | None":
    """Measurements of a model, from the files that were given."""
    from dataclasses import replace  # noqa: PLC0415

    from quantplan.costs.evidence import Evidence  # noqa: PLC0415
    from quantplan.formats.sensitivity_tables import read_sensitivity_table  # noqa: PLC0415
    from quantplan.quantize.weights import WeightErrors  # noqa: PLC0415

    if measured is None and weights is None:
        return None
    found = Evidence() if measured is None else read_sensitivity_table(measured).evidence
    if weights is not None:
        found = replace(found, weight_errors=WeightErrors.load(weights).ratios())
    return found


@app.command()
def measure_weights(
    source: Annotated[Path, typer.Argument(help="The F32, F16 or BF16 GGUF (any shard).")],
    output: Annotated[Path, typer.Argument(metavar="JSON", help="Where to save the errors.")],
    types: Annotated[
        str, typer.Option(help="Types to measure, separated by commas.")
    ] = "Q8_0,Q6_K,Q5_K,Q4_K,IQ4_XS,Q3_K,Q2_K",
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix, GGUF or .dat.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to sample from each tensor.")] = 64,
) -> None:
    """Measure the error that each type makes on a model's real weights."""
    from quantplan.quantize.imatrix import read_imatrix  # noqa: PLC0415
    from quantplan.quantize.weights import measure_weights as measure  # noqa: PLC0415
    from quantplan.recipe import write_whole  # noqa: PLC0415

    found = measure(
        source,
        [name.strip() for name in types.split(",")],
        imatrix=None if imatrix is None else read_imatrix(imatrix),
        rows_per_tensor=rows,
    )
    write_whole(output, found.model_dump_json(indent=1))
    typer.echo(f"{output}: errors of {len(found.errors)} tensors")


@app.command()
def explain(
    model: ModelArgument,
    tensor: Annotated[str, typer.Argument(metavar="TENSOR", help="Full name of a tensor.")],
    qtype: Annotated[str, typer.Option(help="Type to explain the loss of.")] = "Q4_K",
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say which evidence gives the predicted loss of a tensor at a type."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.costs.quality import LossTable, type_errors  # noqa: PLC0415
    from quantplan.report import explanation_text  # noqa: PLC0415

    inventory = qp.read_inventory(model)
    faults = []
    if tensor not in inventory.by_name:
        faults.append(f"{inventory.name} has no tensor {tensor}; quantplan show lists them")
    if qtype.upper() not in type_errors():
        faults.append(f"the error of the type {qtype} was never measured")
    if faults:
        raise InputError(faults)
    table = LossTable(inventory, _evidence(measured, weights))
    found = table.explain(inventory.by_name[tensor], qtype.upper())
    typer.echo(found.model_dump_json(indent=1) if json_output else explanation_text(found))


@app.command()
def show(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A recipe, a GGUF file, or a catalog name."),
    ],
    ftype: Annotated[
        str | None,
        typer.Option(help="Show the model as llama-quantize would make it: 'Q4_K_M'."),
    ] = None,
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="With an importance matrix, which changes some types.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Show what is in a recipe or in a model."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.report import inventory_text, recipe_text  # noqa: PLC0415

    found: qp.Recipe | qp.Inventory
    if _is_recipe(source):
        if ftype is not None:
            raise InputError(
                f"{source} is a recipe, which has its own types; --ftype needs a model"
            )
        found = qp.Recipe.load(source)
    else:
        found = qp.read_inventory(source)
        if ftype is not None:
            found = found.with_qtypes(qp.stock_mix(found, ftype, has_imatrix=imatrix))
    if json_output:
        typer.echo(found.model_dump_json(indent=1))
    elif isinstance(found, qp.Recipe):
        typer.echo(recipe_text(found))
    else:
        typer.echo(inventory_text(found))


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A recipe.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    json_output: JsonOption = False,
) -> None:
    """Show what differs between two recipes: types, places, bytes, predictions."""
    import quantplan as qp  # noqa: PLC0415

    found = qp.diff_recipes(qp.Recipe.load(first), qp.Recipe.load(second))
    typer.echo(found.model_dump_json(indent=1) if json_output else found.summary())


@app.command()
def export(
    recipe: Annotated[Path, typer.Argument(help="A recipe.")],
    target: Annotated[
        str, typer.Argument(metavar="FORMAT", help="For which program; --help names all formats.")
    ],
    gguf_name: Annotated[
        str, typer.Option(metavar="FILE", help="The quantized GGUF, in commands.")
    ] = "model.gguf",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; to the terminal.")
    ] = None,
) -> None:
    """Write a recipe in the words of another program.

    FORMAT is llama-quantize (a tensor-type file), llama-quantize-command, ik-custom-q,
    ik-quantize-command, gguf-tool-suite, llama-server, llama-cli, llama-bench, ik-server,
    koboldcpp, shell, systemd or docker-compose.
    """
    import quantplan as qp  # noqa: PLC0415
    from quantplan.recipe import write_whole  # noqa: PLC0415

    text = qp.export_recipe(qp.Recipe.load(recipe), _any(target), model_path=gguf_name)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_whole(output, text)


@app.command(name="import")
def import_(
    model: ModelArgument,
    source: Annotated[Path, typer.Argument(help="The file to read.")],
    recipe: Annotated[Path, typer.Option(metavar="FILE", help="Where to save the recipe.")],
    source_format: Annotated[
        str | None,
        typer.Option("--format", help="Of the file; told from its suffix where that is clear."),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Whose commands they are.")] = "llama.cpp",
    machine: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Whose devices imported flags put tensors on."),
    ] = None,
) -> None:
    """Make a recipe from a quantized GGUF, or from rules or commands of other programs.

    --format is gguf, llama-quantize (a tensor-type file), rules (the same with # comments),
    ik-custom-q, gguf-tool-suite, or command (a command line, script, systemd unit, compose file).
    """
    import quantplan as qp  # noqa: PLC0415
    from quantplan.report import recipe_text  # noqa: PLC0415

    found = qp.import_recipe(
        qp.read_inventory(model),
        source,
        source_format=_any(source_format),
        engine="llama.cpp" if engine == "llama.cpp" else "ik_llama.cpp",
        machine=None if machine is None else qp.Machine.parse(machine),
    )
    found.save(recipe)
    typer.echo(recipe_text(found))


def _any(text: str | None) -> Any:
    """A text that the API checks against the values that it knows."""
    return text


def _is_recipe(source: str) -> bool:
    """Whether a source is meant as a recipe: by its suffix, or because it starts as JSON."""
    if source.endswith(".json"):
        return True
    path = Path(source)
    with contextlib.suppress(OSError):  # reading it as a model will say what is wrong
        if path.is_file():
            with path.open("rb") as file:
                return file.read(1) == b"{"
    return False


@app.command()
def quantize(
    recipe: Annotated[Path, typer.Argument(help="A recipe that `quantplan plan` saved.")],
    source: Annotated[
        str, typer.Argument(help="The F32, F16 or BF16 GGUF (any shard): a file or an HTTP URL.")
    ],
    target: Annotated[Path, typer.Argument(help="The GGUF to write.")],
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Importance matrix of llama.cpp, GGUF or .dat."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run has stopped.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all back, hash it, compare the weights."),
    ] = False,
    split_max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Write shards with at most so much, such as 40GiB."),
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Convert quantized tensors too.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Worker threads; all cores.")] = None,
) -> None:
    """Write a GGUF with the types of a recipe, and check it."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    import quantplan as qp  # noqa: PLC0415
    from quantplan.quantize import Progress as Step  # noqa: PLC0415

    bar = Progress(
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("quantize", total=None)
    with contextlib.ExitStack() as shown:

        def report(step: Step) -> None:
            if not bar.live.is_started:
                shown.enter_context(bar)
            bar.update(task, completed=step.done_bytes, total=step.total_bytes)

        result = qp.quantize(
            qp.Recipe.load(recipe),
            source,
            target,
            imatrix=imatrix,
            allow_requantize=allow_requantize,
            split_max_bytes=_bytes("--split-max-size", split_max_size),
            resume=resume,
            verify=verify,
            threads=threads,
            progress=report,
        )
    typer.echo(f"{result.path}: {result.n_bytes} bytes in {result.duration_s:.1f} s, checked")
    if result.verification is not None:
        typer.echo(result.verification.summary())


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


if __name__ == "__main__":
    main()
