"""Reads llama.cpp's and ik_llama.cpp's command-line flags, as far as memory depends on them.

Both generations of flags are understood (``--no-mmap`` and ``-lm none``, ``-fa`` with and without a
value). What has no influence on memory is skipped; what has one that is not modelled is noted.
"""

import argparse
import datetime
import re
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from quantplan.errors import InputError
from quantplan.formats.args_notes import (
    NOT_COUNTED,
    PROMPT_CACHE_MIB,
    flag_notes,
    flag_warnings,
    misspelt,
)
from quantplan.formats.llama_cpp import flag_words
from quantplan.inventory import Inventory
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD
from quantplan.placement import IkOptions, Launch, Override
from quantplan.qtypes import Runtime
from quantplan.workload import Workload

# What --cpu-moe stands for (common/arg.cpp).
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE = r"\.ffn_(up|down|gate)\."
# llama-server's default: four slots that share one KV buffer.
_AUTO_SLOTS = 4
_DEFAULT_CONTEXT = 4096
_DRAFT_TOKENS = 3
# Load modes that read the file into buffers instead of mapping it.
_READS = {"none", "dio"}
_SWITCH = {
    **dict.fromkeys(("on", "enabled", "true", "1", "auto", "-1"), True),
    **dict.fromkeys(("off", "disabled", "false", "0"), False),
}
_NUMBER = re.compile(r"-\d+(\.\d*)?")
_IK_ONLY = {
    "-mla", "--mla-use", "-amb", "--attention-max-batch", "-fmoe", "--fused-moe", "-no-fmoe",
    "--no-fused-moe", "-rtr", "--run-time-repack", "-no-fa", "--no-flash-attn", "--swa-compress",
    "-ser", "--smart-expert-reduction", "-khad", "-ger", "-gr", "-mqkv",
}  # fmt: skip
# Defaults of ik_llama.cpp, by the day of the pull request that changed them (863, 943, 2209).
_IK_FUSED_EXPERTS_SINCE = datetime.date(2025, 10, 25)
_IK_FLASH_ATTENTION_SINCE = datetime.date(2025, 10, 25)
_IK_LATENT_SINCE = datetime.date(2025, 11, 12)
_IK_ALL_LAYERS_SINCE = datetime.date(2026, 7, 30)
_IK_MLA = 3


