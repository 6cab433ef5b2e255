"""Rules about types and places, as data: floors, ties, allowed types, places, and why."""

import json
import re
from collections.abc import Collection
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from quantplan.errors import InputError
from quantplan.inventory import Inventory, RoleClass, Tensor
from quantplan.near import similar, similar_tensors
from quantplan.qtypes import QTYPES, QType, Runtime, fitting_qtype, qtype
from quantplan.schema import Frozen

SOURCE = "SOURCE"
"""The candidate that keeps a tensor as it is in the source."""


class Rule(Frozen):
    """What holds for some classes of tensors.

    Attributes:
        classes: Role classes that the rule is about.
        floor: Type with the fewest bits per weight that is allowed; None for no floor.
        types: The only types allowed, before row fallbacks; None for the policy's candidates.
        usual: Type that people give such tensors by hand; used for tensors that are not loaded.
        may_leave_gpu: Whether the tensors may be in RAM while their layer is on a GPU.
        why: The reason.
    """

    classes: tuple[RoleClass, ...]
    floor: str | None
    types: tuple[str, ...] | None = None
    usual: str
    may_leave_gpu: bool
    why: str


class TensorRule(Frozen):
    """What a person says about single tensors; it takes the place of the rule of their class.

    Attributes:
        pattern: Regular expression, searched in the full tensor name.
        qtypes: The only types allowed, ``SOURCE`` among them; one type is a pin.
    """

    pattern: str
    qtypes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The rule as on the command line, ``regex=type,type``."""
        return f"{self.pattern}={','.join(self.qtypes)}"

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def matches(self, tensor: Tensor) -> bool:
        """Whether the pattern is found in the tensor's name."""
        return self._regex.search(tensor.name) is not None


class Policy(Frozen):
    """A named set of rules.

    Attributes:
        name: Name of the preset.
        why: What it is for.
        candidates: Types to choose from, before row fallbacks; ``SOURCE`` keeps a tensor.
        ik_candidates: The same for ik_llama.cpp.
        ties: Sets of roles that share type and device within a layer.
        ties_why: The reason for the ties.
        decode_price_nats_per_s: Loss that a second per token is worth where no speed is asked for.
        decode_price_why: The reason for the price.
        rules: One rule per role class.
        tensor_rules: What a person said about single tensors; the first that matches decides.
    """

    name: str
    why: str
    candidates: tuple[str, ...]
    ik_candidates: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    ties_why: str
    decode_price_nats_per_s: float
    decode_price_why: str
    rules: tuple[Rule, ...]
    tensor_rules: tuple[TensorRule, ...] = ()

    @cached_property
    def _by_class(self) -> dict[RoleClass, Rule]:
        return {role_class: rule for rule in self.rules for role_class in rule.classes}

    def rule(self, role_class: RoleClass) -> Rule:
        """The rule for a class of tensors."""
        return self._by_class[role_class]

    def allow(self, pattern: str, *qtypes: str) -> "Policy":
        """The policy in which some tensors may have these types and no others.

        Tied tensors stay tied where the same rule is about them. Where several rules match a
        tensor, the first one decides.

        Args:
            pattern: Regular expression, searched in the full tensor name.
            qtypes: Types in any case; ``SOURCE`` for that of the source.

        Raises:
            InputError: The pattern is no regular expression, or a type is unknown.
        """
        named = tuple(name.strip().upper() for name in qtypes)
        faults = [fault for name in dict.fromkeys(named) if (fault := _type_fault(name))]
        if not named:
            faults.append("no type is given")
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(f"{pattern!r} is no regular expression: {error}")
        if not pattern:
            faults.append("the pattern is empty, which every tensor would match")
        if faults:
            raise InputError(f"rule {pattern}={','.join(named)}: {fault}" for fault in faults)
        rule = TensorRule(pattern=pattern, qtypes=named)
        return self.model_copy(update={"tensor_rules": (*self.tensor_rules, rule)})

    def pin(self, pattern: str, qtype_name: str) -> "Policy":
        """The policy in which some tensors have this type and no other; see `allow`.

        Args:
            pattern: Regular expression, searched in the full tensor name.
            qtype_name: The type in any case; ``SOURCE`` for that of the source.

        Raises:
            InputError: The pattern is no regular expression, or the type is unknown.
        """
        return self.allow(pattern, qtype_name)

    def tensor_rule(self, tensor: Tensor) -> TensorRule | None:
        """What a person said about a tensor; None where nothing, or where nothing can change it."""
        if not self.tensor_rules or not _may_change(tensor):
            return None
        return next((rule for rule in self.tensor_rules if rule.matches(tensor)), None)

    def candidates_for(
        self, tensor: Tensor, *, is_loaded: bool, runtime: Runtime = "llama.cpp"
    ) -> tuple[str, ...]:
        """Types that a tensor may get, row fallbacks applied, most bits first.

        A tensor that no quantizer touches, or that is quantized already, keeps its type. One that
        the runtime does not load gets its usual type. One that no candidate fits keeps its type.

        Args:
            tensor: With the type that it has in the source.
            is_loaded: Whether the runtime loads it.
            runtime: The program that will load the model.

        Returns:
            Upper-case names; at least one.
        """
        source = qtype(tensor.qtype)
        if not _may_change(tensor):
            return (tensor.qtype,)
        own = self.tensor_rule(tensor)
        rule = self.rule(tensor.role_class)
        if own is not None:
            kinds = {source if name == SOURCE else qtype(name) for name in own.qtypes}
            names = tuple(kind.name for kind in sorted(kinds, key=lambda kind: -kind.bpw))
            if is_loaded:
                return names
            return (rule.usual,) if rule.usual in names else names[-1:]
        floor = qtype(rule.floor).bpw if rule.floor else 0.0
        offered = rule.types or (self.candidates if runtime == "llama.cpp" else self.ik_candidates)
        names = offered if is_loaded else (rule.usual,)
        found: dict[str, QType] = {}
        for name in names:
            fits = source if name == SOURCE else fitting_qtype(name, tensor.shape_ne[0], runtime)
            if fits and floor <= fits.bpw <= source.bpw and (name == SOURCE or not fits.is_float):
                found[fits.name] = fits
        ordered = sorted(found.values(), key=lambda kind: -kind.bpw)
        return tuple(kind.name for kind in ordered) or (tensor.qtype,)

    def check(
        self,
        inventory: Inventory,
        *,
        priced: Collection[str],
        runtime: Runtime = "llama.cpp",
    ) -> None:
        """Holds the rules about single tensors against a model.

        Args:
            inventory: The model.
            priced: Types whose loss can be predicted.
            runtime: The program that will load the model.

        Raises:
            InputError: A rule matches nothing, or nothing that can be changed; a type fits no row,
                has no known loss, or is not the runtime's. All faults are gathered.
        """
        faults: list[str] = []
        for rule in self.tensor_rules:
            named = [tensor for tensor in inventory.tensors if rule.matches(tensor)]
            tensors = [tensor for tensor in named if _may_change(tensor)]
            if not named:
                hint = similar_tensors(rule.pattern, inventory.by_name)
                faults.append(f"rule {rule.text} matches no tensor of {inventory.name}{hint}")
            elif not tensors:
                faults.append(
                    f"rule {rule.text} matches only tensors that keep their type, such as "
                    f"{named[0].name} ({named[0].qtype}): quantized already, or never quantized"
                )
            for name in dict.fromkeys(rule.qtypes) if tensors else ():
                fault = _misfit(name, tensors, priced, runtime)
                faults += [f"rule {rule.text}: {fault}"] if fault else []
        if faults:
            raise InputError(faults)


