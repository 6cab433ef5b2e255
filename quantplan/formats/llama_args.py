"""Reads llama.cpp's command-line flags, as far as memory depends on them.

Both generations of flags are understood (``--no-mmap`` and ``-lm none``, ``-fa`` with and without a
value). What has no influence on memory is skipped; what has one that is not modelled is noted.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from quantplan.errors import InputError
from quantplan.placement import Launch, Override
from quantplan.workload import NEWEST_KNOWN_BUILD, Workload

# What --cpu-moe stands for (common/arg.cpp).
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE = r"\.ffn_(up|down|gate)\."
# llama-server's default: four slots that share one KV buffer.
_AUTO_SLOTS = 4
_NOT_COUNTED = {
    "mmproj": "--mmproj: the vision projector is not counted",
    "draft": "-md: the draft model is not counted",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"llama.cpp flags: {message}")


class _AddOverrides(argparse.Action):
    """Collects every kind of override in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002 (argparse calls with it)
    ) -> None:
        found: list[Override] = namespace.overrides
        if self.dest == "override_tensor":
            for rule in values.split(","):
                pattern, equals, buffer_type = rule.partition("=")
                if not equals:
                    parser.error(f"-ot {rule!r} is not pattern=buffer; a pattern holds no , or =")
                found.append(Override(pattern=pattern, buffer_type=buffer_type))
        elif self.dest == "cpu_moe":
            found.append(Override(pattern=_EXPERTS, buffer_type="CPU"))
        else:
            inside = _EXPERTS if self.dest == "n_cpu_moe" else _DENSE
            found += [
                Override(pattern=rf"blk\.{layer}{inside}", buffer_type="CPU")
                for layer in range(int(values))
            ]


def _parser() -> _Parser:
    parser = _Parser(prog="llama-server", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model")
    add("-ngl", "--gpu-layers", "--n-gpu-layers", dest="n_gpu_layers", default="all")
    add("-ot", "--override-tensor", action=_AddOverrides, dest="override_tensor")
    add("-cmoe", "--cpu-moe", action=_AddOverrides, dest="cpu_moe", nargs=0)
    add("-ncmoe", "--n-cpu-moe", action=_AddOverrides, dest="n_cpu_moe", type=int)
    add("-ncffn", "--n-cpu-ffn", action=_AddOverrides, dest="n_cpu_ffn", type=int)
    add("-ts", "--tensor-split", default="")
    add("-sm", "--split-mode", default="layer", choices=["none", "layer", "row", "tensor"])
    add("-mg", "--main-gpu", type=int, default=0)
    add("-c", "--ctx-size", type=int, default=0)
    add("-np", "--parallel", type=int, default=-1)
    add("-kvu", "--kv-unified", action="store_true", dest="kv_unified", default=None)
    add("-no-kvu", "--no-kv-unified", action="store_false", dest="kv_unified")
    add("-b", "--batch-size", type=int, default=2048)
    add("-ub", "--ubatch-size", type=int, default=512)
    add("-ctk", "--cache-type-k", default="f16")
    add("-ctv", "--cache-type-v", default="f16")
    add("-fa", "--flash-attn", nargs="?", const="on", default="auto")
    add("--swa-full", action="store_true")
    add("-lm", "--load-mode")
    add("--no-mmap", action="store_true")
    add("-fit", "--fit", default="on")
    add("--no-op-offload", action="store_true")
    add("--spec-type", default="")
    add("-mm", "--mmproj")
    add("-md", "--model-draft", dest="draft")
    parser.set_defaults(overrides=[])
    return parser


def parse_flags(
    flags: str | Sequence[str],
    *,
    context_length: int,
    llama_cpp_build: int = NEWEST_KNOWN_BUILD,
) -> Launch:
    """Reads flags of llama-server.

    Args:
        flags: A command line or its arguments; a leading program name is skipped.
        context_length: The model's trained context, used where ``-c`` is absent or 0.
        llama_cpp_build: Build number of the llama.cpp, where builds differ.

    Raises:
        InputError: A flag has an impossible value; quantized V without flash attention included.
    """
    arguments = shlex.split(flags) if isinstance(flags, str) else list(flags)
    if arguments and not arguments[0].startswith("-"):
        arguments = arguments[1:]
    parser = _parser()
    found, others = parser.parse_known_args(arguments)
    auto = found.parallel < 1
    notes = [text for name, text in _NOT_COUNTED.items() if getattr(found, name)]
    if found.fit != "off" and found.n_gpu_layers in ("all", "auto"):
        notes.append("--fit is on: llama.cpp may lower -c and -ngl; this is without such changes")
    if found.split_mode in ("row", "tensor"):
        notes.append(f"-sm {found.split_mode} is counted as -sm layer")
    if "draft-mtp" in found.spec_type:
        notes.append("--spec-type draft-mtp: the draft context's KV cache is not counted")
    if found.swa_full:
        notes.append("--swa-full: sliding windows are counted at full length")
    if others:
        notes.append(f"without influence on this prediction: {shlex.join(others)}")
    if found.flash_attn not in ("on", "off", "auto"):
        parser.error(f"-fa {found.flash_attn!r} is not on, off or auto")
    layers = found.n_gpu_layers
    if layers not in ("all", "auto") and not layers.lstrip("-").isdigit():
        parser.error(f"-ngl {layers!r} is not a number, all or auto")
    n_gpu_layers = None if layers in ("all", "auto") or int(layers) < 0 else int(layers)
    return Launch(
        n_gpu_layers=n_gpu_layers,
        overrides=tuple(found.overrides),
        tensor_split=_proportions(parser, found.tensor_split),
        split_mode="none" if found.split_mode == "none" else "layer",
        main_gpu=found.main_gpu,
        op_offload=not found.no_op_offload,
        loads_nextn="draft-mtp" in found.spec_type,
        workload=Workload(
            context=found.ctx_size or context_length or 4096,
            slots=_AUTO_SLOTS if auto else found.parallel,
            kv_unified=auto if found.kv_unified is None else found.kv_unified,
            batch=found.batch_size,
            ubatch=min(found.ubatch_size, found.batch_size),
            kv_type_k=found.cache_type_k,
            kv_type_v=found.cache_type_v,
            flash_attention=found.flash_attn != "off",
            swa_full=found.swa_full,
            llama_cpp_build=llama_cpp_build,
        ),
        notes=tuple(notes),
    )


def _proportions(parser: _Parser, text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(",") if part)
    except ValueError:
        parser.error(f"-ts {text!r} is not a list of proportions such as 3,1")
    if any(share < 0 for share in shares):
        parser.error(f"-ts {text!r} has a negative proportion")
    return shares
