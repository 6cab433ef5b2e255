"""The inventories of public models that ship with the package.

Made by ``scripts/build_catalog.py``; each entry names its source.
"""

import gzip
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from quantplan.inventory import Inventory, Tensor

_SUFFIX = ".json.gz"


@cache
def catalog_names() -> tuple[str, ...]:
    """Names of the models in the catalog, sorted."""
    entries = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(e.removesuffix(_SUFFIX) for e in entries if e.endswith(_SUFFIX)))


def read_catalog(name: str) -> Inventory | None:
    """Reads a catalog entry.

    Args:
        name: Name of the model, in any case.

    Returns:
        The inventory, or None where the catalog has no such model.
    """
    known = {n.lower(): n for n in catalog_names()}.get(name.lower())
    if known is None:
        return None
    raw = gzip.decompress(files(__name__).joinpath(known + _SUFFIX).read_bytes())
    entry: dict[str, Any] = json.loads(raw)
    return Inventory(
        name=known,
        source=f"catalog:{known}",
        header_sha256=hashlib.sha256(raw).hexdigest(),
        metadata=entry["metadata"],
        array_lengths=entry["array_lengths"],
        tensors=tuple(
            Tensor(name=tensor, shape_ne=tuple(shape_ne), qtype=qtype)
            for tensor, shape_ne, qtype in entry["tensors"]
        ),
    )
