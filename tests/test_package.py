"""What is promised about the installed package: quick to import, complete to tools, bounds."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quantplan

ROOT = Path(__file__).parent.parent
HEAVY = {
    "gguf", "highspy", "jinja2", "libggml", "matplotlib", "numpy", "pandas", "platformdirs",
    "psutil", "pulp", "pydantic", "rich", "starlette", "typer", "urllib3", "uvicorn",
}  # fmt: skip
# Recent versions of typer read options with pydantic.
TYPER = {"pydantic", "rich", "typer"}


def heavy_modules_after(code: str, **environment: str) -> set[str]:
    """The packages outside of Python that a new process has imported when some code ended."""
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = subprocess.run(
        [sys.executable, "-c", f"{report}\n{code}"],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return {name for name in done.stderr.split() if name in HEAVY}


def test_importing_imports_nothing_outside_python() -> None:
    """`import quantplan` waits for no other package."""
    assert heavy_modules_after("import quantplan") == set()


def test_no_name_brings_what_only_few_functions_need() -> None:
    """No part of the API waits for plots, pages, progress bars or what measures a machine."""
    needed = {"gguf", "highspy", "numpy", "pulp", "pydantic", "urllib3"}
    assert heavy_modules_after("from quantplan import *") == needed


@pytest.mark.parametrize("name", ["Recipe", "predict", "quantize", "read_inventory"])
def test_the_solver_is_imported_only_to_plan(name: str) -> None:
    """Reading, predicting and quantizing wait for no solver."""
    assert not heavy_modules_after(f"from quantplan import {name}") & {"highspy", "pulp"}


@pytest.mark.parametrize("words", ["--help", "plan --help", "--version"])
def test_help_loads_only_what_prints_it(words: str) -> None:
    """Help pages wait for no cost model."""
    code = f"import sys; sys.argv[1:] = {words.split()}; from quantplan.cli import main; main()"
    assert heavy_modules_after(code) <= TYPER


@pytest.mark.parametrize("words", ["quantplan pl", "quantplan plan --min", "quantplan plan GLM"])
def test_completion_loads_only_what_answers(words: str) -> None:
    """The shell waits for no cost model when Tab is pressed, not even for names of models."""
    code = "import sys; sys.argv = ['quantplan']; from quantplan.cli import main; main()"
    count = str(len(words.split()) - 1)
    asked = {"_QUANTPLAN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    assert heavy_modules_after(code, **asked) <= TYPER | {"platformdirs"}


def test_every_reader_of_the_package_sees_the_same_names() -> None:
    """What type checkers see, what is imported when asked for, and __all__ are the same names."""
    tree = ast.parse(Path(quantplan.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == {f"quantplan.{home}": names for home, names in quantplan._NAMES.items()}
    names = [name for defined in quantplan._NAMES.values() for name in defined]
    assert sorted([*names, "__version__"]) == quantplan.__all__
    assert set(quantplan.__all__) <= set(dir(quantplan))


@pytest.mark.parametrize("first", ["modules", "names"])
def test_functions_keep_their_names_when_modules_of_those_names_are_imported(first: str) -> None:
    """`quantplan.predict` is the function, whoever imports the module and when."""
    both = {
        name: home
        for home, names in quantplan._NAMES.items()
        for name in names
        if name == home.rpartition(".")[2]
    }
    assert {"plan", "predict", "quantize", "verify"} <= set(both)
    modules = [f"import quantplan.{home}" for home in both.values()]
    names = [f"assert callable(quantplan.{name})" for name in both]
    lines = [*modules, *names] if first == "modules" else [*names, *modules, *names]
    code = "\n".join(["import quantplan", *lines])
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_can_be_reached_without_importing_them_by_name() -> None:
    """`qp.runtime` works in a process that only said `import quantplan as qp`."""
    code = "import quantplan as qp; qp.errors.InputError; qp.runtime.find_llama_cpp"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["plam", "_plan", "__wrapped__"])
def test_names_that_do_not_exist_are_attribute_errors(name: str) -> None:
    """A typing error is told as one, and `hasattr` works."""
    assert not hasattr(quantplan, name)
    with pytest.raises(AttributeError, match=rf"'quantplan' has no attribute '{name}'"):
        getattr(quantplan, name)


def test_a_module_that_lacks_a_package_says_which() -> None:
    """A missing dependency is not taken for a missing name."""
    code = "import sys; sys.modules['pydantic'] = None; import quantplan; quantplan.Machine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr
    assert "pydantic" in done.stderr.splitlines()[-1]


def test_every_dependency_has_a_lower_bound() -> None:
    """Without one, an installer may choose a version that was never tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (text for extra in project["optional-dependencies"].values() for text in extra)
    wanted = [text for text in (*project["dependencies"], *extras) if "quantplan[" not in text]
    assert [text for text in wanted if not re.search(r">=\d", text)] == []


def test_every_supported_python_is_a_classifier() -> None:
    """What the index shows, what installers accept, and what is tested are the same versions."""
    from scripts.package import PYTHONS  # noqa: PLC0415 (its tests run against a wheel, too)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    shown = [c.removeprefix(prefix[:-2]) for c in project["classifiers"] if c.startswith(prefix)]
    assert shown == list(PYTHONS)
    assert project["requires-python"] == ">=3.11,<3.14"
