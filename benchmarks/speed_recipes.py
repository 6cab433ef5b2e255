"""Which type each tensor of a published quant has, from counts of types, its name, and its size."""

import re
from collections.abc import Iterable, Mapping

from quantplan import Inventory, Tensor, stock_mix
from quantplan.ftypes.mixes import FTYPES
from quantplan.qtypes import QTYPES, qtype

_TYPE = re.compile(
    r"(?<![A-Z0-9])[HD]?(?P<name>I?Q\d_(?:K[STL]{0,2}|[01]|XXS|XS|NL|S|M|KV)(?:_R\d+)?|I?Q\d(?=\s)|MXFP\d+|"
    r"BF16|F16|F32|TQ\d_0)(?![A-Z0-9])"
)
_AFTER_FTYPE = re.compile(r"(Q\d_K)_(?:XL|S|M|L)\b")
_ALIASES = {"IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "MXFP16": "MXFP4"}
# Types of fewer bits than these are seldom used for attention in mixed quants.
_USUAL_ATTENTION = "Q5_K"


def types_in(text: str) -> list[str]:
    """Names of tensor types in a text, in its order, each once."""
    found = []
    for match in _TYPE.finditer(_AFTER_FTYPE.sub(r"\1", text.upper().replace("-", " "))):
        name = match["name"]
        if re.fullmatch(r"I?Q\d", name):
            name += "_K"
        name = _ALIASES.get(name, name)
        if name in QTYPES and name not in found:
            found.append(name)
    return found


def fitting(tensor: Tensor, name: str) -> str:
    """A type, or Q8_0 or F16 where the tensor's rows are no whole number of its blocks."""
    for candidate in (name, "Q8_0"):
        if tensor.shape_ne[0] % qtype(candidate).block == 0:
            return candidate
    return "F16"


def types_from_counts(inventory: Inventory, counts: Mapping[str, int]) -> dict[str, str]:
    """Types from how many tensors have each: few bits go to experts first, then to large matrices.

    Args:
        inventory: The model.
        counts: Number of tensors by type, as a load log prints it.
    """
    left = {n.upper(): c for n, c in counts.items() if n.upper() in QTYPES and n.upper() != "F32"}
    names = sorted(left, key=lambda n: QTYPES[n].bpw)
    order = {"up_gate_experts": 0, "down_experts": 1, "embedding": 3, "output": 4}
    matrices = [t for t in inventory.tensors if t.is_quantizable]
    matrices.sort(key=lambda t: (order.get(t.role_class, 2), -t.n_weights))
    found = {}
    for tensor in matrices:
        while len(names) > 1 and left[names[0]] <= 0:
            names.pop(0)
        left[names[0]] -= 1
        found[tensor.name] = names[0]
    return _complete(inventory, found)


def types_from_name(inventory: Inventory, quant: str) -> dict[str, str] | None:
    """Types from a quant's name and what people write beside it; None where it names no type.

    ``Q4_K_M`` is what llama-quantize makes of it. Several types in brackets are those of the
    experts (up and gate, down) and of the rest, by size. Words such as ``experts``, ``attn``,
    ``rest`` and ``output`` go first.
    """
    stock = re.match(r"(\w+)(?: \([^)]*\))?$", quant.strip())
    if stock and stock[1].upper() in FTYPES and len(types_in(quant)) == 1:
        return stock_mix(inventory, stock[1], has_imatrix=True)
    said = {"experts": "", "rest": "", "output": ""}
    for part in re.split(r"[,;()]", quant):
        names = types_in(part)
        for word, key in (("expert", "experts"), ("attn", "rest"), ("rest", "rest"),
                          ("output", "output")):  # fmt: skip
            if word in part.lower() and names:
                said[key] = " ".join(names)
    names = types_in(quant)
    if not names:
        return None
    by_size = sorted(names, key=lambda n: QTYPES[n].bpw)
    experts = said["experts"].split() or by_size[: max(1, len(by_size) - 1)]
    rest = said["rest"] or (by_size[-1] if len(by_size) > 1 else _usual_rest(names[0], quant))
    found = {}
    has_experts = inventory.architecture.n_expert > 0
    for tensor in inventory.tensors:
        if not tensor.is_quantizable:
            continue
        if tensor.role_class == "output":
            found[tensor.name] = said["output"] or rest
        elif has_experts and tensor.is_expert:
            found[tensor.name] = experts[-1 if tensor.role_class == "down_experts" else 0]
        else:
            found[tensor.name] = rest if has_experts else names[0]
    return _complete(inventory, found)


def _usual_rest(name: str, quant: str) -> str:
    """Type of attention and shared matrices in a mix that is named for its experts."""
    if name == "MXFP4":
        return "Q8_0"
    if "pure" in quant.lower():
        return name
    if name.startswith("IQ") and "llama.cpp" not in QTYPES[name].runtimes:
        return "Q8_0"
    return name if QTYPES[name].bpw >= QTYPES[_USUAL_ATTENTION].bpw else _USUAL_ATTENTION


def _complete(inventory: Inventory, found: Mapping[str, str]) -> dict[str, str]:
    """Types of all tensors: what no quantizer touches is F32."""
    return {t.name: fitting(t, found.get(t.name, "F32")) for t in inventory.tensors}


def size_factor(
    inventory: Inventory, types: Mapping[str, str], file_bytes: float
) -> tuple[float, float]:
    """Factors on the bytes of experts and of the rest that make the file as large as it is.

    Experts take the whole difference where there are any: mixes differ there most.

    Args:
        inventory: The model.
        types: Type of each tensor.
        file_bytes: Size of the published file.

    Returns:
        Factor of the experts and factor of the rest.
    """

    def total(tensors: Iterable[Tensor]) -> float:
        return float(sum(t.bytes_as(types[t.name]) for t in tensors))

    experts = total(t for t in inventory.tensors if t.is_expert)
    rest = total(t for t in inventory.tensors if not t.is_expert)
    if not experts:
        return 1.0, file_bytes / rest
    wanted = (file_bytes - rest) / experts
    if 0.8 <= wanted <= 1.25:
        return wanted, 1.0
    both = file_bytes / (experts + rest)
    return both, both
