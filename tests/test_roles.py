"""Names of tensors: layer, role, class, and what a quantizer leaves alone."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.inventory import Inventory
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.roles import RoleClass, is_quantizable, role_class, split_layer, split_name
from quantplan.inventory.sources import read_inventory

# Names as llama.cpp's own tables spell them, all with two dimensions or more.
LEFT_ALONE = """
blk.0.attn_q_norm.weight blk.0.ssm_norm.weight output_norm.weight enc.blk.3.attn_norm.weight
blk.0.ffn_gate_inp.weight blk.7.ffn_gate_tid2eid.weight
altup_proj.weight altup_unembd_proj.weight blk.4.altup_router.weight blk.4.altup_correct_coef.weight
blk.1.laurel_l.weight blk.1.laurel_r.weight per_layer_model_proj.weight
blk.2.ssm_conv1d.weight blk.2.shortconv.conv.weight
blk.5.indexer.k_proj.weight blk.5.indexer.q_proj.weight
blk.0.time_mix_first.weight blk.0.time_mix_w0.weight blk.0.time_mix_w1.weight
blk.0.time_mix_w2.weight blk.0.time_mix_v0.weight blk.0.time_mix_v1.weight blk.0.time_mix_v2.weight
blk.0.time_mix_a0.weight blk.0.time_mix_a1.weight blk.0.time_mix_a2.weight blk.0.time_mix_g1.weight
blk.0.time_mix_g2.weight blk.0.time_mix_decay_w1.weight blk.0.time_mix_decay_w2.weight
blk.0.time_mix_lerp_fused.weight enc.blk.0.attn_rel_b.weight
position_embd.weight token_types.weight v.position_embd.weight v.patch_embd.weight
blk.0.attn_q.bias blk.0.ssm_dt.bias blk.0.ssm_a blk.0.exp_probs_b
"""
QUANTIZED = """
token_embd.weight output.weight per_layer_token_embd.weight
blk.0.attn_q.weight blk.0.attn_k.weight blk.0.attn_v.weight blk.0.attn_qkv.weight
blk.0.attn_output.weight blk.0.attn_gate.weight blk.0.attn_kv_a_mqa.weight blk.0.attn_k_b.weight
blk.0.ffn_up.weight blk.0.ffn_down_exps.weight blk.0.ffn_gate_up_exps.weight
blk.0.ffn_up_shexp.weight blk.0.ffn_down_chexps.weight
blk.0.ssm_in.weight blk.0.ssm_out.weight blk.0.shortconv.in_proj.weight
blk.0.indexer.attn_q_b.weight blk.0.indexer.proj.weight
blk.46.nextn.eh_proj.weight blk.46.nextn.embed_tokens.weight
blk.0.time_mix_key.weight blk.0.time_mix_output.weight blk.0.channel_mix_value.weight
"""
CLASSES = {
    "embedding": "token_embd per_layer_token_embd",
    "output": "output",
    "attention": "attn_q attn_k attn_v attn_qkv attn_output attn_gate attn_kv_a_mqa attn_k_b "
    "attn_q_a",
    "recurrent": "ssm_a ssm_alpha ssm_beta ssm_conv1d ssm_out ssm_in time_mix_key shortconv.conv",
    "indexer": "indexer.attn_q_b indexer.attn_k indexer.proj",
    "ffn": "ffn_up ffn_gate ffn_down",
    "shared_experts": "ffn_up_shexp ffn_gate_shexp ffn_down_shexp",
    "up_gate_experts": "ffn_up_exps ffn_gate_exps ffn_gate_up_exps ffn_up_chexps ffn_gate_chexps",
    "down_experts": "ffn_down_exps ffn_down_chexps",
    "router": "ffn_gate_inp ffn_gate_inp_shexp",
    "nextn": "nextn.eh_proj nextn.embed_tokens nextn.enorm nextn.shared_head_norm",
    "norm": "attn_norm attn_q_norm attn_k.bias output_norm post_ffw_norm exp_probs_b.bias "
    "ssm_dt.bias indexer.k_norm attn_q.scale",
    "other": "rope_freqs layer_output_scale",
}


@pytest.fixture(scope="module", params=catalog_names())
def inventory(request: pytest.FixtureRequest) -> Inventory:
    """Every model of the catalog."""
    return read_inventory(request.param)


@pytest.mark.parametrize("name", LEFT_ALONE.split())
def test_llama_quantize_leaves_it_alone(name: str) -> None:
    """Matrices on llama-quantize's list keep their type, whatever their shape."""
    assert not is_quantizable(name, (4096, 4096))
    assert not is_quantizable(name, (4096, 128, 64))


