"""Caches of every architecture that llama.cpp loads."""

import shlex
from pathlib import Path
from typing import Any

import pytest

import quantplan as qp
from quantplan.costs.memory import cache_bytes
from quantplan.inventory.architecture import read_architecture
from tests.support.architectures import (
    ARCHITECTURES,
    REFUSED,
    cache_mib,
    metadata_of,
    write_toy,
)
from tests.support.llama_cpp import llama_server, needs_llama_cpp

BUILD = 10434

# Each architecture that llama.cpp loads and quantplan refuses, with the reason.
NOT_MODELLED = {
    "deepseek4": "compressed caches with states of their own, whose types do not follow -ctk",
    "graniteswitch": "its router has a layer of its own, with a cache of another width",
}

CASES = [
    (name, variant)
    for name, entry in ARCHITECTURES.items()
    if name not in NOT_MODELLED
    for variant in (None, *entry["variants"])
]


@pytest.mark.parametrize(("architecture", "variant"), CASES, ids=str)
def test_caches_are_what_llama_cpp_allocates(architecture: str, variant: str | None) -> None:
    """KV caches and recurrent state equal, to the byte, what llama.cpp allocated for a tiny model
    of the architecture, for one slot and three, shared and not, with flash attention and without.
    """
    entry: dict[str, Any] = ARCHITECTURES[architecture]
    measured = (entry["variants"][variant] if variant else entry)["measured"]
    found = read_architecture(metadata(architecture, variant))
    predicted = [
        sum(cache_bytes(found, qp.Workload(
            context=case["context"],
            slots=case["slots"],
            kv_unified=case["unified"],
            ubatch=case["ubatch"],
            flash_attention=case["flash"],
            llama_cpp_build=BUILD,
        )))
        for case in measured
    ]  # fmt: skip
    assert predicted == [case["bytes"] for case in measured]


def metadata(architecture: str, variant: str | None) -> dict[str, Any]:
    return {"general.architecture": architecture, **metadata_of(architecture, variant)}


def test_nearly_all_architectures_are_modelled() -> None:
    """At least 120 architectures agree with llama.cpp; those that do not are named above."""
    assert len({name for name, _ in CASES}) >= 120
    assert set(NOT_MODELLED) <= set(ARCHITECTURES)
    assert len(REFUSED) <= 3


@pytest.mark.parametrize("architecture", NOT_MODELLED)
def test_architectures_that_are_not_modelled_are_refused(architecture: str) -> None:
    """Rather than a wrong figure there is an error that names the architecture."""
    with pytest.raises(qp.UnsupportedModelError, match=architecture):
        read_architecture(metadata(architecture, None))


@needs_llama_cpp
@pytest.mark.parametrize(
    "architecture",
    [
        "falcon-h1", "gemma3n", "gpt-oss", "jamba", "kimi-linear", "lfm2", "llama4", "mamba2",
        "minimax-m3", "nemotron_h", "olmo2", "qwen3next", "rwkv7",
    ],
)  # fmt: skip
def test_the_installed_llama_cpp_still_allocates_them(architecture: str, tmp_path: Path) -> None:
    """What was measured once is what the installed llama.cpp prints for the same tiny model."""
    model = write_toy(architecture, tmp_path / "toy.gguf")
    flags = shlex.split("-ngl 0 -c 4096 -ub 64 -np 2 -kvu -lm none --fit off")
    with llama_server(model, flags) as server:
        printed = sum(cache_mib(server.log))
    work = qp.Workload(context=4096, slots=2, ubatch=64, llama_cpp_build=BUILD)
    predicted = sum(cache_bytes(qp.read_inventory(model).architecture, work)) / 2**20
    assert predicted == pytest.approx(printed, abs=0.03)  # two decimals for each of several lines
