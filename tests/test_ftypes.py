"""Stock mixes, compared with what llama.cpp's own quantizer chooses."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplan.errors import InputError
from quantplan.ftypes.mixes import FTYPES, stock_mix
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from tests.support import architectures as toys
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.models import toy_moe
from tests.support.quantizer import llama_mixes, llama_quantize_mix, stored

ALL_MIXES = [(ftype, has_imatrix) for ftype in FTYPES for has_imatrix in (False, True)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The gguf package warns of metadata that the toys' vocabulary replaces."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def our_mix(inventory: Inventory, ftype: str, *, has_imatrix: bool) -> dict[str, str] | None:
    """The mix, or None where it is refused."""
    try:
        return stock_mix(inventory, ftype, has_imatrix=has_imatrix)
    except InputError:
        return None


def assert_llama_cpp_agrees(paths: Sequence[Path]) -> None:
    """Compares every mix of some models with llama.cpp's, tensor by tensor."""
    runs = [(path, *mix) for path in paths for mix in ALL_MIXES]
    inventories = {path: read_inventory(path) for path in paths}
    for (path, ftype, has_imatrix), theirs in zip(runs, llama_mixes(runs), strict=True):
        ours = our_mix(inventories[path], ftype, has_imatrix=has_imatrix)
        assert ours == theirs, f"{path.name} {ftype} {has_imatrix}"


def write_catalog_model(folder: Path, name: str) -> Path:
    """Writes a model of the catalog in its true size, as a hole."""
    inventory = read_inventory(name)
    metadata = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in inventory.metadata.items()
    }
    shapes = {t.name: t.shape_ne for t in inventory.tensors}
    return toys.write_model(folder / f"{name}.gguf", metadata, shapes)


@needs_llama_cpp
@pytest.mark.parametrize(
    "name",
    [
        "GLM-4.5-Air",  # experts with rows of 1408 weights, shared experts, prediction layer
        "GLM-4.7-Flash",  # latent attention
        "Qwen3.5-35B-A3B",  # recurrent layers
        "gemma-4-31B-it",  # KV heads by layer
    ],
)
def test_public_models_get_the_types_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Every tensor of a full-size model has llama.cpp's type in every mix."""
    assert_llama_cpp_agrees([write_catalog_model(tmp_path, name)])


@needs_llama_cpp
def test_odd_architectures_get_the_types_of_llama_cpp(tmp_path: Path) -> None:
    """So it is with encoders, fused QKV, loops, per-layer embeddings, narrow rows."""
    names = ("deepseek2", "falcon", "gemma3n", "gpt-oss", "kimi-linear", "phi3", "qwen3next", "t5")
    paths = [toys.write_toy(name, tmp_path / f"{name}.gguf") for name in names]
    paths.append(toys.write_toy("nanbeige", tmp_path / "nanbeige.gguf", "loops"))
    switch = toys.metadata_of("graniteswitch") | {"graniteswitch.block_count": 7}
    shapes = dense_shapes(7, ["ffn_down"])
    paths.append(toys.write_model(tmp_path / "graniteswitch.gguf", switch, shapes))
    assert_llama_cpp_agrees(paths)


@needs_llama_cpp
def test_mixtral_and_llama_70b_get_the_types_of_llama_cpp(tmp_path: Path) -> None:
    """Eight experts, and eight queries per KV head at 80 layers, have rules of their own."""
    attention = ["attn_q", "attn_k", "attn_v", "attn_output"]
    heads = {"llama.attention.head_count": 32, "llama.attention.head_count_kv": 8}
    mixtral = (
        toys.metadata_of("llama")
        | heads
        | {
            "llama.block_count": 32,
            "llama.expert_count": 8,
            "llama.expert_used_count": 2,
        }
    )
    experts = {
        f"blk.{layer}.ffn_{role}_exps.weight": (256, 256, 8)
        for layer in range(32)
        for role in ("gate", "up", "down")
    }
    llama = toys.metadata_of("llama") | {
        "llama.block_count": 80,
        "llama.attention.head_count": 64,
        "llama.attention.head_count_kv": 8,
    }
    dense = dense_shapes(80, [*attention, "ffn_gate", "ffn_up", "ffn_down"])
    assert_llama_cpp_agrees(
        [
            toys.write_model(
                tmp_path / "mixtral.gguf", mixtral, dense_shapes(32, attention) | experts
            ),
            toys.write_model(tmp_path / "llama.gguf", llama, dense),
        ]
    )


