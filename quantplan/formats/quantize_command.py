"""The command line of llama-quantize, read as the program reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import gguf

from quantplan.errors import RecipeError
from quantplan.formats.ik_llama import read_custom_q
from quantplan.formats.llama_cpp import options, read_tensor_type_file
from quantplan.formats.rules import (
    IK_QUANTIZE,
    Dialect,
    Rules,
    named_types,
    read_rules,
    split_rules,
    type_faults,
)
from quantplan.ftypes.mixes import FTYPES, MixOptions, quantized_types
from quantplan.inventory import Inventory

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_COPY = "COPY"
_BARE = {"--allow-requantize", "--leave-output-tensor", "--pure", "--keep-split", "--dry-run"}
# SOURCE [TARGET] FTYPE: the target may be left out.
_FTYPE_AT = (1, 2)
_NAMED = 3


@dataclass(frozen=True)
class QuantizeCommand:
    """What a command of llama-quantize, llama.cpp's or ik_llama.cpp's, says of types.

    Attributes:
        rules: Patterns and types, in order.
        dialect: How the program reads rules.
        ftype: The mix of all that no rule names; empty where the command has none.
        options: What else changes types, without the named ones.
    """

    rules: Rules
    dialect: Dialect
    ftype: str
    options: MixOptions

    def types_of(self, inventory: Inventory) -> dict[str, str]:
        """The type of every tensor of a model that it quantizes.

        Args:
            inventory: The model. Without an ftype, what no rule names keeps its type.

        Raises:
            InputError: The program would refuse the mix or a rule, or what ik_llama.cpp makes of
                tensors that no rule names is not known.
        """
        if not self.ftype:
            return read_rules(self.rules, inventory, self.dialect)
        named = named_types(self.rules, inventory, self.dialect)
        if self.dialect is IK_QUANTIZE:
            left = [t.name for t in inventory.tensors if t.is_quantizable and t.name not in named]
            if left:
                raise RecipeError(
                    f"what ik_llama.cpp's {self.ftype} gives {len(left)} tensors that no rule "
                    f"names, such as {', '.join(left[:_NAMED])}, is not known: name them with "
                    "--custom-q, or import its rules alone (--format ik-custom-q)"
                )
            return read_rules(self.rules, inventory, self.dialect)
        if self.ftype == _COPY:
            return {tensor.name: tensor.qtype for tensor in inventory.tensors}
        return quantized_types(inventory, self.ftype, replace(self.options, named=named))


def read_quantize_command(
    arguments: Sequence[str], dialect: Dialect, read_file: Callable[[str], str]
) -> QuantizeCommand:
    """Reads the arguments of llama-quantize.

    Args:
        arguments: They.
        dialect: Whose program it is, if its options do not tell.
        read_file: The text of a file that an option names.

    Raises:
        RecipeError: A rule is none, or there is no such ftype; ``--custom-q`` beside ``--pure``,
            which ignores it.
    """
    given = options(arguments)
    bare = {flag for flag, *_ in given}
    values = {flag: words[0] for flag, *words in given if words}
    rules: list[tuple[str, str]] = []
    for flag, *words in given:
        if flag == "--tensor-type":
            rules += split_rules(words[:1])
        elif flag == "--tensor-type-file" and words:
            rules += read_tensor_type_file(read_file(words[0]))
        elif flag == "--custom-q" and "--pure" in bare:
            raise RecipeError("ik_llama.cpp ignores --custom-q beside --pure; drop --pure")
        elif flag == "--custom-q":
            rules += read_custom_q(words[0] if words else "")
            dialect = IK_QUANTIZE
    return QuantizeCommand(
        rules=rules,
        dialect=dialect,
        ftype=_ftype(_files(given), dialect),
        options=MixOptions(
            has_imatrix="--imatrix" in bare,
            is_pure="--pure" in bare,
            output=_type("--output-tensor-type", values, dialect),
            embedding=_type("--token-embedding-type", values, dialect),
            keeps_output="--leave-output-tensor" in bare,
        ),
    )


def _files(given: Sequence[Sequence[str]]) -> list[str]:
    """What follows the options: source, target, ftype and threads."""
    if not given:
        return []
    flag, *words = given[-1]
    if not flag.startswith("-"):
        return [flag, *words]
    return words if flag in _BARE else words[1:]


def _ftype(files: Sequence[str], dialect: Dialect) -> str:
    """The ftype among them; empty where there are no files at all."""
    if not files:
        return ""
    words = [files[n] for n in _FTYPE_AT if n < len(files)]
    if dialect is IK_QUANTIZE:
        return words[-1] if words else ""
    found = next(filter(None, map(_known_ftype, words)), None)
    if found is None:
        raise RecipeError(
            f"llama-quantize {' '.join(files)} names no ftype that is known, in the place of "
            f"{words[-1] if words else 'the last word'}: write one of {', '.join(FTYPES)}"
        )
    return found


def _known_ftype(word: str) -> str | None:
    """An ftype by its name in any case, an alias or its number."""
    name = word.upper()
    if word.isdigit():
        numbers = {int(ftype): ftype.name for ftype in gguf.LlamaFileType}
        name = numbers.get(int(word), "").removeprefix("MOSTLY_").removeprefix("ALL_")
    name = _ALIASES.get(name, name)
    return name if name in (*FTYPES, _COPY) else None


def _type(option: str, values: Mapping[str, str], dialect: Dialect) -> str | None:
    """The type that an option names; None where it is not given.

    Raises:
        RecipeError: The program does not write it.
    """
    word = values.get(option)
    if word is None:
        return None
    if faults := type_faults(option, word, dialect):
        raise RecipeError(faults)
    return word.upper()
