"""Predicted loss in nats per token: sensitivity of the tensor times the error of the type.

``loss(tensor, type) = s(tensor) * error(type)``. Losses add up; the KLD of the whole model is a
convex function of their sum (`kld_nats`), so that the least sum also has the least KLD. The error
of a type is relative and squared (linearity theorem: HIGGS, arXiv 2411.17525), on Gaussian rows
where nothing else is known (``type_error.json``), and otherwise pooled from published runs of whole
models at one type. Sensitivities come from `Prior`, and from measurements of the model itself where
there are any. Fitted numbers are in ``quality.json``, with their provenance and how well they
predict families that were left out.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantplan.costs import load_data
from quantplan.costs.evidence import (
    FEWEST_FOR_A_FLOOR,
    Evidence,
    Link,
    can_be_halved,
    fit_curve,
    fit_singles,
)
from quantplan.costs.explanation import Estimate, Explanation
from quantplan.costs.resampling import resamples
from quantplan.costs.sensitivity import Prior
from quantplan.inventory import Inventory, Tensor
from quantplan.words import listed

# Resamples of measured chunks that an upper end is taken from; a standard deviation is then known
# to a tenth.
_RESAMPLES = 50


def _usual_ratios(ratios: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Geometric mean of what types do to the weights of each tensor, over Gaussian rows."""
    found: dict[str, list[float]] = defaultdict(list)
    for (name, _), ratio in ratios.items():
        found[name].append(math.log(ratio))
    return {name: math.exp(fmean(values)) for name, values in found.items()}


@cache
def _shipped() -> Mapping[str, Any]:
    data: Mapping[str, Any] = load_data("quality.json")
    return data


