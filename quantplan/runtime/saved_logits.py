"""Reads what ``llama-perplexity --kl-divergence-base`` saves: log probabilities of a model."""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import LlamaCppError
from quantplan.runtime.logits_worker import Floats, judged, log_softmax


def read_head(file: BinaryIO) -> tuple[NDArray[np.int32], int, int]:
    """Reads tokens, size of the vocabulary and number of chunks.

    Raises:
        LlamaCppError: The file does not begin as llama-perplexity writes it.
    """
    magic, head = file.read(8), np.frombuffer(file.read(12), dtype="<i4")
    if magic != b"_logits_" or len(head) != 3:
        raise LlamaCppError("llama-perplexity saved no log probabilities")
    chunk_tokens, n_vocab, n_chunks = head.tolist()
    tokens = np.frombuffer(file.read(4 * chunk_tokens * n_chunks), dtype="<i4")
    return tokens.astype(np.int32), n_vocab, n_chunks


def read_chunks(file: BinaryIO, chunk_tokens: int, n_vocab: int) -> Iterator[Floats]:
    """Log probabilities that llama-perplexity saved, chunk by chunk, a row per position.

    A row begins with its step and its least value in single precision; then come 16 bits for each
    word, rounded up to an even number of words.
    """
    own = judged(chunk_tokens)
    n_rows, width = own.stop - own.start, 4 + n_vocab + n_vocab % 2
    while content := file.read(2 * n_rows * width):
        rows = np.frombuffer(content, dtype="<u2").reshape(n_rows, width)
        step, least = (rows[:, :4].copy().view("<f4")[:, [i]] for i in (0, 1))
        yield log_softmax(rows[:, 4 : 4 + n_vocab] * step + least)
