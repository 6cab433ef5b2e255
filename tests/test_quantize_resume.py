"""Quantizing that is interrupted: what is left, and that going on gives the identical file."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from quantplan.errors import QuantizeError, RecipeError, SourceError, WeightError
from quantplan.inventory.header import read_header
from quantplan.quantize import Progress, partial, quantize
from quantplan.quantize.partial import PartialFile
from quantplan.recipe import Recipe
from tests.support.http_server import serve
from tests.support.models import toy_moe
from tests.support.quantizer import recipe_for, spread, stored

# Kills itself with SIGKILL once so many bytes are written: nothing is flushed or tidied up.
_KILLED = """
import os, signal, sys
from quantplan.quantize import quantize
from quantplan.recipe import Recipe

def report(progress):
    if progress.done_bytes >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3], resume=True, progress=report)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts."""
    return toy_moe(tmp_path_factory.mktemp("toy") / "toy.gguf")


@pytest.fixture(scope="module")
def recipe(toy: Path) -> Recipe:
    """A recipe of several types."""
    return recipe_for(toy, spread(toy, ["Q8_0", "Q4_K", "Q5_0", "F16"]))


@pytest.fixture(scope="module")
def whole(toy: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that an undisturbed run writes."""
    return quantize(recipe, toy, tmp_path_factory.mktemp("whole") / "q.gguf").path.read_bytes()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A target in a folder of its own that exists already."""
    path = tmp_path / "target" / "q.gguf"
    path.parent.mkdir()
    path.write_bytes(b"an older model")
    yield path


def beside(target: Path) -> set[str]:
    """Files in the target's folder."""
    return {path.name for path in target.parent.iterdir()}


def stop_at(share: float, error: type[BaseException]) -> Callable[[Progress], None]:
    """A callback that raises once a share of the file is written."""

    def stop(progress: Progress) -> None:
        if progress.done_bytes >= share * progress.total_bytes:
            raise error

    return stop


def resumed(recipe: Recipe, source: Path, target: Path, whole: bytes) -> list[int]:
    """Goes on, expects the file of an undisturbed run, and returns the bytes of each report."""
    seen: list[int] = []
    quantize(recipe, source, target, resume=True, progress=lambda p: seen.append(p.done_bytes))
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(whole).digest()
    assert beside(target) == {"q.gguf"}
    return seen


def test_killed_runs_are_continued(toy: Path, recipe: Recipe, whole: bytes, tmp_path: Path) -> None:
    """Killed four times, each time further on, the file is in the end that of one run."""
    recipe.save(tmp_path / "recipe.json")
    target = tmp_path / "target" / "q.gguf"
    target.parent.mkdir()
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "recipe.json"), str(toy), str(target)]
    n_done = 0
    for share in (0.1, 0.35, 0.6, 0.97):
        done = subprocess.run([*command, str(int(share * len(whole)))], check=False)
        assert done.returncode == -signal.SIGKILL
        assert beside(target) == {".q.gguf.partial", ".q.gguf.journal"}
        assert target.with_name(".q.gguf.partial").stat().st_size >= n_done
        n_done = json.loads(target.with_name(".q.gguf.journal").read_text().split("\n")[-1])[
            "n_bytes"
        ]
    assert n_done > 0.5 * len(whole)
    seen = resumed(recipe, toy, target, whole)
    assert seen[0] > n_done


