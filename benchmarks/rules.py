"""Compares tensor-type files with one rule per tensor, and one per role and type.

Usage: python benchmarks/rules.py [--plan]

Prints, for assignments of every model of the catalog, how many rules and characters the file for
llama-quantize has: as quantplan writes it, with one rule per role and type (layers in an
alternation), and with one rule per tensor. Assignments are llama.cpp's mixes, ranges of layers by
role, and types dealt out to single tensors at random, which hold the most information; ``--plan``
adds a real plan. Exits with 1 if quantplan's file is ever longer, or has more rules, than another,
or if its rules take more than 2 s to write.
"""

import argparse
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import quantplan as qp
from quantplan.formats.llama_cpp import tensor_type_file
from quantplan.inventory.roles import split_layer

LIMIT_S = 2.0
TYPES = ("Q8_0", "Q6_K", "Q4_K", "IQ4_XS")


def by_tensor(qtypes: Mapping[str, str]) -> str:
    """One anchored rule per tensor."""
    return "".join(f"^{re.escape(name)}$={qtype.lower()}\n" for name, qtype in qtypes.items())


def by_role(qtypes: Mapping[str, str]) -> str:
    """One anchored rule per role and type, with every layer by its number."""
    layers: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, qtype in qtypes.items():
        layer, rest = split_layer(name)
        layers[rest.replace(".", r"\."), qtype.lower()] += [] if layer is None else [str(layer)]
    rules = []
    for (rest, qtype), numbers in layers.items():
        inside = rf"blk\.({'|'.join(numbers)})\." if numbers else ""
        rules.append(f"^{inside}{rest}$={qtype}\n")
    return "".join(rules)


def random_types(inventory: qp.Inventory, seed: int) -> dict[str, str]:
    """A random type for every tensor."""
    rng = random.Random(seed)  # noqa: S311 (repeatable, not secret)
    return {t.name: rng.choice(TYPES) for t in inventory.tensors if t.is_quantizable}


def layered_types(inventory: qp.Inventory, seed: int) -> dict[str, str]:
    """For every role, one type and another one in a range of layers."""
    rng = random.Random(seed)  # noqa: S311 (repeatable, not secret)
    tensors = [t for t in inventory.tensors if t.is_quantizable]
    n_layers = inventory.architecture.n_layers
    choices = {
        role: (rng.choice(TYPES), rng.choice(TYPES), sorted(rng.sample(range(n_layers + 1), 2)))
        for role in sorted({t.role for t in tensors})
    }
    found = {}
    for tensor in tensors:
        usual, special, (begin, end) = choices[tensor.role]
        found[tensor.name] = special if begin <= (tensor.layer or 0) < end else usual
    return found


def assignments(
    inventory: qp.Inventory, *, with_plan: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """Kinds of assignments, with the types of all tensors that a quantizer may change."""
    for ftype in ("Q4_K_M", "IQ3_M"):
        types = qp.stock_mix(inventory, ftype)
        yield ftype, {t.name: types[t.name] for t in inventory.tensors if t.is_quantizable}
    yield "layers", layered_types(inventory, 1)
    yield "random", random_types(inventory, 1)
    if with_plan:
        machine = qp.Machine.parse("RTX 4090 + 64GiB@80GB/s")
        yield "plan", qp.plan(inventory, machine).recipe.quantizable_types


def main() -> None:
    """Prints a line per kind of assignment: medians over the models, and the worst ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="plan GLM-4.5-Air, too")
    with_plan = parser.parse_args().plan
    rows: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)
    slowest = 0.0
    for name in qp.catalog_names():
        inventory = qp.read_inventory(name)
        for kind, types in assignments(inventory, with_plan=with_plan and name == "GLM-4.5-Air"):
            began = time.perf_counter()
            texts = [tensor_type_file(types), by_role(types), by_tensor(types)]
            slowest = max(slowest, time.perf_counter() - began)
            rows[kind].append(tuple(n for text in texts for n in (text.count("\n"), len(text))))
    print(f"{'median of the catalog':24}{'quantplan':>16}{'role, type':>16}{'tensor':>16}   worst")
    failed = slowest > LIMIT_S
    for kind, found in rows.items():
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        cells = [f"{medians[i]:.0f} / {medians[i + 1]:.0f}" for i in (0, 2, 4)]
        worst = max(row[1] / min(row[3], row[5]) for row in found)
        failed |= worst > 1 or any(row[0] > min(row[2], row[4]) for row in found)
        print(f"{kind + ', rules / characters':24}" + "".join(f"{c:>16}" for c in cells)
              + f"{worst:8.2f}")  # fmt: skip
    print(f"the slowest took {slowest:.2f} s, limit {LIMIT_S:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
