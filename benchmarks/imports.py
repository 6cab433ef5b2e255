"""Times what a person waits for before anything is worked out, in new processes.

`import quantplan` imports names when they are first asked for, so the whole API is timed too. All
times are without Python's own start, beside `import numpy, pydantic`, which the API cannot do
without.

python benchmarks/imports.py [--runs 7]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
CLI = "import sys; sys.argv[1:] = {}; from quantplan.cli import main; main()"
TAB = {
    "_QUANTPLAN_COMPLETE": "complete_bash",
    "COMP_WORDS": "quantplan plan GLM",
    "COMP_CWORD": "2",
}
START, PEERS = "python", "import numpy, pydantic"
CASES: dict[str, tuple[str, dict[str, str]]] = {
    START: ("", {}),
    PEERS: (PEERS, {}),
    "import quantplan": ("import quantplan", {}),
    "from quantplan import Machine": ("from quantplan import Machine", {}),
    "from quantplan import plan": ("from quantplan import plan", {}),
    "from quantplan import *": ("from quantplan import *", {}),
    "quantplan --version": (CLI.format(["--version"]), {}),
    "quantplan --help": (CLI.format(["--help"]), {}),
    "quantplan plan GLM<Tab>": (CLI.format([]).replace("[1:] = []", " = ['quantplan']"), TAB),
}


def seconds(code: str, environment: dict[str, str]) -> float:
    """Wall time of a new process."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - start


def main() -> None:
    """Times all cases in turn, so that other load falls on all of them, and prints medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantplan-imports-") as bytecode:
        # Installers compile what they install; a checkout may be told not to.
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        kept |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": bytecode}
        times: dict[str, list[float]] = {name: [] for name in CASES}
        for run in range(options.runs + 1):
            for name, (code, more) in CASES.items():
                taken = seconds(code, kept | more)
                if run:  # the first one compiles
                    times[name].append(taken)
    start = median(times[START])
    peers = median(times[PEERS]) - start
    print(f"{START:31} {start:5.3f} s, contained in none of these:")
    for name in list(CASES)[1:]:
        taken = median(times[name]) - start
        print(f"{name:31} {taken:5.3f} s = {taken / peers:4.1f} x `{PEERS}`")


if __name__ == "__main__":
    main()
