"""The policy preset, held against every tensor of every model of the catalog."""

from collections import Counter
from typing import get_args

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantplan.errors import InputError
from quantplan.inventory import Inventory, RoleClass, Tensor
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_inventory
from quantplan.policy import SOURCE, policy
from quantplan.qtypes import QTYPES, fitting_qtype

ROLE_CLASSES = get_args(RoleClass)
# What the preset promises, in bits per weight; the other classes have no floor.
FLOORS = {
    "attention": 8.5,
    "recurrent": 8.5,
    "indexer": 8.5,
    "nextn": 8.5,
    "output": 6.5625,
    "embedding": 6.5625,
    "shared_experts": 6.5625,
}


def bpw(name: str) -> float:
    """Bits per weight by the gguf package's table."""
    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return n_bytes * 8 / block


@pytest.fixture(scope="module", params=catalog_names())
def inventory(request: pytest.FixtureRequest) -> Inventory:
    """Every model of the catalog."""
    return read_inventory(request.param)


def expert(role: str, n_columns: int, qtype: str = "BF16") -> Tensor:
    """An expert matrix."""
    return Tensor(name=f"blk.3.{role}.weight", shape_ne=(n_columns, 4096, 128), qtype=qtype)


def test_every_class_has_exactly_one_rule() -> None:
    """No class of tensors is without a rule or has two, and every rule gives its reason."""
    rules = policy().rules
    assert Counter(c for rule in rules for c in rule.classes) == Counter(ROLE_CLASSES)
    assert all(role in policy().rule(role).classes for role in ROLE_CLASSES)
    assert all(rule.why for rule in rules)


def test_types_of_the_preset_exist() -> None:
    """Candidates, floors and usual types are ones that llama-quantize writes without an imatrix."""
    preset = policy()
    names = {name for name in preset.candidates if name != SOURCE}
    names |= {rule.usual for rule in preset.rules}
    names |= {rule.floor for rule in preset.rules if rule.floor}
    assert all(QTYPES[name].is_file_target for name in names)
    assert not any(QTYPES[name].needs_imatrix for name in names)
    assert all("llama.cpp" in QTYPES[name].runtimes for name in names)


def test_usual_types_respect_their_floors() -> None:
    """What a rule gives to tensors that are not loaded is not below its own floor."""
    for rule in policy().rules:
        assert rule.floor is None or bpw(rule.usual) >= bpw(rule.floor)


@pytest.mark.parametrize("is_loaded", [True, False])
def test_floors_hold_for_every_tensor(inventory: Inventory, is_loaded: bool) -> None:
    """No candidate of any tensor is below the floor of its class, whatever its rows allow."""
    for tensor in inventory.tensors:
        found = policy().candidates_for(tensor, is_loaded=is_loaded)
        assert min(map(bpw, found)) >= FLOORS.get(tensor.role_class, 0.0)


def test_candidates_can_be_written(inventory: Inventory) -> None:
    """Each candidate fits its tensor as it is, so that no fallback changes it afterwards."""
    for tensor in inventory.tensors:
        found = policy().candidates_for(tensor, is_loaded=True)
        assert found == tuple(dict.fromkeys(found))
        assert [bpw(name) for name in found] == sorted(map(bpw, found), reverse=True)
        for name in found:
            written = fitting_qtype(name, tensor.shape_ne[0])
            assert written is not None
            assert written.name == name
            assert 0 < tensor.bytes_as(name) <= tensor.n_bytes


def test_what_no_quantizer_touches_keeps_its_type(inventory: Inventory) -> None:
    """Tensors that llama-quantize leaves alone have their source's type for only candidate."""
    untouched = [t for t in inventory.tensors if not t.is_quantizable]
    assert len(untouched) > len(inventory.tensors) // 8
    for tensor in untouched:
        assert policy().candidates_for(tensor, is_loaded=True) == (tensor.qtype,)


