r"""Short anchored regular expressions for sets of tensor names.

The expressions use only what ECMAScript (``std::regex``) and Python agree on: literals, groups,
alternation, ``?``, ``+``, ``*``, ``.``, ``\d`` and character classes, and neither ``,`` nor ``=``
nor ``;``, at which llama.cpp splits its arguments.

A pattern may match more than it is for, as long as nobody asks: numbers of layers that a model
does not have, and names that an earlier rule has taken. What it must not match is given to the
functions below; None stands for every other name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, takewhile

from quantplan.inventory.roles import split_layer

_DIGITS = frozenset("0123456789")


def integers_pattern(numbers: Iterable[int], others: Iterable[int] | None = None) -> str:
    r"""An alternation that matches the given non-negative integers in decimal.

    Runs of last digits become classes: 0 to 12 is ``\d|1[0-2]``.

    Args:
        numbers: What to match.
        others: What not to match; None for every other integer.
    """
    needed = {str(n) for n in sorted(set(numbers))}
    candidates = [_decimals(needed, None), "|".join(sorted(needed, key=int))]
    if others is not None:
        candidates.append(_decimals(needed, {str(n) for n in others}))
    return min(candidates, key=lambda pattern: len(_group(pattern)))


def _decimals(needed: set[str], avoided: set[str] | None) -> str:
    r"""An alternation of decimal numbers.

    Numbers are sorted by what precedes their last digit; prefixes that can share one class of last
    digits form one alternative, and the prefixes are numbers again.
    """
    if needed and avoided is not None and not avoided:
        return min(_decimals(needed, None), r"\d+", key=len)
    last_needed, last_avoided = _by_prefix(needed), _by_prefix(avoided or ())
    groups: list[tuple[set[str], set[str], list[str]]] = []
    for prefix in sorted(last_needed, key=lambda text: (len(text), text)):
        wanted = last_needed[prefix]
        unwanted = _DIGITS - wanted if avoided is None else last_avoided[prefix]
        for all_wanted, all_unwanted, prefixes in groups:
            if not (all_wanted | wanted) & (all_unwanted | unwanted):
                all_wanted.update(wanted)
                all_unwanted.update(unwanted)
                prefixes.append(prefix)
                break
        else:
            groups.append((set(wanted), set(unwanted), [prefix]))
    parts = []
    for wanted, unwanted, prefixes in groups:
        last = _digit_class(wanted, unwanted)
        taken = None
        if avoided is not None:
            shown = {digit for digit in _DIGITS if re.fullmatch(last, digit)}
            taken = {p for p, digits in last_avoided.items() if digits & shown} - set(prefixes)
        parts.append(_prefixes_pattern(set(prefixes), taken) + last)
    return "|".join(parts)


def _prefixes_pattern(prefixes: set[str], avoided: set[str] | None) -> str:
    r"""What precedes the last digit; an empty prefix stands for numbers of one digit."""
    longer = prefixes - {""}
    if not longer:
        return ""
    inside = _decimals(longer, None if avoided is None else avoided - {""})
    if inside == r"\d+" and avoided is not None and "" not in avoided:
        return r"\d*"
    return _optional(inside) if "" in prefixes else _group(inside)


def _by_prefix(numbers: Iterable[str]) -> defaultdict[str, set[str]]:
    """Last digits by what precedes them."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for text in numbers:
        found[text[:-1]].add(text[-1])
    return found


def _optional(pattern: str) -> str:
    is_one = re.fullmatch(r"\\?.|\[[^]]*\]", pattern)
    return f"{pattern}?" if is_one else f"({pattern})?"


def _digit_class(wanted: set[str], unwanted: set[str]) -> str:
    r"""The shortest of a digit, ``\d`` and two classes: without and with the digits in between."""
    if len(wanted) == 1:
        return next(iter(wanted))
    if not unwanted:
        return r"\d"
    candidates = []
    for may_fill in (False, True):
        runs: list[list[int]] = []
        for digit in sorted(map(int, wanted)):
            between = set(map(str, range(runs[-1][-1] + 1, digit))) if runs else set()
            if runs and (not between or (may_fill and not between & unwanted)):
                runs[-1].append(digit)
            else:
                runs.append([digit])
        candidates.append("".join(_run(run[0], run[-1]) for run in runs))
    return f"[{min(candidates, key=len)}]"


def _run(first: int, last: int) -> str:
    return "".join(map(str, range(first, last + 1))) if last < first + 2 else f"{first}-{last}"


def _group(pattern: str) -> str:
    """The pattern as one piece: in parentheses if it has alternatives that are not in any yet."""
    depth = 0
    for character in pattern:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "|" and not depth:
            return f"({pattern})"
    return pattern


def _escape(text: str) -> str:
    return text.replace(".", r"\.")


@dataclass(frozen=True)
class _Branch:
    """Tensors of some roles in some layers.

    Attributes:
        rests: What follows the number of the layer.
        needed: Layers to match.
        avoided: Layers of which none may match; None for all but the needed ones.
        pattern: Matches the tensors.
    """

    rests: frozenset[str]
    needed: frozenset[int]
    avoided: frozenset[int] | None
    pattern: str

    def joined(self, other: "_Branch") -> "_Branch | None":
        """One branch for both, or None where a layer of one must not be one of the other."""
        if self.avoided is None or other.avoided is None:
            if self.needed != other.needed:
                return None
            avoided = None
        else:
            avoided = self.avoided | other.avoided
            if (self.needed | other.needed) & avoided:
                return None
        return _branch(self.rests | other.rests, self.needed | other.needed, avoided)


