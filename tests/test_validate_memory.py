"""The benchmark that holds predicted memory against published load logs."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-ngl 99 --cpu-moe -c 4096 -np 1 -fa on"
KEYS = {
    "n",
    "kv_within_1pct",
    "n_kv_within_1pct",
    "gpu_weights_within_0_5pct",
    "n_gpu_weights_within_0_5pct",
    "compute_median_err",
    "n_compute_median_err",
    "compute_p90_err",
    "n_compute_p90_err",
    "vram_within_3pct",
    "n_vram_within_3pct",
}


def case(name: str, model: str, **printed: object) -> dict[str, object]:
    """A load log in the documented format."""
    return {
        "id": name, "kind": "memory", "engine": "llama.cpp", "model": model, "quant": "BF16",
        "source": "https://example.org/log (2026-02-01)", "flags": {}, **printed,
    }  # fmt: skip


def test_the_last_line_is_one_object_of_figures(tmp_path: Path) -> None:
    """A right cache, a cache that is twice too large and a log that is of no use are counted so."""
    cases = [
        case(
            "right",
            "GLM-4.5-Air",
            cmd=f"llama-server -m air.gguf {FLAGS}",
            model_buffers_mib={"CUDA0": 8000.0},
            kv_buffers_mib={"CUDA0": 736.0},
            compute_buffers_mib={"CUDA0": 1000.0},
        ),
        case("wrong", "Qwen3-4B-Instruct-2507", cmd=f"llama-server -m 4b.gguf {FLAGS}",
             kv_buffers_mib={"CUDA0": 288.0}),
        case("unusable", "no such model", kv_buffers_mib={"CUDA0": 1.0}),
    ]  # fmt: skip
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in cases))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/validate_memory.py", "--cases", path],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *rows, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert set(figures) == KEYS
    assert (figures["n"], figures["n_kv_within_1pct"], figures["kv_within_1pct"]) == (2, 2, 0.5)
    assert figures["n_compute_median_err"] == figures["n_vram_within_3pct"] == 1
    assert figures["compute_median_err"] > 0
    assert any("unusable no such model" in row for row in rows)
