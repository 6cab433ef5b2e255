"""Peak memory of quantizing a sparse model of the true shapes of GLM-4.5-Air in BF16, 205 GiB.

Its weights are a hole and read as zeros. The whole file would not fit on most disks, so the run is
ended once so much is written; memory is stated at ever larger amounts, and must stay flat.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.inventory.sources import read_inventory
from quantplan.quantize import Progress, quantize
from quantplan.runtime.sparse import write_sparse
from tests.support.quantizer import recipe_for, spread

_LIMIT_MIB = 300


class _EnoughError(Exception):
    """Ends the run."""


def peak_mib() -> float:
    """The largest resident set of this process until now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Quantizes and states the peak of memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=8, help="how much to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model = read_inventory("GLM-4.5-Air")
        wide = {t.name: "BF16" for t in model.tensors if t.is_quantizable}
        source = write_sparse(model.with_qtypes(wide), folder / "source.gguf")
        recipe = recipe_for(source, spread(source, ["Q2_K", "Q3_K", "Q4_0", "Q8_0"]))
        print(f"source {source.stat().st_size / 2**30:.1f} GiB, before {peak_mib():.0f} MiB")
        shown = 0.0

        def report(progress: Progress) -> None:
            nonlocal shown
            written = progress.done_bytes / 2**30
            if written >= shown:
                print(f"  written {written:5.2f} GiB: peak {peak_mib():.0f} MiB", flush=True)
                shown += options.gib / 8
            if written >= options.gib:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            quantize(recipe, source, folder / "q.gguf", threads=options.threads, progress=report)
    peak = peak_mib()
    print(f"peak {peak:.0f} MiB, limit {_LIMIT_MIB} MiB")
    sys.exit(peak > _LIMIT_MIB)


if __name__ == "__main__":
    main()
