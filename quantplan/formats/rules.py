r"""Lists of ``pattern=type`` rules, read as each program reads them.

All programs search for the pattern anywhere in the tensor's name, and the first rule whose pattern
is found decides. They differ in letter case: llama-quantize lower-cases patterns (so that ``\D``
turns into ``\d``) and takes types in any case; ik_llama.cpp takes both literally.

The programs use ECMAScript (``std::regex``), this module Python's ``re``. Patterns may hold what
both read alike: literals, escaped punctuation, ``.``, ``\b``, ``\d \w \s`` and their opposites,
plain classes, groups, negative lookahead, alternation, ``^ $``, and ``* + ? {n,m}``, lazy or not.
Everything else is refused: other escapes, backreferences, other ``(?`` groups, possessive
quantifiers, braces that count nothing, ``[[:classes:]]``, letters beyond ASCII.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantplan.errors import RecipeError
from quantplan.formats.regex import rules_by_value
from quantplan.inventory import Inventory, Tensor
from quantplan.near import similar, similar_tensors
from quantplan.qtypes import QTYPES, Runtime, fitting_qtype

_NAMED = 3
_CLASS_ITEM = (
    r"(?:\\[dDwWsS]|\\[^A-Za-z0-9\s]|[^\\\[\]&~|-]|-(?![-\]])|-(?=\])|\|(?!\|)|&(?!&)|~(?!~))"
)
_TOKEN = re.compile(
    rf"""(?P<quantifier>[*+?]\??|\{{\d+(?:,\d*)?\}}\??)
    |(?P<edge>[\^$]|\\b|\|)
    |(?P<open>\((?:\?[:!])?)
    |(?P<close>\))
    |(?P<atom>\\[dDwWsS]|\\[^A-Za-z0-9\s]|\[\^?{_CLASS_ITEM}+\]|[^\\\[\]{{}}()*+?^$|])""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Dialect:
    r"""How a program reads rules.

    Attributes:
        name: The program.
        runtime: Whose types and row fallbacks apply.
        lowers_patterns: Patterns are lower-cased before they are used.
        any_case: Types may be written in any case.
        is_shell: Shells match the patterns, which know no ``\d``; order is not relied on.
    """

    name: str
    runtime: Runtime
    lowers_patterns: bool
    any_case: bool
    is_shell: bool = False


LLAMA_QUANTIZE = Dialect("llama-quantize", "llama.cpp", lowers_patterns=True, any_case=True)
IK_QUANTIZE = Dialect("ik_llama.cpp", "ik_llama.cpp", lowers_patterns=False, any_case=False)
TOOL_SUITE = Dialect(
    "GGUF-Tool-Suite", "ik_llama.cpp", lowers_patterns=False, any_case=True, is_shell=True
)
Rules = Sequence[tuple[str, str]]
"""Patterns and types, in order."""


def type_name(qtype: str, dialect: Dialect) -> str:
    """A type as the program writes it: ``q4_K`` but ``iq4_ks`` in ik_llama.cpp, else small."""
    if dialect.any_case:
        return qtype.lower()
    small = qtype.lower()
    if re.fullmatch(r"q[2-6]_k", small):
        return small[:-1] + "K"
    return re.sub(r"^q8_kv", "q8_KV", small)


def compiled(pattern: str, dialect: Dialect) -> re.Pattern[str]:
    """A pattern as the program uses it.

    Raises:
        RecipeError: It is no regular expression, or one that ECMAScript and Python read in
            different ways.
    """
    text = pattern.lower() if dialect.lowers_patterns else pattern
    _refuse_foreign(text)
    try:
        return re.compile(text, re.ASCII)
    except re.error as error:
        raise RecipeError(f"{pattern!r} is no regular expression: {error}") from error


def _refuse_foreign(pattern: str) -> None:
    """Raises where the two languages may differ."""
    position, previous = 0, "open"
    lookaheads: list[bool] = []
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        kind = token.lastgroup if token else None
        is_odd = kind == "quantifier" and previous in ("quantifier", "edge", "open", "lookahead")
        if token is None or is_odd or not pattern.isascii():
            raise RecipeError(
                f"{pattern!r}: at position {position}, {pattern[position : position + 4]!r} may "
                "mean something else in ECMAScript; write it in another way"
            )
        if kind == "open":
            lookaheads.append(token[0] == "(?!")
        if kind == "close" and lookaheads and lookaheads.pop():
            kind = "lookahead"
        previous, position = kind or "", token.end()
    if not pattern:
        raise RecipeError("a rule has an empty pattern, which matches every tensor; write ^.+$")


def first_match(rules: Sequence[tuple[re.Pattern[str], str]], name: str) -> str | None:
    """The value of the first rule that is found in the name, or None."""
    return next((value for pattern, value in rules if pattern.search(name)), None)


