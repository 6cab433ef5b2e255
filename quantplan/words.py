"""Lists in sentences."""

from collections.abc import Sequence


def listed(texts: Sequence[str], word: str = "and") -> str:
    """Texts as a list in a sentence: ``a, b and c``.

    Args:
        texts: Any number of them.
        word: What stands before the last of several.
    """
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} {word} {texts[-1]}"