class _Parser(argparse.ArgumentParser):
    """A parser that leaves flags that it does not know alone.

    argparse itself reads ``-cb`` as ``-c b`` and ``-mla`` as ``-m la``, which llama.cpp does not.
    """

    def __init__(self) -> None:
        super().__init__(prog="llama-server", add_help=False, allow_abbrev=False)
        self.names: set[str] = set()

    def flag(self, *names: str, **options: Any) -> None:
        self.names.update(names)
        self.add_argument(*names, **options)

    def split(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Parts the arguments into those of known flags and the others, each with its values."""
        known: list[str] = []
        others: list[str] = []
        side = others
        for argument in arguments:
            if argument.startswith("-") and argument != "-" and not _NUMBER.fullmatch(argument):
                name, equals, value = argument.partition("=")
                if equals and name in self.names:
                    self.error(f"{argument} is refused by it: write {name} {value}")
                side = known if argument in self.names else others
            side.append(argument)
        return known, others

    def error(self, message: str) -> NoReturn:
        raise InputError(f"llama.cpp flags: {message}")


class _AddOverrides(argparse.Action):
    """Collects every kind of override in the order of the command line.

    Layers from the end cannot be named before the model is known: they are kept as their number.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        of_draft = self.dest.startswith("draft_")
        found: list[Override | int] = namespace.draft_overrides if of_draft else namespace.overrides
        kind = self.dest.removeprefix("draft_")
        if kind == "override_tensor":
            for rule in values.split(","):
                pattern, equals, buffer_type = rule.partition("=")
                if not equals:
                    parser.error(f"-ot {rule!r} is not pattern=buffer; a pattern holds no , or =")
                found.append(Override(pattern=pattern, buffer_type=buffer_type))
        elif kind == "cpu_moe":
            found.append(Override(pattern=_EXPERTS, buffer_type="CPU", flag="--cpu-moe"))
        elif kind == "last_cpu_moe":
            found.append(values)
        else:
            inside = _EXPERTS if kind == "n_cpu_moe" else _DENSE
            flag = f"{option_string} {values}"
            found += [_layer_override(layer, inside, flag) for layer in range(int(values))]
        namespace.given.add(kind)


def _layer_override(layer: int, inside: str, flag: str) -> Override:
    return Override(pattern=rf"blk\.{layer}{inside}", buffer_type="CPU", flag=flag)


def _parser(engine: Runtime) -> _Parser:
    parser = _Parser()
    flag = parser.flag
    is_ik = engine == "ik_llama.cpp"
    flag("-m", "--model")
    flag("-ngl", "--gpu-layers", "--n-gpu-layers", dest="n_gpu_layers")
    flag("-ot", "--override-tensor", action=_AddOverrides, dest="override_tensor")
    flag("-cmoe", "--cpu-moe", action=_AddOverrides, dest="cpu_moe", nargs=0)
    n_cpu_moe = "last_cpu_moe" if is_ik else "n_cpu_moe"
    flag("-ncmoe", "--n-cpu-moe", action=_AddOverrides, dest=n_cpu_moe, type=int)
    flag("-ncffn", "--n-cpu-ffn", action=_AddOverrides, dest="n_cpu_ffn", type=int)
    flag("-ts", "--tensor-split", default="")
    own_modes = ["attn", "graph"] if is_ik else ["tensor"]
    modes = ["none", "layer", "row", *own_modes]
    flag("-sm", "--split-mode", default="layer", choices=modes)
    flag("-mg", "--main-gpu", type=int, default=0)
    flag("--rpc", default="")
    flag("-c", "--ctx-size", type=int, default=0)
    flag("-np", "--parallel", type=int, default=1 if is_ik else -1)
    flag("-kvu", "--kv-unified", action="store_true", dest="kv_unified", default=None)
    flag("-no-kvu", "--no-kv-unified", action="store_false", dest="kv_unified")
    flag("-nkvo", "--no-kv-offload", action="store_true", dest="no_kv_offload")
    flag("-b", "--batch-size", type=int, default=2048)
    flag("-ub", "--ubatch-size", type=int, default=512)
    flag("-ctk", "--cache-type-k", default="f16")
    flag("-ctv", "--cache-type-v", default="f16")
    flag("-fa", "--flash-attn", nargs="?", const="on", default=None)
    flag("--swa-full", action="store_true")
    flag("-lm", "--load-mode", default="auto")
    flag("--no-mmap", action="store_true")
    flag("-nr", "--no-repack", action="store_true", dest="no_repack")
    flag("-fit", "--fit", default="off" if is_ik else "on")
    flag("--no-op-offload", action="store_true")
    flag("--spec-type", default="")
    flag("-mm", "--mmproj", dest="projector", default="")
    flag("--no-mmproj-offload", action="store_true")
    _add_server_flags(parser)
    _add_draft_flags(parser)
    for names in NOT_COUNTED:
        flag(*names)
    if is_ik:
        flag("-mla", "--mla-use", type=int, default=None, choices=range(4))
        flag("-amb", "--attention-max-batch", type=int, default=0)
        flag("-fmoe", "--fused-moe", nargs="?", const="1")
        flag("-no-fmoe", "--no-fused-moe", action="store_true")
        flag("-no-fa", "--no-flash-attn", action="store_const", const="off", dest="flash_attn")
        flag("-rtr", "--run-time-repack", action="store_true", dest="run_time_repack")
        flag("--swa-compress", action="store_true")
    else:
        parser.set_defaults(run_time_repack=False, swa_compress=False)
    parser.set_defaults(overrides=[], draft_overrides=[], given=set())
    return parser


def _add_server_flags(parser: _Parser) -> None:
    flag = parser.flag
    flag("-cram", "--cache-ram", type=int, default=PROMPT_CACHE_MIB, dest="prompt_cache_mib")
    flag("--embedding", "--embeddings", action="store_true", dest="embeds")
    flag("--rerank", "--reranking", action="store_true", dest="embeds")


def _add_draft_flags(parser: _Parser) -> None:
    flag = parser.flag
    flag("-md", "--model-draft", "--spec-draft-model", dest="draft_model", default="")
    flag(
        "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl",
        dest="draft_n_gpu_layers",
    )  # fmt: skip
    flag("--spec-draft-n-max", dest="draft_tokens", type=int, default=_DRAFT_TOKENS)
    flag("-cd", "--ctx-size-draft", dest="draft_ctx_size", type=int, default=0)
    flag("-ctkd", "--cache-type-k-draft", "--spec-draft-type-k", dest="draft_type_k", default="f16")
    flag("-ctvd", "--cache-type-v-draft", "--spec-draft-type-v", dest="draft_type_v", default="f16")
    flag(
        "-otd", "--override-tensor-draft", "--spec-draft-override-tensor",
        action=_AddOverrides, dest="draft_override_tensor",
    )  # fmt: skip
    flag(
        "-cmoed", "--cpu-moe-draft", "--spec-draft-cpu-moe",
        action=_AddOverrides, dest="draft_cpu_moe", nargs=0,
    )  # fmt: skip
    flag(
        "-ncmoed", "--n-cpu-moe-draft", "--spec-draft-n-cpu-moe", "--spec-draft-ncmoe",
        action=_AddOverrides, dest="draft_n_cpu_moe", type=int,
    )  # fmt: skip


def parse_flags(
    flags: str | Sequence[str],
    inventory: Inventory,
    *,
    engine: Runtime = "llama.cpp",
    engine_date: datetime.date | None = None,
    llama_cpp_build: int = NEWEST_KNOWN_BUILD,
) -> Launch:
    """Reads flags of llama-server.

    Args:
        flags: A command line or its arguments; a leading program name is skipped.
        inventory: The model, whose trained context is used where ``-c`` is absent or 0.
        engine: Whose llama-server it is.
        engine_date: Day of ik_llama.cpp's sources, where its defaults changed; None for the newest.
        llama_cpp_build: Build number of the llama.cpp, where builds differ.

    Raises:
        InputError: A flag has an impossible value, or is not the engine's; quantized V without
            flash attention included.
    """
    if engine not in get_args(Runtime):
        raise InputError(f"unknown engine {engine!r}: use {' or '.join(get_args(Runtime))}")
    parser = _parser(engine)
    known, others = parser.split(flag_words(flags))
    foreign = [argument for argument in others if argument in _IK_ONLY]
    if foreign and engine == "llama.cpp":
        parser.error(f"{foreign[0]} is ik_llama.cpp's, llama.cpp refuses it; name that engine")
    found, left = parser.parse_known_args(known)
    ik = _ik_options(found, engine_date) if engine == "ik_llama.cpp" else None
    trained = inventory.architecture.context_length
    workload = _workload(parser, found, ik, trained, llama_cpp_build)
    launch = Launch(
        n_gpu_layers=_n_gpu_layers(parser, found.n_gpu_layers, ik),
        overrides=_overrides(found.overrides, inventory),
        tensor_split=_proportions(parser, found.tensor_split),
        split_mode="none" if found.split_mode == "none" else "layer",
        main_gpu=found.main_gpu,
        endpoints=tuple(found.rpc.split(",")) if found.rpc else (),
        cache_on_gpu=not found.no_kv_offload,
        op_offload=not found.no_op_offload,
        maps_file=not (found.no_mmap or found.run_time_repack or found.load_mode.lower() in _READS),
        repacks=not found.no_repack and ik is None,
        embeds=found.embeds,
        prompt_cache_mib=found.prompt_cache_mib if ik is None else 0,
        predicts_tokens="draft-mtp" in found.spec_type,
        draft_tokens=found.draft_tokens,
        draft_model=found.draft_model,
        projector=found.projector,
        projector_on_gpu=not found.no_mmproj_offload,
        ik=ik,
        workload=workload,
        warnings=(
            *misspelt(others, parser.names),
            *flag_warnings(found, llama_cpp_build, is_ik=ik is not None),
        ),
        notes=flag_notes(
            found, [*others, *left], workload, trained, llama_cpp_build, is_ik=ik is not None
        ),
    )
    draft = launch.model_copy(
        update={
            "n_gpu_layers": _n_gpu_layers(parser, found.draft_n_gpu_layers, ik),
            "overrides": _overrides(found.draft_overrides, inventory),
            "workload": _draft_workload(found, workload),
        }
    )
    return launch.model_copy(update={"draft": draft})


def _ik_options(found: argparse.Namespace, engine_date: datetime.date | None) -> IkOptions:
    as_of = engine_date or datetime.date.max
    default_mla = _IK_MLA if as_of >= _IK_LATENT_SINCE else 0
    fuses = as_of >= _IK_FUSED_EXPERTS_SINCE or found.fused_moe not in (None, "0")
    return IkOptions(
        as_of=as_of,
        mla=default_mla if found.mla_use is None else found.mla_use,
        swa_compress=found.swa_compress,
        attention_max_mib=found.attention_max_batch,
        fused_experts=fuses and not found.no_fused_moe,
        repacks_rows=found.run_time_repack,
    )


def _workload(
    parser: _Parser,
    found: argparse.Namespace,
    ik: IkOptions | None,
    trained: int,
    llama_cpp_build: int,
) -> Workload:
    flash_attention = ik is None or ik.as_of >= _IK_FLASH_ATTENTION_SINCE
    if found.flash_attn is not None:
        if found.flash_attn not in _SWITCH:
            parser.error(f"-fa {found.flash_attn!r} is not on, off or auto")
        flash_attention = _SWITCH[found.flash_attn]
    if found.parallel == 0:
        parser.error("-np 0 is no number of slots; leave it out for llama.cpp to choose")
    auto = found.parallel < 1
    return Workload(
        context=found.ctx_size or trained or _DEFAULT_CONTEXT,
        slots=_AUTO_SLOTS if auto else found.parallel,
        # Where llama-server chooses the slots, they share their cells whatever is said.
        kv_unified=ik is not None or auto or bool(found.kv_unified),
        batch=found.batch_size,
        ubatch=min(found.ubatch_size, found.batch_size),
        kv_type_k=found.cache_type_k,
        kv_type_v=found.cache_type_v,
        flash_attention=flash_attention,
        swa_full=found.swa_full,
        llama_cpp_build=llama_cpp_build,
    )


def _draft_workload(found: argparse.Namespace, workload: Workload) -> Workload:
    """The draft context has the main one's slots and length, and KV types of its own."""
    values = {name: getattr(workload, name) for name in Workload.model_fields}
    values |= {"kv_type_k": found.draft_type_k, "kv_type_v": found.draft_type_v}
    return Workload(**values | {"context": found.draft_ctx_size or workload.context})


def _n_gpu_layers(parser: _Parser, text: str | None, ik: IkOptions | None) -> int | None:
    """``-ngl`` as a number; None for all layers."""
    if text is None:
        needs_number = ik is not None and ik.as_of < _IK_ALL_LAYERS_SINCE
        return 0 if needs_number else None
    if text in ("all", "auto"):
        return None
    if not re.fullmatch(r"-?\d+", text):
        parser.error(f"-ngl {text!r} is not a number, all or auto")
    return None if int(text) < 0 else int(text)


def _overrides(found: list[Override | int], inventory: Inventory) -> tuple[Override, ...]:
    """Names the layers of ``-ncmoe`` that count from the end."""
    loaded = filter(inventory.is_loaded, inventory.tensors)
    with_experts = {t.layer for t in loaded if re.search(_EXPERTS, t.name)}
    moe_layers = sorted(layer for layer in with_experts if layer is not None)
    overrides: list[Override] = []
    for item in found:
        if isinstance(item, Override):
            overrides.append(item)
        else:
            last = moe_layers[max(0, len(moe_layers) - item) :]
            flag = f"-ncmoe {item}"
            overrides += [_layer_override(layer, _EXPERTS, flag) for layer in last]
    return tuple(overrides)


def _proportions(parser: _Parser, text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(",") if part)
    except ValueError:
        parser.error(f"-ts {text!r} is not a list of proportions such as 3,1")
    if any(share < 0 for share in shares):
        parser.error(f"-ts {text!r} has a negative proportion")
    return shares
