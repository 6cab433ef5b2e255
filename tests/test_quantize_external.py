"""llama-quantize as a backend: ik_llama.cpp's real program, and llama.cpp's around its library."""

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantplan.cli import app
from quantplan.errors import InputError, LlamaCppError, QuantizeError, RecipeError
from quantplan.exchange import export_recipe
from quantplan.inventory.header import read_header
from quantplan.qtypes import QTYPES, fitting_qtype
from quantplan.quantize import LlamaQuantize, Progress, find_llama_quantize, quantize
from quantplan.recipe import Recipe
from quantplan.version import __version__
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.llama_quantize import program
from tests.support.models import toy_moe
from tests.support.quantizer import imatrix_gguf, random_imatrix, recipe_for, spread, stored

needs_ik = pytest.mark.skipif(
    find_spec("ik_llama_cpp") is None, reason="the package ik-llama-cpp-python is not installed"
)
# Those whose tables take long are left out, with what their program does not know by that name.
IK_TYPES = ("IQ4_KS", "IQ5_K", "Q6_0", "IQ4_K", "IQ2_KS", "Q8_KV", "IQ5_KS_R4", "Q4_K", "IQ4_NL_R4")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A glm4moe with expert rows of 352 weights."""
    return toy_moe(tmp_path_factory.mktemp("toy") / "toy.gguf", "glm4moe")


@pytest.fixture
def llama_cpp(tmp_path: Path) -> LlamaQuantize:
    """llama.cpp's llama-quantize."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder)
    return find_llama_quantize(folder)


@pytest.fixture
def ik() -> LlamaQuantize:
    """ik_llama.cpp's llama-quantize."""
    spec = find_spec("ik_llama_cpp")
    assert spec is not None
    return find_llama_quantize(Path((spec.submodule_search_locations or [""])[0]))


def ik_recipe(source: Path, names: tuple[str, ...] = IK_TYPES) -> Recipe:
    """Types of ik_llama.cpp for all tensors that fit them, Q8_0 for the others."""
    types = {}
    for name, wanted in spread(source, names).items():
        entry = next(t for t in read_header(source).tensors if t.name == name)
        found = fitting_qtype(wanted, entry.shape_ne[0], "ik_llama.cpp")
        is_plain = (found is not None and "_R" not in found.name) or name != "token_embd.weight"
        types[name] = found.name if found and is_plain else "Q8_0"
    recipe = recipe_for(source, {})
    tensors = tuple(
        t.model_copy(update={"qtype": types.get(t.tensor, t.qtype)}) for t in recipe.tensors
    )
    return recipe.model_copy(update={"tensors": tensors})


def own_program(folder: Path, script: str, silence_limit_s: float = 60) -> LlamaQuantize:
    """A program that behaves as a script says."""
    path = folder / "llama-quantize"
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{script}\n")
    path.chmod(0o755)
    return LlamaQuantize(path, "llama.cpp", silence_limit_s=silence_limit_s)


@needs_llama_cpp
def test_llama_cpp_writes_the_recipe(toy: Path, tmp_path: Path, llama_cpp: LlamaQuantize) -> None:
    """llama.cpp's program writes the tensors that the bundled quantizer writes, imatrix included,
    and the file says who wrote it.
    """
    imatrix = imatrix_gguf(tmp_path / "imatrix.gguf", random_imatrix(toy))
    recipe = recipe_for(toy, spread(toy, ["Q8_0", "Q4_K", "IQ4_XS", "Q5_0"]))
    ours, theirs, seen = tmp_path / "ours.gguf", tmp_path / "theirs.gguf", list[Progress]()
    quantize(recipe, toy, ours, imatrix=imatrix)
    result = quantize(
        recipe, toy, theirs, imatrix=imatrix, backend=llama_cpp, verify=True, progress=seen.append
    )
    assert stored(theirs) == stored(ours)
    metadata = read_header(theirs).metadata
    assert metadata["quantplan.version"] == __version__
    assert metadata["quantplan.backend"].startswith("llama-quantize of llama.cpp")
    assert metadata["quantplan.imatrix_sha256"]
    assert result.n_bytes == theirs.stat().st_size
    assert result.verification is not None
    assert all(0 < e < 0.1 for e in result.verification.relative_squared_error.values())
    assert seen
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == [
        "imatrix.gguf", "ours.gguf", "theirs.gguf"
    ]  # fmt: skip


