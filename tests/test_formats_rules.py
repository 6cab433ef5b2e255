"""Rules of other programs, written and read as each program does, llama.cpp itself included."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.errors import RecipeError
from quantplan.formats.gguf_tool_suite import read_recipe_file, recipe_file
from quantplan.formats.ik_llama import custom_q, read_custom_q
from quantplan.formats.llama_cpp import read_tensor_type_file, tensor_type_file
from quantplan.formats.rules import (
    IK_QUANTIZE,
    LLAMA_QUANTIZE,
    TOOL_SUITE,
    Dialect,
    compiled,
    read_rules,
    split_rules,
    type_name,
    write_rules,
)
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_inventory
from quantplan.qtypes import QTYPES
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.models import toy_moe
from tests.support.quantizer import llama_reads_rules

AIR = read_inventory("GLM-4.5-Air")
DIALECTS = (LLAMA_QUANTIZE, IK_QUANTIZE, TOOL_SUITE)
IK_TYPES = ("Q8_0", "Q6_K", "IQ4_KS", "IQ5_K", "IQ2_KL", "Q8_KV", "IQ4_K_R4")
MAINLINE_TYPES = ("Q8_0", "Q6_K", "Q4_K", "IQ4_XS", "IQ3_XXS", "MXFP4", "BF16")
names = st.sampled_from(catalog_names())


def random_types(name: str, seed: int, qtypes: tuple[str, ...]) -> dict[str, str]:
    """Types dealt out at random to whole roles, ranges of layers and single tensors of a model."""
    rng = random.Random(seed)  # noqa: S311 (a test's variety)
    tensors = [t for t in read_inventory(name).tensors if t.is_quantizable]
    found = {t.name: rng.choice(qtypes) for t in tensors}
    for _ in range(rng.randint(0, 30)):
        role, qtype = rng.choice(tensors).role, rng.choice(qtypes)
        begin, length = rng.randint(-5, 90), rng.choice([1, 5, 20, 200])
        for tensor in tensors:
            if tensor.role == role and begin <= (tensor.layer or 0) < begin + length:
                found[tensor.name] = qtype
    return found


@given(names, st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_any_assignment_survives_a_tensor_type_file(name: str, seed: int) -> None:
    """Random types of any catalog model are read back from a tensor-type file, one rule each."""
    meant = random_types(name, seed, MAINLINE_TYPES)
    rules = read_tensor_type_file(tensor_type_file(meant))
    lowered = [(re.compile(pattern.lower()), value) for pattern, value in rules]
    read = {n: next(value for regex, value in lowered if regex.search(n)) for n in meant}
    assert read == {n: qtype.lower() for n, qtype in meant.items()}
    assert len(rules) == len(set(meant.values()))


@given(names, st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_any_assignment_survives_ik_and_the_tool_suite(name: str, seed: int) -> None:
    """Random types come back from --custom-q and .recipe; the latter's rules do not overlap."""
    meant = random_types(name, seed, IK_TYPES)
    custom = [word.split("=", 1) for word in custom_q(meant).split(",")]
    for tensor, qtype in meant.items():
        value = next(value for pattern, value in custom if re.search(pattern, tensor))
        assert value == type_name(qtype, IK_QUANTIZE)
    suite = read_recipe_file(recipe_file(meant, "any\nmodel"))
    assert not any("\\d" in pattern for pattern, _ in suite)
    for tensor, qtype in meant.items():
        assert [v for p, v in suite if re.search(p, tensor)] == [qtype.lower()]


@pytest.mark.parametrize(
    ("qtype", "name"),
    [
        ("Q4_K", "q4_K"), ("Q2_K", "q2_K"), ("IQ4_KS", "iq4_ks"), ("IQ4_K", "iq4_k"),
        ("Q4_K_R4", "q4_k_r4"), ("Q8_K_R8", "q8_k_r8"), ("Q8_KV", "q8_KV"), ("MXFP4", "mxfp4"),
        ("Q8_KV_R8", "q8_KV_r8"), ("Q8_0", "q8_0"), ("BF16", "bf16"), ("F32", "f32"),
    ],
)  # fmt: skip
def test_ik_llama_cpp_minds_the_case_of_types(qtype: str, name: str) -> None:
    """Types are spelled as ik_llama.cpp's table spells them, and no other spelling is read."""
    assert type_name(qtype, IK_QUANTIZE) == name
    for wrong in {qtype, qtype.lower()} - {name}:
        with pytest.raises(RecipeError, match=f"write {name} for {wrong}"):
            read_rules([(r"ffn_up", wrong)], AIR, IK_QUANTIZE)
    if qtype != "F32":
        read_rules([(r"attn_q\.weight", name)], AIR, IK_QUANTIZE)