@pytest.mark.parametrize("name", QUANTIZED.split())
def test_llama_quantize_changes_it(name: str) -> None:
    """Other matrices named weight may change their type."""
    assert is_quantizable(name, (4096, 2))
    assert is_quantizable(name, (4096, 1, 2))


@pytest.mark.parametrize("shape_ne", [(4096,), (4096, 1), (4096, 1, 1), (1,), (1, 1, 1, 1)])
def test_vectors_are_left_alone(shape_ne: tuple[int, ...]) -> None:
    """A tensor with one dimension, written with trailing ones or without, keeps its type."""
    assert not is_quantizable("blk.0.attn_q.weight", shape_ne)


def test_quantizable_is_what_the_converter_halved(inventory: Inventory) -> None:
    """The converter keeps F32 for exactly those tensors that no quantizer changes."""
    assert {t.name for t in inventory.tensors if t.is_quantizable} == {
        t.name for t in inventory.tensors if t.qtype != "F32"
    }


def test_names_are_put_together_again(inventory: Inventory) -> None:
    """Layer and role of every tensor of a model give back its name, and no two share both."""
    for tensor in inventory.tensors:
        layer, role = split_name(tensor.name)
        rest = f"{role}.weight" if tensor.name.endswith(".weight") else role
        assert tensor.name == (rest if layer is None else f"blk.{layer}.{rest}")
        assert (tensor.layer, tensor.role) == (layer, role)
    assert len({split_name(t.name) for t in inventory.tensors}) == len(inventory.tensors)


@given(
    layer=st.none() | st.integers(0, 10**6),
    rest=st.from_regex(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*(\.weight)?", fullmatch=True),
)
@settings(deadline=None)
def test_layers_of_any_name_are_found(layer: int | None, rest: str) -> None:
    """A name is split into the layer it was built from and the rest."""
    name = rest if layer is None else f"blk.{layer}.{rest}"
    assert split_layer(name) == (layer, rest)
    assert split_name(name) == (layer, rest.removesuffix(".weight"))


@pytest.mark.parametrize("name", ["blk.x.attn_q.weight", "enc.blk.0.attn_q.weight", "blk.0.", "0"])
def test_names_outside_the_layers_stay_whole(name: str) -> None:
    """A name that is not blk.NUMBER.REST belongs to no layer."""
    assert split_layer(name) == (None, name)


@pytest.mark.parametrize(
    ("expected", "role"),
    [(expected, role) for expected, roles in CLASSES.items() for role in roles.split()],
)
def test_roles_have_their_class(expected: RoleClass, role: str) -> None:
    """Every role of the supported models is in the class that policies mean by it."""
    assert role_class(role) == expected


def test_every_class_is_covered_here() -> None:
    """The table of examples above knows every class there is."""
    assert set(CLASSES) == set(get_args(RoleClass))


def test_catalog_roles_are_known(inventory: Inventory) -> None:
    """Only two small tensors of the public models have a role without a class of its own."""
    others = {t.role for t in inventory.tensors if t.role_class == "other"}
    assert others <= {"rope_freqs", "layer_output_scale"}
    assert not any(t.is_quantizable for t in inventory.tensors if t.role in others)


def test_matrices_with_experts_are_expert_matrices(inventory: Inventory) -> None:
    """Three-dimensional matrices as deep as the model has experts are its expert classes."""
    n_expert = inventory.architecture.n_expert
    deep = {t.name for t in inventory.tensors if n_expert and t.shape_ne[2:] == (n_expert,)}
    classes = ("up_gate_experts", "down_experts")
    assert deep == {t.name for t in inventory.tensors if t.role_class in classes}