@needs_ik
def test_ik_llama_cpp_writes_types_of_its_own(toy: Path, tmp_path: Path, ik: LlamaQuantize) -> None:
    """ik_llama.cpp's program writes each tensor in the type of the recipe, among them its own."""
    recipe, target = ik_recipe(toy), tmp_path / "q.gguf"
    imatrix = imatrix_gguf(tmp_path / "imatrix.gguf", random_imatrix(toy))
    assert ik.runtime == "ik_llama.cpp"
    result = quantize(recipe, toy, target, imatrix=imatrix, backend=ik, verify=True)
    found = {name: qtype for name, (qtype, _) in stored(target).items()}
    assert found == {t.tensor: t.qtype for t in recipe.tensors}
    assert set(IK_TYPES) <= set(found.values())
    metadata = read_header(target).metadata
    assert metadata["quantplan.backend"].startswith("llama-quantize of ik_llama.cpp")
    assert result.verification is not None
    plain = {n for n, qtype in found.items() if "llama.cpp" in QTYPES[qtype].runtimes}
    assert result.verification.relative_squared_error.keys() <= plain
    assert list(tmp_path.glob(".*")) == []


@needs_ik
def test_the_exported_command_does_what_the_recipe_says(
    toy: Path, tmp_path: Path, ik: LlamaQuantize
) -> None:
    """The command line that is exported for ik_llama.cpp writes each tensor in its type."""
    recipe = ik_recipe(toy, ("IQ4_KS", "Q6_0", "Q4_K"))
    program_, *words = shlex.split(
        export_recipe(recipe, "ik-quantize-command", model_path=str(tmp_path / "q.gguf"))
    )
    assert program_ == "llama-quantize"
    words[words.index("SOURCE.gguf")] = str(toy)
    subprocess.run([ik.program, *words], check=True, capture_output=True)
    found = {name: qtype for name, (qtype, _) in stored(tmp_path / "q.gguf").items()}
    assert found == {t.tensor: t.qtype for t in recipe.tensors}


