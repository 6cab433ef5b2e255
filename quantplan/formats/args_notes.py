"""What a person should know about given llama.cpp flags: contradictions, and what plays no part."""

import argparse
import difflib
import shlex
from collections.abc import Collection, Sequence

from quantplan.hardware.machine import Machine
from quantplan.llama_cpp import (
    FLASH_BY_DEFAULT,
    FLASH_IF_BUILT,
    NEWEST_KNOWN_BUILD,
    OLDEST_KNOWN_BUILD,
)
from quantplan.units import MIB, gib
from quantplan.workload import Workload

# Builds from this one on refuse --no-mmap (seen in b11434; b10434 calls it deprecated).
_LOAD_MODE_BUILD = 11434
# llama-server keeps prompts in RAM since October 2025 (pull request 16391).
_PROMPT_CACHE_BUILD = 6730
PROMPT_CACHE_MIB = 8192
"""Most that it keeps where ``-cram`` does not say."""
# Advice is a multiple of this, so that it is 0 where hardly a prompt would fit.
_PROMPT_CACHE_STEP_MIB = 256

# Flags with a value that memory depends on, but this prediction does not.
NOT_COUNTED = (
    ("-dev", "--device"),
    ("-devd", "--device-draft", "--spec-draft-device"),
    ("-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf"),
    ("-mmu", "--mmproj-url"),
    ("--lora",),
    ("--lora-scaled",),
    ("--control-vector",),
    ("--override-kv",),
)
# How alike a flag that is not known and one that is must be (difflib's ratio) to be confused: one
# letter more, less or swapped.
_ALIKE = 0.88
# Flags of llama.cpp (b10434) without influence on memory that are so alike to one that has some.
_OTHERS = {
    "-fitc", "-fitt", "-hfr", "-kvo", "--kv-offload", "--mmproj-offload", "--op-offload",
    "--spec-draft-cpu-mask", "--spec-draft-n-min",
}  # fmt: skip
_COUNTED_AS_LAYER = {"row", "tensor", "attn", "graph"}


def flag_warnings(
    found: argparse.Namespace, llama_cpp_build: int, *, is_ik: bool
) -> tuple[str, ...]:
    """Names flags that contradict each other, or do not do what they seem to say."""
    warnings = []
    if found.split_mode == "none" and found.tensor_split:
        warnings.append(
            f"-ts {found.tensor_split} has no effect with -sm none, which uses GPU {found.main_gpu}"
        )
    if "cpu_moe" in found.given and found.given & {"n_cpu_moe", "last_cpu_moe"}:
        warnings.append(
            "--n-cpu-moe has no effect beside --cpu-moe, which keeps the experts of all layers in "
            "RAM; give one of the two"
        )
    if found.ubatch_size > found.batch_size:
        warnings.append(
            f"-ub {found.ubatch_size} is larger than -b {found.batch_size}, so it becomes "
            f"{found.batch_size}; raise -b too"
        )
    if found.no_mmap and not is_ik and llama_cpp_build >= _LOAD_MODE_BUILD:
        warnings.append(f"llama.cpp b{llama_cpp_build} refuses --no-mmap: write -lm none")
    return tuple(warnings)


