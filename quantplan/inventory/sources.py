"""Where an inventory comes from: a GGUF file, whole or split, local or remote, or the catalog."""

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from quantplan.errors import SourceError
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.catalog import catalog_names, read_catalog
from quantplan.inventory.header import Header, SkippedArray, read_header
from quantplan.inventory.ranges import Location, located
from quantplan.near import near_names
from quantplan.words import listed

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of a model on the disk, given any of them.

    Raises:
        SourceError: Shards are missing; all of them are named.
    """
    shards = tuple(path.with_name(name) for name in _shard_names(path.name))
    missing = [shard for shard in shards if len(shards) > 1 and not shard.is_file()]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(shards)} shards are missing: put {shard} beside {path}"
            for shard in missing
        )
    return shards


def _shard_urls(url: str) -> tuple[str, ...]:
    parts = urlsplit(url)
    folder, _, last = parts.path.rpartition("/")
    names = _shard_names(last)
    return tuple(urlunsplit(parts._replace(path=f"{folder}/{name}")) for name in names)


def is_split(source: str) -> bool:
    """Whether the name of a file is that of one of several shards."""
    match = _SHARD.fullmatch(PurePosixPath(source).name)
    return match is not None and int(match["count"]) > 1


def _shard_names(name: str) -> list[str]:
    """The names of all shards, given one of them; a file that is no shard is alone."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["index"]) <= count:
        raise SourceError(f"{name}: there is no shard {match['index']} of {match['count']}")
    return [f"{match['stem']}-{i:05d}-of-{match['count']}.gguf" for i in range(1, count + 1)]


def read_headers(source: str | os.PathLike[str]) -> tuple[tuple[Location, Header], ...]:
    """Reads the headers of a model's files and checks that they belong together.

    Args:
        source: A GGUF file or any shard of one, by its path, its URL or ``hf:owner/repo/file``.

    Raises:
        SourceError: A file is missing or damaged, or the shards contradict each other.
    """
    location = located(source)
    shards: tuple[Location, ...]
    if isinstance(location, Path):
        _refuse_irregular(location)
        shards = shard_paths(location)
    else:
        shards = _shard_urls(location)
    files = tuple((shard, read_header(shard)) for shard in shards)
    first = files[0][1]
    count = _count(files[0], "split.count") or len(files)
    names = [t.name for _, header in files for t in header.tensors]
    expected = _count(files[0], "split.tensors.count")
    expected = len(names) if expected is None else expected
    faults = []
    if count != len(files):
        faults.append(
            f"{location}: the file says that it is one of {count} shards, but its name does not "
            f"follow NAME-00001-of-{count:05d}.gguf; restore the names that the shards were made "
            "with"
        )
    elif len(names) != expected or len(set(names)) != len(names):
        faults.append(
            f"{location}: the shards hold {len(set(names))} different tensors in {len(names)} "
            f"entries, but {expected} are announced; they come from different models"
        )
    if "general.architecture" not in first.metadata:
        faults.append(f"{location}: the metadata name no general.architecture; this is no model")
    if faults:
        raise SourceError(faults)
    return files


def headers_sha256(headers: Sequence[Header]) -> str:
    """The hash that identifies a model's files: of their headers, in order."""
    hashes = [header.sha256 for header in headers]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _refuse_irregular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return  # opening it says why
    if stat.S_ISDIR(mode):
        raise SourceError(f"{_text(path)}: is a directory; name a GGUF file")
    if not stat.S_ISREG(mode):
        raise SourceError(f"{_text(path)}: is no regular file, but a device or a pipe")


def _count(file: tuple[Location, Header], key: str) -> int | None:
    """A count of a shard's metadata, or None where it has none."""
    path, header = file
    value = header.metadata.get(key)
    if value is not None and not isinstance(value, int):
        raise SourceError(f"{path}: {key} is {value!r}, which is no number of anything")
    return value


def _text(path: str | PurePath) -> str:
    """A path as text that JSON can hold."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def _from_files(source: Location) -> Inventory:
    files = read_headers(source)
    path = PurePosixPath(urlsplit(source).path) if isinstance(source, str) else source
    headers: Sequence[Header] = [header for _, header in files]
    metadata = {k: v for k, v in headers[0].metadata.items() if not k.startswith("split.")}
    return Inventory(
        name=str(metadata.get("general.name") or _text(path.stem)),
        source=_text(source),
        header_sha256=headers_sha256(headers),
        metadata={k: v for k, v in metadata.items() if not isinstance(v, SkippedArray)},
        array_lengths={k: v.length for k, v in metadata.items() if isinstance(v, SkippedArray)},
        tensors=tuple(
            Tensor(name=t.name, shape_ne=t.shape_ne, qtype=t.qtype.name)
            for header in headers
            for t in header.tensors
        ),
    )


def read_inventory(source: str | Path) -> Inventory:
    """Reads the tensor inventory and the metadata of a model.

    Weights are never read and vocabulary arrays are skipped, so this takes milliseconds whatever
    the size of the model.

    Args:
        source: A GGUF file or any shard of a split one, by its path, its HTTP URL or, on Hugging
            Face, ``hf:owner/repository/file.gguf``, or a name of the catalog such as
            ``GLM-4.5-Air``, in any spelling (``glm 4.5 air``).

    Raises:
        SourceError: The file is missing, no regular file, no GGUF, truncated or damaged, a shard
            is missing, or the catalog has no such name; similar names are suggested.
    """
    path = located(source)
    if isinstance(path, str):
        return _from_files(path)
    try:
        is_file = path.is_file()
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror or error}") from error
    if is_file:
        return _from_files(path)
    text = str(source)
    entry = read_catalog(text)
    if entry is not None:
        return entry
    _refuse_irregular(path)
    if text.lower().endswith(".gguf") or len(path.parts) > 1:
        raise SourceError(f"{text}: no such file")
    raise SourceError(_unknown_name(text))


def read_named(name: str, n_tensors: int | None = None) -> Inventory:
    """Reads the inventory of a model that is known by name only, as from a log.

    Args:
        name: A name of the catalog, or of a model with the same shapes. Case, spaces, ``-`` and
            ``_``, publishers, formats and remarks in parentheses do not matter.
        n_tensors: The tensors that the log counts, where it does. Files of one model may differ:
            those of DeepSeek from before llama.cpp's latent attention have another layout.

    Raises:
        SourceError: The catalog has no such model, or no layout of it with as many tensors.
    """
    found = read_catalog(name, n_tensors)
    if found is not None:
        return found
    usual = read_catalog(name)
    if usual is None:
        raise SourceError(_unknown_name(name))
    raise SourceError(
        f"{name}: no known layout of this model has {n_tensors} tensors; {usual.name} has "
        f"{len(usual.tensors)}. Leave the number out to take that one"
    )


def _unknown_name(name: str) -> str:
    names = catalog_names()
    near = near_names(name, names, cutoff=0.5)
    hint = f"Did you mean {listed(near, 'or')}?" if near else f"Known: {', '.join(names)}."
    return f"{name!r} is neither a file nor a catalog name. {hint}"