@lru_cache(maxsize=4096)  # the orders of values that are tried share most branches
def _branch(
    rests: frozenset[str], needed: frozenset[int], avoided: frozenset[int] | None
) -> _Branch:
    numbers = _group(integers_pattern(needed, avoided))
    pattern = rf"blk\.{numbers}\.{_group(_alternatives(rests))}"
    return _Branch(rests, needed, avoided, pattern)


def _branches(names: Iterable[str], others: Iterable[str] | None) -> list[str]:
    """Patterns, to be anchored, that together match the names and none of the others."""
    needed, outside = _layers_by_rest(names)
    avoided, _ = _layers_by_rest(others or ())
    branches = [
        _branch(
            frozenset([rest]),
            frozenset(layers),
            None if others is None else frozenset(avoided[rest]),
        )
        for rest, layers in sorted(needed.items())
    ]
    found = [branch.pattern for branch in _merged(branches)]
    return found + ([_alternatives(outside)] if outside else [])


def _merged(branches: list[_Branch]) -> list[_Branch]:
    """Joins the two branches that save most characters, as long as any two save some."""
    gains: dict[tuple[_Branch, _Branch], tuple[int, _Branch]] = {}

    def consider(one: _Branch, other: _Branch) -> None:
        both = one.joined(other)
        if both is not None:
            gains[one, other] = len(one.pattern) + len(other.pattern) + 1 - len(both.pattern), both

    for one, other in combinations(branches, 2):
        consider(one, other)
    while gains:
        pair, (gain, both) = max(gains.items(), key=lambda item: item[1][0])
        if gain <= 0:
            break
        branches = [branch for branch in branches if branch not in pair]
        gains = {key: gain for key, gain in gains.items() if not set(key) & set(pair)}
        for branch in branches:
            consider(branch, both)
        branches.append(both)
    return sorted(branches, key=lambda branch: (min(branch.needed), sorted(branch.rests)))


def _layers_by_rest(names: Iterable[str]) -> tuple[defaultdict[str, set[int]], list[str]]:
    """Layers by the name without the layer, and the names outside the layers."""
    layers_of: defaultdict[str, set[int]] = defaultdict(set)
    outside = []
    for name in names:
        layer, rest = split_layer(name)
        if layer is None:
            outside.append(rest)
        else:
            layers_of[rest].add(layer)
    return layers_of, outside


def _alternatives(names: Iterable[str]) -> str:
    """An alternation of names that states what they begin and end with only once."""
    unique = sorted(set(names))
    if len(unique) == 1:
        return _escape(unique[0])
    prefix = _common_prefix(unique)
    stems = [name.removeprefix(prefix) for name in unique]
    suffix = _common_prefix([stem[::-1] for stem in stems])[::-1]
    if not prefix and not suffix:
        return "|".join(_by_first_part(stems))
    stems = [stem.removesuffix(suffix) for stem in stems]
    inside = [stem for stem in stems if stem]
    if len(inside) > 1 and all(len(stem) == 1 and stem.isalnum() for stem in inside):
        middle = f"[{''.join(inside)}]"
    else:
        middle = _alternatives(inside)
    middle = _group(middle) if len(inside) == len(stems) else _optional(middle)
    return _escape(prefix) + middle + _escape(suffix)


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in pairs)


def _by_first_part(stems: Sequence[str]) -> list[str]:
    """Alternatives of names that have nothing in common, those with equal beginnings together."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for stem in stems:
        parts[re.split(r"(?<=[._])", stem, maxsplit=1)[0]].append(stem)
    return [_alternatives(part) for part in parts.values()]


def names_patterns(names: Iterable[str], others: Iterable[str] | None = None) -> list[str]:
    """Anchored patterns that together match the given names, and no two the same name.

    Roles share one pattern where that is shorter.

    Args:
        names: Full tensor names, made of letters, digits, ``_``, ``-`` and ``.``.
        others: Names that none of the patterns may match; None for all other names.
    """
    return [f"^{_group(branch)}$" for branch in _branches(names, others)]


def rules_by_value(
    value_by_name: Mapping[str, str], others: Iterable[str] = (), *, may_overlap: bool = True
) -> list[tuple[str, str]]:
    """Compresses a mapping of tensor names to values into (pattern, value) rules, one per value.

    The first rule that matches a name decides, so a rule may match what an earlier one has taken,
    and the last rule matches everything where no other names are given. Of the orders that end with
    different values, the one with the fewest characters is taken.

    Args:
        value_by_name: What to compress.
        others: Names that no rule may match.
        may_overlap: Whether the first rule decides; otherwise no two rules match the same name, so
            that their order does not matter.
    """
    names_of: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in value_by_name.items():
        names_of[value].append(name)
    others = list(others)
    if not may_overlap:
        return [
            rule
            for value, names in sorted(names_of.items())
            for rule in _rules_in_order(
                [value], names_of, [*others, *(n for n in value_by_name if n not in set(names))]
            )
        ]
    rare_first = sorted(names_of, key=lambda value: (len(names_of[value]), value))
    orders = [[*(v for v in rare_first if v != last), last] for last in rare_first]
    found = [_rules_in_order(order, names_of, others) for order in orders]
    return min(found, key=lambda rules: sum(map(len, (p + v for p, v in rules))), default=[])


def _rules_in_order(
    order: Sequence[str], names_of: Mapping[str, Sequence[str]], others: Sequence[str]
) -> list[tuple[str, str]]:
    rules = []
    for index, value in enumerate(order):
        later = [name for v in order[index + 1 :] for name in names_of[v]]
        if not later and not others:
            rules.append(("^.+$", value))
        else:
            branches = _branches(names_of[value], [*later, *others])
            rules.append((f"^{_group('|'.join(branches))}$", value))
    return rules
