"""Predicted loss per tensor and type."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import Inventory, catalog_names
from quantplan import read_inventory as read
from quantplan.costs import load_data
from quantplan.costs.quality import LossTable, type_error
from quantplan.qtypes import QTYPES
from tests.support.models import toy_inventory

untimed = settings(max_examples=50, deadline=None)

# From few bits per weight to many, within a family of types.
FAMILIES = [
    ("IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0"),
    ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16", "F16"),
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
]
QUANTIZED = sorted(load_data("type_error.json")["relative_squared_error"].keys() - {"F16", "BF16"})


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_of_a_family_have_less_error(family: tuple[str, ...]) -> None:
    """Within a family of types, more bits per weight never have a larger error."""
    assert all(QTYPES[a].bpw <= QTYPES[b].bpw for a, b in pairwise(family))
    assert all(type_error(a) > type_error(b) > 0 for a, b in pairwise(family))


@pytest.mark.parametrize("name", catalog_names())
def test_keeping_every_type_loses_nothing(name: str) -> None:
    """A model whose tensors all keep their types has no loss."""
    inventory = read(name)
    table = LossTable(inventory)
    assert all(table.loss_nats(t, t.qtype) == 0 for t in inventory.tensors)


def scale(inventory: Inventory) -> float:
    """Loss of the model per unit of type error, summed over the tensors that have any."""
    table = LossTable(inventory)
    return sum(
        table.loss_nats(tensor, qtype) / type_error(qtype)
        for tensor in inventory.tensors
        for qtype in ["Q8_0" if tensor.qtype != "Q8_0" else "Q6_K"]
    )


@pytest.mark.parametrize("name", catalog_names())
def test_shares_add_up(name: str) -> None:
    """The same type for all matrices has a loss of that type's error times one constant."""
    assert scale(read(name)) == pytest.approx(scale(toy_inventory([256])))


@untimed
@given(
    st.lists(st.integers(1, 64).map(lambda n: 32 * n), min_size=1, max_size=4),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.sampled_from(QUANTIZED),
    st.sampled_from(QUANTIZED),
)
def test_loss_follows_the_error_of_the_type(
    widths: list[int], experts: int, has_tied_output: bool, better: str, worse: str
) -> None:
    """For every matrix the type with the larger error has the larger loss, in proportion."""
    better, worse = sorted((better, worse), key=type_error)
    inventory = toy_inventory(widths, experts=experts, has_tied_output=has_tied_output)
    table = LossTable(inventory)
    for tensor in inventory.tensors:
        losses = table.loss_nats(tensor, better), table.loss_nats(tensor, worse)
        if tensor.is_quantizable:
            assert 0 < losses[0] <= losses[1]
            ratio = type_error(worse) / type_error(better)
            assert losses[1] / losses[0] == pytest.approx(ratio)
        else:
            assert losses == (0, 0)


def test_blocks_that_are_not_loaded_lose_nothing() -> None:
    """What llama.cpp does not load has no loss, whatever its type."""
    inventory = read("GLM-4.5-Air")
    table = LossTable(inventory)
    skipped = [t for t in inventory.tensors if not inventory.is_loaded(t)]
    assert [t for t in skipped if t.role == "nextn.eh_proj"]
    assert all(table.loss_nats(t, "Q2_K") == 0 for t in skipped)


def test_a_tied_embedding_is_as_sensitive_as_an_output_matrix() -> None:
    """The embedding loses more where it is the output matrix too."""
    losses = []
    for has_tied_output in (False, True):
        inventory = toy_inventory([256, 256], has_tied_output=has_tied_output)
        embedding = inventory.by_name["token_embd.weight"]
        losses.append(LossTable(inventory).loss_nats(embedding, "Q6_K"))
    assert losses[0] < losses[1]


def test_the_output_matrix_is_the_most_sensitive_one() -> None:
    """Per weight, no matrix of a model with layers of its size is as sensitive as the output."""
    inventory = toy_inventory([1024] * 4)
    table = LossTable(inventory)
    density = {
        t.role: table.loss_nats(t, "Q4_K") / t.n_weights
        for t in inventory.tensors
        if t.is_quantizable
    }
    assert max(density, key=lambda role: density[role]) == "output"
