"""Other sources and targets: files behind HTTP, quantized ones, shards; and reading back."""

import hashlib
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantplan.errors import QuantizeError, SourceError
from quantplan.inventory.header import read_header
from quantplan.inventory.remote import HttpFile
from quantplan.inventory.sources import read_inventory
from quantplan.quantize import NumpyBackend, Progress, quantize
from quantplan.quantize.ggml import ggml
from quantplan.recipe import Recipe
from tests.support.http_server import serve
from tests.support.llama_cpp import llama_server, needs_llama_cpp
from tests.support.models import toy_moe
from tests.support.quantizer import llama_quantize, recipe_for, spread, stored, tiny


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts."""
    return toy_moe(tmp_path_factory.mktemp("toy") / "toy.gguf", "qwen3moe")


@pytest.fixture(scope="module")
def recipe(toy: Path) -> Recipe:
    """A recipe of several types."""
    return recipe_for(toy, spread(toy, ["Q8_0", "Q4_K", "Q5_0"]))


@pytest.fixture
def blob(tmp_path: Path) -> bytes:
    """A file to serve."""
    raw = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "blob").write_bytes(raw)
    return raw


def test_a_remote_model_gives_the_file_of_a_local_one(
    toy: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """Quantized through HTTP ranges, the tensors are those of a local source; nothing is stored."""
    quantize(recipe, toy, tmp_path / "local.gguf")
    with serve(toy.parent) as (url, handler):
        assert read_inventory(f"{url}/toy.gguf").tensors == read_inventory(toy).tensors
        quantize(recipe, f"{url}/toy.gguf?download=true", tmp_path / "remote.gguf")
    assert (tmp_path / "remote.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert all(end - begin < 4 << 20 for begin, end in handler.requests)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local.gguf", "remote.gguf"]


def test_remote_shards_are_found_by_one_of_them(toy: Path, recipe: Recipe, tmp_path: Path) -> None:
    """The URL of any shard leads to the others; one that is missing is named."""
    plain = recipe_for(toy, {})
    quantize(plain, toy, tmp_path / "toy.gguf", split_max_bytes=4 << 20)
    shards = sorted(tmp_path.glob("toy-*.gguf"))
    assert len(shards) > 2
    with serve(tmp_path) as (url, _):
        quantize(recipe, f"{url}/{shards[1].name}", tmp_path / "remote.gguf")
        shards[2].unlink()
        with pytest.raises(SourceError, match=f"{shards[2].name}: HTTP 404"):
            quantize(recipe, f"{url}/{shards[1].name}", tmp_path / "remote.gguf")
    quantize(recipe, toy, tmp_path / "local.gguf")
    assert stored(tmp_path / "remote.gguf") == stored(tmp_path / "local.gguf")


def patience_s(fault: str) -> float:
    """How long to wait for a server with a fault: short only where it says nothing at all."""
    return 1 if fault == "stall" else 60


@pytest.mark.parametrize("fault", ["drop", "stall", "busy", "moved"])
def test_faults_that_pass_are_sat_out(tmp_path: Path, blob: bytes, fault: str) -> None:
    """A lost or stalled connection, a busy server and a redirection do not end the reading."""
    with (
        serve(tmp_path, fault, 2) as (url, handler),
        HttpFile(
            f"{url}/blob", read_ahead=3, block_bytes=1 << 14, timeout_s=patience_s(fault)
        ) as file,
    ):
        assert file.read_at(0, len(blob)) == blob
        assert handler.n_faults == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("drop", "the connection failed at bytes=16384-32767"),
        ("stall", "the connection failed at bytes=16384-32767.*timed out"),
        ("busy", "HTTP 503"),
        ("whole", "ignores ranges and sends the whole file"),
        ("shifted", "asked for bytes=16384-32767 and answers with 'bytes 16385-32768"),
        ("short", "sent 8192 bytes instead of 16384"),
        ("size", "has changed while it was read: 100007 bytes"),
        ("changed", 'has changed while it was read: 100000 bytes, "other", instead of'),
    ],
)
def test_faults_that_stay_are_errors(tmp_path: Path, blob: bytes, fault: str, says: str) -> None:
    """A server that cannot be relied on ends the reading with one clear error."""
    with (
        serve(tmp_path, fault, 99) as (url, _),
        HttpFile(
            f"{url}/blob", block_bytes=1 << 14, timeout_s=patience_s(fault), retries=1
        ) as file,
    ):
        assert file.read_at(0, 1 << 14) == blob[: 1 << 14]
        with pytest.raises(SourceError, match=says):
            file.read_at(1 << 14, 100)


def test_a_file_that_changes_before_it_is_read_is_an_error(tmp_path: Path, blob: bytes) -> None:
    """What was asked for its size and replaced then is not taken for what it was."""
    with serve(tmp_path) as (url, _), HttpFile(f"{url}/blob", block_bytes=1 << 14) as file:
        (tmp_path / "blob").write_bytes(blob[::-1] + b"more")
        with pytest.raises(SourceError, match="has changed while it was read"):
            file.read_at(0, 100)


def test_no_server_is_an_error(tmp_path: Path) -> None:
    """Where nobody listens, and where there is no such file, the URL is named."""
    with serve(tmp_path) as (url, _), pytest.raises(SourceError, match="missing: HTTP 404"):
        HttpFile(f"{url}/missing")
    with pytest.raises(SourceError, match=f"{url}/missing: the connection failed"):
        HttpFile(f"{url}/missing", retries=0)


def test_a_lost_server_leaves_work_to_go_on_with(
    toy: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that fails half way ends the run; when it is back, the run goes on from there."""
    monkeypatch.setattr(
        HttpFile.__init__,
        "__kwdefaults__",
        {"read_ahead": 0, "timeout_s": 60, "retries": 0, "block_bytes": 1 << 18},
    )
    quantize(recipe, toy, tmp_path / "local.gguf")
    target, seen = tmp_path / "remote.gguf", list[int]()
    with serve(toy.parent, "drop") as (url, handler):

        def fail(progress: Progress) -> None:
            if progress.done_bytes > progress.total_bytes // 2:
                handler.n_faults = 99

        with pytest.raises(SourceError, match="the connection failed"):
            quantize(recipe, f"{url}/toy.gguf", target, progress=fail)
        handler.n_faults = 0
        quantize(
            recipe,
            f"{url}/toy.gguf",
            target,
            resume=True,
            progress=lambda p: seen.append(p.done_bytes),
        )
    assert target.read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert seen[0] > 0.4 * target.stat().st_size


