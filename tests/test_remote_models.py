"""Models behind HTTP: Hugging Face's addresses, tokens, kept headers, the user's own catalog."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantplan import catalog_names
from quantplan.cli import app
from quantplan.errors import SourceError
from quantplan.folders import cache_folder, catalog_folder
from quantplan.inventory import hub
from quantplan.inventory.catalog import add_to_catalog, remove_from_catalog
from quantplan.inventory.header import read_header
from quantplan.inventory.sources import read_inventory
from quantplan.inventory.summary import summarize
from quantplan.quantize import quantize
from tests.support.http_server import Handler, serve
from tests.support.models import toy_moe
from tests.support.quantizer import recipe_for, spread, stored

SECRET = "hf_AbCdEf0123456789"  # noqa: S105 (nobody's)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts, where Hugging Face would have it."""
    folder = tmp_path_factory.mktemp("hub") / "owner" / "some.repo-GGUF" / "resolve" / "main"
    (folder / "BF16").mkdir(parents=True)
    return toy_moe(folder / "BF16" / "toy.gguf", "qwen3moe")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a cache and a catalog of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def served(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """A server that stands in for Hugging Face and lets those read who show the token."""
    with serve(toy.parents[5]) as (url, handler):
        handler.token = SECRET
        monkeypatch.setattr(hub, "ORIGIN", url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield f"{url}/owner/some.repo-GGUF/resolve/main/BF16/toy.gguf", handler


SHORT = "hf:owner/some.repo-GGUF/BF16/toy.gguf"


@pytest.mark.parametrize(
    ("source", "url"),
    [
        (SHORT, f"{hub.ORIGIN}/owner/some.repo-GGUF/resolve/main/BF16/toy.gguf"),
        ("hf:o/r/a b.gguf", f"{hub.ORIGIN}/o/r/resolve/main/a%20b.gguf"),
        ("https://huggingface.co/o/r/blob/main/x.gguf", f"{hub.ORIGIN}/o/r/resolve/main/x.gguf"),
        ("https://hf.co/o/r/blob/v2/d/x.gguf?download=true",
         f"{hub.ORIGIN}/o/r/resolve/v2/d/x.gguf?download=true"),
        ("https://huggingface.co/o/r/resolve/main/x.gguf",
         f"{hub.ORIGIN}/o/r/resolve/main/x.gguf"),
        ("https://example.org/o/r/blob/main/x.gguf", "https://example.org/o/r/blob/main/x.gguf"),
        ("models/x.gguf", None),
        ("hf/o/r/x.gguf", None),
    ],
)  # fmt: skip
def test_addresses_lead_to_files(source: str, url: str | None) -> None:
    """Short names and pages of Hugging Face become the file's URL; others stay what they are."""
    assert hub.file_url(source) == url


@pytest.mark.parametrize("source", ["hf:", "hf:owner", "hf:owner/repo", "hf:owner/repo/"])
def test_short_names_without_a_file_are_refused(source: str) -> None:
    """A short name that names a repository alone says how to name a file."""
    with pytest.raises(SourceError, match="names no file; write hf:OWNER/REPOSITORY/FILE"):
        read_inventory(source)


def test_a_gated_model_is_read_and_quantized(
    toy: Path, served: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    """By its short name a gated model is read and quantized as a local one, and the token is in
    no file that is written.
    """
    assert read_inventory(SHORT).tensors == read_inventory(toy).tensors
    recipe = recipe_for(toy, spread(toy, ["Q8_0", "Q4_0"]))
    result = quantize(recipe, SHORT, tmp_path / "remote.gguf")
    quantize(recipe, toy, tmp_path / "local.gguf")
    assert stored(result.path) == stored(tmp_path / "local.gguf")
    assert set(served[1].shown) == {f"Bearer {SECRET}"}
    assert read_inventory(SHORT).source == served[0]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


@pytest.mark.usefixtures("served")
def test_the_second_variable_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """HUGGING_FACE_HUB_TOKEN is used where HF_TOKEN is not set."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", f" {SECRET}\n")
    assert read_inventory(SHORT).tensors


def test_other_hosts_never_see_the_token(
    toy: Path, served: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    """Neither a redirection to another host nor a URL of another host gets the token."""
    with serve(toy.parents[5]) as (other, handler):
        served[1].elsewhere = other
        recipe = recipe_for(toy, spread(toy, ["Q8_0"]))
        quantize(recipe, SHORT, tmp_path / "q.gguf")
        read_inventory(f"{other}/owner/some.repo-GGUF/resolve/main/BF16/toy.gguf")
        assert len(handler.shown) > 3
        assert set(handler.shown) == {None}
    assert set(served[1].shown) == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "HTTP 401 .* set HF_TOKEN to a token that may read it"),
        ("hf_another", "HTTP 401 .* The token in HF_TOKEN may not read it: accept the model"),
        ("hf_two\nlines", "HF_TOKEN holds characters that no token has"),
    ],
)
def test_refusals_say_what_to_do_but_not_the_token(
    served: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch, token: str, says: str
) -> None:
    """Without a token, with a wrong one and with a broken one the error names the remedy alone."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SourceError, match=says) as caught:
        read_inventory(served[0])
    shown: BaseException | None = caught.value
    while shown is not None:
        assert token == "" or token.split("\n", maxsplit=1)[0] not in str(shown)
        shown = shown.__cause__ or shown.__context__


def test_headers_are_kept_until_the_file_changes(toy: Path, tmp_path: Path) -> None:
    """The second time a header takes one request of a byte; a changed file is read again, a damaged
    copy is not used, and a folder that cannot be written is no error.
    """
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(toy, folder / "toy.gguf")
    with serve(folder) as (url, handler):
        first = read_header(f"{url}/toy.gguf")
        handler.requests.clear()
        assert read_header(f"{url}/toy.gguf") == first
        assert handler.requests == [(0, 0)]
        (kept,) = (cache_folder() / "headers").iterdir()
        kept.write_bytes(kept.read_bytes()[:-1] + b"\xff")
        handler.requests.clear()
        assert read_header(f"{url}/toy.gguf") == first
        assert len(handler.requests) > 1
        toy_moe(folder / "toy.gguf", "qwen3moe", layers=2)
        assert len(read_header(f"{url}/toy.gguf").tensors) < len(first.tensors)
        shutil.rmtree(cache_folder())
        cache_folder().write_bytes(b"no folder")
        assert read_header(f"{url}/toy.gguf").tensors


def run(*words: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_own_models_join_the_catalog(toy: Path, served: tuple[str, type[Handler]]) -> None:
    """A model that was added is listed and found by its name in any spelling until it is removed,
    with the hash of the header that it was made of.
    """
    before = catalog_names()
    printed = run("catalog", "add", SHORT, "--name", "My Toy")
    assert printed.startswith("My Toy: ")
    assert set(catalog_names()) - set(before) == {"My Toy"}
    served[1].token = "no longer valid"  # noqa: S105
    found, real = read_inventory("my-toy"), read_inventory(toy)
    assert (found.tensors, found.metadata) == (real.tensors, real.metadata)
    assert (found.header_sha256, found.source) == (real.header_sha256, served[0])
    rows = {row["name"]: row for row in json.loads(run("models", "--json"))}
    assert rows.keys() == set(catalog_names())
    assert [name for name, row in rows.items() if row["is_own"]] == ["My Toy"]
    assert run("catalog", "remove", "my toy") == "My Toy: removed\n"
    assert catalog_names() == before


def test_names_of_the_catalog_are_taken_once(toy: Path) -> None:
    """A name that the catalog knows, also by another spelling, one that is no file name, and one to
    remove that is not the user's own are refused.
    """
    inventory = read_inventory(toy)
    add_to_catalog(inventory, "Mine")
    for name, says in (
        ("glm 4.5 air", "has GLM-4.5-Air already. To keep both"),
        ("mine", "has Mine already. Remove that first"),
        ("../escape", "is no name for a model"),
    ):
        with pytest.raises(SourceError, match=says):
            add_to_catalog(inventory, name)
    with pytest.raises(SourceError, match="no catalog entry of yours; yours are: Mine"):
        remove_from_catalog("GLM-4.5-Air")
    (path,) = catalog_folder().iterdir()
    path.write_bytes(b"damaged")
    with pytest.raises(SourceError, match="cannot be read"):
        read_inventory("Mine")


def test_models_are_listed_with_their_sizes() -> None:
    """The list has every model in at most 80 columns, with parameters as publishers state them."""
    lines = run("models").splitlines()
    assert len(lines) == len(catalog_names()) + 1
    assert max(map(len, lines)) <= 80
    for name, params, active in (
        ("Qwen3-30B-A3B", 30.5e9, 3.3e9), ("Qwen3-235B-A22B", 235e9, 22e9),
        ("DeepSeek-V3.1-Terminus", 671e9, 37e9), ("Qwen3-32B", 32.8e9, 32.8e9),
    ):  # fmt: skip
        found = summarize(read_inventory(name))
        assert found.n_params == pytest.approx(params, rel=0.02)
        assert found.n_active_params == pytest.approx(active, rel=0.06)
