"""The catalog: what its entries hold, and under which names they are found."""

import gzip
import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from quantplan import Inventory, SourceError, catalog_names
from quantplan.inventory.sources import read_inventory, read_named
from scripts.build_catalog_from_dimensions import LAYOUTS, MODELS, Model, build, shapes_of
from tests.support.architectures import ARCHITECTURES, VOCABULARY, expand

CATALOG = files("quantplan.inventory.catalog")
FROM_DIMENSIONS = {model["name"]: model for model in json.loads(MODELS.read_text())}
NAMES = json.loads(CATALOG.joinpath("names.json").read_bytes())
UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}

every_built_model = pytest.mark.parametrize("name", FROM_DIMENSIONS)


def entry_of(name: str) -> dict[str, Any]:
    """An entry as it is on disk."""
    entry: dict[str, Any] = json.loads(
        gzip.decompress(CATALOG.joinpath(f"{name}.json.gz").read_bytes())
    )
    return entry


def as_printed(n_weights: int, printed: str) -> str:
    """A number of weights in the unit and with the decimals in which a loader printed it."""
    number, unit = printed.split()
    decimals = len(number.partition(".")[2])
    return f"{n_weights / UNITS[unit]:.{decimals}f} {unit}"


# Entries


@every_built_model
def test_entries_are_what_loaders_printed(name: str) -> None:
    """An entry has the weights and the tensors, in all and in F32, that loaders of the real model
    printed, to the last digit.
    """
    printed, inventory = entry_of(name)["printed"], read_inventory(name)
    assert printed.keys() & {"n_weights", "n_tensors"}
    found = {
        "n_weights": as_printed(inventory.n_weights, printed.get("n_weights", "0 B")),
        "n_tensors": len(inventory.tensors),
        "n_f32_tensors": sum(t.qtype == "F32" for t in inventory.tensors),
        "source": printed["source"],
    }
    assert printed == {key: found[key] for key in printed}


@every_built_model
def test_entries_are_those_of_the_data_file(name: str) -> None:
    """An entry is what the build script makes of the dimensions now."""
    assert entry_of(name) == build(FROM_DIMENSIONS[name])


