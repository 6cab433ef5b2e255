"""Measures KLD and PPL of a model on any text with the real llama.cpp, chunk by chunk.

llama.cpp's library beside llama-server is run in a child process (`logits_worker`). Where it is
missing or of an unknown layout, as in static builds and in ik_llama.cpp, llama-perplexity is run
instead. Both judge the same positions. What is done is kept, so that a run goes on where it ended:

- log probabilities of the base, in 16 bits, under a key of the base's file, the text, the build,
  the length of a chunk and the layers on GPUs;
- the results of each model beside them, a line of JSON per chunk.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from quantplan.errors import InputError, LlamaCppError
from quantplan.inventory.header import read_header
from quantplan.inventory.sources import shard_paths
from quantplan.runtime import logits_worker
from quantplan.runtime.divergence import Divergence
from quantplan.runtime.find import LlamaCpp
from quantplan.runtime.locate import LIBRARIES
from quantplan.runtime.process import Watch, running
from quantplan.runtime.saved_logits import read_chunks, read_head
from quantplan.threads import usable_threads

ChunkProgress = Callable[[int, int], None]
"""Is called with the chunks that are done and the chunks to do, those of the base included."""

_PROGRAM = "llama-perplexity"
# A standard error needs so many.
_FEWEST_CHUNKS = 2
# Files up to so many bytes are hashed whole, of others the header and so many places.
_WHOLE_BYTES, _SAMPLES, _SAMPLE_BYTES = 2**29, 256, 2**16
_JOURNAL_LINE = re.compile(r'^\{"chunk": (\d+),.*\}$', re.MULTILINE)


def measure_divergence(
    llama_cpp: LlamaCpp,
    model: Path,
    text: str,
    *,
    base: Path,
    cache: Path,
    chunks: int | None = None,
    chunk_tokens: int = 512,
    threads: int | None = None,
    gpu_layers: int | None = None,
    chunk_limit_s: float = 3600.0,
    progress: ChunkProgress | None = None,
    watch: Watch | None = None,
) -> Divergence:
    """Measures how far a model is from its base on a text.

    Goes on where an earlier call ended. A chunk of the base takes two bytes per judged token and
    word of the vocabulary: 25 MB for 512 tokens and 49152 words.

    Args:
        llama_cpp: What runs the models.
        model: A GGUF file, or any shard of one.
        text: Any text; the first chunks of it are used.
        base: The model before quantization.
        cache: Folder for what is kept.
        chunks: How many chunks at most, at least 2; all of the text by default.
        chunk_tokens: Tokens per chunk; the second half is judged.
        threads: Of the CPU; all by default.
        gpu_layers: Layers on GPUs; by default as llama.cpp decides.
        chunk_limit_s: Time for one chunk, loading included, in seconds.
        progress: Is called after every chunk.
        watch: Is called many times a second; an exception that it raises ends the work and is
            passed on.

    Raises:
        InputError: The text is shorter than two chunks, or a number is out of range.
        SourceError: Shards of a model are missing.
        LlamaCppError: llama.cpp failed, took too long, has no way to give log probabilities, or the
            two models do not cut the text into the same tokens.
    """
    _check(model, base, chunks, chunk_tokens)
    job = _Job(
        llama_cpp, text, base, chunks, chunk_tokens, threads, gpu_layers, chunk_limit_s, watch
    )
    store = _Store.of(job, cache, model)
    for path, is_base in ((base, True), (model, False)):
        job.complete(path, store, is_base=is_base, progress=progress)
    rows = [row for chunk, row in sorted(store.rows().items()) if chunk < (store.n_wanted or 0)]
    return Divergence(
        kld_nats=np.array([row["kld_nats"] for row in rows]),
        same_top=np.array([row["same_top"] for row in rows], dtype=np.bool_),
        ln_ppl_by_chunk=np.array([row["ln_ppl"] for row in rows]),
        base_ln_ppl_by_chunk=np.array([row["base_ln_ppl"] for row in rows]),
    )


def check_length(
    llama_cpp: LlamaCpp,
    text: str,
    *,
    base: Path,
    cache: Path,
    chunk_tokens: int = 512,
    threads: int | None = None,
    gpu_layers: int | None = None,
    chunk_limit_s: float = 3600.0,
    watch: Watch | None = None,
) -> None:
    """Refuses a text that is too short for `measure_divergence`, by its first two chunks.

    What llama.cpp's library gives for them is kept, so that this takes no time from what follows.

    Args:
        llama_cpp: What runs the model.
        text: The text.
        base: The model before quantization.
        cache: Folder for what is kept.
        chunk_tokens: Tokens per chunk.
        threads: Of the CPU; all by default.
        gpu_layers: Layers on GPUs; by default as llama.cpp decides.
        chunk_limit_s: Time for one chunk, loading included, in seconds.
        watch: Is called many times a second; an exception that it raises ends the work and is
            passed on.

    Raises:
        InputError: The text is shorter than two chunks, or a number is out of range.
        SourceError: Shards of the model are missing.
        LlamaCppError: llama.cpp failed or took too long.
    """
    _check(base, base, _FEWEST_CHUNKS, chunk_tokens)
    job = _Job(
        llama_cpp, text, base, _FEWEST_CHUNKS, chunk_tokens, threads, gpu_layers, chunk_limit_s,
        watch,
    )  # fmt: skip
    job.complete(base, _Store.of(job, cache, base), is_base=True, progress=None)


def _check(model: Path, base: Path, chunks: int | None, chunk_tokens: int) -> None:
    faults = [
        f"{path} is no file; KLD is measured between two GGUF files"
        for path in dict.fromkeys((model, base))
        if not path.is_file()
    ]
    faults += chunk_faults(chunks, chunk_tokens)
    if faults:
        raise InputError(faults)


def chunk_faults(chunks: int | None, chunk_tokens: int) -> list[str]:
    """What is wrong with a number of chunks and their tokens, one sentence each."""
    faults = []
    if chunks is not None and chunks < _FEWEST_CHUNKS:
        faults.append(f"{chunks} chunks; at least {_FEWEST_CHUNKS} are needed for a standard error")
    if chunk_tokens < 8:
        faults.append(f"chunks of {chunk_tokens} tokens; they must have at least 8")
    return faults


@dataclass(frozen=True, slots=True)
class _Store:
    """What is kept: log probabilities of the base, and the journal of a model."""

    folder: Path
    journal: Path
    chunks: int | None

    @classmethod
    def of(cls, job: "_Job", cache: Path, model: Path) -> Self:
        folder = cache / job.key()
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / f"{fingerprint(model)[:16]}.jsonl"
        content = journal.read_bytes() if journal.exists() else b""
        if not content.endswith(b"\n"):  # the end of a run that was killed
            journal.write_bytes(content[: content.rfind(b"\n") + 1])
        return cls(folder.absolute(), journal.absolute(), job.chunks)

    @property
    def n_wanted(self) -> int | None:
        """Chunks to judge; None before the text was cut into tokens."""
        try:
            known = json.loads((self.folder / "text.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        n_chunks = int(known["n_chunks"])
        return n_chunks if self.chunks is None else min(self.chunks, n_chunks)

    def done(self) -> set[int]:
        """Chunks in the journal."""
        found = _JOURNAL_LINE.findall(self.journal.read_text(encoding="utf-8"))
        return {int(chunk) for chunk in found}

    def n_left(self, *, is_base: bool) -> int | None:
        """Chunks to do; None before the text was cut into tokens."""
        if self.n_wanted is None:
            return None
        wanted = range(self.n_wanted)
        if is_base:
            return sum(not logits_worker.base_path(self.folder, i).exists() for i in wanted)
        return len(set(wanted) - self.done())

    def rows(self) -> dict[int, dict[str, Any]]:
        """Results by chunk."""
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        return {row["chunk"]: row for row in map(json.loads, lines)}


@dataclass(frozen=True, slots=True)
class _Job:
    llama_cpp: LlamaCpp
    text: str
    base: Path
    chunks: int | None
    chunk_tokens: int
    threads: int | None
    gpu_layers: int | None
    chunk_limit_s: float
    watch: Watch | None

    def key(self) -> str:
        """Another one for all that changes the base's log probabilities."""
        # llama-perplexity says nothing of the text beyond the chunks that were asked for.
        chunks = "" if self._library() else f", {self.chunks} chunks"
        parts = (
            fingerprint(self.base),
            hashlib.sha256(self.text.encode()).hexdigest(),
            f"{self.llama_cpp} {fingerprint(self._library() or self._program())}",
            f"{self.chunk_tokens} tokens, {self.gpu_layers} layers on GPUs{chunks}",
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def _library(self) -> Path | None:
        """The library beside llama-server, where its layout is known."""
        library = self.llama_cpp.library
        is_known = self.llama_cpp.runtime == "llama.cpp"
        return library.resolve() if library and is_known else None  # its backends are beside it

    def _program(self) -> Path:
        """The llama-perplexity beside llama-server."""
        found = self.llama_cpp.tool(_PROGRAM)
        if found is None:
            raise LlamaCppError(
                f"{self.llama_cpp.server} has neither {LIBRARIES[0]} (of llama.cpp) nor "
                f"{_PROGRAM} beside it, which measure KLD: install a whole build"
            )
        return found

    def complete(
        self, model: Path, store: _Store, *, is_base: bool, progress: ChunkProgress | None
    ) -> None:
        """Runs a model over the chunks that are missing, if any are.

        Raises:
            InputError: The text is too short.
        """
        if store.n_left(is_base=is_base) != 0:
            self._run(model, store, is_base=is_base, progress=progress)
        if (store.n_wanted or 0) < _FEWEST_CHUNKS:
            raise InputError(
                f"the text has fewer than {_FEWEST_CHUNKS} chunks of {self.chunk_tokens} tokens: "
                "give a longer one, or shorter chunks"
            )

    def _run(
        self, model: Path, store: _Store, *, is_base: bool, progress: ChunkProgress | None
    ) -> None:
        """Runs a model over the chunks that are missing."""
        library = self._library()
        with tempfile.TemporaryDirectory(prefix="quantplan-") as name:
            text = Path(name) / "text"
            text.write_bytes(self.text.encode())
            one = _Pass(model, text, store, is_base, progress)
            if library is not None:
                self._run_library(library, one)
            else:
                self._run_program(self._program(), one)

    def _run_library(self, library: Path, one: "_Pass") -> None:
        store = one.store
        job = {
            "parent": os.getpid(),
            "library": str(library),
            "model": str(shard_paths(one.model)[0].absolute()),
            "text": str(one.text),
            "base": str(store.folder),
            "journal": None if one.is_base else str(store.journal),
            "done": sorted(store.done()),
            "chunks": self.chunks,
            "chunk_tokens": self.chunk_tokens,
            "threads": self.threads or usable_threads(),
            "gpu_layers": self.gpu_layers,
        }
        path = one.text.with_name("job.json")
        path.write_text(json.dumps(job), encoding="utf-8")
        # -P: the modules beside the worker must not stand in for those of the standard library.
        command = [sys.executable, "-P", logits_worker.__file__, str(path)]
        with running(command, watch=self.watch) as child:
            process = replace(child, name=f"llama.cpp ({library.name}) with {one.model.name}")
            left = one.n_left()
            while left != 0:
                process.wait_until(lambda seen=left: one.n_left() != seen, self.chunk_limit_s)  # type: ignore[misc]
                left = one.n_left()
                one.report(left)

    def _run_program(self, program: Path, one: "_Pass") -> None:
        """Has llama-perplexity save log probabilities, which it does for a base only."""
        store, saved = one.store, one.text.with_name("logits")
        command = [str(program), "-m", str(shard_paths(one.model)[0].absolute())]
        command += ["-f", str(one.text), "--kl-divergence-base", str(saved)]
        command += ["-c", str(self.chunk_tokens), "-b", str(self.chunk_tokens)]
        command += ["--chunks", str(self.chunks)] if self.chunks else []
        command += ["-t", str(self.threads)] if self.threads else []
        command += ["-ngl", str(self.gpu_layers)] if self.gpu_layers is not None else []
        n_most = self.chunks or max(len(self.text) // self.chunk_tokens, 1)
        with running(command, watch=self.watch) as process:
            process.wait_until(lambda: process.popen.poll() == 0, self.chunk_limit_s * n_most)
        with saved.open("rb") as file:
            tokens, n_vocab, n_chunks = read_head(file)
            try:
                logits_worker.agree(store.folder, tokens, n_vocab, n_chunks)
            except ValueError as error:
                raise LlamaCppError(f"{one.model}: {error}") from error
            for chunk, log_p in enumerate(read_chunks(file, self.chunk_tokens, n_vocab)):
                if one.is_base:
                    logits_worker.keep(store.folder, chunk, log_p)
                    continue
                begin = chunk * self.chunk_tokens + logits_worker.judged(self.chunk_tokens).start
                nexts = tokens[begin + 1 :][: len(log_p)]
                logits_worker.record(store.folder, store.journal, chunk, log_p, nexts)
        one.report(one.n_left())


@dataclass(frozen=True, slots=True)
class _Pass:
    """One model over the text: the base, which is kept, or one that is compared with it."""

    model: Path
    text: Path
    store: _Store
    is_base: bool
    progress: ChunkProgress | None

    def n_left(self) -> int | None:
        return self.store.n_left(is_base=self.is_base)

    def report(self, left: int | None) -> None:
        if self.progress is not None and left is not None:
            n = self.store.n_wanted or 0
            self.progress(n - left + (0 if self.is_base else n), 2 * n)


def fingerprint(path: Path) -> str:
    """A hash of what a file, or a model's shards, hold.

    Of a model that is too large to read as a whole, its header and 256 places spread over its
    weights are read: weights that differ at all were quantized or trained differently everywhere,
    and which tensor has which type is in the header.
    """
    digest = hashlib.sha256()
    for shard in shard_paths(path):
        size = shard.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with shard.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            begin = read_header(shard).data_offset
            digest.update(file.read(begin))
            for place in np.linspace(begin, size - _SAMPLE_BYTES, _SAMPLES):
                file.seek(int(place))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
