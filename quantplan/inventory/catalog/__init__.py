"""The inventories of public models that ship with the package.

Made by ``scripts/build_catalog.py`` and ``scripts/build_catalog_from_dimensions.py``; each entry
names its source. ``names.json`` has the other names of these models.
"""

import gzip
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from quantplan.inventory import Inventory, Tensor

_SUFFIX = ".json.gz"
_REMARK = re.compile(r"\(.*?\)| on .*")
_SEPARATORS = re.compile(r"[\s_-]+")


@cache
def catalog_names() -> tuple[str, ...]:
    """Names of the models in the catalog, sorted."""
    entries = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(e.removesuffix(_SUFFIX) for e in entries if e.endswith(_SUFFIX)))


def read_catalog(name: str, n_tensors: int | None = None) -> Inventory | None:
    """Reads a catalog entry.

    Args:
        name: Name of the model, or of one with the same shapes, such as a finetune. Case, spaces,
            ``-`` and ``_`` do not matter, nor do publishers, formats and remarks in parentheses:
            ``unsloth_DeepSeek R1 BF16`` is ``DeepSeek-R1``.
        n_tensors: How many tensors a loader counted. Some models are in files of several layouts,
            such as those of DeepSeek from before and after llama.cpp's latent attention; without
            this the one that present converters write is read.

    Returns:
        The inventory, or None where the catalog has no such model.
    """
    known = _entry_by_key().get(_key(name))
    if known is None:
        return None
    found = _read_entry(known)
    if n_tensors is None or len(found.tensors) == n_tensors:
        return found
    layouts = (_read_entry(other) for other in _names()["other_layouts"].get(known, ()))
    return next((other for other in layouts if len(other.tensors) == n_tensors), None)


@cache
def _names() -> dict[str, Any]:
    """Words to ignore, names of the same shapes, and layouts of the same model."""
    names: dict[str, Any] = json.loads(files(__name__).joinpath("names.json").read_bytes())
    return names


def _key(name: str) -> str:
    """What is left of a name without what does not matter."""
    words = _SEPARATORS.split(_REMARK.sub("", name.casefold()).strip())
    return "".join(word for word in words if word not in _names()["ignored"])


@cache
def _entry_by_key() -> dict[str, str]:
    """The entry of every name that is known."""
    same = _names()["same_shapes"].items()
    known = {_key(name): name for name in catalog_names()}
    return known | {_key(other): name for name, others in same for other in others}


def _read_entry(name: str) -> Inventory:
    raw = gzip.decompress(files(__name__).joinpath(name + _SUFFIX).read_bytes())
    entry: dict[str, Any] = json.loads(raw)
    return Inventory(
        name=name,
        source=f"catalog:{name}",
        header_sha256=hashlib.sha256(raw).hexdigest(),
        metadata=entry["metadata"],
        array_lengths=entry["array_lengths"],
        tensors=tuple(
            Tensor(name=tensor, shape_ne=tuple(shape_ne), qtype=qtype)
            for tensor, shape_ne, qtype in entry["tensors"]
        ),
    )
