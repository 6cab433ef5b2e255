"""Rules about types and places, as data: floors, ties, what may leave the GPU, and why."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from quantplan.errors import InputError
from quantplan.inventory import RoleClass, Tensor
from quantplan.qtypes import QType, fitting_qtype, qtype
from quantplan.schema import Frozen

SOURCE = "SOURCE"
"""The candidate that keeps a tensor as it is in the source."""


class Rule(Frozen):
    """What holds for some classes of tensors.

    Attributes:
        classes: Role classes that the rule is about.
        floor: Type with the fewest bits per weight that is allowed; None for no floor.
        usual: Type that people give such tensors by hand; used for tensors that are not loaded.
        may_leave_gpu: Whether the tensors may be in RAM while their layer is on a GPU.
        why: The reason.
    """

    classes: tuple[RoleClass, ...]
    floor: str | None
    usual: str
    may_leave_gpu: bool
    why: str


class Policy(Frozen):
    """A named set of rules.

    Attributes:
        name: Name of the preset.
        why: What it is for.
        candidates: Types to choose from, before row fallbacks; ``SOURCE`` keeps a tensor.
        ties: Sets of roles that share type and device within a layer.
        ties_why: The reason for the ties.
        decode_price_nats_per_s: Loss that a second per token is worth where no speed is asked for.
        decode_price_why: The reason for the price.
        rules: One rule per role class.
    """

    name: str
    why: str
    candidates: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    ties_why: str
    decode_price_nats_per_s: float
    decode_price_why: str
    rules: tuple[Rule, ...]

    def rule(self, role_class: RoleClass) -> Rule:
        """The rule for a class of tensors."""
        return next(rule for rule in self.rules if role_class in rule.classes)

    def candidates_for(self, tensor: Tensor, *, is_loaded: bool) -> tuple[str, ...]:
        """Types that a tensor may get, row fallbacks applied, most bits first.

        A tensor that no quantizer touches, or that is quantized already, keeps its type. One that
        the runtime does not load gets its usual type. One that no candidate fits keeps its type.
        """
        source = qtype(tensor.qtype)
        if not tensor.is_quantizable or not source.is_float:
            return (tensor.qtype,)
        rule = self.rule(tensor.role_class)
        floor = qtype(rule.floor).bpw if rule.floor else 0.0
        names = self.candidates if is_loaded else (rule.usual,)
        found: dict[str, QType] = {}
        for name in names:
            fits = source if name == SOURCE else fitting_qtype(name, tensor.shape_ne[0])
            if fits and floor <= fits.bpw <= source.bpw and (name == SOURCE or not fits.is_float):
                found[fits.name] = fits
        ordered = sorted(found.values(), key=lambda kind: -kind.bpw)
        return tuple(kind.name for kind in ordered) or (tensor.qtype,)


@cache
def _presets() -> dict[str, Any]:
    text = files("quantplan").joinpath("data/policies.json").read_text(encoding="utf-8")
    presets: dict[str, Any] = json.loads(text)
    return presets


def policy(name: str = "quality") -> Policy:
    """A policy preset.

    Raises:
        InputError: There is no such preset.
    """
    presets = _presets()
    if name not in presets:
        raise InputError(f"unknown policy {name!r}; known are {', '.join(presets)}")
    return Policy(name=name, **presets[name])
