"""Asks llama.cpp for the compute buffers of many models under many flags.

    python scripts/measure_compute.py OUT.jsonl [--runs-per-model 25] [--seed 0]
    python scripts/measure_compute.py OUT.jsonl --tiny

Each run lays a model of the catalog (or a tiny one of every architecture) out on RPC devices that
stand for GPUs, without loading it, and appends one line to OUT.jsonl: model, flags and bytes per
device. ``scripts/fit_compute.py`` fits the compute-buffer model to them. About 0.5 s per run.
"""

import argparse
import json
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import quantplan as qp
from quantplan.errors import LlamaCppError
from quantplan.runtime.find import find_llama_cpp
from quantplan.runtime.memory import measure_memory
from tests.support.architectures import ARCHITECTURES, write_toy
from tests.support.llama_cpp import rpc_server

_UBATCHES = (64, 128, 256, 512, 512, 512, 1024, 2048, 4096)
_CONTEXTS = (2048, 4096, 8192, 16384, 32768, 49152, 65536, 131072)
_TINY = "tiny "
_TINY_FLAGS = [
    ["-ngl", "99", "-c", "4096", "-ub", "2048", "-np", "1", "-fa", "on"],
    ["-ngl", "99", "-c", "32768", "-ub", "512", "-np", "1", "-fa", "on"],
]


def sample_flags(random_: random.Random, inventory: qp.Inventory) -> list[str]:
    """Flags that a person could give, at random."""
    ubatch = random_.choice(_UBATCHES)
    flags = ["-c", str(random_.choice(_CONTEXTS)), "-ub", str(ubatch), "-b", str(max(2048, ubatch))]
    slots = random_.choice((1, 1, 1, 4))
    flags += ["-np", str(slots)]
    if slots > 1 and random_.random() < 0.5:
        flags += ["-kvu"]
    flash = random_.random() < 0.8
    flags += ["-fa", "on" if flash else "off"]
    kv_type = random_.choice(("f16", "f16", "q8_0")) if flash else "f16"
    flags += ["-ctk", kv_type, "-ctv", kv_type]
    n_layers = inventory.architecture.n_layers
    flags += ["-ngl", str(random_.choice((99, 99, 99, n_layers // 2)))]
    if inventory.architecture.n_expert:
        half = ["--n-cpu-moe", str(n_layers // 2)]
        flags += random_.choice(([], ["--cpu-moe"], ["--cpu-moe"], half))
    return flags


def read_model(name: str) -> qp.Inventory:
    """A model of the catalog, or the tiny one of an architecture (``tiny llama``)."""
    if not name.startswith(_TINY):
        return qp.read_inventory(name)
    with tempfile.TemporaryDirectory() as folder:
        path = write_toy(name.removeprefix(_TINY), Path(folder, "model.gguf"))
        return qp.read_inventory(str(path))


def main() -> None:
    """Measures and appends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs-per-model", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    random_ = random.Random(options.seed)  # noqa: S311 (a sample, no secret)
    llama_cpp = find_llama_cpp()
    with ExitStack() as stack, options.out.open("a") as out:
        servers = [stack.enter_context(rpc_server()) for _ in range(2)]
        for name in [_TINY + a for a in ARCHITECTURES] if options.tiny else qp.catalog_names():
            inventory = read_model(name)
            for run in range(len(_TINY_FLAGS) if options.tiny else options.runs_per_model):
                n_gpus = 1 if options.tiny else random_.choice((1, 1, 2))
                flags = _TINY_FLAGS[run] if options.tiny else sample_flags(random_, inventory)
                rpc = ["--rpc", ",".join(str(s) for s in servers[:n_gpus])]
                try:
                    measured = measure_memory(llama_cpp, inventory, [*rpc, *flags])
                except LlamaCppError as error:
                    print(name, flags, str(error).splitlines()[-1])
                    continue
                row = {
                    "model": name,
                    "architecture": inventory.metadata["general.architecture"],
                    "build": llama_cpp.build,
                    "n_gpus": n_gpus,
                    "flags": flags,
                    "compute_bytes": [device.compute_bytes for device in measured.devices],
                }
                out.write(json.dumps(row) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