@needs_llama_cpp
def test_models_that_count_as_70b_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Which architectures get more bits for V at 80 or 68 layers, and which only with GQA."""
    paths = []
    for arch in ("llama", "qwen2", "olmo", "jais2", "qwen3", "phi3"):
        for n_layers in (68, 80):
            for n_kv in (1, 2, 4):
                metadata = toys.metadata_of(arch) | {
                    f"{arch}.block_count": n_layers,
                    f"{arch}.attention.head_count": 4,
                    f"{arch}.attention.head_count_kv": n_kv,
                }
                shapes = dense_shapes(n_layers, ["attn_v"])
                path = tmp_path / f"{arch}-{n_layers}-{n_kv}.gguf"
                paths.append(toys.write_model(path, metadata, shapes))
    runs = [(path, "Q3_K_S", False) for path in paths]
    theirs = llama_mixes(runs)
    assert [stock_mix(read_inventory(path), "Q3_K_S") for path in paths] == theirs
    raised = {
        p.stem for p, mix in zip(paths, theirs, strict=True) if mix and "Q5_K" in mix.values()
    }
    assert {"llama-80-1", "qwen2-80-4", "jais2-68-4"} <= raised
    assert not raised & {"llama-80-4", "qwen3-80-1", "jais2-80-1"}


def dense_shapes(n_layers: int, roles: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Square matrices of some roles in every layer, an embedding and an output matrix."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("token_embd.weight", "output.weight"), (256, toys.VOCABULARY)
    )
    for layer in range(n_layers):
        shapes |= {f"blk.{layer}.{role}.weight": (256, 256) for role in roles}
    return shapes


ROLES = [
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_kv_b", "attn_output", "attn_norm", "ffn_gate",
    "ffn_up", "ffn_down", "ffn_gate_inp", "ffn_down_shexp", "nextn.eh_proj", "ssm_in",
]  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of a model that need not make sense, but that llama.cpp reads."""
    arch = draw(st.sampled_from(["llama", "falcon", "qwen2"]))
    n_layers = draw(st.integers(1, 50))
    n_kv = draw(st.sampled_from([1, 2, 4, 8]))
    n_expert = draw(st.sampled_from([0, 2, 4, 8, 16])) if arch == "llama" else 0
    metadata = toys.metadata_of(arch) | {
        f"{arch}.block_count": n_layers,
        f"{arch}.attention.head_count": n_kv * draw(st.integers(1, 8)),
        f"{arch}.attention.head_count_kv": n_kv,
    }
    if n_expert:
        metadata |= {"llama.expert_count": n_expert, "llama.expert_used_count": 2}
    rows = st.sampled_from([256, 512, 352, 48])
    width, inner = draw(rows), draw(rows)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, toys.VOCABULARY)}
    if draw(st.booleans()):
        shapes["output.weight"] = (width, toys.VOCABULARY)
    roles = draw(
        st.lists(
            st.sampled_from(ROLES),
            min_size=3,
            unique=True,
        )
    )
    for layer in range(n_layers):
        for role in roles:
            if layer % 3 == 0 and role == roles[0]:
                continue  # layers are not all alike
            columns = inner if "down" in role else width
            name = f"blk.{layer}.{role}.weight"
            shapes[name] = (columns,) if role.endswith("norm") else (columns, 8)
        if n_expert:
            shapes[f"blk.{layer}.ffn_down_exps.weight"] = (inner, 8, n_expert)
    return metadata, shapes


