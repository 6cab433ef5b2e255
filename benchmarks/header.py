"""Times opening a header with the vocabulary of GLM-4.5, beside `gguf.GGUFReader`.

The file has 151,552 tokens, their types and 318,088 merges of realistic lengths, and the 803
tensors of GLM-4.5-Air, whose weights are a hole. Both readers open it in turn, in this process.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.costs.memory import pad
from quantplan.inventory.header import read_header
from quantplan.inventory.sources import read_inventory
from quantplan.qtypes import qtype

_N_TOKENS = 151_552
_N_MERGES = 318_088


def write_vocabulary(path: Path) -> Path:
    """Writes the header and a hole for the weights."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 14, _N_TOKENS)
    letters = rng.integers(97, 123, (_N_TOKENS, 14), dtype=np.uint8)
    tokens = [bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)]
    left, right = rng.integers(0, _N_TOKENS, (2, _N_MERGES))
    model = read_inventory("GLM-4.5-Air")
    writer = gguf.GGUFWriter(path, "glm4moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(rng.integers(1, 5, _N_TOKENS).tolist())
    writer.add_token_merges([f"{tokens[a]} {tokens[b]}" for a, b in zip(left, right, strict=True)])
    for t in model.tensors:
        kind = gguf.GGMLQuantizationType(qtype(t.qtype).ggml_id)
        writer.add_tensor_info(
            t.name, t.shape_ne[::-1], np.dtype(np.float32), t.n_bytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    hole = sum(pad(t.n_bytes, 32) for t in model.tensors)
    os.truncate(path, pad(path.stat().st_size, 32) + hole)
    return path


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Writes the file and times both readers in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_vocabulary(Path(folder, "vocabulary.gguf"))
        reader, header = gguf.GGUFReader(path), read_header(path)
        assert [t.name for t in reader.tensors] == [t.name for t in header.tensors]
        assert list(reader.fields)[3:] == list(header.metadata)
        pairs = [
            (seconds(lambda: read_header(path)), seconds(lambda: gguf.GGUFReader(path)))
            for _ in range(options.repeats)
        ]
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    print(
        f"quantplan {1e3 * median(p[0] for p in pairs):.0f} ms  "
        f"GGUFReader {1e3 * median(p[1] for p in pairs):.0f} ms  "
        f"ratio {median(ratios):.0f} ({ratios[0]:.0f} to {ratios[-1]:.0f})"
    )


if __name__ == "__main__":
    main()