def type_errors(data: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Relative squared error by type: pooled from runs of whole models, else on Gaussian rows.

    Args:
        data: Document of the form of ``quality.json``; the shipped one by default.
    """
    pooled = (data or _shipped())["type_error"]
    return {**load_data("type_error.json")["relative_squared_error"], **pooled}


def link(data: Mapping[str, Any] | None = None) -> Link:
    """The function from summed loss to KLD.

    Args:
        data: Document of the form of ``quality.json``; the shipped one by default.
    """
    found = (data or _shipped())["link"]
    return Link(found["curvature"], found["valid_kld_nats"])


def kld_nats(loss_nats: float) -> float:
    """Predicted KLD of the whole model, in nats per token, for the summed loss of its tensors."""
    return link().kld(loss_nats)


class LossTable:
    """Predicted loss of each tensor of one model at each type."""

    def __init__(
        self,
        inventory: Inventory,
        evidence: Evidence | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Computes the sensitivity of every quantizable, loaded tensor.

        Args:
            inventory: The model.
            evidence: What was measured of it; nothing by default.
            data: Fitted constants in the form of ``quality.json``; the shipped ones by default.
        """
        data = data or _shipped()
        self._inventory = inventory
        self._link = link(data)
        self._sd: dict[str, Any] = data["ln_sd"]
        self._tested = set(data["type_error"])
        self._prior = Prior(data)
        self._alike: tuple[str, ...] = tuple(self._prior.same_shape(inventory).get("models", ()))
        self._borrowed = self._prior.borrowed(inventory)
        self._family_is_known = self._prior.scale.is_known(inventory)
        self._curve_prior = self._prior.scale.curve(inventory)
        self._scale_sd = self._curve_prior.ln_scale_sd
        self._prior_s = self._prior.sensitivities(inventory)
        self._errors: Mapping[str, float] = type_errors(data)
        self._has_curve = False
        self._resampled: tuple[LossTable, ...] = ()
        plain = copy.copy(self)
        self._use((evidence or Evidence()).of(inventory))
        if self._evidence.upper_sds and self._evidence.holds_out:
            self._resampled = tuple(
                plain._with(one) for one in resamples(self._evidence, "fit", _RESAMPLES)
            )

    def _with(self, evidence: Evidence) -> "LossTable":
        """The table of the same model with evidence, from one that has none."""
        other = copy.copy(self)
        other._use(evidence)
        return other

    def _use(self, evidence: Evidence) -> None:
        """Combines the prior with what was measured."""
        self._evidence = evidence
        self._ratios = _usual_ratios(evidence.weight_errors)
        if evidence.curve:
            self._use_curve()
        self._s = dict(self._prior_s)
        self._ln_sd = {n: math.hypot(self._scale_sd, self._share_sd(n)) for n in self._s}
        # Without what all tensors have in common.
        self._own_sd = {name: self._share_sd(name) for name in self._s}
        # Number of tensors measured together, sensitivity by each measurement alone, ln sd.
        self._singles: dict[str, list[tuple[int, float, float]]] = {}
        self._by_chunk = {
            n for one in evidence.singles if can_be_halved(one.by_chunk) for n in one.tensors
        }
        self._use_singles()

    def _share_sd(self, name: str) -> float:
        """Standard deviation of ln of a tensor's share of the model's sensitivity, by the prior."""
        sds = self._sd_of_shares(name)
        role_class = self._inventory.by_name[name].role_class
        found: float = sds.get("share_by_class", {}).get(role_class, sds["share"])
        return found

    def _sd_of_shares(self, name: str) -> Mapping[str, Any]:
        """Less is unsure of tensors that were measured in models of the same shape."""
        is_alike = name in self._borrowed and "same_shape" in self._sd
        found: Mapping[str, Any] = self._sd["same_shape"] if is_alike else self._sd
        return found

    def _within_sd(self, name: str) -> float:
        """What is left of that where the sum over like tensors of neighbouring layers is known."""
        return self._share_sd(name) * float(self._sd_of_shares(name)["within_group"])

    def _type_sd(self, qtype_name: str) -> float:
        """Standard deviation of ln error of a type; more where no whole model was run at it."""
        tested = "type" if qtype_name in self._tested else "untested_type"
        found: float = self._sd.get(tested, self._sd["type"])
        return found

    def _use_curve(self) -> None:
        """Replaces scale and errors of types by what the model's own curve says."""
        prior = self._curve_prior
        # On the real weights of this model types err as they do in the runs of its curve.
        whole, shown = list(self._prior_s), {*self._evidence.curve, self._evidence.baseline}
        errors = {q: e * self._ratio(whole, q) for q, e in self._errors.items() if q in shown}
        fit = fit_curve(
            self._evidence.curve, self._evidence.baseline, errors, self._link,
            type_sd=self._sd["type"], prior=prior, height_sd=self._evidence.curve_ln_sd,
        )  # fmt: skip
        self._has_curve = True
        # Many types average their scatter out, but not what the curve's form leaves open.
        own_sd = math.hypot(fit.ln_scale_sd, self._sd["scale_with_curve"])
        self._scale_sd = min(own_sd, prior.ln_scale_sd)
        shift = fit.ln_scale - prior.ln_scale
        self._prior_s = {n: s * math.exp(shift) for n, s in self._prior_s.items()}
        own_errors = {
            name: self._errors[name] * math.exp(d) for name, d in fit.ln_deviation.items()
        }
        self._errors = {**self._errors, **own_errors}

    def _ratio(self, names: Collection[str], qtype_name: str) -> float:
        """Error of a type on the weights of some tensors over that of the type, by loss."""
        if not self._ratios:
            return 1.0
        total = sum(self._prior_s[name] for name in names)
        return sum(self._prior_s[n] * self._ratio_of(n, qtype_name) for n in names) / total

    def _ratio_of(self, name: str, qtype_name: str) -> float:
        """The same of one tensor; types that were not measured err as the others do there."""
        found = self._evidence.weight_errors.get((name, qtype_name))
        return self._ratios.get(name, 1.0) if found is None else found

    def _use_singles(self) -> None:
        """Combines prior and measured sensitivities, weighted by one over their variances.

        Many measurements together are scaled to the sum that the prior gives their tensors: the
        noise floor and the lack of additivity falsify their sum more than their proportions.
        """
        usable = [
            replace(single, tensors=names)
            for single in self._evidence.singles
            if (names := tuple(name for name in single.tensors if name in self._s))
            and single.qtype in self._errors
        ]
        found = fit_singles(
            usable,
            lambda one: self._errors[one.qtype] * self._ratio(one.tensors, one.qtype),
            self._link,
            self._sd["single"],
        )
        offset = scale_sd = 0.0
        if len(found) >= FEWEST_FOR_A_FLOOR:
            by_prior = sum(self._s[name] for single in found for name in single.tensors)
            offset = math.log(by_prior / sum(math.exp(s.ln_sensitivity) for s in found))
            scale_sd = self._scale_sd
        for single in found:
            measured, names = single.ln_sensitivity + offset, single.tensors
            total, prior_total = (
                sum(of[name] for name in names) for of in (self._s, self._prior_s)
            )
            shares = {name: self._s[name] / total for name in names}
            squares = sum(share**2 for share in shares.values())
            own = single.ln_sd**-2
            prior = 1 / sum(shares[name] * self._ln_sd[name] ** 2 for name in names)
            for name in names:
                alone = self._prior_s[name] / prior_total * math.exp(measured)
                # Of what is measured together, the sum is known, and not who has how much of it.
                rest = max(0.0, squares + 1 - 2 * shares[name])
                inside = self._within_sd(name) * math.sqrt(rest)
                self._singles.setdefault(name, []).append(
                    (len(names), alone, math.hypot(single.ln_sd, inside))
                )
                self._s[name] *= math.exp(own / (own + prior) * (measured - math.log(total)))
                self._own_sd[name] = math.hypot((own + prior) ** -0.5, inside)
                self._ln_sd[name] = math.hypot(self._own_sd[name], scale_sd)

    def error(self, tensor: Tensor, qtype_name: str) -> float:
        """Relative squared error of a type on a tensor; of its real weights where measured.

        Raises:
            KeyError: The type was never measured.
        """
        return self._ratio_of(tensor.name, qtype_name) * self._errors[qtype_name]

    def loss_nats(self, tensor: Tensor, qtype_name: str) -> float:
        """Predicted loss in nats per token when the tensor has the type.

        A tensor that keeps its source type, is not quantizable or is not loaded costs nothing.
        Where the evidence asks for the upper end, the loss is so many standard deviations above
        what is expected, those of the sensitivity and of the type; that of the whole model's scale
        says nothing about which answer is better.

        Raises:
            KeyError: The error of the type was never measured.
        """
        if qtype_name == tensor.qtype or tensor.name not in self._s:
            return 0.0
        loss = self._s[tensor.name] * self.error(tensor, qtype_name)
        if not self._evidence.upper_sds:
            return loss
        if self._resampled and tensor.name in self._by_chunk:
            return self._upper_nats(tensor, qtype_name)
        own = math.hypot(self.own_ln_sd(tensor), self._type_sd(qtype_name))
        return loss * math.exp(self._evidence.upper_sds * own)

    def _upper_nats(self, tensor: Tensor, qtype_name: str) -> float:
        """Mean over resamples, and so many standard deviations: theirs and those of the model."""
        losses: NDArray[np.float64] = np.array(
            [one._s[tensor.name] * one.error(tensor, qtype_name) for one in self._resampled]
        )
        mean = float(losses.mean())
        of_model = mean * math.hypot(self.single_ln_sd, self._type_sd(qtype_name))
        return mean + self._evidence.upper_sds * math.hypot(float(losses.std()), of_model)

    def ln_sd(self, tensor: Tensor, qtype_name: str) -> float:
        """Standard deviation of the logarithm of a loss; 0 where there is none."""
        if self.loss_nats(tensor, qtype_name) == 0:
            return 0.0
        return math.hypot(self._ln_sd[tensor.name], self._type_sd(qtype_name))

    def own_ln_sd(self, tensor: Tensor) -> float:
        """Standard deviation of ln sensitivity without what is common to all tensors."""
        return self._own_sd.get(tensor.name, 0.0)

    @property
    def scale_ln_sd(self) -> float:
        """Standard deviation of the logarithm of what all losses of the model share."""
        return self._scale_sd

    @property
    def single_ln_sd(self) -> float:
        """Standard deviation of ln loss of one measurement, far above the noise."""
        found: float = self._sd["single"]
        return found

    def model_kld_nats(self, qtypes: Mapping[str, str]) -> float:
        """Predicted KLD of the model with the types given by full tensor name, others kept."""
        by_name = self._inventory.by_name
        return self._link.kld(sum(self.loss_nats(by_name[n], q) for n, q in qtypes.items()))

    def difference_nats(
        self, qtypes: Mapping[str, str], others: Mapping[str, str]
    ) -> tuple[float, float]:
        """Summed loss of the model in some types less that in other ones, and how sure that is.

        What is common to both does not count: the scale of the model, and tensors of one type. Of
        the rest, errors of sensitivities are taken as common to the tensors of a class, and errors
        of types as common to all tensors of the type, which is the careful end: were they
        independent, they would average out.

        Args:
            qtypes: Type by full tensor name; tensors left out are kept.
            others: The same for what it is compared with.

        Returns:
            The difference in nats, and its standard deviation.
        """
        by_class: dict[str, float] = defaultdict(float)
        by_type: dict[str, float] = defaultdict(float)
        total = 0.0
        for tensor in self._inventory.tensors:
            one, other = (names.get(tensor.name, tensor.qtype) for names in (qtypes, others))
            if one == other or tensor.name not in self._s:
                continue
            losses = self.loss_nats(tensor, one), self.loss_nats(tensor, other)
            total += losses[0] - losses[1]
            by_class[tensor.role_class] += (losses[0] - losses[1]) * self.own_ln_sd(tensor)
            by_type[one] += losses[0] * self._type_sd(one)
            by_type[other] -= losses[1] * self._type_sd(other)
        return total, math.hypot(*by_class.values(), *by_type.values())

    def explain(self, tensor: Tensor, qtype_name: str) -> Explanation:
        """Says which evidence gave one entry of the table.

        Raises:
            KeyError: The error of the type was never measured.
        """
        error = self.error(tensor, qtype_name)
        prior = self._prior_s.get(tensor.name, 0.0)
        known = "measured" if self._family_is_known else "never measured"
        if tensor.name in self._borrowed:
            known += f", tensors as in {listed(self._alike)}"
        scale = ", scaled to the model's own curve" if self._has_curve else ""
        estimates = [
            Estimate(
                source=f"prior from metadata, family {known}{scale}",
                loss_nats=prior * error,
                ln_sd=math.hypot(self._scale_sd, self._share_sd(tensor.name)),
            )
        ]
        for together, sensitivity, ln_sd in self._singles.get(tensor.name, ()):
            what = f"measured with {together - 1} others" if together > 1 else "measured alone"
            estimates.append(Estimate(source=what, loss_nats=sensitivity * error, ln_sd=ln_sd))
        terms = self._prior.terms(tensor, self._inventory)
        if prior:
            rest = math.log(prior) - sum(terms.values())
            terms["the model's scale, over the sum of these products of all tensors"] = rest
        return Explanation(
            tensor=tensor.name,
            qtype=qtype_name,
            loss_nats=self.loss_nats(tensor, qtype_name),
            ln_sd=self.ln_sd(tensor, qtype_name),
            sensitivity_nats=self._s.get(tensor.name, 0.0),
            error=error,
            share=self._s.get(tensor.name, 0.0) / sum(self._s.values()),
            terms=terms,
            estimates=tuple(estimates),
        )
