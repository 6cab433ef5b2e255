"""Known names that a person may have meant."""

import re
from collections.abc import Iterable

_MOST = 3
# Names of tensors are long, and those of a layer differ in a few letters.
_TENSOR_CUTOFF = 0.4


def near_names(text: str, names: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Names that have all the words of a text, then those that are spelt like it; three at most.

    Args:
        text: As a person wrote it.
        names: Known names.
        cutoff: Least likeness of a spelling, from 0 to 1.
    """
    import difflib  # noqa: PLC0415 (only messages need it)

    wanted = _words(text)
    by_spelling = {"".join(_words(name)): name for name in names}
    close = difflib.get_close_matches("".join(wanted), by_spelling, n=_MOST, cutoff=cutoff)
    spelt = [by_spelling[spelling] for spelling in close]
    longer = [name for name in by_spelling.values() if wanted and {*wanted} <= {*_words(name)}]
    longer.sort(key=lambda name: (name not in spelt, len(name)))
    return list(dict.fromkeys([*longer, *spelt]))[:_MOST]


def similar(text: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Such names as the end of a message, ``; similar are ...``; empty where there are none."""
    near = near_names(text, names, cutoff=cutoff)
    return f"; similar are {', '.join(near)}" if near else ""


def similar_tensors(pattern: str, names: Iterable[str]) -> str:
    """The same for a name of a tensor, or a regular expression that matches none."""
    literal = re.sub(r"\\d|[\\^$()|\[\]*+?]", "", pattern)
    return similar(literal, names, cutoff=_TENSOR_CUTOFF)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
