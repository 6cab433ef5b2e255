"""The policy preset, held against every tensor of every model of the catalog."""

from collections import Counter
from typing import get_args

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

import quantplan as qp
from quantplan.costs.quality import type_errors
from quantplan.errors import InputError
from quantplan.inventory import Inventory, RoleClass, Tensor
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_inventory
from quantplan.policy import SOURCE, parse_rule, policy, policy_names
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
    return float(n_bytes * 8 / block)


@pytest.fixture(scope="module", params=catalog_names())
def inventory(request: pytest.FixtureRequest) -> Inventory:
    """Every model of the catalog."""
    return read_inventory(request.param)


def expert(role: str, n_columns: int, qtype: str = "BF16") -> Tensor:
    """An expert matrix."""
    return Tensor(name=f"blk.3.{role}.weight", shape_ne=(n_columns, 4096, 128), qtype=qtype)


every_preset = pytest.mark.parametrize(
    "preset", [policy(n) for n in policy_names()], ids=policy_names()
)


@every_preset
def test_every_class_has_exactly_one_rule(preset: qp.Policy) -> None:
    """No class of tensors is without a rule or has two, and every rule gives its reason."""
    rules = preset.rules
    assert Counter(c for rule in rules for c in rule.classes) == Counter(ROLE_CLASSES)
    assert all(role in preset.rule(role).classes for role in ROLE_CLASSES)
    assert all(rule.why for rule in rules)
    assert all((preset.why, preset.ties_why, preset.decode_price_why))


@every_preset
def test_types_of_the_preset_exist(preset: qp.Policy) -> None:
    """Candidates, floors and usual types are ones that llama-quantize writes without an imatrix."""
    names = {name for name in preset.candidates if name != SOURCE}
    names |= {rule.usual for rule in preset.rules}
    names |= {rule.floor for rule in preset.rules if rule.floor}
    names |= {name for rule in preset.rules for name in rule.types or () if name != SOURCE}
    assert names <= type_errors().keys()
    assert all(QTYPES[name].is_file_target for name in names)
    assert not any(QTYPES[name].needs_imatrix for name in names)
    assert all("llama.cpp" in QTYPES[name].runtimes for name in names)


@every_preset
def test_usual_types_respect_their_floors(preset: qp.Policy) -> None:
    """What a rule gives to tensors that are not loaded is not below its own floor."""
    for rule in preset.rules:
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


# The other presets.


def of_role(model: str, role: str) -> Tensor:
    """The last tensor of a role that is loaded."""
    inventory = read_inventory(model)
    return [t for t in inventory.tensors if t.role == role and inventory.is_loaded(t)][-1]


@pytest.mark.parametrize(("strict", "lax"), [("quality", "compact"), ("compact", "free")])
@pytest.mark.parametrize("model", ["GLM-4.5-Air", "Qwen3.5-27B"])
def test_presets_allow_more_and_more(model: str, strict: str, lax: str) -> None:
    """What `quality` allows `compact` does too, and `free` what that allows; each allows more."""
    tensors = read_inventory(model).tensors
    few, many = (
        [set(policy(name).candidates_for(tensor, is_loaded=True)) for tensor in tensors]
        for name in (strict, lax)
    )
    assert all(a <= b for a, b in zip(few, many, strict=True))
    assert few != many


@pytest.mark.parametrize(
    ("model", "role", "expected"),
    [
        ("GLM-4.5-Air", "attn_q", "Q8_0"),
        ("GLM-4.5-Air", "ffn_up_exps", "Q4_K"),
        ("GLM-4.5-Air", "ffn_gate_exps", "Q4_K"),
        ("GLM-4.5-Air", "ffn_down_exps", "Q8_0"),
        ("DeepSeek-V3.1-Terminus", "ffn_down_exps", "Q6_K"),
        ("DeepSeek-V3.1-Terminus", "attn_kv_a_mqa", "Q8_0"),
        ("GLM-4.5-Air", "ffn_down_shexp", "BF16"),
        ("GLM-4.5-Air", "token_embd", "BF16"),
        ("GLM-4.5-Air", "output", "BF16"),
        ("GLM-4.5-Air", "attn_norm", "F32"),
        ("GLM-4.5-Air", "ffn_gate_inp", "F32"),
    ],
)
def test_the_hand_made_recipe_leaves_no_choice(model: str, role: str, expected: str) -> None:
    """hq4k gives every tensor one type: that of the rules which people apply by hand."""
    found = policy("hq4k").candidates_for(of_role(model, role), is_loaded=True)
    assert found == (expected,)


@every_preset
def test_each_runtime_is_offered_types_that_it_loads(preset: qp.Policy) -> None:
    """Candidates for llama.cpp are llama.cpp's; for ik_llama.cpp there are some of its own."""
    tensor = of_role("DeepSeek-V3.1-Terminus", "ffn_up_exps")
    for runtime, own in (("llama.cpp", set()), ("ik_llama.cpp", {"IQ4_KS"})):
        found = preset.candidates_for(tensor, is_loaded=True, runtime=runtime)  # type: ignore[arg-type]
        assert all(runtime in QTYPES[name].runtimes for name in found)
        assert own <= set(found) or preset.name == "hq4k"


