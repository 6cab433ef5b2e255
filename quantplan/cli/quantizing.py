"""Commands that read and write weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantplan.cli.options import check_targets, json_option, parse_size, read_recipe, tell
from quantplan.cli.progress import working, writing

if TYPE_CHECKING:
    from quantplan.quantize import Backend, LlamaQuantize

BackendName = Literal["ggml", "numpy", "llama-quantize"]


def measure_weights(
    source: Annotated[Path, typer.Argument(help="The F32, F16 or BF16 GGUF (any shard).")],
    output: Annotated[Path, typer.Argument(metavar="JSON", help="Where to save the errors.")],
    types: Annotated[
        str, typer.Option(help="Types to measure, separated by commas.")
    ] = "Q8_0,Q6_K,Q5_K,Q4_K,IQ4_XS,Q3_K,Q2_K",
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance matrix, GGUF or .dat.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to sample from each tensor.")] = 256,
    json_output: Annotated[bool, json_option("weight-errors")] = False,
) -> None:
    """Measure the error that each type makes on a model's real weights."""
    from quantplan.files import write_whole  # noqa: PLC0415
    from quantplan.quantize.imatrix import read_imatrix  # noqa: PLC0415
    from quantplan.quantize.weights import measure_weights as measure  # noqa: PLC0415

    check_targets(output, read=(source, imatrix))
    importance = None if imatrix is None else read_imatrix(imatrix)
    with working("quantizing a sample of each tensor") as shown:
        found = measure(
            source,
            [name.strip() for name in types.split(",")],
            imatrix=importance,
            rows_per_tensor=rows,
            progress=shown.count,
        )
    write_whole(output, found.model_dump_json(indent=1))
    tell(found, f"{output}: errors of {len(found.errors)} tensors", json_output)


def quantize(
    recipe: Annotated[Path, typer.Argument(help="A recipe that `quantplan plan` saved.")],
    source: Annotated[
        str,
        typer.Argument(
            help="The F32, F16 or BF16 GGUF (any shard): a file, a URL, or hf:OWNER/REPO/FILE."
        ),
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
    backend: Annotated[
        BackendName,
        typer.Option(
            help="What quantizes: the bundled ggml, numpy (slow, simple types), or llama-quantize "
            "(llama.cpp's or ik_llama.cpp's, in LLAMA_CPP_DIR or on PATH).",
        ),
    ] = "ggml",
    json_output: Annotated[bool, json_option("written-file")] = False,
) -> None:
    """Write a GGUF with the types of a recipe, and check it."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.printed import WrittenFile  # noqa: PLC0415

    check_targets(target, read=(recipe, imatrix))
    split_max_bytes = parse_size("--split-max-size", split_max_size)
    try:
        with writing() as report:
            result = qp.quantize(
                read_recipe(recipe),
                source,
                target,
                imatrix=imatrix,
                allow_requantize=allow_requantize,
                split_max_bytes=split_max_bytes,
                resume=resume,
                verify=verify,
                backend=_backend(backend),
                threads=threads,
                progress=report,
            )
    except KeyboardInterrupt:
        if backend != "llama-quantize":
            typer.echo("Interrupted. The same command with --resume goes on.", err=True)
        raise
    text = f"{result.path}: {result.n_bytes} bytes in {result.duration_s:.1f} s, checked"
    if result.verification is not None:
        text += "\n" + result.verification.summary()
    tell(WrittenFile.of(result), text, json_output)


def _backend(name: BackendName) -> "Backend | LlamaQuantize | None":
    from quantplan.quantize import NumpyBackend, find_llama_quantize  # noqa: PLC0415

    if name == "llama-quantize":
        return find_llama_quantize()
    return NumpyBackend() if name == "numpy" else None