@needs_llama_cpp
def test_requantized_tensors_have_the_bytes_of_llama_cpp(toy: Path, tmp_path: Path) -> None:
    """From a quantized source, where that is allowed, the bytes are llama.cpp's too."""
    sources = ["Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q5_1", "Q4_0", "IQ4_XS", "Q2_K"]
    quantize(recipe_for(toy, spread(toy, sources)), toy, tmp_path / "source.gguf")
    source, qtypes = tmp_path / "source.gguf", spread(toy, ["Q4_0", "Q5_K", "Q8_0"])
    llama_quantize(source, tmp_path / "theirs.gguf", qtypes, allow_requantize=True)
    recipe = recipe_for(source, qtypes)
    quantize(recipe, source, tmp_path / "ours.gguf", allow_requantize=True)
    assert stored(tmp_path / "ours.gguf") == stored(tmp_path / "theirs.gguf")


@needs_llama_cpp
def test_llama_cpp_runs_the_shards(smollm2: Path, tmp_path: Path) -> None:
    """llama.cpp loads the shards by the first of them and still speaks English."""
    recipe = recipe_for(smollm2, spread(smollm2, ["Q8_0"]))
    result = quantize(recipe, smollm2, tmp_path / "q.gguf", split_max_bytes=40 << 20)
    shards = sorted(tmp_path.iterdir())
    assert result.path == shards[0]
    assert len(shards) > 3
    assert sum(path.stat().st_size for path in shards) == result.n_bytes
    for path in shards:
        header = read_header(path)
        assert len(header.tensors) == 1 or sum(t.n_bytes for t in header.tensors) <= 40 << 20
    with llama_server(result.path, ["-c", "64", "-t", "2"]) as server:
        assert "Paris" in server.complete("The capital of France is", 8)


