"""Times the way from a clone of the repository to the first plan, as a newcomer goes it.

Clones what is committed here and runs `make plan`, which makes a virtual environment, installs
quantplan and what it depends on, and plans GLM-4.5-Air. pip keeps no cache: everything is fetched.

python benchmarks/newcomer.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Times it, and prints what the newcomer sees."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory(prefix="quantplan-newcomer-") as name:
        start = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", ROOT, name], check=True)  # noqa: S607
        cloned = time.perf_counter()
        command = ["make", "plan", f"PYTHON={sys.executable}"]
        subprocess.run(command, cwd=name, env={**environment, "PIP_NO_CACHE_DIR": "1"}, check=True)
        planned = time.perf_counter()
    print(f"clone {cloned - start:.1f} s, make plan {planned - cloned:.1f} s")


if __name__ == "__main__":
    main()