@needs_ik
def test_the_command_runs_the_program(
    toy: Path, tmp_path: Path, ik: LlamaQuantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantplan quantize --backend llama-quantize` uses the program of LLAMA_CPP_DIR."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(ik.program.parent))
    recipe, target = ik_recipe(toy, ("IQ4_KS", "Q6_0")), tmp_path / "q.gguf"
    recipe.save(tmp_path / "recipe.json")
    words = ["quantize", str(tmp_path / "recipe.json"), str(toy), str(target)]
    done = CliRunner().invoke(app, [*words, "--backend", "llama-quantize"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "checked" in done.output
    assert {t.tensor: t.qtype for t in recipe.tensors} == {
        name: qtype for name, (qtype, _) in stored(target).items()
    }


@needs_ik
@needs_llama_cpp
def test_both_programs_agree_on_simple_types(toy: Path, tmp_path: Path, ik: LlamaQuantize) -> None:
    """Q8_0, Q6_K and BF16 from ik_llama.cpp lose as much as from the bundled quantizer."""
    recipe = recipe_for(toy, spread(toy, ["Q8_0", "Q6_K", "BF16"]))
    ours = quantize(recipe, toy, tmp_path / "ours.gguf", verify=True).verification
    theirs = quantize(recipe, toy, tmp_path / "ik.gguf", backend=ik, verify=True).verification
    assert ours is not None
    assert theirs is not None
    assert theirs.relative_squared_error == pytest.approx(ours.relative_squared_error, rel=0.05)


def test_what_a_program_cannot_write_is_refused_before(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types of the other runtime, rows that are not interleaved and options that it lacks are
    named before the program is run.
    """
    monkeypatch.chdir(tmp_path)
    backend = own_program(tmp_path, "raise SystemExit('was run')")
    ik = LlamaQuantize(backend.program, "ik_llama.cpp")
    cases = [
        (backend, "output.weight", "IQ4_KS", "llama.cpp's quantizer writes no such file; for ik_"),
        (ik, "output.weight", "TQ1_0", "ik_llama.cpp's quantizer writes no such file"),
        (ik, "token_embd.weight", "IQ4_K_R4", "embeddings cannot be stored in interleaved rows"),
        (backend, "blk.0.attn_norm.weight", "F16", "llama-quantize leaves this tensor as it is"),
    ]
    for program_, name, qtype, says in cases:
        recipe = ik_recipe(toy, ("F16",))
        tensors = tuple(
            t.model_copy(update={"qtype": qtype}) if t.tensor == name else t for t in recipe.tensors
        )
        with pytest.raises(RecipeError, match=says):
            quantize(
                recipe.model_copy(update={"tensors": tensors}), toy, "q.gguf", backend=program_
            )
    with pytest.raises(InputError) as caught:
        quantize(
            recipe_for(toy, {}), "https://127.0.0.1/x.gguf", "q.gguf",
            backend=backend, resume=True, split_max_bytes=1,
        )  # fmt: skip
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("print('cannot allocate: failed to allocate buffer'); sys.exit(3)", "ended with code 3"),
        ("import os; os.abort()", "was ended by SIGABRT"),
        ("time.sleep(60)", "has neither printed nor written for 1 s"),
    ],
)
def test_a_program_that_fails_says_why_and_leaves_nothing(
    toy: Path, tmp_path: Path, script: str, says: str
) -> None:
    """A failing, crashing or silent program is one error with its words; the target stays."""
    target = tmp_path / "q.gguf"
    target.write_bytes(b"an older model")
    backend = own_program(tmp_path, script, silence_limit_s=1 if "for 1 s" in says else 60)
    with pytest.raises(LlamaCppError, match=says):
        quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, target, backend=backend)
    assert target.read_bytes() == b"an older model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-quantize", "q.gguf"]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("", "cannot be read back"),
        ("import shutil; shutil.copy(sys.argv[-4], sys.argv[-3])", "F16 .* instead of Q8_0"),
    ],
)
def test_what_is_not_the_recipe_never_gets_the_name(
    toy: Path, tmp_path: Path, script: str, says: str
) -> None:
    """A program that ends well, but has written nothing or other types, is found out."""
    backend = own_program(tmp_path, script)
    with pytest.raises(QuantizeError, match=says):
        quantize(recipe_for(toy, spread(toy, ["Q8_0"])), toy, tmp_path / "q.gguf", backend=backend)
    assert [path.name for path in tmp_path.iterdir()] == ["llama-quantize"]


def test_a_build_in_the_usual_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-quantize is looked for where llama-server is, ~/llama.cpp/build/bin included."""
    folder = tmp_path / "llama.cpp" / "build" / "bin"
    folder.mkdir(parents=True)
    own_program(folder, "print('--allow-requantize --tensor-type-file'); sys.exit(1)")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    assert find_llama_quantize() == LlamaQuantize(folder / "llama-quantize", "llama.cpp")


def test_programs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLAMA_CPP_DIR goes before PATH; a folder without the program and an old one are errors."""
    first, second, old = (tmp_path / name / "build" / "bin" for name in ("one", "two", "old"))
    for folder, option in ((first, "--custom-q"), (second, "--tensor-type-file"), (old, "")):
        folder.mkdir(parents=True)
        own_program(folder, f"print('--allow-requantize {option}'); sys.exit(1)")
    monkeypatch.setenv("PATH", f"{second}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    assert find_llama_quantize() == LlamaQuantize(second / "llama-quantize", "llama.cpp")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "one"))
    assert find_llama_quantize().runtime == "ik_llama.cpp"
    with pytest.raises(LlamaCppError, match="too old to take the types of tensors"):
        find_llama_quantize(tmp_path / "old")
    with pytest.raises(LlamaCppError, match="no llama-quantize in this folder"):
        find_llama_quantize(tmp_path)
