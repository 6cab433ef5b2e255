"""Builds the catalog of public models from load logs and tensor maps.

Usage: python scripts/build_catalog.py RAW_DIRECTORY

RAW_DIRECTORY holds one NAME.json.gz per model with `name`, `source`, `metadata` as a loader printed
it, `tokenizer_array_lengths` and `tensors` ([name, shape_ne, type]). Loaders cut long values when
they print them: cut strings are dropped, cut per-layer arrays are derived from the tensor shapes.
"""

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "quantplan" / "inventory" / "catalog"
_LAYER_ROLE = re.compile(r"blk\.(\d+)\.(.+)")


def derive_array(key: str, arch: str, metadata: dict[str, Any], shapes: dict[str, Any]) -> Any:
    """Derives a per-layer array that the loader cut, from the shapes of each layer's K tensors."""
    setting = key.removeprefix(f"{arch}.attention.")
    full = metadata[f"{arch}.attention.key_length"]
    sliding = metadata.get(f"{arch}.attention.key_length_swa", full)
    values = []
    for layer in range(metadata[f"{arch}.block_count"]):
        (head_width,) = shapes[f"blk.{layer}.attn_k_norm.weight"]
        if setting == "sliding_window_pattern":
            values.append(head_width == sliding)
        elif setting == "head_count_kv":
            values.append(shapes[f"blk.{layer}.attn_k.weight"][1] // head_width)
        else:
            raise SystemExit(f"{key} was cut by the loader, and no rule derives it")
    return values


def convert(raw: dict[str, Any]) -> dict[str, Any]:
    """Turns a raw entry into a catalog entry."""
    arch = raw["metadata"]["general.architecture"]
    shapes = {name: shape for name, shape, _ in raw["tensors"]}
    metadata = {}
    for key, value in raw["metadata"].items():
        if isinstance(value, str) and value.endswith("..."):
            continue
        if isinstance(value, dict):
            metadata[key] = derive_array(key, arch, raw["metadata"], shapes)
            shown = value["truncated"]
            # The last shown number may itself be cut in the middle.
            if metadata[key][: len(shown) - 1] != shown[:-1]:
                raise SystemExit(f"{raw['name']}: {key}: {metadata[key]} derived, {shown} logged")
        else:
            metadata[key] = value
    return {
        "name": raw["name"],
        "source": raw["source"],
        "metadata": metadata,
        "array_lengths": raw["tokenizer_array_lengths"],
        "tensors": [[name, shape, dtype.upper()] for name, shape, dtype in raw["tensors"]],
    }


def main() -> None:
    """Converts every raw entry; the output is the same for the same input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw_directory", type=Path)
    for path in sorted(parser.parse_args().raw_directory.glob("*.json.gz")):
        entry = convert(json.loads(gzip.decompress(path.read_bytes())))
        text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
        target = TARGET / f"{entry['name']}.json.gz"
        target.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{target.name}: {len(entry['tensors'])} tensors")


if __name__ == "__main__":
    main()
