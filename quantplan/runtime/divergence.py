"""How far a model is from its base on a text: figures, and their errors over chunks of the text."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_RESAMPLES, _SEED = 1000, 20261123


class Measured(NamedTuple):
    """A figure, and its standard error over chunks of the text."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """What a text shows of a model beside its base.

    Tokens of one chunk are not independent, so standard errors are those over chunks.

    Attributes:
        kld_nats: KLD from the base of every judged token, of shape (chunks, tokens).
        same_top: Whether the most likely token is the base's, likewise.
        ln_ppl_by_chunk: Mean surprise of the model in nats, by chunk.
        base_ln_ppl_by_chunk: That of the base.
    """

    kld_nats: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    ln_ppl_by_chunk: NDArray[np.float64]
    base_ln_ppl_by_chunk: NDArray[np.float64]

    @property
    def kld_by_chunk(self) -> NDArray[np.float64]:
        """Mean KLD of each chunk, in nats per token; pairs with that of another model."""
        found: NDArray[np.float64] = self.kld_nats.mean(axis=1)
        return found

    @property
    def kld(self) -> Measured:
        """Mean KLD in nats per token."""
        return _mean(self.kld_by_chunk)

    @property
    def kld_p99(self) -> Measured:
        """99th percentile of the KLD over tokens; its error is a bootstrap over chunks."""
        n = len(self.kld_nats)
        draws = np.random.default_rng(_SEED).integers(n, size=(_RESAMPLES, n))
        resampled = [np.percentile(self.kld_nats[chosen], 99) for chosen in draws]
        return Measured(float(np.percentile(self.kld_nats, 99)), float(np.std(resampled)))

    @property
    def same_top_share(self) -> Measured:
        """Share of tokens at which model and base have the same most likely token."""
        return _mean(self.same_top.mean(axis=1))

    @property
    def ln_ppl(self) -> Measured:
        """Logarithm of the model's perplexity."""
        return _mean(self.ln_ppl_by_chunk)

    @property
    def base_ln_ppl(self) -> Measured:
        """Logarithm of the base's perplexity."""
        return _mean(self.base_ln_ppl_by_chunk)

    @property
    def ln_ppl_ratio(self) -> Measured:
        """Logarithm of PPL over that of the base, paired by chunk."""
        return _mean(self.ln_ppl_by_chunk - self.base_ln_ppl_by_chunk)

    def summary(self) -> str:
        """The figures in one line, each with its standard error."""
        kld, high, top, ratio = self.kld, self.kld_p99, self.same_top_share, self.ln_ppl_ratio
        ppl = np.exp(ratio.value)
        return (
            f"mean KLD {kld.value:.5f} ± {kld.standard_error:.5f}, "
            f"99th percentile {high.value:.4f} ± {high.standard_error:.4f}, "
            f"same top token {top.value:.2%} ± {top.standard_error:.2%}, "
            f"PPL {np.exp(self.ln_ppl.value):.4f}, ratio {ppl:.5f} ± "
            f"{ppl * ratio.standard_error:.5f} ({len(self.kld_nats)} chunks)"
        )


def _mean(values: NDArray[np.float64]) -> Measured:
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Measured(float(values.mean()), error)