def misspelt(others: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Names flags that are probably meant as others, on which memory depends.

    Args:
        others: Flags and values that are not known.
        known: Flags that are.
    """
    warnings = []
    for flag in dict.fromkeys(word.partition("=")[0] for word in others if word.startswith("-")):
        near = difflib.get_close_matches(flag, sorted(known), n=1, cutoff=_ALIKE)
        if near and flag not in _OTHERS:
            warnings.append(f"{flag} is not known, and not counted; did you mean {near[0]}?")
    return tuple(warnings)


def build_note(llama_cpp_build: int) -> str | None:
    """Says that a build of llama.cpp is outside the checked range; None where it is inside."""
    if llama_cpp_build < OLDEST_KNOWN_BUILD:
        than = f"older than b{OLDEST_KNOWN_BUILD}, the oldest"
    elif llama_cpp_build > NEWEST_KNOWN_BUILD:
        than = f"newer than b{NEWEST_KNOWN_BUILD}, the newest"
    else:
        return None
    return f"llama.cpp b{llama_cpp_build} is {than} that was checked: its memory may differ"


def kernel_notes(workload: Workload, machine: Machine) -> tuple[str, ...]:
    """Says that attention may run on the CPU, where GPUs have no kernel for the cache's types.

    Args:
        workload: The types.
        machine: The GPUs; of NVIDIA and AMD, or of no known vendor.
    """
    is_cuda = any(gpu.vendor in (None, "nvidia", "amd") for gpu in machine.gpus)
    k, v = workload.kv_type_k, workload.kv_type_v
    if not (is_cuda and workload.flash_attention) or (k == v and k in FLASH_BY_DEFAULT):
        return ()
    can_be_built = {k, v} <= FLASH_IF_BUILT
    only = " unless built with -DGGML_CUDA_FA_ALL_QUANTS=ON" if can_be_built else ""
    return (
        f"KV cache in {k} and {v}: CUDA and ROCm builds have no kernel for that{only}, and then "
        "attention runs on the CPU, many times slower and with a large buffer in RAM, which is not "
        "counted; f16, q8_0 or q4_0 for both need nothing",
    )


def prompt_cache_notes(left_bytes: int, limit_mib: int, llama_cpp_build: int) -> tuple[str, ...]:
    """Says so where llama-server's copies of earlier prompts may fill the RAM.

    Args:
        left_bytes: RAM that is left beside the margin.
        limit_mib: Most that the server keeps; below 0 without a limit.
        llama_cpp_build: Build number of the llama.cpp.
    """
    has_room = 0 <= limit_mib * MIB <= left_bytes
    if has_room or left_bytes <= 0 or llama_cpp_build < _PROMPT_CACHE_BUILD:
        return ()
    most = f"up to {gib(limit_mib * MIB)}" if limit_mib >= 0 else "any amount"
    advised = left_bytes // MIB // _PROMPT_CACHE_STEP_MIB * _PROMPT_CACHE_STEP_MIB
    return (
        f"llama-server keeps earlier prompts in {most} of RAM, which is not counted, and "
        f"{gib(left_bytes)} are left: -cram {advised} keeps it within that",
    )


def context_notes(workload: Workload, trained: int) -> tuple[str, ...]:
    """Says so where a slot has more context than it can use.

    Args:
        workload: Its context and slots.
        trained: The model's trained context in tokens; 0 where it is not known.
    """
    most = int(workload.slot_context)
    if not trained or most <= trained:
        return ()
    return (
        f"a context of {most} tokens in a slot is longer than the {trained} that the model was "
        f"trained for: llama-server fills {trained} of them",
    )


def flag_notes(
    found: argparse.Namespace,
    others: Sequence[str],
    workload: Workload,
    trained: int,
    llama_cpp_build: int,
    *,
    is_ik: bool,
) -> tuple[str, ...]:
    """Names what was given but is not counted, or is counted in another way.

    Args:
        found: The flags that are known.
        others: Flags and values that are not.
        workload: What they ask for.
        trained: The model's trained context in tokens; 0 where it is not known.
        llama_cpp_build: Build number of the llama.cpp.
        is_ik: Whether ik_llama.cpp runs.
    """
    notes = []
    if not is_ik and (said := build_note(llama_cpp_build)):
        notes.append(said)
    notes += context_notes(workload, trained)
    if found.fit != "off" and found.n_gpu_layers in (None, "all", "auto"):
        notes.append("--fit is on: llama.cpp may lower -c and -ngl; this is without such changes")
    if found.split_mode in _COUNTED_AS_LAYER:
        notes.append(f"-sm {found.split_mode} is counted as -sm layer")
    if found.swa_full:
        notes.append("--swa-full: sliding windows are counted at full length")
    for names in NOT_COUNTED:
        destination = next((n for n in names if n.startswith("--")), names[0])
        value = getattr(found, destination.lstrip("-").replace("-", "_"))
        if value:
            notes.append(f"{names[0]} {value} has an influence that is not counted")
    if others:
        engine = "ik_llama.cpp" if is_ik else "llama.cpp"
        notes.append(f"without influence on this prediction for {engine}: {shlex.join(others)}")
    return tuple(notes)
