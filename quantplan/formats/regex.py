"""Short anchored regular expressions for sets of tensor names.

The expressions use only what ECMAScript (``std::regex``) and Python agree on: literals, groups,
alternation and character classes, and neither ``,`` nor ``=``, at which llama.cpp splits its
arguments.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from quantplan.inventory.roles import split_layer


def integers_pattern(numbers: Iterable[int]) -> str:
    """An alternation that matches exactly the given non-negative integers in decimal.

    Runs of last digits become classes: 0 to 12 is ``[0-9]|1[0-2]``.
    """
    by_prefix: dict[str, list[int]] = defaultdict(list)
    for number in sorted(set(numbers)):
        text = str(number)
        by_prefix[text[:-1]].append(int(text[-1]))
    # Prefixes with the same set of last digits share one class: 10-19 and 20-29 is [1-2][0-9].
    by_digits: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for prefix, digits in by_prefix.items():
        by_digits[tuple(digits)].append(prefix)
    parts = []
    for last_digits, prefixes in by_digits.items():
        last = _digit_class(last_digits)
        if "" in prefixes:
            parts.append(last)
        longer = [int(prefix) for prefix in prefixes if prefix]
        if longer:
            parts.append(_group(integers_pattern(longer)) + last)
    return "|".join(parts)


def _digit_class(digits: Sequence[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    runs: list[list[int]] = []
    for digit in digits:
        if runs and digit == runs[-1][-1] + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    inside = "".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs
    )
    return f"[{inside}]"


def _group(pattern: str) -> str:
    return f"({pattern})" if "|" in pattern else pattern


def _escape(text: str) -> str:
    return text.replace(".", r"\.")


def names_patterns(names: Iterable[str]) -> list[str]:
    """Anchored patterns that together match exactly the given names, and no two the same name.

    Roles that occur in the same set of layers share one pattern.

    Args:
        names: Full tensor names, made of letters, digits, ``_``, ``-`` and ``.``.
    """
    layers_of: dict[str, set[int]] = defaultdict(set)
    outside: list[str] = []
    for name in names:
        layer, rest = split_layer(name)
        if layer is None:
            outside.append(rest)
        else:
            layers_of[rest].add(layer)
    roles_of: dict[frozenset[int], list[str]] = defaultdict(list)
    for rest, layers in layers_of.items():
        roles_of[frozenset(layers)].append(rest)
    patterns = []
    if outside:
        patterns.append(f"^{_alternatives(outside)}$")
    for shared, roles in sorted(roles_of.items(), key=lambda item: (min(item[0]), item[1])):
        numbers = _group(integers_pattern(shared))
        patterns.append(rf"^blk\.{numbers}\.{_alternatives(roles)}$")
    return patterns


def _alternatives(names: Iterable[str]) -> str:
    """An alternation of names, with a common suffix such as ``.weight`` written once."""
    unique = sorted(set(names))
    suffix = ".weight" if all(name.endswith(".weight") for name in unique) else ""
    stems = [_escape(name.removesuffix(suffix)) for name in unique]
    return _group("|".join(stems)) + _escape(suffix)


def rules_by_value(value_by_name: Mapping[str, str]) -> list[tuple[str, str]]:
    """Compresses a mapping of tensor names to values into (pattern, value) rules.

    The patterns are disjoint on the given names, so their order does not matter.
    """
    names_of: dict[str, list[str]] = defaultdict(list)
    for name, value in value_by_name.items():
        names_of[value].append(name)
    return [(p, value) for value in sorted(names_of) for p in names_patterns(names_of[value])]
