"""The inventories of public models that ship with the package, and the user's own.

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

from quantplan.errors import SourceError
from quantplan.folders import ENTRY_SUFFIX, catalog_names, own_names, shipped_names
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.catalog.own import read_own, remove_own, write_own

__all__ = ["add_to_catalog", "catalog_names", "read_catalog", "remove_from_catalog"]

_REMARK = re.compile(r"\(.*?\)| on .*")
_SEPARATORS = re.compile(r"[\s_-]+")


def add_to_catalog(inventory: Inventory, name: str | None = None) -> str:
    """Adds a model to the user's own entries.

    Args:
        inventory: The model.
        name: What to call it; its own name by default.

    Returns:
        The name.

    Raises:
        SourceError: The catalog has such a name already, it is no name, or it cannot be written.
    """
    name = name or inventory.name
    known = _entry_by_key().get(_key(name))
    if known is not None:
        own = " Remove that first, or" if known in own_names() else " To keep both,"
        raise SourceError(f"the catalog has {known} already.{own} choose another name with --name")
    write_own(inventory, name)
    return name


def remove_from_catalog(name: str) -> str:
    """Removes one of the user's own entries.

    Args:
        name: Its name, in any spelling.

    Returns:
        The name as the catalog had it.

    Raises:
        SourceError: There is no such entry of the user's own.
    """
    found = {_key(own): own for own in own_names()}.get(_key(name), name)
    remove_own(found)
    return found


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


def _entry_by_key() -> dict[str, str]:
    """The entry of every name that is known; the user's own can be read even where keys meet."""
    return _shipped_by_key() | {_key(name): name for name in own_names()}


@cache
def _shipped_by_key() -> dict[str, str]:
    same = _names()["same_shapes"].items()
    known = {_key(name): name for name in shipped_names()}
    return known | {_key(other): name for name, others in same for other in others}


def _read_entry(name: str) -> Inventory:
    if name in own_names():
        return read_own(name)
    raw = gzip.decompress(files(__name__).joinpath(name + ENTRY_SUFFIX).read_bytes())
    entry = json.loads(raw)
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