def test_patterns_are_lowered_by_llama_quantize_alone() -> None:
    r"""`\D` turns into `\d` in llama-quantize, and a capital letter into a small one."""
    rules = [(r"blk\.\D", "q6_K"), (r"FFN_UP", "q4_K"), (".", "q8_0")]
    with pytest.raises(RecipeError) as caught:
        read_rules(rules, AIR, IK_QUANTIZE)
    assert [fault.partition(" ")[0] for fault in caught.value.faults] == [r"blk\.\D", "FFN_UP"]
    read = read_rules(rules, AIR, LLAMA_QUANTIZE)
    assert {t.layer is None: read[t.name] for t in AIR.tensors if t.role == "ffn_up"} == {
        False: "Q6_K"
    }
    assert read["output.weight"] == "Q8_0"


def test_rules_are_searched_and_the_first_match_wins() -> None:
    """An unanchored `output` takes attn_output too, and a later rule for it comes too late."""
    loose = read_rules(
        [("output", "q6_k"), ("attn_output", "q4_k"), (".", "q8_0")], AIR, TOOL_SUITE
    )
    assert loose["blk.3.attn_output.weight"] == loose["output.weight"] == "Q6_K"
    tight = read_rules([(r"^output\.weight$", "q6_k"), (".", "q8_0")], AIR, TOOL_SUITE)
    assert (tight["blk.3.attn_output.weight"], tight["output.weight"]) == ("Q8_0", "Q6_K")


@pytest.mark.parametrize(
    ("dialect", "wanted", "written"),
    [
        (LLAMA_QUANTIZE, "q5_k", "Q5_1"), (IK_QUANTIZE, "q5_K", "Q6_0"),
        (LLAMA_QUANTIZE, "q2_k", "Q4_0"), (IK_QUANTIZE, "q2_K", "IQ4_NL"),
        (IK_QUANTIZE, "iq5_ks", "Q5_0"), (LLAMA_QUANTIZE, "Q4_K", "Q5_0"),
    ],
)  # fmt: skip
def test_row_fallbacks_are_each_programs_own(dialect: Dialect, wanted: str, written: str) -> None:
    """Rows of 1408 weights get the substitute of the program that the rules are for."""
    read = read_rules([("ffn_down_exps", wanted)], AIR, dialect)
    assert read["blk.1.ffn_down_exps.weight"] == written


def test_all_faults_of_a_list_come_at_once() -> None:
    """Unknown types, patterns of no use and rows that do not divide are told together, by name."""
    rules = [
        ("ffn_dwon_exps", "q4_k"),
        ("ffn_up_exps", "q4_q"),
        ("(", "q8_0"),
        (r"(?<=a)b", "q8_0"),
        ("ffn_gate_exps", "iq4_ks"),
        ("ffn_down_exps", "nvfp4"),
        ("attn_q", "q8_1"),
    ]
    tensors = [t for t in AIR.tensors if t.layer in (None, 3)]
    # Rows of 1440 weights, which NVFP4's blocks of 64 do not divide.
    odd = [
        t.model_copy(update={"shape_ne": (1440, *t.shape_ne[1:])})
        if t.role == "ffn_down_exps"
        else t
        for t in tensors
    ]
    with pytest.raises(RecipeError) as caught:
        read_rules(rules, AIR.model_copy(update={"tensors": tuple(odd)}), LLAMA_QUANTIZE)
    text = str(caught.value)
    assert len(caught.value.faults) == len(rules)
    for part in (
        "ffn_dwon_exps matches no tensor; similar are blk.3.ffn_down_exps.weight",
        "there is no type 'q4_q'; similar are q4_",
        "'(' is no regular expression",
        "may mean something else in ECMAScript",
        "llama-quantize does not write IQ4_KS",
        "rows of 1440 weights are no whole number of blocks of NVFP4 (64 weights)",
        "llama-quantize does not write Q8_1",
    ):
        assert part in text


@pytest.mark.parametrize(
    "pattern",
    [
        r"\A", r"a\Z", r"(a)\1", "(?i)a", "(?P<n>a)", "(?=a)", "(?<!a)", "a*+", "a++", "a{",
        "a{,2}", "{", "}", "]", "[]a]", "[^]", "[[:alpha:]]", "[a&&b]", "[a--b]", r"[\b]", "^*",
        r"\b+", "*a", "a|*", "é", "", r"\x41", r"\N", "(?!a)*", "a\\",
    ],
)  # fmt: skip
def test_what_two_languages_may_read_otherwise_is_refused(pattern: str) -> None:
    """Constructs of which ECMAScript and Python may make different things are no rules."""
    with pytest.raises(RecipeError):
        compiled(pattern, IK_QUANTIZE)


