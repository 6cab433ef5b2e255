"""The chunks of a text as a sample: a half to fit on, a half to judge on, and resamples.

What was measured on the same chunks errs alike, so all measurements of a table are halved and
resampled together. Several texts are strata: each is halved and resampled by itself, and they count
alike however long they are. Resamples are bootstraps that draw one chunk less than there are, so
that the variance of a mean over few chunks is right (Rao and Wu 1988,
doi:10.1080/01621459.1988.10478591).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantplan.costs.evidence import ByChunk, Evidence, Measurement, can_be_halved

Half = Literal["fit", "held out"]
Array = NDArray[np.float64]

_SEED = 20261124
_FOR_AN_ERROR = 1000


def mean_nats(by_chunk: ByChunk) -> float:
    """Mean KLD over all chunks, texts counting alike; at least 0."""
    return max(float(np.mean([np.mean(text) for text in by_chunk])), 0.0)


def standard_error_nats(by_chunk: ByChunk) -> float:
    """Standard error of that mean; every text has at least two chunks."""
    variances = [np.var(text, ddof=1) / len(text) for text in by_chunk]
    return float(np.sqrt(np.sum(variances))) / len(by_chunk)


def half_nats(by_chunk: ByChunk, half: Half) -> float:
    """Mean KLD of every other chunk: those to fit on, from the first one, or those to judge on."""
    return mean_nats(tuple(text[half == "held out" :: 2] for text in by_chunk))


def on_half(evidence: Evidence, half: Half) -> Evidence:
    """The evidence with means and standard errors of one half of the chunks.

    What was not measured chunk by chunk stays as it is, and so do chunks that are too few.
    """
    curve = dict(evidence.curve)
    ln_curve = []
    for name, by_chunk in evidence.curve_by_chunk.items():
        if can_be_halved(by_chunk):
            curve[name] = half_nats(by_chunk, half)
            drawn = _drawn_nats(by_chunk, half, _FOR_AN_ERROR)
            if curve[name] > 0 and (drawn > 0).all():
                ln_curve.append(np.log(drawn))
    return replace(
        evidence,
        curve=curve,
        curve_ln_sd=float(np.std(np.mean(ln_curve, axis=0))) if ln_curve else 0.0,
        singles=tuple(_on_half(one, half) for one in evidence.singles),
    )


def resamples(evidence: Evidence, half: Half, n: int) -> Iterator[Evidence]:
    """The evidence as so many other samples of chunks like those of one half might have shown it.

    Their losses are what is expected, not the upper end. There are none without chunks.
    """
    plain = replace(on_half(evidence, half), curve_by_chunk={}, upper_sds=0.0)
    curves = {
        name: _drawn_nats(by_chunk, half, n)
        for name, by_chunk in evidence.curve_by_chunk.items()
        if can_be_halved(by_chunk)
    }
    singles = [
        _drawn_nats(one.by_chunk, half, n) if can_be_halved(one.by_chunk) else None
        for one in evidence.singles
    ]
    if not evidence.holds_out:
        return
    for i in range(n):
        yield replace(
            plain,
            curve={**plain.curve, **{name: float(drawn[i]) for name, drawn in curves.items()}},
            singles=tuple(
                replace(one, by_chunk=(), kld_nats=one.kld_nats if k is None else float(k[i]))
                for one, k in zip(plain.singles, singles, strict=True)
            ),
        )


def _on_half(one: Measurement, half: Half) -> Measurement:
    if not can_be_halved(one.by_chunk):
        return one
    error = float(np.std(_drawn_nats(one.by_chunk, half, _FOR_AN_ERROR)))
    return replace(one, kld_nats=half_nats(one.by_chunk, half), standard_error_nats=error)


def _drawn_nats(by_chunk: ByChunk, half: Half, n: int) -> Array:
    """Mean KLD in each of n resamples of one half, the same resamples for equal texts."""
    own = [np.array(text[half == "held out" :: 2]) for text in by_chunk]
    found = np.concatenate(own) @ _weights(tuple(map(len, own)), half, n)
    return np.maximum(found, 0.0)


@cache
def _weights(sizes: tuple[int, ...], half: Half, n: int) -> Array:
    """Weight of each chunk (rows, text by text) in each resample (columns)."""
    rng = np.random.default_rng([_SEED, half == "fit"])
    parts = []
    for size in sizes:
        counts = rng.multinomial(size - 1, np.full(size, 1 / size), size=n)
        parts.append(counts.T / (size - 1) / len(sizes))
    return np.concatenate(parts)