def test_matrices_of_a_loaded_layer_have_a_choice(inventory: Inventory) -> None:
    """Every matrix may stay as it is or become smaller, experts in at least four steps; only what
    is published quantized stays as it is.
    """
    for tensor in inventory.tensors:
        found = policy().candidates_for(tensor, is_loaded=True)
        if tensor.qtype == "MXFP4":
            assert found == ("MXFP4",)
        elif tensor.is_quantizable:
            assert found[0] == "BF16"
            is_expert = tensor.role_class in ("down_experts", "up_gate_experts")
            assert len(found) > (4 if is_expert else 1)


@pytest.mark.parametrize("n_columns", [1408, 352])
def test_odd_down_experts_get_what_public_quants_show(n_columns: int) -> None:
    """Where 256 does not divide the row, asking for Q6_K means Q8_0, and no K type is offered."""
    found = policy().candidates_for(expert("ffn_down_exps", n_columns), is_loaded=True)
    assert set(found) == {"BF16", "Q8_0", "Q5_1", "Q5_0", "IQ4_NL", "Q4_0"}
    only = policy().candidates_for(expert("ffn_down_exps", n_columns), is_loaded=False)
    assert only == ("Q8_0",)


def test_glm_air_down_experts() -> None:
    """The 1408-wide down experts of GLM-4.5-Air may become Q8_0 but not Q6_K."""
    for tensor in read_inventory("GLM-4.5-Air").tensors:
        if tensor.role == "ffn_down_exps":
            found = policy().candidates_for(tensor, is_loaded=True)
            assert tensor.shape_ne[0] == 1408
            assert "Q8_0" in found
            assert "Q6_K" not in found


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "IQ2_XXS", "MXFP4"])
def test_quantized_sources_are_not_quantized_again(qtype: str) -> None:
    """A tensor that is quantized already keeps its type, loaded or not."""
    for is_loaded in (True, False):
        found = policy().candidates_for(expert("ffn_up_exps", 4096, qtype), is_loaded=is_loaded)
        assert found == (qtype,)


def test_a_row_that_no_type_fits_keeps_its_source() -> None:
    """A matrix whose rows 32 does not divide stays as it is."""
    for is_loaded in (True, False):
        found = policy().candidates_for(expert("ffn_up_exps", 1000), is_loaded=is_loaded)
        assert found == ("BF16",)


def test_unloaded_blocks_get_their_usual_type() -> None:
    """Matrices of a skipped next-token-prediction block have one candidate, a quantized type."""
    inventory = read_inventory("GLM-4.5-Air")
    skipped = [t for t in inventory.tensors if not inventory.is_loaded(t) and t.is_quantizable]
    assert len(skipped) > 8
    for tensor in skipped:
        (only,) = policy().candidates_for(tensor, is_loaded=False)
        assert bpw(only) < 16


def test_ties_are_about_real_roles() -> None:
    """Tied roles occur together in every layer that has one of them, with equal rows."""
    inventories = [read_inventory(name) for name in catalog_names()]
    for tie in policy().ties:
        assert len(tie) > 1
        n_layers = 0
        for inventory in inventories:
            by_layer = Counter(t.layer for t in inventory.tensors if t.role in tie)
            assert set(by_layer.values()) <= {len(tie)}
            n_layers += len(by_layer)
            shapes = {t.shape_ne for t in inventory.tensors if t.role in tie}
            assert len(shapes) <= 1
        assert n_layers > 100


def test_places() -> None:
    """Feed-forward matrices may leave the GPU; attention, norms and routers stay with the layer."""
    movable = {role for role in ROLE_CLASSES if policy().rule(role).may_leave_gpu}
    assert movable == {"ffn", "shared_experts", "up_gate_experts", "down_experts"}


def test_unknown_presets_are_refused() -> None:
    """An unknown preset is refused with the names of those that exist."""
    with pytest.raises(InputError, match="unknown policy 'speed'; known are quality"):
        policy("speed")
