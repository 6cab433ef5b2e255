"""What differs between two recipes, by role and layer."""

from pathlib import Path

import pytest

import quantplan as qp
from quantplan.difference import ranges_text
from quantplan.recipe import MemoryUse, Prediction, Recipe
from tests.support.models import toy_moe
from tests.support.quantizer import recipe_for


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe of a small mixture of experts, all in Q8_0."""
    source = toy_moe(tmp_path / "toy.gguf")
    quantizable = [t.name for t in qp.read_inventory(source).tensors if t.is_quantizable]
    return recipe_for(source, dict.fromkeys(quantizable, "Q8_0"))


def changed(recipe: Recipe, role: str, **values: str) -> Recipe:
    """The recipe with other values for the tensors of a role."""
    tensors = tuple(
        t.model_copy(update=values) if f".{role}." in t.tensor else t for t in recipe.tensors
    )
    return recipe.model_copy(update={"tensors": tensors})


def test_a_recipe_does_not_differ_from_itself(recipe: Recipe) -> None:
    """Two equal recipes have no difference, and the text says so."""
    found = qp.diff_recipes(recipe, recipe)
    assert found.is_empty
    assert "the same types, places and flags" in found.summary()


def test_types_are_told_by_role_and_layers(recipe: Recipe) -> None:
    """Tensors of a role that change alike are one line, with their layers and exact bytes."""
    other = changed(recipe, "ffn_up_exps", qtype="Q4_K")
    found = qp.diff_recipes(recipe, other)
    (change,) = found.changes
    mine = [t for t in recipe.inventory_tensors if t.role == "ffn_up_exps"]
    assert change.layers == tuple(t.layer for t in mine)
    assert change.qtypes == ("Q8_0", "Q4_K")
    assert change.n_bytes == (sum(t.n_bytes for t in mine), sum(t.bytes_as("Q4_K") for t in mine))
    assert found.n_bytes[1] - found.n_bytes[0] == change.n_bytes[1] - change.n_bytes[0]
    assert "ffn_up_exps" in found.summary()
    assert "Q8_0 -> Q4_K" in found.summary()
    back = qp.diff_recipes(other, recipe)
    assert back.changes[0].qtypes == ("Q4_K", "Q8_0")


def test_places_flags_and_sources_are_told(recipe: Recipe) -> None:
    """A tensor that moves, other flags and another source are differences too."""
    other = changed(recipe, "attn_q", device="GPU0")
    made = other.provenance.model_copy(update={"header_sha256": "f" * 64})
    other = other.model_copy(update={"flags": ("-ngl", "9"), "provenance": made})
    found = qp.diff_recipes(recipe, other)
    assert {change.devices for change in found.changes} == {("CPU", "GPU0")}
    assert {change.n_bytes[0] - change.n_bytes[1] for change in found.changes} == {0}
    for part in ("made for different files", "CPU -> GPU0", "flags -ngl 9"):
        assert part in found.summary()


def test_predictions_stand_side_by_side(recipe: Recipe) -> None:
    """Loss, speed and free memory of both are shown where both have them."""
    numbers = Prediction(decode_tps=10, prefill_tps=200, loss_nats=0.01, file_bytes=1, bpw=4)
    memory = MemoryUse(
        device="GPU0", weights_bytes=1, kv_bytes=1, compute_bytes=1, free_bytes=2**30
    )
    first = recipe.model_copy(update={"predicted": numbers, "memory": (memory,)})
    better = numbers.model_copy(update={"loss_nats": 0.005, "decode_tps": 12.5})
    second = first.model_copy(update={"predicted": better})
    text = qp.diff_recipes(first, second).summary()
    assert "loss 0.0100 -> 0.0050 nats/token, decode 10.0 -> 12.5 tokens/s" in text
    assert "GPU0  free 1.00 GiB -> 1.00 GiB" in text
    assert "loss" not in qp.diff_recipes(recipe, second).summary()


def test_tensors_of_one_recipe_alone_are_named(recipe: Recipe) -> None:
    """Tensors that the other recipe lacks are counted, with an example, on either side."""
    shorter = recipe.model_copy(update={"tensors": recipe.tensors[:-2]})
    found = qp.diff_recipes(recipe, shorter)
    assert found.only_in == (tuple(t.tensor for t in recipe.tensors[-2:]), ())
    assert "2 tensors only in the first" in found.summary()
    assert not found.is_empty


def test_differences_are_json_for_other_tools(recipe: Recipe) -> None:
    """A difference comes back from its JSON unchanged."""
    found = qp.diff_recipes(recipe, changed(recipe, "attn_q", qtype="Q6_K"))
    assert qp.RecipeDifference.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 7, 9, 10], "0-2,7,9-10")]
)
def test_runs_of_layers_are_joined(numbers: list[int], text: str) -> None:
    """Layers that follow each other are written as a range."""
    assert ranges_text(numbers) == text


def test_a_plan_hands_its_predictions_to_its_recipe(tmp_path: Path) -> None:
    """A planned recipe carries speed, loss and memory, also after loading."""
    machine = qp.Machine.parse("24GiB + 64GiB@80GB/s")
    plan = qp.plan(qp.read_inventory(toy_moe(tmp_path / "toy.gguf")), machine)
    plan.recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded.predicted == plan.predicted
    assert {use.device: use.free_bytes for use in loaded.memory} == {
        use.name: use.free_bytes for use in plan.devices
    }