# What a person says about single tensors.


def test_a_pin_is_kept_by_the_plan() -> None:
    """Pinned tensors have their type in the plan, below the floor too, and others do not."""
    inventory = read_inventory("Qwen3-4B-Thinking-2507")
    rules = policy().pin(r"blk\.[0-3]\.attn_q\.", "q4_k").allow("ffn_down", "Q5_K", "Q6_K")
    machine = qp.Machine.parse("4GiB@300GB/s + 64GiB@80GB/s")
    made = qp.plan(inventory, machine, policy=rules, baselines=False)
    types = {a.tensor: a.qtype for a in made.assignments}
    for name, kind in types.items():
        is_pinned = "attn_q." in name and int(name.split(".")[1]) <= 3
        assert (kind == "Q4_K") == is_pinned or "attn" not in name
        assert kind in {"Q5_K", "Q6_K"} or "ffn_down" not in name
    assert made.provenance.rules == rules
    assert "attn_q" in made.provenance.policy_text


def test_the_first_rule_decides() -> None:
    """Of several rules that match a tensor, the first one counts."""
    rules = policy().pin("ffn_up_exps", "Q6_K").allow("exps", "Q4_K", "SOURCE")
    up, down = expert("ffn_up_exps", 4096), expert("ffn_down_exps", 4096)
    assert rules.candidates_for(up, is_loaded=True) == ("Q6_K",)
    assert rules.candidates_for(down, is_loaded=True) == ("BF16", "Q4_K")


def test_rules_that_differ_undo_a_tie() -> None:
    """Up and gate experts with rules of their own are decided each for itself."""
    inventory = read_inventory("DeepSeek-V2-Lite")
    machine = qp.Machine.parse("8GiB@300GB/s + 64GiB@80GB/s")
    rules = policy().pin("ffn_up_exps", "Q6_K").pin("ffn_gate_exps", "Q4_K")
    made = qp.plan(inventory, machine, policy=rules, baselines=False)
    found = {(a.tensor.split(".")[2], a.qtype) for a in made.assignments if "exps" in a.tensor}
    assert {kind for role, kind in found if role == "ffn_up_exps"} == {"Q6_K"}
    assert {kind for role, kind in found if role == "ffn_gate_exps"} == {"Q4_K"}


def test_rules_leave_alone_what_no_quantizer_changes() -> None:
    """A pattern that also matches norms and quantized tensors changes neither."""
    rules = policy().pin("blk", "Q6_K")
    norm = Tensor(name="blk.0.attn_norm.weight", shape_ne=(4096,), qtype="F32")
    assert rules.candidates_for(norm, is_loaded=True) == ("F32",)
    quantized = expert("ffn_up_exps", 4096, "Q4_K")
    assert rules.candidates_for(quantized, is_loaded=True) == ("Q4_K",)


@pytest.mark.parametrize(
    ("pattern", "types", "fault"),
    [
        ("ffn_dwn_exps", ["Q8_0"], "matches no tensor of GLM-4.5-Air; similar are blk"),
        ("attn_norm", ["Q8_0"], "matches only tensors that keep their type"),
        ("ffn_down_exps", ["Q6_K"], "1408 weights .* no whole number .* would write Q8_0"),
        ("ffn_up_exps", ["IQ4_KS"], "llama.cpp does not load the type IQ4_KS"),
        ("ffn_up_exps", ["NVFP4"], "the loss of the type NVFP4 is not known"),
        ("ffn_up_exps", ["F32"], "is BF16 and stays so, or is quantized; say SOURCE"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(
    pattern: str, types: list[str], fault: str
) -> None:
    """A rule that matches nothing or names an impossible type is refused before any solving."""
    rules = policy().allow(pattern, *types)
    with pytest.raises(InputError, match=fault):
        qp.plan(read_inventory("GLM-4.5-Air"), qp.Machine.parse("64GiB@80GB/s"), policy=rules)


def test_faults_of_rules_are_gathered() -> None:
    """Every rule that does not fit is named at once."""
    rules = policy().pin("nothing_like_it", "Q8_0").pin("ffn_down_exps", "Q6_K")
    with pytest.raises(InputError) as caught:
        rules.check(read_inventory("GLM-4.5-Air"), priced=type_errors())
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("pattern", "types", "n_faults"),
    [("(", ["Q8_0"], 1), ("attn", ["Q9_0", "Q8_1"], 2), ("", [], 2), ("attn", [""], 1)],
)
def test_rules_that_mean_nothing_are_refused(pattern: str, types: list[str], n_faults: int) -> None:
    """No regular expression, no type and unknown types are refused whatever the model."""
    with pytest.raises(InputError) as caught:
        policy().allow(pattern, *types)
    assert len(caught.value.faults) == n_faults


def test_rules_are_written_as_on_the_command_line() -> None:
    """Everything after the last = is types, so that a pattern may hold one itself."""
    assert parse_rule("(?=blk).*exps=Q4_K,Q5_K") == ("(?=blk).*exps", ("Q4_K", "Q5_K"))
    with pytest.raises(InputError, match="is not regex=type"):
        parse_rule("ffn_down_exps")