# bitnet-25 is an architecture of ik_llama.cpp.
@pytest.mark.parametrize("architecture", sorted(LAYOUTS.keys() - {"bitnet-25"}))
def test_layouts_are_what_llama_cpp_loads(architecture: str) -> None:
    """For a tiny model of an architecture, the build script names exactly the tensors that
    llama.cpp asked for, with their shapes, besides those that it takes only if a file has them.
    """
    tiny = ARCHITECTURES[architecture]
    expected = expand(tiny["tensors"])
    data = {
        "architecture": architecture,
        "metadata": tiny["metadata"],
        "n_vocab": VOCABULARY,
        "has_tied_output": "output.weight" not in expected,
        "has_rope_factors": False,
    }
    found = {name: tuple(shape) for name, shape in shapes_of(Model(data))}
    for name in [name for name in expected if name.endswith("ffn_gate_up_exps.weight")]:
        # Two matrices, or one of both.
        n_embd, both, n_expert = expected.pop(name)
        for part in ("gate", "up"):
            split = name.replace("gate_up", part)
            expected[split] = (n_embd, both // 2, n_expert)
    expected.pop("rope_freqs.weight", None)
    optional = found.keys() - expected.keys()
    assert {name.split(".", 2)[-1] for name in optional} <= {
        "attn_q.bias", "attn_k.bias", "attn_v.bias", "exp_probs_b.bias",
    }  # fmt: skip
    assert {name: shape for name, shape in found.items() if name not in optional} == expected


def test_expanded_latents_are_as_llama_cpp_loads_them() -> None:
    """Without the keys of latent attention, llama.cpp asks for one matrix of keys and values."""
    tiny = ARCHITECTURES["deepseek2"]
    variant = tiny["variants"]["no latent"]
    settings = {k: v for k, v in (tiny["metadata"] | variant["metadata"]).items() if v is not None}
    data = {"architecture": "deepseek2", "metadata": settings, "n_vocab": VOCABULARY}
    expected = expand(variant["tensors"])
    found = dict(shapes_of(Model(data)))
    for role in ("attn_kv_b", "attn_q_b", "attn_kv_a_mqa", "attn_output"):
        assert tuple(found[f"blk.0.{role}.weight"]) == expected[f"blk.0.{role}.weight"]
    assert not [name for name in (*found, *expected) if "attn_k_b" in name or "attn_v_b" in name]


@pytest.mark.parametrize(("usual", "others"), NAMES["other_layouts"].items())
def test_layouts_hold_the_same_model(usual: str, others: list[str]) -> None:
    """Layouts of a model differ in nothing but the matrices that expand keys and values."""
    expanding = ("attn_k_b", "attn_v_b", "attn_kv_b")

    def rest(inventory: Inventory) -> Counter[tuple[str, tuple[int, ...], str]]:
        kept = (t for t in inventory.tensors if t.role not in expanding)
        return Counter((t.name, t.shape_ne, t.qtype) for t in kept)

    for other in others:
        assert rest(read_inventory(other)) == rest(read_inventory(usual))
        extra = read_inventory(other).n_weights - read_inventory(usual).n_weights
        expanded = sum(t.n_weights for t in read_inventory(other).tensors if t.role == "attn_kv_b")
        assert extra == (expanded if other.endswith("ik-MLA") else 0)


# Names


def test_every_name_means_one_model() -> None:
    """No two names of different models are the same once what does not matter is left out, so
    every entry and every other name is found.
    """
    assert [read_inventory(name).name for name in catalog_names()] == list(catalog_names())
    for entry, others in NAMES["same_shapes"].items():
        assert {read_inventory(other).name for other in others} == {entry}
    others = [other for names in NAMES["same_shapes"].values() for other in names]
    assert not {name.lower() for name in others} & {name.lower() for name in catalog_names()}
    assert max(Counter(name.lower() for name in others).values()) == 1


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("qwen3 235b a22b", "Qwen3-235B-A22B"),
        ("Qwen3-235B-A22B-128K", "Qwen3-235B-A22B"),
        ("Qwen3_235B_A22B-Thinking-2507-GGUF", "Qwen3-235B-A22B-Instruct-2507"),
        ("gptoss120b", "gpt-oss-120b"),
        ("gpt-oss-120b on 2x3090 (llmgarage)", "gpt-oss-120b"),
        ("GLM-4.5-Air (PR 14939, sammcj)", "GLM-4.5-Air"),
        ("Gemma 3 27b It Qat", "gemma-3-27b-it"),
        ("unsloth_DeepSeek R1 BF16", "DeepSeek-V3.1-Terminus"),
        ("DeepSeek-TNG-R1T2-Chimera", "DeepSeek-V3.1-Terminus"),
        ("DeepSeek V3.1 Terminus Bf16 Safetensors", "DeepSeek-V3.1-Terminus"),
        ("Kimi K2 Instruct Bf16 Safetensors", "Kimi-K2-Instruct"),
        ("Agatha 111B v1", "c4ai-command-a-03-2025"),
        ("Meta Llama 3.1 8B Instruct", "Llama-3.1-8B-Instruct"),
    ],
)
def test_names_of_logs_are_understood(name: str, entry: str) -> None:
    """Names as people and loaders write them lead to the entry with the model's shapes."""
    assert read_named(name).name == read_inventory(name).name == entry


@pytest.mark.parametrize(
    "name",
    [
        "DeepSeek-R1-Distill-Qwen-32B",
        "DeepSeek R1 0528 Qwen3 8B",
        "GLM-4.5-Air-REAP",
        "Qwen3-30B",
        "models/Qwen3-30B-A3B",
        "Qwen3-30B-A3B.gguf",
        "it",
        "",
    ],
)
def test_other_models_are_not_mistaken(name: str) -> None:
    """A name that goes on, stops short or is a path is no name of the catalog."""
    with pytest.raises(SourceError):
        read_named(name)


@pytest.mark.parametrize(
    ("name", "n_tensors", "entry"),
    [
        ("DeepSeek R1 0528", None, "DeepSeek-V3.1-Terminus"),
        ("DeepSeek R1 0528", 1086, "DeepSeek-V3.1-Terminus"),
        ("DeepSeek R1 0528", 1025, "DeepSeek-V3-pre-MLA"),
        ("DeepSeek R1 0528", 1147, "DeepSeek-V3-ik-MLA"),
        ("Kimi K2 Instruct", 1157, "Kimi-K2-Instruct-ik-MLA"),
        ("DeepSeek-Coder-V2-Lite-Instruct", 377, "DeepSeek-V2-Lite-pre-MLA"),
    ],
)
def test_the_number_of_tensors_tells_layouts_apart(
    name: str, n_tensors: int | None, entry: str
) -> None:
    """The layout of a file is found by how many tensors a loader counted."""
    assert read_named(name, n_tensors).name == entry


def test_a_wrong_number_of_tensors_is_refused() -> None:
    """A number of tensors that no layout has is an error that states the usual one."""
    with pytest.raises(SourceError, match=r"has 999 tensors; DeepSeek-V3\.1-Terminus has 1086"):
        read_named("DeepSeek-R1", 999)
