"""Commands that show a plan as a page."""

from pathlib import Path
from typing import Annotated

import typer

from quantplan.cli.options import (
    MeasuredOption,
    WeightsOption,
    check_targets,
    parse_policy,
    read_model,
    say,
)
from quantplan.cli.progress import working
from quantplan.errors import InputError


def report(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="What `quantplan plan --json` printed.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ] = Path("report.html"),
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model, where it is not where the plan found it."),
    ] = None,
    points: Annotated[
        int, typer.Option(help="Points of the frontier to work out; 0 for none.")
    ] = 12,
    policy: Annotated[
        str | None, typer.Option(help="The policy that the plan was made with, if it is not found.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=TYPE,...", help="As the plan was made with.")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=TYPE", help="As the plan was made with.")
    ] = None,
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
) -> None:
    """Write a plan as one HTML page that needs no network.

    It has the command, the memory, the frontier with a slider, all tensors, the plain answers and
    what the numbers rest on.
    """
    from quantplan.files import write_whole  # noqa: PLC0415
    from quantplan.measure.evidence_files import read_evidence  # noqa: PLC0415
    from quantplan.page.content import page_content  # noqa: PLC0415
    from quantplan.page.document import report_html  # noqa: PLC0415
    from quantplan.page.others import other_plans, why_not  # noqa: PLC0415
    from quantplan.plans.result import Plan  # noqa: PLC0415

    check_targets(output, read=(plan, model, measured, weights))
    made = Plan.load(plan)
    asked = made.provenance
    rules = (
        parse_policy(policy or asked.policy or "", pin or [], allow or [])
        if policy or pin or allow
        else asked.rules
    )
    evidence = read_evidence(measured, weights)
    inventory, reason = None, "the frontier was not asked for (--points 0)" if points == 0 else ""
    try:
        inventory = read_model(model or made.provenance.source.removeprefix("catalog:"))
    except InputError as error:
        reason = f"the model cannot be read, give it with --model: {error}"
    if inventory is not None:
        mismatch = why_not(made, inventory, rules, evidence)
        inventory, reason = (None, mismatch) if mismatch else (inventory, reason)
    others = []
    if inventory is not None and points > 0:
        with working("tracing the frontier") as shown:
            others = other_plans(
                made,
                inventory,
                policy=rules,
                evidence=evidence,
                points=points,
                progress=shown.count,
            )
        reason = "" if others else "no other plan is as good at another speed"
    content = page_content(
        made,
        others,
        inventory=inventory,
        evidence=evidence,
        without_frontier=f"There is no frontier: {reason}." if reason else None,
    )
    write_whole(output, report_html(content))
    say(f"{output}: {made.model}, {len(content.plans)} plans to choose from")
    if reason:
        typer.echo(f"note: no frontier: {reason}", err=True)


def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for any free one.")] = 8765,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Show plans in the browser, and change model, machine and context there.

    Only this machine can reach the page. Ctrl+C ends it.
    """
    import webbrowser  # noqa: PLC0415

    from quantplan.page.server import Server  # noqa: PLC0415

    server = Server(port)
    typer.echo(f"{server.url}\nCtrl+C ends it.")
    if browser:
        webbrowser.open(server.url)
    server.serve_until_interrupted()


def schema(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="plan, recipe, machine, ...; see docs/reference.")
    ],
) -> None:
    """Print the JSON Schema of what --json prints."""
    import json  # noqa: PLC0415

    from quantplan.schemas import json_schema  # noqa: PLC0415

    typer.echo(json.dumps(json_schema(name), indent=1))
