"""Recipes: saved whole or not at all, refused where damaged, read by llama-quantize as meant."""

import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.cli.options import check_targets
from quantplan.errors import InputError, RecipeError, SourceError
from quantplan.files import write_whole
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_headers, read_inventory
from quantplan.qtypes import QTYPES
from quantplan.recipe import Provenance, Recipe, RecipeTensor

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and limits only.")


def provenance(**values: Any) -> Provenance:
    """Some provenance."""
    defaults = {
        "quantplan_version": "1.2.3",
        "source": "catalog:toy",
        "header_sha256": "0" * 64,
        "cost_data": {"a.json": "1" * 64},
        "policy": "quality",
        "runtime": "llama.cpp",
        "solver": "some solver 1.0",
        "solver_options": {"gap": "0.01"},
        "status": "within_gap",
        "objective_nats": 0.125,
        "bound_nats": 0.1,
        "gap": 0.2,
    }
    return Provenance(**defaults | values)


def tensor(name: str, qtype: str = "Q4_K", shape_ne: tuple[int, ...] = (256, 8)) -> RecipeTensor:
    """A tensor on a GPU."""
    return RecipeTensor(tensor=name, qtype=qtype, device="GPU0", shape_ne=shape_ne)


def small(**values: Any) -> Recipe:
    """A small recipe."""
    tensors = (tensor("token_embd.weight"), tensor("blk.0.attn_norm.weight", "F32", (256,)))
    defaults = {"model": "toy", "tensors": tensors, "flags": ("-ngl", "1")}
    return Recipe(**defaults | {"provenance": provenance()} | values)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Takes away the right to write to a directory, even from root."""
    directory.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o755)


@contextmanager
def no_room_beyond(n_bytes: int) -> Iterator[None]:
    """Lets the operating system refuse to make files longer than this."""
    import resource  # noqa: PLC0415 (does not exist on Windows)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["GLM-4.5-Air", "gemma-4-31B-it"])
def test_recipes_come_back(tmp_path: Path, name: str) -> None:
    """A saved recipe of a whole model is the same after loading."""
    inventory = read_inventory(name)
    recipe = small(
        model=inventory.name,
        tensors=tuple(
            RecipeTensor(
                tensor=t.name,
                qtype=t.qtype,
                shape_ne=t.shape_ne,
                device="GPU0" if inventory.is_loaded(t) else None,
            )
            for t in inventory.tensors
        ),
    )
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


@given(
    model=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    flags=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), max_size=4),
    device=st.none() | st.sampled_from(["GPU0", "CPU"]),
    numbers=st.tuples(*[st.floats(allow_nan=False)] * 3),
)
@settings(deadline=None)
def test_any_recipe_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    flags: list[str],
    device: str | None,
    numbers: tuple[float, float, float],
) -> None:
    """Names, flags and numbers of any kind, infinities included, survive a trip through a file."""
    objective, bound, gap = numbers
    recipe = small(
        model=model,
        flags=tuple(flags),
        tensors=(RecipeTensor(tensor=model, qtype="F32", device=device, shape_ne=(1, 2, 3)),),
        provenance=provenance(objective_nats=objective, bound_nats=bound, gap=gap),
    )
    path = tmp_path_factory.mktemp("any") / "recipe.json"
    recipe.save(path)
    assert Recipe.load(path) == recipe


def test_recipes_are_json_for_other_tools(tmp_path: Path) -> None:
    """A recipe is plain JSON that states its version, for readers without quantplan."""
    small().save(tmp_path / "recipe.json")
    read = json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    assert read["schema_version"] == 1
    assert read["tensors"][0] == {
        "tensor": "token_embd.weight",
        "qtype": "Q4_K",
        "device": "GPU0",
        "shape_ne": [256, 8],
    }
    assert math.isclose(read["provenance"]["gap"], 0.2)


def test_saving_replaces_the_old_file(tmp_path: Path) -> None:
    """A reader that has the old file open keeps the old content; nothing else is left behind."""
    path = tmp_path / "recipe.json"
    path.write_text("old")
    with path.open() as before:
        small().save(path)
        assert before.read() == "old"
    assert Recipe.load(path) == small()
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


def umask() -> int:
    """The mask that takes rights from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@posix
