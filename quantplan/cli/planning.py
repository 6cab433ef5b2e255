"""Commands that plan, predict and explain."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from quantplan.cli.options import (
    AllowOption,
    CacheTypeOption,
    ContextOption,
    EngineName,
    FtypeOption,
    ImatrixOption,
    LlamaBuildOption,
    MachineOption,
    MarginOption,
    MeasuredOption,
    ModelArgument,
    PinOption,
    PolicyOption,
    RobustOption,
    WeightsOption,
    check_targets,
    in_mix,
    is_recipe,
    json_option,
    parse_machine,
    parse_policy,
    read_model,
    read_recipe,
    tell,
    text_width,
)
from quantplan.cli.progress import working
from quantplan.errors import InputError
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD, KVType
from quantplan.near import similar

if TYPE_CHECKING:
    from quantplan.inventory import Tensor

# Of measured chunks, that --robust plans again for; each takes as long as a plan.
_RESAMPLES = 12
_EXPLAINED = "Q4_K"


def plan(
    model: ModelArgument,
    machine: MachineOption = None,
    ctx: Annotated[
        str, typer.Option(help="Tokens of context, all slots together; max for the longest.")
    ] = "4096",
    kv: Annotated[
        str, typer.Option(help="Type of the KV cache; auto to choose f16 or q8_0.")
    ] = "f16",
    slots: Annotated[int, typer.Option(help="Requests served at the same time, at most 256.")] = 1,
    ubatch: Annotated[str, typer.Option(help="Physical batch in tokens; auto to choose.")] = "512",
    gpus: Annotated[
        Literal["all", "auto"], typer.Option(help="auto to choose how many GPUs to use.")
    ] = "all",
    llama_build: LlamaBuildOption = NEWEST_KNOWN_BUILD,
    margin: MarginOption = None,
    min_tps: Annotated[
        float | None, typer.Option(help="Least decode speed in tokens/s, context full.")
    ] = None,
    max_turn: Annotated[
        float | None, typer.Option(help="Longest seconds for --prompt and --answer.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a typical prompt.")] = 2048,
    answer: Annotated[int, typer.Option(help="Tokens of a typical answer.")] = 512,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Largest loss in nats/token; the fastest plan within it is made."),
    ] = None,
    no_worse_than: Annotated[
        str | None, typer.Option(metavar="MIX", help="The same, as large as that of 'Q4_K_M'.")
    ] = None,
    policy: PolicyOption = "quality",
    allow: AllowOption = None,
    pin: PinOption = None,
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
    robust: RobustOption = False,
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
    json_output: Annotated[bool, json_option("plan")] = False,
) -> None:
    """Choose types and places, and print the flags for llama.cpp."""
    import quantplan as qp  # noqa: PLC0415 (help pages must not wait for the solver)
    from quantplan.files import write_whole  # noqa: PLC0415

    context = 4096 if ctx == "max" else _tokens("--ctx", ctx, "max")
    physical = 512 if ubatch == "auto" else _tokens("--ubatch", ubatch, "auto")
    kv_type = _kv_type(kv)
    check_targets(recipe, tensor_types, read=(model, machine, measured, weights))
    inventory = read_model(model)
    described = parse_machine(machine, margin, inventory)
    rules = parse_policy(policy, pin or [], allow or [])
    evidence = qp.read_evidence(measured, weights, robust=robust)
    task = qp.Workload(
        context=context,
        kv_type=kv_type or "f16",
        slots=slots,
        batch=max(physical, 2048),
        ubatch=physical,
        prompt_tokens=prompt,
        answer_tokens=answer,
        llama_cpp_build=llama_build,
    )
    with working("planning"):
        found = qp.plan(
            inventory,
            described,
            task,
            min_decode_tps=min_tps,
            max_turn_s=max_turn,
            max_loss_nats=max_loss,
            no_worse_than=no_worse_than,
            context="max" if ctx == "max" else None,
            kv_type=None if kv_type else "auto",
            ubatch="auto" if ubatch == "auto" else None,
            n_gpus="auto" if gpus == "auto" else None,
            policy=rules,
            evidence=evidence,
            gap=gap,
            resamples=_RESAMPLES if robust else 0,
        )
    if recipe is not None:
        found.recipe.save(recipe)
    if tensor_types is not None:
        write_whole(tensor_types, found.recipe.tensor_type_file())
    tell(found, found.summary(text_width()), json_output)
    if not json_output:
        typer.echo(f"\n{found.llama_server_command(gguf_name)}")


def _tokens(option: str, text: str, word: str) -> int:
    """A number of tokens from the command line."""
    try:
        return int(text)
    except ValueError as error:
        raise InputError(
            f"{option} {text}: give a number of tokens, such as 32768, or {word}"
        ) from error


def _kv_type(text: str) -> KVType | None:
    """A type of the KV cache from the command line; None for one that is to be chosen."""
    known = get_args(KVType)
    if text.lower() in known:
        return cast(KVType, text.lower())
    if text.lower() == "auto":
        return None
    hint = similar(text, known) or f"; known are {', '.join(known)}, auto"
    raise InputError(f"--kv {text}: there is no such type of KV cache{hint}")


def frontier(
    model: ModelArgument,
    machine: MachineOption = None,
    over: Annotated[
        Literal["speed", "size", "context"], typer.Option(help="What to trade for quality.")
    ] = "speed",
    points: Annotated[int, typer.Option(help="How many points.")] = 24,
    ctx: ContextOption = 4096,
    kv: CacheTypeOption = "f16",
    min_tps: Annotated[
        float | None, typer.Option(help="Least decode speed in tokens/s of all points.")
    ] = None,
    policy: PolicyOption = "quality",
    allow: AllowOption = None,
    pin: PinOption = None,
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
    margin: MarginOption = None,
    json_output: Annotated[bool, json_option("frontier")] = False,
) -> None:
    """Show what more speed, less size or more context costs in quality."""
    import quantplan as qp  # noqa: PLC0415

    inventory = read_model(model)
    described = parse_machine(machine, margin, inventory)
    rules = parse_policy(policy, pin or [], allow or [])
    evidence = qp.read_evidence(measured, weights)
    with working("tracing the frontier") as shown:
        found = qp.frontier(
            inventory,
            described,
            qp.Workload(context=ctx, kv_type=kv),
            over=over,
            points=points,
            min_decode_tps=min_tps,
            policy=rules,
            evidence=evidence,
            progress=shown.count,
        )
    tell(found, found.summary(), json_output)


def prices(
    model: ModelArgument,
    machine: MachineOption = None,
    ctx: ContextOption = 4096,
    kv: CacheTypeOption = "f16",
    min_tps: Annotated[
        float | None, typer.Option(help="Least decode speed in tokens/s, context full.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Largest loss in nats/token, at the best speed.")
    ] = None,
    policy: PolicyOption = "quality",
    allow: AllowOption = None,
    pin: PinOption = None,
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
    margin: MarginOption = None,
    json_output: Annotated[bool, json_option("prices")] = False,
) -> None:
    """Say what one more GiB of VRAM or RAM, or a tenth more bandwidth, would buy."""
    import quantplan as qp  # noqa: PLC0415

    inventory = read_model(model)
    described = parse_machine(machine, margin, inventory)
    rules = parse_policy(policy, pin or [], allow or [])
    evidence = qp.read_evidence(measured, weights)
    with working("planning with a little more of each") as shown:
        made = qp.plan(
            inventory,
            described,
            qp.Workload(context=ctx, kv_type=kv),
            min_decode_tps=min_tps,
            max_loss_nats=max_loss,
            policy=rules,
            evidence=evidence,
            baselines=False,
        )
        found = qp.prices(made, inventory, policy=rules, evidence=evidence, progress=shown.count)
    tell(found, found.summary(), json_output)


def predict(
    model: ModelArgument,
    machine: MachineOption = None,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- FLAGS", help="Flags of llama-server, after --."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A recipe, in place of flags.")
    ] = None,
    ftype: FtypeOption = None,
    imatrix: ImatrixOption = False,
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
    json_output: Annotated[bool, json_option("prediction")] = False,
) -> None:
    """Say how much memory a model takes with given flags or a recipe, and whether that fits."""
    import quantplan as qp  # noqa: PLC0415
    from quantplan.runtime import find_llama_cpp, predict_calibrated  # noqa: PLC0415

    if recipe is not None and flags:
        raise InputError("give flags or --recipe, not both: a recipe has its flags")
    if recipe is not None and ftype is not None:
        raise InputError("give --ftype or --recipe, not both: a recipe has its own types")
    calibrate = calibrate or llama_cpp is not None
    if calibrate and (recipe is not None or engine != "llama.cpp"):
        raise InputError("--calibrate asks llama.cpp about flags: give no recipe, no other engine")
    inventory = in_mix(read_model(model), ftype, has_imatrix=imatrix)
    described = parse_machine(machine, margin, inventory)
    if calibrate:
        with working("asking llama.cpp"):
            found = predict_calibrated(inventory, flags or [], described, find_llama_cpp(llama_cpp))
    else:
        found = qp.predict(
            inventory,
            read_recipe(recipe) if recipe is not None else flags or [],
            described,
            engine="llama.cpp" if engine == "llama.cpp" else "ik_llama.cpp",
            engine_date=engine_date.date() if engine_date else None,
            llama_cpp_build=llama_build,
        )
    tell(found, found.summary(), json_output)


def explain(
    model: ModelArgument,
    tensor: Annotated[str, typer.Argument(metavar="TENSOR", help="Full name of a tensor.")],
    qtype: Annotated[
        str | None,
        typer.Option(help="Type to explain the loss of; Q4_K, or what is written in its place."),
    ] = None,
    measured: MeasuredOption = None,
    weights: WeightsOption = None,
    json_output: Annotated[bool, json_option("explanation")] = False,
) -> None:
    """Say which evidence gives the predicted loss of a tensor at a type."""
    from quantplan.costs.quality import LossTable, type_errors  # noqa: PLC0415
    from quantplan.measure.evidence_files import read_evidence  # noqa: PLC0415
    from quantplan.report import explanation_text  # noqa: PLC0415

    inventory = read_model(model)
    faults = []
    if tensor not in inventory.by_name:
        faults.append(f"{inventory.name} has no tensor {tensor}; quantplan show lists them")
    if qtype is not None and qtype.upper() not in type_errors():
        faults.append(f"the error of the type {qtype} was never measured")
    if faults:
        raise InputError(faults)
    explained = inventory.by_name[tensor]
    name = _type_of(explained, qtype)
    found = LossTable(inventory, read_evidence(measured, weights)).explain(explained, name)
    tell(found, explanation_text(found), json_output)


def _type_of(tensor: "Tensor", asked: str | None) -> str:
    """The type whose loss is explained.

    Args:
        tensor: The tensor that has it.
        asked: What was asked for, in any case; by default what a quantizer writes for Q4_K.

    Raises:
        InputError: The tensor cannot have the type.
    """
    from quantplan.qtypes import fitting_qtype, qtype  # noqa: PLC0415

    kind = qtype(asked or _EXPLAINED)
    if not tensor.is_quantizable:
        raise InputError(
            f"{tensor.name} cannot be {kind.name}: quantizers leave it {tensor.qtype}, which "
            "costs nothing; name a tensor that they change"
        )
    written = fitting_qtype(kind.name, tensor.shape_ne[0])
    if written == kind or (asked is None and written is not None):
        return written.name
    instead = (
        f"; llama-quantize would write {written.name}: --qtype {written.name}" if written else ""
    )
    fault = kind.row_fault(tensor.shape_ne[0])
    raise InputError(f"{tensor.name} cannot be {kind.name}: {fault}{instead}")


def show(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A recipe, a plan, a GGUF file, or a catalog name."),
    ],
    ftype: FtypeOption = None,
    imatrix: ImatrixOption = False,
    json_output: Annotated[bool, json_option("recipe", "inventory")] = False,
) -> None:
    """Show what is in a recipe or in a model."""
    from quantplan.report import inventory_text, recipe_text  # noqa: PLC0415

    if is_recipe(source):
        if ftype is not None:
            raise InputError(
                f"{source} is a recipe, which has its own types; --ftype needs a model"
            )
        recipe = read_recipe(source)
        tell(recipe, recipe_text(recipe), json_output)
        return
    inventory = in_mix(read_model(source), ftype, has_imatrix=imatrix)
    tell(inventory, inventory_text(inventory), json_output)
