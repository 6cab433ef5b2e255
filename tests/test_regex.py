"""Compressed patterns, expanded again over every tensor name of every model of the catalog."""

import re
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.formats.regex import integers_pattern, names_patterns, rules_by_value
from quantplan.inventory import Inventory
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_inventory

DECIMALS = tuple(map(str, range(5001)))
# What ECMAScript and Python read alike, and what llama.cpp does not split its arguments at.
PLAIN = re.compile(r"\^([a-z0-9_|()?+*-]|\\\.|\\d|\[[a-z0-9-]+\])+\$", re.ASCII)
EVERYTHING = "^.+$"
TYPES = ("Q8_0", "Q6_K", "Q4_K", "IQ4_XS")


@pytest.fixture(scope="module", params=catalog_names())
def inventory(request: pytest.FixtureRequest) -> Inventory:
    """Every model of the catalog."""
    return read_inventory(request.param)


def expand(patterns: Iterable[str], names: Sequence[str]) -> list[set[str]]:
    """The names that each pattern finds, searching unanchored as llama.cpp does."""
    return [{name for name in names if re.search(pattern, name)} for pattern in patterns]


def first_match(rules: Sequence[tuple[str, str]], name: str) -> str | None:
    """The value of the first rule whose pattern is found in the name."""
    return next((value for pattern, value in rules if re.search(pattern, name)), None)


def matched_integers(numbers: Iterable[int]) -> set[int]:
    """All integers from 0 to 5000 that the pattern matches."""
    pattern = re.compile(integers_pattern(numbers))
    return {int(text) for text in DECIMALS if pattern.fullmatch(text)}


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=60))
@settings(deadline=None)
def test_scattered_integers_match_exactly(numbers: set[int]) -> None:
    """The pattern of a set of numbers matches these and no others."""
    assert matched_integers(numbers) == numbers


runs = st.tuples(st.integers(0, 5000), st.integers(1, 800), st.integers(1, 12))


@given(st.lists(runs, min_size=1, max_size=4))
@settings(deadline=None)
def test_runs_of_integers_match_exactly(spans: list[tuple[int, int, int]]) -> None:
    """The pattern of ranges with steps, overlapping or not, matches these and no others."""
    numbers = {n for begin, length, step in spans for n in range(begin, begin + length, step)}
    assert matched_integers(numbers) == {n for n in numbers if n <= 5000}


@given(st.integers(0, 5000), st.text("0123456789", max_size=6))
@settings(deadline=None)
def test_other_spellings_of_a_number_do_not_match(number: int, digits: str) -> None:
    """Leading zeros and longer numbers that contain a member are not matched."""
    matches = re.fullmatch(integers_pattern([number]), digits) is not None
    assert matches == (digits == str(number))


@pytest.mark.parametrize(
    ("numbers", "length"), [(range(13), 14), (range(100), 20), (range(1000), 30), (range(61), 20)]
)
def test_ranges_are_short(numbers: range, length: int) -> None:
    """A range of layers takes a few characters, not one alternative a layer."""
    assert len(integers_pattern(numbers)) <= length


def test_the_order_and_repetition_of_numbers_do_not_matter() -> None:
    """A pattern depends on the set of numbers alone, so that recipes are reproducible."""
    assert integers_pattern([12, 3, 40, 3]) == integers_pattern({3, 12, 40})


def test_no_names_need_no_pattern() -> None:
    """Nothing is matched by no pattern, rather than by an empty one that matches everything."""
    assert names_patterns([]) == []
    assert rules_by_value({}) == []


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_part_of_a_model_matches_exactly(data: st.DataObject, inventory: Inventory) -> None:
    """The patterns of any set of a model's names find each of these once and no other name."""
    names = [tensor.name for tensor in inventory.tensors]
    wanted = data.draw(st.sets(st.sampled_from(names), max_size=40))
    found = expand(names_patterns(wanted), names)
    assert set().union(*found) == wanted
    assert sum(map(len, found)) == len(wanted)


def scattered(inventory: Inventory, salt: int) -> dict[str, str]:
    """An assignment without any order, the hardest to compress."""
    names = [tensor.name for tensor in inventory.tensors]
    return {name: TYPES[(i * 7919 + i * i * salt) % len(TYPES)] for i, name in enumerate(names)}


def layered(inventory: Inventory) -> dict[str, str]:
    """An assignment as plans have it: by role, with other types in ranges of layers."""
    arch = inventory.architecture
    found = {}
    for tensor in inventory.tensors:
        layer, group = tensor.layer or 0, TYPES.index("Q6_K")
        if tensor.role_class in ("up_gate_experts", "ffn"):
            group = 2 if layer < arch.n_layers // 3 else 3
        elif tensor.role_class == "down_experts":
            group = 0 if layer < 5 or layer > arch.n_layers - 7 else 1
        elif tensor.role_class in ("attention", "recurrent", "indexer"):
            group = 0
        found[tensor.name] = TYPES[group]
    return found