def test_shards_hold_what_the_whole_file_holds(toy: Path, recipe: Recipe, tmp_path: Path) -> None:
    """All tensors are there once, and the first shard has the metadata."""
    quantize(recipe, toy, tmp_path / "whole.gguf")
    quantize(recipe, toy, tmp_path / "parts.gguf", split_max_bytes=1 << 20)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    found: dict[str, tuple[str, bytes]] = {}
    for path in parts:
        found |= stored(path)
    assert found == stored(tmp_path / "whole.gguf")
    metadata = read_header(parts[0]).metadata
    assert metadata.pop("split.count") == len(parts)
    assert metadata.pop("split.tensors.count") == len(found)
    assert metadata.pop("split.no") == 0
    assert metadata == read_header(tmp_path / "whole.gguf").metadata
    assert [read_header(path).metadata["split.no"] for path in parts] == list(range(len(parts)))
    assert read_inventory(parts[1]).tensors == read_inventory(tmp_path / "whole.gguf").tensors


def test_reading_back_finds_the_errors_of_another_dequantizer(toy: Path, tmp_path: Path) -> None:
    """Hash and errors are those that hashlib and the gguf package find in the file."""
    recipe = recipe_for(toy, spread(toy, ["Q8_0", "Q4_K", "Q5_0", "IQ4_XS"]))
    result = quantize(recipe, toy, tmp_path / "q.gguf", verify=True)
    assert result.verification is not None
    content = result.path.read_bytes()
    assert result.verification.sha256 == {"q.gguf": hashlib.sha256(content).hexdigest()}
    before = {t.name: t for t in gguf.GGUFReader(toy).tensors}
    after = {t.name: t for t in gguf.GGUFReader(result.path).tensors}
    errors = result.verification.relative_squared_error
    assert errors.keys() == {n for n in after if after[n].tensor_type != before[n].tensor_type}
    for name, error in errors.items():
        old, new = (
            gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
            for t in (before[name], after[name])
        )
        assert error == pytest.approx(((new - old) ** 2).sum() / (old**2).sum(), rel=1e-5)
    assert all(0 < error < 0.02 for error in errors.values())


def test_reading_back_finds_a_faulty_disk(toy: Path, recipe: Recipe, tmp_path: Path) -> None:
    """A byte that is not what was written is found, and the file never gets its name."""

    def damage(progress: Progress) -> None:
        if progress.done_bytes > progress.total_bytes // 2:
            fd = os.open(tmp_path / ".q.gguf.partial", os.O_WRONLY)
            os.pwrite(fd, b"JUNK", progress.total_bytes // 3)
            os.close(fd)

    with pytest.raises(QuantizeError, match="does not hold what was written"):
        quantize(recipe, toy, tmp_path / "q.gguf", verify=True, progress=damage)
    assert list(tmp_path.iterdir()) == []


def test_the_numpy_backend_writes_the_same_tensors(toy: Path, tmp_path: Path) -> None:
    """ggml and the gguf package's quantizers agree on every type that both have."""
    recipe = recipe_for(toy, spread(toy, sorted(NumpyBackend.qtypes)))
    quantize(recipe, toy, tmp_path / "ggml.gguf")
    quantize(recipe, toy, tmp_path / "numpy.gguf", backend=NumpyBackend(), verify=True)
    assert stored(tmp_path / "numpy.gguf") == stored(tmp_path / "ggml.gguf")
    metadata = read_header(tmp_path / "numpy.gguf").metadata
    assert metadata["quantplan.backend"].startswith("gguf ")
    assert read_header(tmp_path / "ggml.gguf").metadata["quantplan.backend"].startswith(ggml().name)


def test_the_numpy_backend_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    """Other types and overflows are errors before and while it works."""
    rows = np.full((4, 256), 1e8, np.float32)
    source = tiny(tmp_path / "s.gguf", output__weight=rows)
    for qtype, says in (("Q4_K", "cannot write Q4_K"), ("Q8_0", "too large for Q8_0")):
        recipe = recipe_for(source, {"output.weight": qtype})
        with pytest.raises(QuantizeError, match=says):
            quantize(recipe, source, tmp_path / "t.gguf", backend=NumpyBackend())