def test_saved_recipes_can_be_read_by_others(tmp_path: Path) -> None:
    """A saved recipe has the rights of an ordinary file, not those of a temporary one."""
    small().save(tmp_path / "recipe.json")
    assert stat.S_IMODE((tmp_path / "recipe.json").stat().st_mode) == 0o666 & ~umask()


def test_a_recipe_with_unknown_types_is_refused(tmp_path: Path) -> None:
    """Every tensor whose type does not exist is named where the file is read."""
    path = tmp_path / "recipe.json"
    small().save(path)
    path.write_text(path.read_text(encoding="utf-8").replace("Q4_K", "Q9_9"), encoding="utf-8")
    with pytest.raises(RecipeError, match="there is no type 'Q9_9'"):
        Recipe.load(path)


@posix
def test_links_and_rights_stay_as_they_are(tmp_path: Path) -> None:
    """What a link leads to is replaced, not the link, and keeps its own rights."""
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    kept.write_text("old")
    kept.chmod(0o600)
    link.symlink_to(kept)
    small().save(link)
    assert link.is_symlink()
    assert Recipe.load(kept) == small()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@posix
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """What is no file, as /dev/stdout in a pipeline, is written to and not replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(pipe.read_text)
        small().save(pipe)
        assert Recipe.model_validate_json(text.result(timeout=60)) == small()
    assert pipe.is_fifo()


@pytest.mark.parametrize("folder", [".", "recipe.json"])
def test_a_folder_is_no_file_to_save_to(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that would replace a folder is refused, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(exist_ok=True)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be written"):
        small().save(folder)
    assert sorted(tmp_path.iterdir()) == before


@posix
def test_a_pipe_without_a_name_is_written_to() -> None:
    """So is the pipe of a shell behind /dev/stdout, which has no place among the files."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as reader, os.fdopen(write_end, "w"), ThreadPoolExecutor(1) as pool:
        text = pool.submit(reader.readline)
        write_whole(Path(f"/dev/fd/{write_end}"), "a recipe\n")
        assert text.result(timeout=10) == "a recipe\n"


@posix
def test_a_read_only_directory_changes_nothing(tmp_path: Path) -> None:
    """Where the directory cannot be written to, saving fails and the old file stays."""
    directory = tmp_path / "recipes"
    directory.mkdir()
    (directory / "recipe.json").write_text("old")
    with read_only(directory), pytest.raises(InputError, match="Permission denied"):
        small().save(directory / "recipe.json")
    assert [p.name for p in directory.iterdir()] == ["recipe.json"]
    assert (directory / "recipe.json").read_text() == "old"


@posix
def test_a_read_only_directory_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    """A command that would save there, or where nobody may look, ends at once with what is wrong; a
    device is written to wherever it is.
    """
    with TemporaryDirectory() as name:  # the folders above are everybody's
        directory = Path(name, "recipes")
        directory.mkdir()
        Path(name).chmod(0o755)
        (directory / "device").symlink_to("/dev/null")
        tmp_path.chmod(0o700)
        with read_only(directory):
            with pytest.raises(InputError, match="its directory is read-only"):
                check_targets(directory / "recipe.json")
            check_targets(directory / "device", Path("/dev/null"))
            with pytest.raises(InputError, match="cannot be written"):
                check_targets(tmp_path / "inside" / "recipe.json")


@posix
def test_a_source_where_nobody_may_look_is_told(tmp_path: Path) -> None:
    """A model in such a folder is the caller's fault, to say by its name, and no fault in here."""
    directory = tmp_path / "secret"
    directory.mkdir(0o000)
    with read_only(tmp_path), pytest.raises(SourceError, match=r"model\.gguf: Permission denied"):
        read_headers(directory / "model.gguf")