def write_rules(
    qtypes: Mapping[str, str], dialect: Dialect, others: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """The shortest rules from which the program reads the given types, proven by reading them.

    Args:
        qtypes: Type of every tensor that the program is to change, by name.
        dialect: How the program reads rules.
        others: Names that no rule may match.

    Raises:
        RecipeError: The program has no such type, a name cannot be matched (letters other than
            small ones where patterns are lower-cased, characters other than letters, digits, ``_``,
            ``.`` and ``-``), or the rules read back give other types.
    """
    others = list(others)
    allowed = r"[a-z0-9_.-]+" if dialect.lowers_patterns else r"[A-Za-z0-9_.-]+"
    faults = [
        f"{dialect.name} cannot match the tensor name {name!r}"
        for name in qtypes
        if not re.fullmatch(allowed, name, re.ASCII)
    ]
    faults += [
        f"{dialect.name} has no type {qtype}"
        for qtype in dict.fromkeys(qtypes.values())
        if qtype not in QTYPES or dialect.runtime not in QTYPES[qtype].runtimes
    ]
    if faults:
        raise RecipeError(faults)
    named = {name: type_name(qtype, dialect) for name, qtype in qtypes.items()}
    rules = rules_by_value(named, others, may_overlap=not dialect.is_shell)
    if dialect.is_shell:
        rules = [(pattern.replace(r"\d", "[0-9]"), value) for pattern, value in rules]
    read = [(compiled(pattern, dialect), value) for pattern, value in rules]
    meant = {**dict.fromkeys(others), **named}
    wrong = [name for name, value in meant.items() if first_match(read, name) != value]
    if wrong:
        raise RecipeError(
            f"the rules for {dialect.name} give {name} another type than the recipe"
            for name in wrong[:_NAMED]
        )
    return rules


def read_rules(rules: Rules, inventory: Inventory, dialect: Dialect) -> dict[str, str]:
    """The types that a program would write for a model, given its rules.

    Args:
        rules: See `named_types`.
        inventory: The model. Tensors that no rule matches, and those that no quantizer touches,
            keep their types.
        dialect: See `named_types`.

    Returns:
        Type of every tensor by name, in file order, row fallbacks of the program included.

    Raises:
        RecipeError: See `named_types`.
    """
    named = named_types(rules, inventory, dialect)
    return {tensor.name: named.get(tensor.name, tensor.qtype) for tensor in inventory.tensors}


def named_types(rules: Rules, inventory: Inventory, dialect: Dialect) -> dict[str, str]:
    """The types that rules name for the tensors of a model that a program changes.

    Args:
        rules: Patterns and types, in order.
        inventory: The model.
        dialect: How the program reads rules.

    Returns:
        Type by name, row fallbacks of the program included.

    Raises:
        RecipeError: Patterns that are none or match nothing, types that the program does not have
            or does not write, rows that are no whole number of blocks and for whose type the
            program has no substitute. All faults are gathered.
    """
    faults: list[str] = []
    read: list[tuple[re.Pattern[str], str]] = []
    names = [tensor.name for tensor in inventory.tensors]
    for pattern, value in rules:
        faults += type_faults(pattern, value, dialect)
        try:
            regex = compiled(pattern, dialect)
        except RecipeError as error:
            faults += error.faults
            continue
        read.append((regex, value.upper()))
        if not any(map(regex.search, names)):
            faults.append(_no_match(pattern, names))
    qtypes = {}
    for tensor in inventory.tensors:
        wanted = first_match(read, tensor.name) if tensor.is_quantizable else None
        if wanted is not None and wanted in QTYPES:
            try:
                qtypes[tensor.name] = _written(tensor, wanted, dialect)
            except RecipeError as error:
                faults += error.faults
    if faults:
        raise RecipeError(faults)
    return qtypes


def _written(tensor: Tensor, wanted: str, dialect: Dialect) -> str:
    found = fitting_qtype(wanted, tensor.shape_ne[0], dialect.runtime)
    if found is None:
        fault = QTYPES[wanted].row_fault(tensor.shape_ne[0])
        raise RecipeError(f"{tensor.name}: {fault}, for which {dialect.name} has no substitute")
    return found.name


def type_faults(pattern: str, value: str, dialect: Dialect) -> list[str]:
    """Why a program does not write a type; nothing where it does.

    Args:
        pattern: What names the type, a pattern or an option.
        value: Name of the type.
        dialect: The program.
    """
    qtype = QTYPES.get(value.upper())
    if qtype is None:
        hint = similar(value, [type_name(name, dialect) for name in QTYPES])
        return [f"{pattern}: there is no type {value!r}{hint}"]
    if dialect.runtime not in qtype.runtimes or not qtype.is_file_target:
        return [f"{pattern}: {dialect.name} does not write {qtype.name}"]
    if not dialect.any_case and value != type_name(qtype.name, dialect):
        return [
            f"{pattern}: {dialect.name} minds the case of types: write "
            f"{type_name(qtype.name, dialect)} for {value}"
        ]
    return []


def _no_match(pattern: str, names: Sequence[str]) -> str:
    return f"{pattern} matches no tensor{similar_tensors(pattern, names)}"


def split_rules(words: Iterable[str]) -> list[tuple[str, str]]:
    """Splits rules at their first ``=``.

    Raises:
        RecipeError: One has no ``=``, or nothing on a side of it. All are gathered.
    """
    rules, faults = [], []
    for word in words:
        pattern, _, value = (part.strip() for part in word.partition("="))
        if pattern and value:
            rules.append((pattern, value))
        else:
            faults.append(f"{word!r} is not pattern=type; a pattern holds no =")
    if faults:
        raise RecipeError(faults)
    return rules