@pytest.mark.parametrize("salt", [1])
def test_scattered_assignments_come_back(inventory: Inventory, salt: int) -> None:
    """Any assignment comes back from its rules, by the first rule that is found in the name."""
    assignment = scattered(inventory, salt)
    rules = rules_by_value(assignment)
    assert {name: first_match(rules, name) for name in assignment} == assignment


def test_layered_assignments_come_back_from_few_rules(inventory: Inventory) -> None:
    """An assignment by roles and ranges of layers comes back from one short rule a value."""
    assignment = layered(inventory)
    rules = rules_by_value(assignment)
    assert {name: first_match(rules, name) for name in assignment} == assignment
    assert len(rules) == len(set(assignment.values()))
    assert sum(len(pattern) for pattern, _ in rules) < len(assignment)


def test_rules_that_may_not_overlap_do_not(inventory: Inventory) -> None:
    """Where asked for, no two rules match the same name, so that any order gives the same types."""
    assignment = layered(inventory)
    rules = rules_by_value(assignment, may_overlap=False)
    found = expand([pattern for pattern, _ in rules], list(assignment))
    assert sum(map(len, found)) == len(assignment)
    assert {name: first_match(rules[::-1], name) for name in assignment} == assignment


def test_names_without_a_value_match_no_rule(inventory: Inventory) -> None:
    """Names that are given as others are left alone, though they are much like the rest."""
    assignment = scattered(inventory, 1)
    others = list(assignment)[::7]
    rules = rules_by_value({n: v for n, v in assignment.items() if n not in others}, others)
    for name, value in assignment.items():
        assert first_match(rules, name) == (None if name in others else value)


@given(st.data(), st.integers(1, 99))
@settings(deadline=None)
def test_integers_that_nobody_asks_for_may_match(data: st.DataObject, n_layers: int) -> None:
    """A pattern matches all its numbers, none of the others, and is no longer than an exact one."""
    numbers = data.draw(st.sets(st.integers(0, n_layers), min_size=1))
    others = data.draw(st.sets(st.integers(0, n_layers))) - numbers
    pattern = integers_pattern(numbers, others)
    matched = {n for n in numbers | others if re.fullmatch(pattern, str(n))}
    assert matched == numbers
    assert len(pattern) <= len("|".join(map(str, numbers))) + 2


def test_patterns_are_plain(inventory: Inventory) -> None:
    """Patterns are anchored and hold nothing that a runtime or a second dialect reads otherwise."""
    for assignment in (layered(inventory), scattered(inventory, 1)):
        rules = rules_by_value(assignment)
        assert rules[-1][0] == EVERYTHING
        for pattern, _ in [*rules[:-1], *rules_by_value(assignment, may_overlap=False)]:
            assert PLAIN.fullmatch(pattern)
            assert not set(pattern) & set(",= \t\n;")
            assert pattern == pattern.lower()


@pytest.mark.parametrize(
    ("wanted", "others"),
    [
        (["output.weight"], ["blk.0.attn_output.weight", "output_norm.weight", "outputxweight"]),
        (["blk.1.ffn_up.weight"], ["blk.11.ffn_up.weight", "blk.1.ffn_up_exps.weight"]),
        (["blk.1.attn_q.weight"], ["enc.blk.1.attn_q.weight", "blk.1.attn_q.weight.scale"]),
        (["blk.2.attn_q.bias", "blk.2.attn_q.weight"], ["blk.2.attn_q", "blk.2.attn_qkv.bias"]),
        (["blk.3.a-b.weight"], ["blk.3.a.weight", "blk.3.b.weight"]),
        (["blk.07.attn_q.weight"], ["blk.7.attn_q.weight"]),
    ],
)
def test_similar_names_are_told_apart(wanted: list[str], others: list[str]) -> None:
    """A name is matched whole, and not as a part of another one."""
    found = expand(names_patterns(wanted), [*wanted, *others])
    assert set().union(*found) == set(wanted)


identifiers = st.from_regex(
    r"(blk\.(0|[1-9][0-9]{0,2})\.)?[a-z_-][a-z0-9_-]{0,2}(\.[a-z0-9_-]{1,3})?(\.weight)?",
    fullmatch=True,
)


@given(st.dictionaries(identifiers, st.sampled_from(TYPES), min_size=1, max_size=25), identifiers)
@settings(deadline=None)
def test_any_names_come_back(assignment: dict[str, str], other: str) -> None:
    """Names that no model has yet come back too, and a name that is left out matches no rule."""
    for may_overlap in (True, False):
        rules = rules_by_value(assignment, {other} - set(assignment), may_overlap=may_overlap)
        assert {name: first_match(rules, name) for name in assignment} == assignment
        assert first_match(rules, other) == assignment.get(other)