@needs_llama_cpp
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=models())
def test_any_model_gets_the_types_of_llama_cpp(
    model: tuple[Mapping[str, Any], toys.Shapes],
) -> None:
    """Whatever the layers, heads, experts and row lengths are, llama.cpp agrees, or refuses too."""
    with TemporaryDirectory() as folder:
        assert_llama_cpp_agrees([toys.write_model(Path(folder, "model.gguf"), *model)])


@needs_llama_cpp
def test_a_file_that_llama_cpp_writes_has_the_types(tmp_path: Path) -> None:
    """What llama.cpp says it would write is what it writes, with an importance matrix too."""
    source = toy_moe(tmp_path / "source.gguf", layers=2)
    inventory = read_inventory(source)
    imatrix = {t.name: t.shape_ne[0] * prod(t.shape_ne[2:]) for t in inventory.tensors}
    for ftype, has_imatrix in (("Q4_K_M", False), ("Q2_K_S", True)):
        target = tmp_path / f"{ftype}.gguf"
        llama_quantize_mix(source, target, ftype, imatrix if has_imatrix else None)
        written = {name: qtype for name, (qtype, _) in stored(target).items()}
        assert written == stock_mix(inventory, ftype, has_imatrix=has_imatrix)


@pytest.mark.parametrize(
    ("ftype", "mib"),
    [
        ("Q2_K", 42492),
        ("IQ2_M", 41944),
        ("Q3_K_M", 53874),
        ("IQ4_XS", 57184),
        ("MXFP4_MOE", 59136),
        ("Q4_K_M", 68807),
        ("Q5_K_M", 78719),
        ("Q6_K", 93441),
        ("Q8_0", 110748),
    ],
)
def test_glm_air_has_the_size_that_llama_quantize_b11434_states(ftype: str, mib: int) -> None:
    """The sizes that a newer build printed, for a file without the predictor's own embeddings."""
    inventory = read_inventory("GLM-4.5-Air")
    mix = stock_mix(inventory, ftype)
    n_bytes = sum(
        t.bytes_as(mix[t.name])
        for t in inventory.tensors
        if t.role not in ("nextn.embed_tokens", "nextn.shared_head_head")
    )
    assert n_bytes / 2**20 == pytest.approx(mib, abs=0.5)


def test_every_tensor_has_a_type_in_file_order() -> None:
    """A mix names all tensors as the file does, and leaves norms and routers as they are."""
    inventory = read_inventory("DeepSeek-V3.1-Terminus")
    mix = stock_mix(inventory, "iq4_xs")
    assert list(mix) == [t.name for t in inventory.tensors]
    assert all(mix[t.name] == t.qtype for t in inventory.tensors if not t.is_quantizable)


def test_an_unknown_ftype_is_refused_with_the_known_ones() -> None:
    """A qtype is no ftype: the message lists what is."""
    with pytest.raises(InputError, match=r"unknown ftype 'Q4_K'.*Q4_K_M"):
        stock_mix(read_inventory("Qwen3-4B-Instruct-2507"), "Q4_K")


@needs_llama_cpp
def test_what_llama_quantize_refuses_is_refused_with_all_reasons(tmp_path: Path) -> None:
    """Rows that no block divides, and experts outside the layers, stop both."""
    metadata = toys.metadata_of("llama") | {
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.block_count": 1,
    }
    narrow = {f"blk.0.{role}.weight": (48, 256) for role in ("attn_q", "attn_k")}
    beyond = {f"blk.{layer}.ffn_down_exps.weight": (256, 256, 4) for layer in (0, 1, 2)}
    for ftype, shapes, n_faults in (("Q8_0", narrow, 2), ("Q4_K_M", beyond, 2)):
        path = toys.write_model(tmp_path / f"{ftype}.gguf", metadata, shapes)
        assert llama_mixes([(path, ftype, False)]) == [None]
        with pytest.raises(InputError) as caught:
            stock_mix(read_inventory(path), ftype)
        assert len(caught.value.faults) == n_faults
