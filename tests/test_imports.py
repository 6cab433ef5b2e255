"""The data flow is one straight line: a module imports only from its left."""

import ast
from pathlib import Path

import pytest

import quantplan

ROOT = Path(quantplan.__file__).parent
# From left to right. A package stands for its __init__.
ORDER = [
    "version",
    "lazy",
    "llama_cpp",
    "errors",
    "files",
    "units",
    "threads",
    "folders",
    "schema",
    "given",
    "display",
    "near",
    "words",
    "qtypes",
    "inventory.roles",
    "inventory.keys",
    "inventory.caches",
    "inventory.architecture",
    "inventory",
    "inventory.hub",
    "inventory.header_cache",
    "inventory.remote",
    "inventory.ranges",
    "inventory.header",
    "inventory.catalog.own",
    "inventory.catalog",
    "inventory.sources",
    "inventory.summary",
    "hardware",
    "hardware.network",
    "hardware.table",
    "hardware.unified",
    "hardware.text",
    "hardware.device",
    "hardware.machine",
    "workload",
    "policy",
    "ftypes",
    "ftypes.rules",
    "ftypes.mixes",
    "costs",
    "costs.memory",
    "costs.host",
    "placement",
    "costs.ik_caches",
    "costs.compute",
    "costs.traffic",
    "costs.factors",
    "costs.decode",
    "costs.prefill",
    "costs.speed",
    "costs.calibration",
    "costs.evidence",
    "costs.families",
    "costs.scale",
    "costs.sensitivity",
    "costs.resampling",
    "costs.explanation",
    "costs.quality",
    "planner",
    "planner.goal",
    "planner.groups",
    "planner.times",
    "planner.problem",
    "planner.linear",
    "planner.model",
    "planner.milp",
    "planner.bounds",
    "planner.regions",
    "planner.split",
    "planner.solution",
    "planner.solve",
    "planner.search",
    "planner.context",
    "planner.changes",
    "planner.diagnose",
    "planner.decisions",
    "planner.resampled",
    "formats",
    "formats.regex",
    "formats.rules",
    "formats.llama_cpp",
    "formats.bench_flags",
    "formats.ik_llama",
    "formats.quantize_command",
    "formats.gguf_tool_suite",
    "formats.koboldcpp",
    "formats.lm_studio",
    "formats.launchers",
    "formats.args_notes",
    "formats.llama_args",
    "formats.llama_bench",
    "calibrate",
    "formats.sensitivity_tables",
    "recipe",
    "exchange",
    "difference",
    "configuration",
    "parts",
    "predict",
    "planner.plain",
    "planner.fit",
    "planner.baselines",
    "planner.baseline_tables",
    "planner.outcome",
    "planner.held_out",
    "plans",
    "plans.checks",
    "plans.notes",
    "plans.result",
    "plans.plan",
    "plans.frontier",
    "plans.prices",
    "runtime.locate",
    "runtime.process",
    "usage",
    "plots",
    "page.loss",
    "page.assumptions",
    "page.content",
    "page.others",
    "page",
    "page.document",
    "page.server",
    "quantize.imatrix",
    "quantize.layout",
    "quantize.backend",
    "quantize.ggml",
    "quantize.partial",
    "quantize.check",
    "quantize.convert",
    "quantize.workers",
    "quantize.verify",
    "quantize.external",
    "quantize.apply",
    "quantize",
    "quantize.weights",
    "runtime.sparse",
    "runtime.log",
    "runtime.find",
    "runtime.logits_worker",
    "runtime.saved_logits",
    "runtime.divergence",
    "runtime.perplexity",
    "runtime.memory",
    "runtime.calibrate",
    "runtime.flags",
    "runtime.server",
    "runtime.speed",
    "runtime.bench",
    "runtime.doctor",
    "runtime",
    "hardware.detect",
    "verification",
    "verification.result",
    "verification.verify",
    "verification.learn",
    "serve",
    "measure",
    "measure.groups",
    "measure.halves",
    "measure.runs",
    "measure.threads",
    "measure.conditions",
    "measure.losses",
    "measure.evidence_files",
    "report",
    "printed",
    "schemas",
    "cli.exits",
    "cli.progress",
    "cli.options",
    "cli.machines",
    "cli.measuring",
    "cli.models",
    "cli.planning",
    "cli.quantizing",
    "cli.recipes",
    "cli.running",
    "cli.reporting",
    "cli",
    "cli.__main__",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py") if path.parent != ROOT or
           path.name != "__init__.py"}  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            inside = name.removeprefix("quantplan.")
            if inside != name:
                while inside not in MODULES:
                    inside = inside.rpartition(".")[0]
                found.add(inside)
    return found


def test_every_module_has_its_place_in_the_line() -> None:
    """No module stands outside the order, and the order names no module that is gone."""
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_from_its_left(module: str) -> None:
    """A module knows only modules that stand before it."""
    left = set(ORDER[: ORDER.index(module)])
    assert imported_modules(MODULES[module]) <= left
