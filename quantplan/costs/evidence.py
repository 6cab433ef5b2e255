"""Measurements of one model, and what they say about its sensitivities and its curve over types.

Everything is in units of loss: a KLD of the whole model, minus what any change at all costs (the
noise floor), through the inverse of the link from summed loss to KLD.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from quantplan.errors import InputError
from quantplan.inventory import Inventory
from quantplan.qtypes import QTYPES

# Scatter of types beyond so many standard deviations counts linearly: some runs are broken.
_HUBER_SDS = 2.0
_CURVE_STEPS, _LARGEST_STEP = 60, 0.7
# A median absolute deviation times this is a standard deviation, where the rest is Gaussian.
_ROBUST = 1.4826
# A KLD of less than so many floors says little about its type, and no type is further from the
# pooled one than so many standard deviations.
_CLEAR_FLOORS, _MOST_SDS = 1.5, 3
_CONVERGED = 1e-4
# The floor of single measurements, and the least that it scatters by, relatively.
_FLOOR_PERCENTILE, _LEAST_FLOOR_SCATTER = 5, 0.02
# Each text must have so many chunks to hold half of them out: two show a standard error.
_FEWEST_CHUNKS = 4
# More than this share of tensors that a model lacks are another model's. Tables of one model may
# lack and have the parts of a converted attention, a tenth of all (DeepSeek-V3's kv_b).
_MOST_FOREIGN = 0.2
# Relative squared error that no type seems to go below, since activations are rounded too: KLDs of
# SmolLM2-135M by llama.cpp on a CPU at Q8_0 over sensitivities, of the whole model (0.8e-4), of its
# embedding (1.25e-4) and of blk.3.ffn_down (1.5e-4).
_ACTIVATION_ERROR = 1.1e-4
# Fewer measurements than this show no floor, and their sum says nothing of the whole model.
FEWEST_FOR_A_FLOOR = 20

ByChunk = tuple[tuple[float, ...], ...]
"""KLD of every chunk, in nats per token, text by text."""


def can_be_halved(by_chunk: ByChunk) -> bool:
    """Whether each text has enough chunks for two halves with standard errors."""
    return bool(by_chunk) and min(map(len, by_chunk)) >= _FEWEST_CHUNKS


@dataclass(frozen=True, slots=True)
class Measurement:
    """KLD of the whole model when only some tensors have a low type.

    Attributes:
        tensors: Full names of the tensors that had it at the same time.
        qtype: The type, upper case.
        kld_nats: Mean KLD from the baseline, in nats per token, noise floor included.
        standard_error_nats: Of the mean, over parts of the text; 0 where it is not known.
        by_chunk: The KLD of each chunk that the mean is over; empty where it is not known.
    """

    tensors: tuple[str, ...]
    qtype: str
    kld_nats: float
    standard_error_nats: float = 0.0
    by_chunk: ByChunk = ()


@dataclass(frozen=True)
class Evidence:
    """What was measured of one model.

    Attributes:
        curve: KLD of the whole model at one type, by type, noise floor included.
        curve_by_chunk: The same for each chunk of the text, where it is known.
        curve_ln_sd: What the text leaves unsure of the curve's height, in ln; 0 where not known.
        baseline: Type that the KLDs are relative to, where it is quantized itself.
        singles: KLDs with a few tensors at a low type.
        weight_errors: Error of a type on the real weights over that on Gaussian rows, by tensor
            name and type.
        shapes: Shapes of the tensors that were measured, by name, where they are known.
        files: Where the measurements were read from, for provenance.
        gaps: What of it does not count, does not go together, or is not covered of the model, in
            words; `of` adds to them.
        upper_sds: Losses count as so many of their standard deviations above what is expected. A
            plan against the upper end prefers what is known well. Deviations of what was measured
            chunk by chunk are those of the mean loss over resamples of the chunks; of all else
            those of its logarithm, without what is common to all tensors, the model's scale.
    """

    curve: Mapping[str, float] = field(default_factory=dict)
    curve_by_chunk: Mapping[str, ByChunk] = field(default_factory=dict)
    curve_ln_sd: float = 0.0
    baseline: str | None = None
    singles: tuple[Measurement, ...] = ()
    weight_errors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    upper_sds: float = 0.0

    @property
    def holds_out(self) -> bool:
        """Whether anything was measured in enough chunks to hold half of them out."""
        own = [*self.curve_by_chunk.values(), *(one.by_chunk for one in self.singles)]
        return any(map(can_be_halved, own))

    def of(self, inventory: Inventory) -> "Evidence":
        """What is about tensors of a model, and of types that are known.

        Raises:
            InputError: Shapes differ, or the model lacks more than a fifth of the tensors: the
                evidence is of another model.
        """
        known = inventory.by_name
        odd = [n for n, shape in self.shapes.items() if n in known and known[n].shape_ne != shape]
        files = f" in {', '.join(self.files)}" if self.files else ""
        if odd:
            raise InputError(
                f"what was measured{files} is of another model than {inventory.name}: {odd[0]} has "
                f"the shape {self.shapes[odd[0]]} there and {known[odd[0]].shape_ne} here, and "
                f"{len(odd) - 1} more tensors differ. Measure this model, or leave it out"
            )
        single_names = {name for one in self.singles for name in one.tensors}
        weight_names = {name for name, _ in self.weight_errors}
        gaps = list(self.gaps)
        for names in (single_names, weight_names):
            foreign = sorted(names - known.keys())
            if len(foreign) > _MOST_FOREIGN * len(names):
                raise InputError(
                    f"what was measured{files} is of another model than {inventory.name}, which "
                    f"has no {foreign[0]}, nor {len(foreign) - 1} more of the {len(names)} "
                    "tensors. Measure this model, or leave it out"
                )
            if foreign:
                gaps.append(f"{len(foreign)} tensors that the model lacks left out")
        types = {*self.curve, *(one.qtype for one in self.singles)}
        unknown = sorted(types - QTYPES.keys())
        if unknown:
            gaps.append(f"no such types, left out: {', '.join(unknown)}")
        layers = {known[name].layer for name in single_names & known.keys()} - {None}
        n_layers = inventory.architecture.n_loaded_layers
        if 0 < len(layers) < n_layers:
            gaps.append(f"tensors of {len(layers)} of {n_layers} layers")
        return replace(
            self,
            curve={name: kld for name, kld in self.curve.items() if name in QTYPES},
            singles=tuple(
                replace(one, tensors=tuple(n for n in one.tensors if n in known))
                for one in self.singles
                if one.qtype in QTYPES and not known.keys().isdisjoint(one.tensors)
            ),
            weight_errors={key: r for key, r in self.weight_errors.items() if key[0] in known},
            gaps=tuple(dict.fromkeys(gaps)),
        )

    def describe(self) -> str:
        """What there is, in a few words."""
        n_tensors = len({tensor for tensor, _ in self.weight_errors})
        parts = [
            f"the KLD of {len(self.curve)} types" if self.curve else "",
            f"{len(self.singles)} measurements of tensors" if self.singles else "",
            f"errors on the weights of {n_tensors} tensors" if n_tensors else "",
        ]
        found = ", ".join(part for part in (*parts, *self.gaps) if part) or "metadata alone"
        if self.holds_out:
            found += ", with half of the chunks held out"
        if self.files:
            found += f" (from {', '.join(self.files)})"
        if self.upper_sds:
            found += f", {self.upper_sds:.2f} standard deviations up"
        return found


@dataclass(frozen=True, slots=True)
class Link:
    """From summed loss to KLD: ``KLD = loss + curvature * loss**2``.

    Low-bit damage is super-additive. Fitted up to ``valid_kld_nats``; beyond that the model is
    broken and a prediction says only that.
    """

    curvature: float
    valid_kld_nats: float

    def kld(self, loss_nats: float) -> float:
        """KLD of the whole model, in nats per token, for a summed loss."""
        return loss_nats + self.curvature * loss_nats**2

    def loss(self, kld_nats: float) -> float:
        """The summed loss that gives a KLD."""
        root = math.sqrt(1 + 4 * self.curvature * max(kld_nats, 0.0))
        return (root - 1) / (2 * self.curvature)


@dataclass(frozen=True, slots=True)
class CurvePrior:
    """What is expected of a model's curve over types before any of it is measured.

    Attributes:
        ln_scale: Logarithm of the loss per unit of relative squared error.
        ln_scale_sd: Its standard deviation.
        ln_floor: Logarithm of the noise floor, in nats per token.
        ln_floor_sd: Its standard deviation.
    """

    ln_scale: float
    ln_scale_sd: float
    ln_floor: float
    ln_floor_sd: float


@dataclass(frozen=True, slots=True)
class CurveFit:
    """What a curve over types says, together with what was expected of it.

    Attributes:
        ln_scale: Logarithm of the loss per unit of relative squared error.
        ln_scale_sd: Its standard deviation.
        floor_nats: Noise floor.
        ln_deviation: How far the error of a type is from the pooled one, by type.
    """

    ln_scale: float
    ln_scale_sd: float
    floor_nats: float
    ln_deviation: Mapping[str, float]


def fit_curve(
    curve: Mapping[str, float],
    baseline: str | None,
    errors: Mapping[str, float],
    link: Link,
    *,
    type_sd: float,
    prior: CurvePrior,
    height_sd: float = 0.0,
) -> CurveFit:
    """Scale, floor and deviations per type of a measured curve over types.

    Scale and floor are the most probable ones, for ``KLD = floor + link(scale * (error(type) +
    error(baseline)))`` with a prior for each; quantization errors of baseline and model are
    independent. Deviations of types shrink by the scatter that the model's own curve shows beyond
    that between models, and end at three of the latter.

    Args:
        curve: KLD by type, in nats per token.
        baseline: Type that the KLDs are relative to; None for an unquantized one.
        errors: Pooled relative squared error by type.
        link: From summed loss to KLD.
        type_sd: Standard deviation of ln error of a type between models.
        prior: What metadata say of scale and floor. A few types cannot tell one from the other.
        height_sd: Standard deviation of ln KLD that all measurements have in common, from the text.

    Raises:
        InputError: No type of the curve is known, or none has a KLD above zero.
    """
    # A type at least as good as the baseline says nothing about the loss.
    base = errors.get(baseline or "", 0.0)
    known = [q for q, kld in curve.items() if q in errors and kld > 0 and errors[q] > base]
    if not known:
        raise InputError(
            f"the measured curve over types ({', '.join(curve)}) says nothing: no type of it is "
            f"known and worse than {baseline or 'the unquantized model'}"
        )
    kld = np.array([curve[q] for q in known])
    total = np.array([errors[q] + base for q in known])
    used = kld < link.valid_kld_nats if (kld < link.valid_kld_nats).any() else kld > 0
    ln_scale, ln_scale_sd, floor = _solve_curve(
        np.log(kld[used]), total[used], link, type_sd=type_sd, prior=prior, height_sd=height_sd
    )
    raw = {}
    for name, value in zip(known, kld, strict=True):
        own = link.loss(float(value) - floor) / math.exp(ln_scale) - base
        if value > _CLEAR_FLOORS * floor and own > 0:
            raw[name] = math.log(own / errors[name])
    scatter = _ROBUST * median(abs(d) for d in raw.values()) if raw else 0.0
    share = type_sd**2 / (type_sd**2 + max(scatter**2 - type_sd**2, 0.0))
    limit = _MOST_SDS * type_sd
    shrunk = {name: share * min(max(d, -limit), limit) for name, d in raw.items()}
    return CurveFit(ln_scale, ln_scale_sd, floor, shrunk)


def _solve_curve(
    ln_kld: NDArray[np.float64],
    total: NDArray[np.float64],
    link: Link,
    *,
    type_sd: float,
    prior: CurvePrior,
    height_sd: float,
) -> tuple[float, float, float]:
    """Gauss-Newton for ln scale, ln floor and the height that the text gives all KLDs alike.

    Returns:
        Ln scale, its standard deviation, and the floor in nats.
    """
    mean = np.array([prior.ln_scale, prior.ln_floor, 0.0])
    # The height has no variance where the text's is not known.
    precision = np.array([prior.ln_scale_sd, prior.ln_floor_sd, max(height_sd, 1e-4)]) ** -2.0
    theta = mean.copy()
    for _ in range(_CURVE_STEPS):
        loss, floor = math.exp(theta[0]) * total, math.exp(theta[1])
        predicted = floor + loss + link.curvature * loss**2
        slope = np.stack(
            [
                (loss + 2 * link.curvature * loss**2) / predicted,
                floor / predicted,
                np.ones_like(loss),
            ],
            axis=1,
        )
        miss = ln_kld - np.log(predicted) - theta[2]
        weight = type_sd**-2 / np.maximum(1.0, np.abs(miss) / (_HUBER_SDS * type_sd))
        normal = slope.T @ (slope * weight[:, None]) + np.diag(precision)
        step = np.linalg.solve(normal, slope.T @ (weight * miss) + precision * (mean - theta))
        theta += np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        if np.abs(step).max() < _CONVERGED:
            break
    sd = math.sqrt(float(np.linalg.inv(normal)[0, 0]))
    return float(theta[0]), sd, math.exp(float(theta[1]))


@dataclass(frozen=True, slots=True)
class Single:
    """One measurement of a few tensors, as a sensitivity.

    Attributes:
        tensors: Full names.
        ln_sensitivity: Logarithm of their summed loss per unit of error.
        ln_sd: Its standard deviation.
    """

    tensors: tuple[str, ...]
    ln_sensitivity: float
    ln_sd: float


def fit_singles(
    singles: Iterable[Measurement],
    error: Callable[[Measurement], float],
    link: Link,
    single_sd: float,
) -> list[Single]:
    """Sensitivities from measurements of single tensors, the noise floor of each type removed.

    The floor is the 5th percentile of all KLDs at the type; its spread below the median of what is
    above it bounds what can be told from noise. KLDs of zero or below count as what can be told
    from noise, and where nothing says how much that is they do not count. Types of many bits err
    less than the rounding of activations beside them, and so say little.

    Args:
        singles: Measurements.
        error: Relative squared error of the type on the tensors of a measurement.
        link: From summed loss to KLD.
        single_sd: Standard deviation of ln loss of one measurement far above the floor.
    """
    found = []
    by_type: dict[str, list[Measurement]] = {}
    for one in singles:
        if one.kld_nats > 0 or one.standard_error_nats > 0:
            by_type.setdefault(one.qtype, []).append(one)
    for ones in by_type.values():
        kld = np.array([one.kld_nats for one in ones])
        has_floor = len(ones) >= FEWEST_FOR_A_FLOOR
        floor = max(0.0, float(np.percentile(kld, _FLOOR_PERCENTILE))) if has_floor else 0.0
        noise = max(floor - float(kld.min()), _LEAST_FLOOR_SCATTER * floor)
        for one in ones:
            least = noise if one.kld_nats > 0 else max(noise, one.standard_error_nats)
            above = max(one.kld_nats - floor, least, 1e-9)
            own = error(one)
            shown = max(own, _ACTIVATION_ERROR)
            of_text = math.hypot(noise, one.standard_error_nats) / above
            sd = math.hypot(single_sd, of_text, math.log(shown / own))
            found.append(Single(one.tensors, math.log(link.loss(above) / shown), sd))
    return found