def readable_patterns(n: int) -> list[str]:
    """Random patterns that this project reads, in small letters, most of which match something."""
    rng = random.Random(7)  # noqa: S311 (a test's variety)
    parts = [
        "blk", r"\.", "ffn_", "(up|down)", "(?:gate)?", "exps", ".*", r"\d+", "[0-3]", "[^a-f]",
        "w", "e", "^", "$", "|", "(?!blk)", r"\bblk", r"\s", r"\w{2,}", "attn", "_",
        "(q|k|v)", "1?", "t*?",
    ]  # fmt: skip
    found: list[str] = []
    while len(found) < n:
        pattern = "".join(rng.choice(parts) for _ in range(rng.randint(1, 5)))
        try:
            compiled(pattern, LLAMA_QUANTIZE)
        except RecipeError:
            continue
        found.append(pattern)
    return found


@needs_llama_cpp
def test_llama_cpp_reads_rules_as_this_project_does(tmp_path: Path) -> None:
    """The real llama.cpp finds the same types by lists of odd patterns, row fallbacks included."""
    source = toy_moe(tmp_path / "toy.gguf")
    inventory = read_inventory(source)
    qtypes = ["q4_k", "q6_k", "iq4_nl", "q5_1", "q3_k", "q2_k"]
    patterns = readable_patterns(40 * len(qtypes))
    lists = [
        [*zip(patterns[i : i + len(qtypes)], qtypes, strict=True), ("^.+$", "q8_0")]
        for i in range(0, len(patterns), len(qtypes))
    ]
    for rules, theirs in zip(lists, llama_reads_rules(source, lists), strict=True):
        useful = [r for r in rules if any(re.search(r[0], t.name) for t in inventory.tensors)]
        assert read_rules(useful, inventory, LLAMA_QUANTIZE) == theirs
    assert len({tuple(theirs.values()) for theirs in llama_reads_rules(source, lists)}) > 10


@needs_llama_cpp
@pytest.mark.parametrize("seed", range(3))
def test_llama_cpp_gives_every_tensor_the_type_that_was_written(tmp_path: Path, seed: int) -> None:
    """For a scattered assignment, the real llama.cpp gets each type from the compressed rules."""
    source = toy_moe(tmp_path / "toy.gguf")
    inventory = read_inventory(source)
    rng = random.Random(seed)  # noqa: S311 (a test's variety)
    qtypes = [n for n in MAINLINE_TYPES if n != "IQ3_XXS"]
    meant = {}
    for tensor in inventory.tensors:
        fitting = [n for n in qtypes if tensor.shape_ne[0] % QTYPES[n].block == 0]
        if tensor.is_quantizable:
            meant[tensor.name] = rng.choice(fitting)
    (theirs,) = llama_reads_rules(source, [write_rules(meant, LLAMA_QUANTIZE)])
    assert {name: theirs[name] for name in meant} == meant


def test_lists_are_split_as_their_programs_do() -> None:
    """Comments and commas are part of a list for --custom-q, and faults in a tensor-type file."""
    text = "# experts\nffn_up=iq4_ks,ffn_down=q4_K\n\nattn=q8_0 # the rest\n"
    assert read_custom_q(text) == [("ffn_up", "iq4_ks"), ("ffn_down", "q4_K"), ("attn", "q8_0")]
    assert read_tensor_type_file("a=q8_0  b=q4_k\nc=q6_k=x") == [
        ("a", "q8_0"), ("b", "q4_k"), ("c", "q6_k=x"),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="'#' is not pattern=type"):
        read_tensor_type_file("# comment\na=q8_0")
    with pytest.raises(RecipeError) as caught:
        split_rules(["a", "=q8_0", "b=", "c=q8_0"])
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_types_of_the_other_program_are_not_written(dialect: Dialect) -> None:
    """A type that the program does not have is refused by name; no file is written."""
    foreign = "NVFP4" if dialect.runtime == "ik_llama.cpp" else "IQ4_KS"
    with pytest.raises(RecipeError, match=f"has no type {foreign}"):
        write_rules({"output.weight": foreign, "token_embd.weight": "Q8_0"}, dialect)