def _may_change(tensor: Tensor) -> bool:
    """Whether a quantizer can give a tensor another type."""
    return tensor.is_quantizable and qtype(tensor.qtype).is_float


def _type_fault(name: str) -> str | None:
    if name == SOURCE or (name in QTYPES and QTYPES[name].is_file_target):
        return None
    if not name:
        return "a type is missing: leave out a comma, or write the type beside it"
    known = [known for known, kind in QTYPES.items() if kind.is_file_target]
    return f"there is no type {name!r} for weights{similar(name, known)}"


def _misfit(
    name: str, tensors: list[Tensor], priced: Collection[str], runtime: Runtime
) -> str | None:
    """Why some tensors cannot have a type; None where all can."""
    if name == SOURCE:
        return None
    kind = qtype(name)
    if runtime not in kind.runtimes:
        return f"{runtime} does not load the type {name}"
    others = [tensor for tensor in tensors if tensor.qtype != name]
    if kind.is_float and others:
        return f"{others[0].name} is {others[0].qtype} and stays so, or is quantized; say SOURCE"
    if not kind.is_float and name not in priced:
        return f"the loss of the type {name} is not known"
    odd = [(t, fault) for t in tensors if (fault := kind.row_fault(t.shape_ne[0]))]
    if odd:
        first, fault = odd[0]
        fits = fitting_qtype(name, first.shape_ne[0], runtime)
        instead = f"; llama-quantize would write {fits.name}" if fits else ""
        return f"{fault}, in {first.name} and {len(odd) - 1} more{instead}"
    return None


def parse_rule(text: str) -> tuple[str, tuple[str, ...]]:
    """Pattern and types of a rule such as ``ffn_down_exps=Q5_K,Q6_K``.

    Raises:
        InputError: There is no ``=``.
    """
    pattern, equals, names = text.rpartition("=")
    if not equals:
        raise InputError(f"the rule {text!r} is not regex=type or regex=type,type")
    return pattern, tuple(names.split(","))


@cache
def _presets() -> dict[str, Any]:
    text = files("quantplan").joinpath("data/policies.json").read_text(encoding="utf-8")
    presets: dict[str, Any] = json.loads(text)
    return presets


def policy_names() -> tuple[str, ...]:
    """Names of the presets."""
    return tuple(_presets())


def policy(name: str = "quality") -> Policy:
    """A policy preset.

    Args:
        name: ``quality``, ``compact``, ``free`` or ``hq4k``.

    Raises:
        InputError: There is no such preset.
    """
    presets = _presets()
    if name not in presets:
        raise InputError(f"unknown policy {name!r}; known are {', '.join(presets)}")
    return Policy(name=name, **presets[name])
