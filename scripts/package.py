"""Builds the wheel and the sdist, checks what is in them, and uses the wheel as its users will.

python -m scripts.package [--tests] [--python 3.12 ...]

The wheel is made from the sdist, and must hold exactly the tracked files of the package. On every
supported Python of this machine, it is installed into a new virtual environment and used in a
folder of its own, with warnings as errors. With --tests, tests of the API and of the command line
run there too. What was built is left in dist/.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quantplan.version import __version__
from tests.support.models import toy_moe

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
NAME = f"quantplan-{__version__}"
# The wheel has 0.5 MB and the sdist 0.9. Much more means that something slipped in.
MAX_WHEEL_BYTES, MAX_SDIST_BYTES = 2_000_000, 3_000_000
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
LICENSES = ("LICENSE", "NOTICE")
TESTS = ("api", "cli", "display", "hardware", "package", "planner", "qtypes", "quantize", "recipe",
         "shell", "units", "workload")  # fmt: skip
MACHINE = ("--machine", "RTX 4090 + 64GiB@80GB/s")
TOY = ("--machine", "8GiB + 32GiB@60GB/s")
# What a user does without a checkout. The file `printed` has what the command before printed.
SESSION = (
    ("--version",),
    ("plan", "GLM-4.5-Air", *MACHINE, "--ctx", "32768", "--kv", "q8_0", "--min-tps", "10"),
    ("predict", "GLM-4.5-Air", *MACHINE, "--", "-ngl", "99", "--cpu-moe", "-c", "32768"),
    ("plan", "toy.gguf", *TOY, "--recipe", "toy.json", "--gguf-name", "out.gguf"),
    ("quantize", "toy.json", "toy.gguf", "out.gguf", "--verify"),
    ("show", "out.gguf"),
    ("export", "toy.json", "llama-quantize"),
    ("plan", "toy.gguf", *TOY, "--json"),
    ("report", "printed", "--points", "2", "-o", "toy.html"),
)
EVERY_MODULE = """
import importlib, pkgutil
import quantplan
from quantplan import *
for module in pkgutil.walk_packages(quantplan.__path__, "quantplan."):
    try:
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    except quantplan.errors.MissingPackageError as error:  # an extra that says how to get it
        assert "pip install 'quantplan[" in str(error)
print(quantplan.__file__)
"""


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Runs a command as a user would, without the Python path of this process.

    Returns:
        What it printed.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env={**kept, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def tracked_files() -> list[str]:
    """Files of the checkout that are in git or not ignored by it."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    names = run(listed, ROOT).splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def build(files: Iterable[str], folder: Path) -> tuple[Path, Path]:
    """Builds an sdist from a clean copy of the checkout, and a wheel from the sdist.

    A checkout itself may hold files of older builds, which setuptools would pack.

    Returns:
        Paths of the wheel and the sdist.
    """
    copy, dist = folder / "checkout", folder / "dist"
    for name in files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    run((sys.executable, "-m", "build", "--outdir", dist, copy), folder)
    return dist / f"{NAME}-py3-none-any.whl", dist / f"{NAME}.tar.gz"


def check_contents(files: Iterable[str], wheel: Path, sdist: Path) -> None:
    """Ends the program where something is missing, changed, or there by accident."""
    package = {name for name in files if name.startswith("quantplan/")}
    about = f"{NAME}.dist-info"
    made = {f"{about}/{name}" for name in METADATA}
    made |= {f"{about}/licenses/{name}" for name in LICENSES}
    with zipfile.ZipFile(wheel) as packed:
        _compare("the wheel", set(packed.namelist()), package | made)
        changed = [name for name in package if packed.read(name) != (ROOT / name).read_bytes()]
    if changed:
        sys.exit(f"the wheel has other contents than the checkout in {changed}")
    with tarfile.open(sdist) as packed:
        inside = {m.name.removeprefix(f"{NAME}/") for m in packed.getmembers() if m.isfile()}
    made = {name for name in inside if "quantplan.egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    _compare("the sdist", inside, {name for name in files if name != ".gitignore"} | made)
    for path, limit in ((wheel, MAX_WHEEL_BYTES), (sdist, MAX_SDIST_BYTES)):
        size = path.stat().st_size
        print(f"{path.name}: {size:,} bytes")
        if size > limit:
            sys.exit(f"{path.name} has more than {limit:,} bytes: what slipped in?")


def _compare(what: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        sys.exit(f"{what} lacks {missing} and should not have {extra}")


def find_python(version: str) -> str | None:
    """A Python of a version that can make virtual environments."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    pyenv = sorted(root.glob(f"versions/{version}.*/bin/python"))
    probe = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    for path in (sys.executable, shutil.which(f"python{version}"), *pyenv):
        if path is not None:
            said = subprocess.run([path, "-c", probe], capture_output=True, text=True, check=False)
            if said.stdout.strip() == version:
                return str(path)
    return None


def use(python: str, wheel: Path, folder: Path, with_tests: bool) -> str:
    """Installs the wheel with a Python and goes through a session with it.

    Returns:
        What to say about it.
    """
    start = time.perf_counter()
    folder.mkdir()
    run((python, "-m", "venv", folder / "venv"), folder)
    bin_folder = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (bin_folder / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run((*pip, wheel), folder)
    work = folder / "a folder"  # with a space
    work.mkdir()
    toy_moe(work / "toy.gguf")
    home = run((bin_folder / "python", "-W", "error", "-c", EVERY_MODULE), work).strip()
    if not Path(home).is_relative_to(folder):
        sys.exit(f"{home} was imported, not the wheel")
    for words in SESSION:
        said = run((bin_folder / "quantplan", *words), work, PYTHONWARNINGS="error")
        (work / "printed").write_text(said, encoding="utf-8")
    said = f"installed and used in {time.perf_counter() - start:.0f} s"
    if with_tests:
        run((*pip, f"{wheel}[dev]"), folder)
        for name in tracked_files():
            if not name.startswith("quantplan/"):
                (folder / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / "tests" / name)
        tests = [f"tests/test_{name}.py" for name in TESTS]
        done = run((bin_folder / "python", "-m", "pytest", "-q", *tests), folder / "tests")
        said += f"; tests: {done.splitlines()[-1].strip('= ')}"
    return said


def main() -> None:
    """Builds, checks and uses; ends with a message and code 1 where anything is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tests", action="store_true", help="also run tests against the wheel")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    options = parser.parse_args()
    files = tracked_files()
    with tempfile.TemporaryDirectory(prefix="quantplan-package-") as name:
        folder = Path(name).resolve()
        wheel, sdist = build(files, folder)
        check_contents(files, wheel, sdist)
        (ROOT / "dist").mkdir(exist_ok=True)
        for path in (wheel, sdist):
            shutil.copy(path, ROOT / "dist")
        found = {version: find_python(version) for version in options.python}
        with ThreadPoolExecutor(2) as pool:
            sessions = {
                version: pool.submit(use, python, wheel, folder / version, options.tests)
                for version, python in found.items()
                if python is not None
            }
            for version in found:
                said = sessions[version].result() if version in sessions else "not on this machine"
                print(f"Python {version}: {said}", flush=True)


if __name__ == "__main__":
    main()
