"""Compares stock mixes with those of llama.cpp's own quantizer, for every model there is.

Usage: python benchmarks/ftypes.py [catalog] [architectures] [layers]

Needs the real llama.cpp of the tests; all three parts take about a quarter of an hour. `catalog`:
the models of the catalog, in true size. `architectures`: a tiny model of every architecture and
variant, with the row lengths that it has and with rows that every type fits; both in every ftype,
with and without an importance matrix. `layers`: two ftypes of every architecture at each number of
layers. Types are compared tensor by tensor; the files are holes. Prints what differs, and ends with
1 where anything does.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from quantplan.errors import InputError  # noqa: E402
from quantplan.ftypes.mixes import FTYPES, stock_mix  # noqa: E402
from quantplan.inventory.catalog import catalog_names  # noqa: E402
from quantplan.inventory.sources import read_inventory  # noqa: E402
from tests.support import architectures as toys  # noqa: E402
from tests.support.quantizer import llama_mixes  # noqa: E402

Model = tuple[str, Mapping[str, Any], toys.Shapes, int]
"""What to call it, metadata, shapes, tokens of the vocabulary."""

BATCH = 20
LAYERS = range(6, 129)
SHOWN = 3


def catalog() -> Iterator[Model]:
    """The models of the catalog, in true size."""
    for name in catalog_names():
        inventory = read_inventory(name)
        shapes = {t.name: t.shape_ne for t in inventory.tensors}
        yield name, _lists(inventory.metadata), shapes, toys.VOCABULARY


def architectures() -> Iterator[Model]:
    """Every architecture and variant, with its own rows and with rows of whole super-blocks."""
    for name, entry in toys.ARCHITECTURES.items():
        for variant in (None, *entry["variants"]):
            chosen = entry if variant is None else entry | entry["variants"][variant]
            shapes = toys.expand(chosen.get("tensors", entry["tensors"]))
            metadata = toys.metadata_of(name, variant)
            vocabulary = entry.get("vocabulary", toys.VOCABULARY)
            yield f"{name} {variant or ''}", metadata, shapes, vocabulary
            yield f"{name} {variant or ''} (wide)", metadata, widened(shapes), vocabulary


def layers() -> Iterator[Model]:
    """Every architecture with V and down projections at each number of layers."""
    for name, entry in toys.ARCHITECTURES.items():
        metadata = toys.metadata_of(name)
        own = metadata[f"{name}.block_count"]
        for n_layers in LAYERS:
            changed = metadata | {f"{name}.block_count": n_layers}
            for key, value in metadata.items():
                if isinstance(value, list) and len(value) == own:
                    changed[key] = (value * n_layers)[:n_layers]
            if metadata.get(f"{name}.nextn_predict_layers") == own:
                changed[f"{name}.nextn_predict_layers"] = n_layers
            own_shapes = toys.expand(entry["tensors"])
            shapes = {n: ne for n, ne in own_shapes.items() if not n.startswith("blk.")}
            for layer in range(n_layers):
                shapes |= {
                    f"blk.{layer}.{role}.weight": (256, 256) for role in ("attn_v", "ffn_down")
                }
            yield f"{name} of {n_layers}", changed, shapes, entry.get("vocabulary", toys.VOCABULARY)


def widened(shapes: toys.Shapes) -> toys.Shapes:
    """Matrices with rows that are rounded up to whole super-blocks of 256 weights."""
    return {
        name: (-(-ne[0] // 256) * 256, *ne[1:]) if len(ne) > 1 else ne
        for name, ne in shapes.items()
    }


def _lists(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The gguf package writes arrays from lists only."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in metadata.items()
        if not key.startswith("tokenizer.")
    }


def differences(names: Mapping[Path, str], mixes: Sequence[tuple[str, bool]]) -> Iterator[str]:
    """Each mix of some models that is not llama.cpp's, and the first tensors that are to blame."""
    runs = [(path, *mix) for path in names for mix in mixes]
    inventories = {path: read_inventory(path) for path in names}
    try:
        all_theirs = llama_mixes(runs)
    except AssertionError as error:  # llama.cpp ended the process
        yield f"one of {', '.join(names.values())}: {str(error)[-300:]}"
        return
    for (path, ftype, has_imatrix), theirs in zip(runs, all_theirs, strict=True):
        label = f"{names[path]}: {ftype}{' with imatrix' if has_imatrix else ''}"
        try:
            ours = stock_mix(inventories[path], ftype, has_imatrix=has_imatrix)
        except InputError as error:
            if theirs is not None:
                yield f"{label}: only we refuse it: {error.faults[0]}"
            continue
        if theirs is None:
            yield f"{label}: only they refuse it"
        elif ours != theirs:
            wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
            shown = (f"{name} {ours.get(name)}, not {theirs.get(name)}" for name in wrong[:SHOWN])
            yield f"{label}: {len(wrong)} of {len(theirs)} tensors: {'; '.join(shown)}"


def main() -> int:
    """Runs the parts that were asked for."""
    logging.disable(logging.WARNING)  # the gguf package repeats itself
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in sys.argv[1:] or PARTS:
            models, mixes = PARTS[part]
            left, n_models = models(), 0
            while batch := list(islice(left, BATCH)):
                names = {
                    toys.write_model(Path(folder, f"{i}.gguf"), metadata, shapes, vocabulary): name
                    for i, (name, metadata, shapes, vocabulary) in enumerate(batch)
                }
                for line in differences(names, mixes):
                    print(line, flush=True)
                    n_wrong += 1
                n_models += len(batch)
            print(f"{part}: {n_models} models x {len(mixes)} mixes compared", flush=True)
    print(f"{n_wrong} differences")
    return int(n_wrong > 0)


ALL_MIXES = [(ftype, has_imatrix) for ftype in FTYPES for has_imatrix in (False, True)]
PARTS: dict[str, tuple[Callable[[], Iterator[Model]], Sequence[tuple[str, bool]]]] = {
    "catalog": (catalog, ALL_MIXES),
    "architectures": (architectures, ALL_MIXES),
    # The first shows which models are 70B, the second how many layers there are.
    "layers": (layers, [("Q3_K_S", False), ("Q4_K_M", False)]),
}

if __name__ == "__main__":
    sys.exit(main())
