"""Feeds damaged headers to the parser: it must read or refuse each, quickly and in little memory.

Inputs are mutations of headers of every kind: flipped bits, bytes lost, inserted or repeated, and
counts and lengths replaced by absurd ones. Anything but a `SourceError` is a fault, and so is more
than a GiB of memory, or a second for one input. Of each way in which a header was refused the
shortest input is kept; `tests/data/header_corpus.json` holds those of a run with a million inputs.
"""

import argparse
import json
import random
import re
import resource
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.errors import SourceError
from quantplan.inventory.header import parse_header
from tests.support.headers import blob, strings, text, u32

_ABSURD = [0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
_SLOWEST_S = 1.0
_MEMORY_BYTES = 1 << 30

SEEDS = [
    blob(),
    blob([("general.architecture", struct.pack("<I", 8) + text("llama")), ("n", u32(7))]),
    blob([("general.alignment", u32(64))], [("a", (32, 2), 8, 0), ("b", (4,), 0, 128)],
         data=bytes(256)),
    blob([("words", strings(["a", "bc", ""])), ("ids", struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3))]),
    blob([("many", strings([1] * 2100))]),
    blob([("ok", struct.pack("<I?", 7, True)), ("f", struct.pack("<Id", 12, 0.5))], version=2),
    blob(tensors=[(f"blk.{i}.ffn_up.weight", (256, 2, 2), 12, 576 * i) for i in range(4)],
         data=bytes(4096)),
]  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """One damaged header."""
    raw = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at : at + 8] = struct.pack("<Q", rng.choice(_ABSURD))
        elif kind == 2:
            raw[at : at + 4] = struct.pack("<I", rng.choice(_ABSURD) & 0xFFFFFFFF)
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            raw[at:at] = rng.randbytes(rng.randrange(1, 24))
        else:
            begin = rng.randrange(len(raw) + 1)
            raw[at:at] = raw[begin : begin + rng.randrange(1, 64)]
    return bytes(raw)


def outcome(raw: bytes) -> str:
    """How the parser answers, without the names and numbers of this input."""
    try:
        parse_header(lambda offset, size: raw[offset : offset + size], len(raw), "fuzz")
    except SourceError as error:
        return re.sub(r"'.*'|\".*\"|\d+", "_", str(error), flags=re.DOTALL)
    return "accepted"


def main() -> None:
    """Parses the command line and feeds the parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="where to keep an input of each outcome")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    rng = random.Random(options.seed)  # noqa: S311 (no secret)
    shortest: dict[str, bytes] = {}
    slowest_s, began = 0.0, time.perf_counter()
    for number in range(options.inputs):
        raw = mutated(rng)
        started = time.process_time()
        try:
            said = outcome(raw)
        except Exception as error:
            sys.exit(f"input {number} of seed {options.seed}: {error!r}: {raw.hex()}")
        slowest_s = max(slowest_s, time.process_time() - started)
        if said not in shortest or len(raw) < len(shortest[said]):
            shortest[said] = raw
    print(
        f"{options.inputs} inputs in {time.perf_counter() - began:.0f} s: "
        f"{len(shortest)} outcomes, "
        f"slowest {1e3 * slowest_s:.1f} ms, peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB, no fault"
    )
    if slowest_s > _SLOWEST_S:
        sys.exit(f"an input took {slowest_s:.1f} s")
    if options.corpus:
        kept = {said: shortest[said].hex() for said in sorted(shortest)}
        options.corpus.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
