"""Stock mixes: the types that llama-quantize gives the tensors of a model for an ftype.

As llama.cpp b10434 does, with the options that name types of single tensors.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantplan.errors import InputError
from quantplan.ftypes.rules import MIXES, Family, Mix, ModelFacts, Position, family_of, rules_of
from quantplan.given import check_given
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.keys import Keys
from quantplan.qtypes import QTYPES, fitting_qtype, qtype

# Layers of the models whose size llama.cpp calls 70B, by architecture.
_LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
# Of these, without grouped queries it calls them 65B.
_65B_WITHOUT_GQA = {"llama", "llama-embed"}

FTYPES = tuple(MIXES)
"""Every known ftype, roughly from most to fewest bits."""


@dataclass(frozen=True)
class MixOptions:
    """Options of llama-quantize beside the ftype.

    Attributes:
        has_imatrix: An importance matrix is given, which changes some types. Without one,
            llama-quantize refuses mixes with types that need one, and Q2_K_S; the types are then
            those of its ``--dry-run``.
        named: Types of single tensors by name (``--tensor-type``), before row fallbacks. A mix of
            floats ignores them.
        is_pure: Every other tensor gets the base type (``--pure``).
        output: Type of the output matrix, which goes before a named one.
        embedding: The same for the embedding.
        keeps_output: The output matrix stays as it is (``--leave-output-tensor``).
    """

    has_imatrix: bool = False
    named: Mapping[str, str] = field(default_factory=dict)
    is_pure: bool = False
    output: str | None = None
    embedding: str | None = None
    keeps_output: bool = False

    def exact(self, tensor: Tensor) -> str | None:
        """The type that is named for the output matrix or the embedding, without substitutes."""
        named: dict[Family, str | None] = {"output": self.output, "embedding": self.embedding}
        return named.get(family_of(tensor.name))


def stock_mix(inventory: Inventory, ftype: str, *, has_imatrix: bool = False) -> dict[str, str]:
    """The type that llama-quantize gives each tensor, row fallbacks included.

    Args:
        inventory: The model. Types of the source matter only for tensors that no quantizer touches.
        ftype: One of ``quantplan.ftypes.mixes.FTYPES``, in any case.
        has_imatrix: Whether an importance matrix is given, which changes some types. Without one,
            llama-quantize refuses mixes with types that need one, and Q2_K_S; the types are then
            those of its ``--dry-run``.

    Returns:
        Types of all tensors by name, in file order.

    Raises:
        InputError: There is no such ftype, or llama-quantize would stop with an error: a type that
            has no substitute does not divide a row, or experts are outside the layers.
        UnsupportedModelError: The metadata hold no number of layers, or impossible counts.
    """
    check_given(("model", inventory, Inventory))
    return quantized_types(inventory, ftype, MixOptions(has_imatrix=has_imatrix))


def quantized_types(inventory: Inventory, ftype: str, options: MixOptions) -> dict[str, str]:
    """The type that llama-quantize gives each tensor when it is called with options.

    Args:
        inventory: See `stock_mix`.
        ftype: See `stock_mix`.
        options: The options.

    Raises:
        InputError: See `stock_mix`; or a row is no whole number of blocks of the type that is named
            for the output matrix or the embedding, for which there are no substitutes.
        UnsupportedModelError: See `stock_mix`.
    """
    name = ftype.upper()
    mix = MIXES.get(name)
    if mix is None:
        raise InputError(f"unknown ftype {ftype!r}; known are {', '.join(FTYPES)}")
    chosen = _chosen_types(inventory, name, mix, options)
    qtypes, faults = {}, []
    for tensor in inventory.tensors:
        wanted = chosen.get(tensor.name)
        if wanted is None:
            qtypes[tensor.name] = tensor.qtype
            continue
        fitting = fitting_qtype(wanted, tensor.shape_ne[0])
        is_exact = options.exact(tensor) is not None
        if fitting is None or (is_exact and fitting != QTYPES[wanted]):
            fault = QTYPES[wanted].row_fault(tensor.shape_ne[0])
            advice = "name another type for it" if is_exact else "choose F16"
            faults.append(
                f"llama-quantize has no type for {tensor.name} in {name}: {fault}; {advice}"
            )
        else:
            qtypes[tensor.name] = fitting.name
    if faults:
        raise InputError(faults)
    return qtypes


def published_mix(inventory: Inventory, ftype: str) -> dict[str, str]:
    """A stock mix as it is published: with an importance matrix where llama-quantize demands one.

    Args:
        inventory: The model.
        ftype: See `stock_mix`.

    Raises:
        InputError: See `stock_mix`.
        UnsupportedModelError: See `stock_mix`.
    """
    mix = stock_mix(inventory, ftype)
    return stock_mix(inventory, ftype, has_imatrix=True) if needs_imatrix(ftype, mix) else mix


def needs_imatrix(ftype: str, mix: Mapping[str, str]) -> bool:
    """Whether llama-quantize refuses to write a mix without an importance matrix.

    Args:
        ftype: Its name.
        mix: Types of all tensors in it.
    """
    return ftype.upper() == "Q2_K_S" or any(qtype(name).needs_imatrix for name in mix.values())


def _chosen_types(
    inventory: Inventory, ftype: str, mix: Mix, options: MixOptions
) -> dict[str, str]:
    """Types of all tensors that are quantized, before row fallbacks.

    Raises:
        InputError: A tensor of the experts is outside the layers.
    """
    tensors = sorted((t for t in inventory.tensors if t.is_quantizable), key=_file_order)
    if options.keeps_output:
        tensors = [t for t in tensors if family_of(t.name) != "output"]
    given = {t.name: q for t in tensors if (q := options.exact(t))}
    if QTYPES[mix.base].is_float:
        return {t.name: mix.base for t in tensors} | given
    given = {name: q for name, q in options.named.items() if name not in given} | given
    if options.is_pure:
        return {t.name: given.get(t.name, mix.base) for t in tensors}
    model = _read_model(inventory, has_imatrix=options.has_imatrix)
    counts: Counter[Family] = Counter()
    n_attn_v = sum(family_of(t.name) == "attn_v" for t in inventory.tensors)
    chosen, faults = {}, []
    for tensor in tensors:
        if tensor.name in given:  # llama-quantize does not count it among its family
            chosen[tensor.name] = given[tensor.name]
            continue
        family = family_of(tensor.name)
        index = counts[family]
        counts[family] += 1
        if family.startswith("ffn_") and model.n_expert > 1 and mix.goes_by_layer:
            if tensor.layer is None or tensor.layer >= model.n_layers:
                faults.append(
                    f"llama-quantize stops at {tensor.name}: it is in none of the "
                    f"{model.n_layers} layers of this mixture of experts"
                )
                continue
            index = tensor.layer
        position = Position(model, index, n_attn_v if family == "attn_v" else model.n_layers)
        chosen[tensor.name] = _mix_type(ftype, mix, tensor, family, position)
    if faults:
        raise InputError(faults)
    return chosen


def _mix_type(ftype: str, mix: Mix, tensor: Tensor, family: Family, position: Position) -> str:
    """The type that a mix names for a tensor."""
    model = position.model
    is_output = family == "output" or (family == "embedding" and model.is_tied)
    if ftype == "MXFP4_MOE":
        is_stack = len(tensor.shape_ne) > 2 and tensor.shape_ne[2] > 1
        return "MXFP4" if is_stack and not is_output else "Q8_0"
    if is_output:
        fits = tensor.shape_ne[0] % QTYPES[mix.base].block == 0
        return mix.output if fits and model.arch != "falcon" else "Q8_0"
    if family == "embedding":
        return mix.embedding or mix.base
    rules = rules_of(ftype, mix, family, model)
    wanted = next((q for q, *conditions in rules if all(c(position) for c in conditions)), mix.base)
    if family == "attn_v" and model.is_70b and not mix.is_low and wanted in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return wanted


def _file_order(tensor: Tensor) -> tuple[int, str]:
    """The order in which llama-quantize works: by layer, then by name."""
    return -1 if tensor.layer is None else tensor.layer, tensor.name


def _read_model(inventory: Inventory, *, has_imatrix: bool) -> ModelFacts:
    """Reads what the rules ask about a model.

    Raises:
        UnsupportedModelError: The number of layers is missing, or a count in the metadata is none.
    """
    keys = Keys(inventory.metadata)
    n_layers = keys.need("block_count")
    n_head = keys.per_layer("attention.head_count", n_layers, 0)[0]
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head)[0]
    n_counted = n_layers
    if keys.arch == "nanbeige":  # runs its layers several times
        n_counted = n_layers * keys.number("num_loops", 1)
    if keys.arch == "graniteswitch":  # the switch has a cache, as if it were a layer
        n_counted = n_layers + 1
    return ModelFacts(
        arch=keys.arch,
        n_layers=n_counted,
        n_gqa=n_head // n_head_kv if n_head_kv else 0,
        n_expert=keys.number("expert_count"),
        is_70b=_LAYERS_OF_70B.get(keys.arch) == n_layers
        and (keys.arch not in _65B_WITHOUT_GQA or n_head != n_head_kv),
        is_tied=inventory.has_tied_output,
        has_imatrix=has_imatrix,
    )
