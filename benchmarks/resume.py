"""Kills quantizing at random moments, goes on each time, and compares the file with one run's.

The process gets SIGKILL from outside after a random time, wherever it is then. Each time the next
one continues; at the end the SHA-256 must be that of an undisturbed run.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantplan.quantize import quantize
from tests.support.models import smollm2_f16
from tests.support.quantizer import recipe_for, spread

_RUN = """
import sys
from quantplan.quantize import quantize
from quantplan.recipe import Recipe
recipe = Recipe.load(sys.argv[1])
print("ready", flush=True)
quantize(recipe, sys.argv[2], sys.argv[3], resume=True)
"""


def main() -> None:
    """Kills and continues."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311 (no secret)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = smollm2_f16(folder)
        recipe = recipe_for(source, spread(source, ["Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "Q6_K"]))
        recipe.save(folder / "recipe.json")
        result = quantize(recipe, source, folder / "whole.gguf")
        whole = hashlib.sha256(result.path.read_bytes()).hexdigest()
        target = folder / "again.gguf"
        command = [sys.executable, "-c", _RUN]
        command += map(str, (folder / "recipe.json", source, target))
        n_killed, sizes = 0, []
        while n_killed < options.kills:
            with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
                assert running.stdout is not None
                running.stdout.readline()
                time.sleep(rng.uniform(0, 2.5 * result.duration_s / options.kills))
                running.kill()
            if running.returncode == -signal.SIGKILL:
                n_killed += 1
            if target.exists():
                assert hashlib.sha256(target.read_bytes()).hexdigest() == whole
                target.unlink()
            else:
                partial = target.with_name(".again.gguf.partial")
                sizes.append(partial.stat().st_size if partial.exists() else 0)
        quantize(recipe, source, target, resume=True)
        same = hashlib.sha256(target.read_bytes()).hexdigest() == whole
    megabytes = ", ".join(f"{size / 1e6:.0f}" for size in sizes)
    print(f"{n_killed} kills with {megabytes} MB written of {result.n_bytes / 1e6:.0f}")
    print("identical" if same else "DIFFERENT")
    sys.exit(not same)


if __name__ == "__main__":
    main()
