"""Text for people: what is in a model, what is in a recipe."""

import math
import shlex
from collections import Counter

from quantplan.costs.explanation import Explanation
from quantplan.inventory import Inventory
from quantplan.recipe import Recipe, are_placed, type_lines
from quantplan.units import gib


def inventory_text(inventory: Inventory) -> str:
    """A model in a few lines: architecture, size, and its tensors by role."""
    arch = inventory.architecture
    experts = f", {arch.n_expert_used} of {arch.n_expert} experts" if arch.n_expert else ""
    nextn = f" + {arch.n_nextn} next-token-prediction" if arch.n_nextn else ""
    rows = [
        f"{inventory.name} ({inventory.source})",
        f"  {arch.name}, {arch.n_loaded_layers} layers{nextn}, width {arch.n_embd}{experts}, "
        f"context {arch.context_length}, vocabulary {inventory.n_vocab}",
        f"  {inventory.n_weights / 1e9:.2f}e9 weights, {gib(inventory.n_bytes)} in "
        f"{len(inventory.tensors)} tensors",
    ]
    found = Counter((t.role, t.shape_ne, t.qtype) for t in inventory.tensors)
    weights = {key: count * math.prod(key[1]) for key, count in found.items()}
    for role, shape_ne, qtype in sorted(weights, key=lambda key: -weights[key]):
        count = found[role, shape_ne, qtype]
        shape = "x".join(map(str, shape_ne))
        share = weights[role, shape_ne, qtype] / inventory.n_weights
        rows.append(f"  {count:4}x {role:24} {shape:>20} {qtype:6} {share:7.2%}")
    return "\n".join(rows)


def recipe_text(recipe: Recipe) -> str:
    """A recipe in a few lines: where it comes from, types and places, flags."""
    made = recipe.provenance
    if made.gap is None:
        origin = [f"{recipe.model}, types from {made.origin} for {made.source}"]
    else:
        origin = [
            f"{recipe.model}, planned by quantplan {made.quantplan_version} from {made.source}",
            f"  {made.status}, proven gap {made.gap:.3%}, policy {made.policy_text}, {made.solver}",
        ]
    return "\n".join(
        [
            *origin,
            "  types and places:" if are_placed(recipe.tensors) else "  types, without places:",
            *(f"    {line}" for line in type_lines(recipe.tensors)),
            *([f"  flags: {shlex.join(recipe.flags)}"] if recipe.flags else []),
        ]
    )


def explanation_text(found: Explanation) -> str:
    """Where one entry of the loss table comes from, in a few lines."""
    rows = [
        f"{found.tensor} at {found.qtype}: loss {found.loss_nats:.3g} nats/token, "
        f"within a factor of {math.exp(found.ln_sd):.2f} (one standard deviation)",
        f"  sensitivity {found.sensitivity_nats:.4g} nats per unit of error "
        f"({found.share:.2%} of the model's), error of the type {found.error:.3g}",
        "  evidence:",
    ]
    rows += [
        f"    {e.source}: {e.loss_nats:.3g} nats, within a factor of {math.exp(e.ln_sd):.2f}"
        for e in found.estimates
    ]
    rows.append("  the prior sensitivity is the product of:")
    rows += [f"    {math.exp(value):8.3g}  {name}" for name, value in found.terms.items()]
    return "\n".join(rows)
