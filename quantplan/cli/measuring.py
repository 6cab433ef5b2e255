"""The command that measures a model's losses with llama.cpp."""

from pathlib import Path
from typing import Annotated

import typer

from quantplan.cli.options import check_targets, json_option, read_text, say
from quantplan.cli.progress import working


def measure(
    source: Annotated[Path, typer.Argument(help="The F32, F16 or BF16 GGUF (any shard).")],
    table: Annotated[
        Path, typer.Argument(metavar="CSV", help="Where to save the KLDs, for --measured.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Text to measure on, such as you will work with; repeatable, all count alike.",
        ),
    ],
    curve: Annotated[
        bool, typer.Option("--curve", help="Only the whole model at a few types.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no run after so many minutes.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Runs at most.")] = None,
    chunks: Annotated[
        int,
        typer.Option(help="Chunks of 512 tokens of each text; half of them are held out."),
    ] = 16,
    imatrix: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Quantize with this importance matrix."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a table that is there.")
    ] = False,
    parallel: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a run; all cores.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Log probabilities and quantized files; CSV.cache."),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The llama.cpp in this folder.")
    ] = None,
    json_output: Annotated[bool, json_option("measured-losses")] = False,
) -> None:
    """Measure the KLD of a model at low types on your own text, on a budget."""
    from quantplan.inventory.sources import read_inventory  # noqa: PLC0415
    from quantplan.measure.groups import Job  # noqa: PLC0415
    from quantplan.measure.halves import survival  # noqa: PLC0415
    from quantplan.measure.losses import measure_losses  # noqa: PLC0415
    from quantplan.measure.runs import Outcome, Setup  # noqa: PLC0415
    from quantplan.printed import MeasuredLosses  # noqa: PLC0415
    from quantplan.runtime import find_llama_cpp  # noqa: PLC0415

    check_targets(table, read=(source, *text, imatrix))
    setup = Setup(
        source=source,
        texts=tuple(read_text(path) for path in text),
        llama_cpp=find_llama_cpp(llama_cpp),
        cache=cache or table.with_name(f"{table.name}.cache"),
        chunks=chunks,
        imatrix=imatrix,
        threads=threads,
    )
    outcomes: list[Outcome] = []
    with working("measuring") as shown:

        def report(job: Job, outcome: Outcome | None) -> None:
            if outcome is None:
                shown.now(f"{len(outcomes)} done, measuring {job}")
                return
            outcomes.append(outcome)
            typer.echo(
                f"{job}: KLD {outcome.kld_nats:.5f} ± {outcome.standard_error_nats:.5f} "
                f"({outcome.duration_s:.0f} s)",
                err=True,
            )

        try:
            found = measure_losses(
                setup,
                table,
                curve=curve,
                runs=runs,
                limit_s=None if minutes is None else minutes * 60,
                resume=resume,
                parallel=parallel,
                progress=report,
            )
        except KeyboardInterrupt:
            typer.echo(
                "Interrupted. What was measured is kept; the same command with --resume goes on.",
                err=True,
            )
            raise
    share = survival(read_inventory(source), found)
    if json_output:
        printed = MeasuredLosses(
            table=table,
            curve=found.curve,
            n_groups=len(found.singles),
            runs=tuple(outcomes),
            surviving_share=share,
        )
        typer.echo(printed.model_dump_json(indent=1))
        return
    say(f"{table}: {found.evidence.describe()}")
    if share is not None:
        say(f"of what the groups show on one half of the text, {share:.0%} is there on the other")