def test_a_command_that_is_interrupted_is_continued(
    toy: Path, recipe: Recipe, whole: bytes, target: Path
) -> None:
    """A real SIGINT, as Ctrl-C sends it, ends the command, with the code of the signal and a
    hint; --resume goes on from there, and the file is that of an undisturbed run.
    """
    saved, journal = target.parent.parent / "recipe.json", target.with_name(".q.gguf.journal")
    recipe.save(saved)
    with serve(toy.parent) as (url, server):
        words = [str(saved), f"{url}/{toy.name}", str(target), "--threads", "1"]
        command = [sys.executable, "-m", "quantplan.cli", "quantize", *words]
        server.held_from = 1 << 20  # it cannot come to the end before the signal
        with subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background ignore SIGINT, and what they start would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        ) as process:
            while not (journal.exists() and "n_bytes" in journal.read_text()):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            server.may_go_on.set()
            _, printed = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT
        assert "--resume" in printed
        assert target.read_bytes() == b"an older model"
        n_done = json.loads(journal.read_text().split("\n")[-1])["n_bytes"]
        assert 0 < n_done < len(whole)
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(whole).digest()
    assert beside(target) == {"q.gguf"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_an_interruption_can_be_continued(
    toy: Path, recipe: Recipe, whole: bytes, target: Path, error: type[BaseException]
) -> None:
    """What the progress callback raises passes through; the work is kept, the target unchanged."""
    with pytest.raises(error):
        quantize(recipe, toy, target, progress=stop_at(0.5, error))
    assert target.read_bytes() == b"an older model"
    assert beside(target) == {"q.gguf", ".q.gguf.partial", ".q.gguf.journal"}
    assert resumed(recipe, toy, target, whole)[0] > 0.4 * len(whole)


def interrupted(*_: object) -> None:
    """What a signal does at this place."""
    raise KeyboardInterrupt


def begin_with_signal(target: Path, n: int) -> None:
    """Begins a file as `quantize` does, with a signal at the ``n``-th line on the way, if any."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal lines
        if frame.f_code.co_filename not in (partial.__file__, contextlib.__file__):
            return None
        lines += event == "line"
        if event == "line" and lines == n:
            interrupted()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(PartialFile(target, "job", resume=False)).begin()
            sys.settrace(None)
    finally:
        sys.settrace(before)


# A file that had just been opened when the signal came is closed by the collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_signal_while_a_file_is_begun_leaves_nothing(target: Path) -> None:
    """Wherever it comes before the first byte, no file is left."""
    for n in itertools.count(1):
        try:
            begin_with_signal(target, n)
        except KeyboardInterrupt:
            assert beside(target) == {"q.gguf"}, n
        else:
            break
    assert n > 30  # it was interrupted everywhere


def test_a_signal_while_earlier_work_is_read_takes_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run left can still be continued."""
    with PartialFile(target, "job", resume=False) as part:
        part.begin()
        part.write(b"good")
        part.mark()
    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt),
        PartialFile(target, "job", resume=True) as part,
    ):
        patched.setattr(PartialFile, "_find_last_good_place", interrupted)
        part.begin()
    with PartialFile(target, "job", resume=True) as part:
        part.begin()
        assert part.n_bytes == len(b"good")


def test_without_resuming_a_run_starts_again(
    toy: Path, recipe: Recipe, whole: bytes, target: Path
) -> None:
    """A run that is not told to continue replaces what another has left, whatever it is."""
    other = recipe_for(toy, spread(toy, ["Q4_0"]))
    with pytest.raises(KeyboardInterrupt):
        quantize(other, toy, target, progress=stop_at(0.5, KeyboardInterrupt))
    seen: list[int] = []
    quantize(recipe, toy, target, progress=lambda p: seen.append(p.done_bytes))
    assert seen[0] < 0.2 * len(whole)
    assert target.read_bytes() == whole
    assert beside(target) == {"q.gguf"}


def test_nothing_to_continue_is_no_error(
    toy: Path, recipe: Recipe, whole: bytes, target: Path
) -> None:
    """Resuming starts a file where there is none."""
    resumed(recipe, toy, target, whole)


@pytest.mark.parametrize("changed", ["recipe", "source"])
def test_another_job_is_not_continued(
    toy: Path, recipe: Recipe, target: Path, tmp_path: Path, changed: str
) -> None:
    """Work of another recipe, or of a source that has changed since, is refused and kept."""
    source = Path(shutil.copy(toy, tmp_path / "source.gguf"))
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, source, target, progress=stop_at(0.5, KeyboardInterrupt))
    if changed == "recipe":
        recipe = recipe_for(toy, spread(toy, ["Q4_0"]))
    else:
        os.utime(source, (1, 1))
    with pytest.raises(RecipeError, match="was begun with another recipe, source"):
        quantize(recipe, source, target, resume=True)
    assert beside(target) == {"q.gguf", ".q.gguf.partial", ".q.gguf.journal"}