@posix
def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    """Where the disk takes only a part of the recipe, saving fails and the old file stays."""
    path = tmp_path / "recipe.json"
    path.write_text("old")
    recipe = small(tensors=tuple(tensor(f"blk.{i}.ffn_up.weight") for i in range(1000)))
    with no_room_beyond(4096), pytest.raises(InputError, match="File too large"):
        recipe.save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    """Saving into a directory that does not exist fails and makes none."""
    with pytest.raises(InputError, match="No such file"):
        small().save(tmp_path / "missing" / "recipe.json")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    """A missing file and a directory are refused by name."""
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(RecipeError, match=path.name):
            Recipe.load(path)


@posix
def test_recipes_without_permission_are_refused(tmp_path: Path) -> None:
    """A recipe that may not be read is refused by name."""
    path = tmp_path / "secret.json"
    small().save(path)
    path.chmod(0o000)
    denied = r"secret\.json cannot be read: Permission denied"
    with read_only(tmp_path), pytest.raises(RecipeError, match=denied):
        Recipe.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF\3\0\0\0",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"schema_version": 1}',
        b"[" * 100_000,
        b'{"model": "x", "tensors": [], "flags": []}',
    ],
    ids=lambda content: repr(content[:20]),
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """A file that is no recipe is refused by name."""
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"foreign\.json is no recipe"):
        Recipe.load(path)


def test_truncated_recipes_are_refused(tmp_path: Path) -> None:
    """A recipe cut off anywhere is refused."""
    path = tmp_path / "recipe.json"
    small().save(path)
    content = path.read_bytes().rstrip()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RecipeError, match="is no recipe"):
            Recipe.load(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"flags": "-ngl 1"}, "flags"),
        ({"tensors": [{"tensor": "a", "qtype": "F32", "device": None}]}, r"tensors\.0\.shape_ne"),
        ({"provenance": {"status": "lucky"}}, r"provenance\.status"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    """What does not belong into a recipe is named with its place."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(small().model_dump(mode="json") | change))
    with pytest.raises(RecipeError, match=rf"recipe\.json is no recipe .*: {fault}: "):
        Recipe.load(path)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    """Every fault of a recipe is reported in one error."""
    path = tmp_path / "recipe.json"
    changed = small().model_dump(mode="json") | {"schema_version": 9, "model": 1, "flags": None}
    path.write_text(json.dumps(changed))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert len(caught.value.faults) == 3


@pytest.mark.parametrize("name", catalog_names())
def test_llama_quantize_reads_the_types_meant(name: str) -> None:
    """Of all tensors of a model, the first pattern found in a quantizable one has its type."""
    inventory = read_inventory(name)
    meant = {
        t.name: TYPES[(i + (t.layer or 0) // 7) % len(TYPES)]
        for i, t in enumerate(inventory.tensors)
        if t.is_quantizable
    }
    recipe = small(
        tensors=tuple(
            tensor(t.name, meant.get(t.name, t.qtype), t.shape_ne) for t in inventory.tensors
        )
    )
    rules = []
    for word in recipe.tensor_type_file().split():
        pattern, _, qtype = word.partition("=")
        assert QTYPES[qtype.upper()].is_file_target
        rules.append((re.compile(pattern.lower()), qtype.upper()))
    found = {t: next(qtype for pattern, qtype in rules if pattern.search(t)) for t in meant}
    assert found == meant


def test_names_that_llama_quantize_cannot_match_are_refused() -> None:
    """A recipe for tensors with capital letters has no tensor-type file, and says why."""
    recipe = small(tensors=(tensor("blk.0.Wq.weight"), tensor("output.weight")))
    with pytest.raises(RecipeError, match=r"cannot match the tensor name 'blk\.0\.Wq\.weight'"):
        recipe.tensor_type_file()
