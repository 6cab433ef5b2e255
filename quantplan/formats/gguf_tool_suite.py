"""Recipe files of GGUF-Tool-Suite: a ``regex=type`` line for every tensor, with ``#`` comments."""

from collections.abc import Mapping

from quantplan.formats.rules import TOOL_SUITE, split_rules, write_rules


def recipe_file(qtype_by_name: Mapping[str, str], title: str) -> str:
    """Text of a ``.recipe`` file.

    Args:
        qtype_by_name: Type of every tensor, norms and biases included.
        title: What the comment at the top says.

    Raises:
        RecipeError: ik_llama.cpp, whose types it takes, has no such type, or a name has characters
            that cannot be matched.
    """
    rules = write_rules(qtype_by_name, TOOL_SUITE)
    lines = [f"{pattern}={qtype}" for pattern, qtype in rules]
    return "\n".join([f"## {' '.join(title.split())}", *lines, ""])


def read_recipe_file(text: str) -> list[tuple[str, str]]:
    """The rules of a ``.recipe`` file.

    Raises:
        RecipeError: A line is no rule.
    """
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return split_rules(line for line in lines if line)