@pytest.mark.parametrize("damage", ["flipped", "cut", "journal", "zeros"])
def test_only_what_is_good_is_continued(
    toy: Path, recipe: Recipe, whole: bytes, target: Path, damage: str
) -> None:
    """Whatever a crash has done to the unfinished file or its journal, the result is right."""
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, toy, target, progress=stop_at(0.7, KeyboardInterrupt))
    partial, journal = (target.with_name(f".q.gguf.{n}") for n in ("partial", "journal"))
    with partial.open("r+b") as file:
        if damage == "flipped":
            file.seek(len(whole) // 3)
            file.write(bytes([file.read(1)[0] ^ 1]))
        elif damage == "cut":
            file.truncate(len(whole) // 3)
        elif damage == "zeros":
            file.seek(len(whole) // 3)
            file.write(bytes(len(whole) // 3))
    if damage == "journal":
        journal.write_bytes(journal.read_bytes()[:-5] + b"\0\xff\0")
    first = resumed(recipe, toy, target, whole)[0]
    assert first > 0.2 * len(whole)
    assert damage == "journal" or first < 0.45 * len(whole)


def test_a_full_disk_can_be_continued(
    toy: Path, recipe: Recipe, whole: bytes, target: Path
) -> None:
    """A write that the system refuses is an error that says what is left, and can be continued."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(
            QuantizeError, match=r"could not be written: File too large\. \.q\.gguf\.partial has"
        ):
            quantize(recipe, toy, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"an older model"
    assert resumed(recipe, toy, target, whole)[0] > 0.3 * len(whole)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [str(mount), "-t", "tmpfs", "-o", options, "none", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False) if mount and umount else None
    if done is None or done.returncode:
        pytest.skip("only an administrator can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run([str(umount), str(folder)], check=True)


def test_a_real_full_disk_is_noticed(
    toy: Path, recipe: Recipe, whole: bytes, tmp_path: Path
) -> None:
    """A small file system is too small before a byte is written, and when another fills it up."""
    with small_disk(tmp_path / "disk", f"size={len(whole) + (64 << 10)}") as disk:
        target, ballast = disk / "q.gguf", disk / "ballast"
        ballast.write_bytes(bytes(len(whole) // 2))
        with pytest.raises(RecipeError, match=r"MiB free, but q[.]gguf takes"):
            quantize(recipe, toy, target)
        assert list(disk.iterdir()) == [ballast]
        ballast.unlink()

        def fill(_: Progress) -> None:
            if not ballast.exists():
                ballast.write_bytes(bytes(len(whole) // 2))

        with pytest.raises(QuantizeError, match="No space left on device"):
            quantize(recipe, toy, target, progress=fill)
        ballast.unlink()
        resumed(recipe, toy, target, whole)


def test_a_disk_that_cannot_be_written_is_refused(
    toy: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """A file system that is mounted for reading alone is named before any work is done."""
    with (
        small_disk(tmp_path / "disk", "ro") as disk,
        pytest.raises(RecipeError, match=r"disk is not writable; write q[.]gguf elsewhere"),
    ):
        quantize(recipe, toy, disk / "q.gguf")


def test_a_source_that_shrinks_meanwhile_is_noticed(
    toy: Path, recipe: Recipe, target: Path, tmp_path: Path
) -> None:
    """A source that another program cuts short while it is read is an error, not zeros."""
    source = Path(shutil.copy(toy, tmp_path / "shrinking.gguf"))

    def cut(_: Progress) -> None:
        os.truncate(source, read_header(toy).data_offset)

    with pytest.raises(SourceError, match="ended at byte"):
        quantize(recipe, source, target, progress=cut)
    assert target.read_bytes() == b"an older model"


def test_work_that_can_never_end_is_not_kept(toy: Path, target: Path, tmp_path: Path) -> None:
    """Where a weight cannot be converted nothing is left to be continued."""
    header = read_header(toy)
    last = max(header.tensors, key=lambda t: t.offset)
    source = Path(shutil.copy(toy, tmp_path / "source.gguf"))
    with source.open("r+b") as file:
        file.seek(header.data_offset + last.offset + last.n_bytes - 2)
        file.write(b"\x00\x7c")  # infinity in half precision
    qtype = "BF16" if last.qtype.name == "F16" else "F16"
    with pytest.raises(WeightError, match="holds the weight"):
        quantize(recipe_for(source, {last.name: qtype}), source, target)
    assert beside(target) == {"q.gguf"}


def test_a_target_is_written_by_one_process(toy: Path, recipe: Recipe, target: Path) -> None:
    """While another process writes a target nobody else does, and its work is left alone."""
    fcntl = pytest.importorskip("fcntl")
    with target.with_name(".q.gguf.journal").open("wb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(QuantizeError, match="is being written by another process"):
            quantize(recipe, toy, target)
        assert beside(target) == {"q.gguf", ".q.gguf.journal"}


def test_shards_are_continued_too(toy: Path, recipe: Recipe, tmp_path: Path) -> None:
    """An interruption in a later shard costs nothing of those before it."""
    split = 1 << 20
    quantize(recipe, toy, tmp_path / "q.gguf", split_max_bytes=split)
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("q-*.gguf")}
    folder = tmp_path / "again"
    folder.mkdir()
    stop = stop_at(0.8, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, toy, folder / "q.gguf", split_max_bytes=split, progress=stop)
    assert not list(folder.glob("q-*.gguf"))
    seen: list[int] = []
    result = quantize(
        recipe,
        toy,
        folder / "q.gguf",
        split_max_bytes=split,
        resume=True,
        progress=lambda p: seen.append(p.done_bytes),
    )
    assert seen[0] > 0.7 * result.n_bytes
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert len(expected) > 2
    assert stored(result.path)
