"""The benchmark that judges the loss model: it must be able to lose, and to say why it left out."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantplan import read_inventory as read
from quantplan.costs.quality import LossTable

ROOT = Path(__file__).parents[1]
MODEL = "Qwen3-4B-Instruct-2507"


def write_tables(folder: Path, sign: int) -> None:
    """A model whose tensors and recipes do exactly (or exactly not) what the loss table says."""
    inventory = read(MODEL)
    table = LossTable(inventory)
    matrices = [t for t in inventory.tensors if t.is_quantizable]
    rows = ["tensor,qtype,kld"]
    rows += [f"{t.name},IQ1_M,{1 + sign * table.loss_nats(t, 'IQ1_M')}" for t in matrices]
    rows += [f"all,{q},{table.model_kld_nats({t.name: q for t in matrices})}" for q in ("Q3_K",)]
    (folder / f"{MODEL}.csv").write_text("\n".join(rows))
    (folder / "Unheard-Of-7B.csv").write_text("\n".join(rows))
    with (folder / "recipes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe_id", "model", "bpw_computed", "ppl", "inventory_used"])
        types = {"a": ("Q5_K", "Q4_K"), "b": ("Q3_K", "Q4_K"), "c": ("Q9", "Q9")}
        for name, (ffn, rest) in types.items():
            own = {t.name: ffn if "ffn" in t.role else rest for t in matrices}
            known = {n: q for n, q in own.items() if q != "Q9"}
            ppl = 10 * (1 + sign * table.model_kld_nats(known))
            writer.writerow([name, MODEL, 4.5, ppl, MODEL])
            with gzip.open(folder / "recipes_tensors.csv.gz", "at", newline="") as tensors:
                if name == "a":
                    tensors.write("recipe_id,tensor,qtype,bytes\n")
                tensors.writelines(f"{name},{n},{q.lower()},0\n" for n, q in own.items())


@pytest.mark.parametrize(("sign", "won"), [(1, 1.0), (-1, 0.0)])
def test_it_judges_what_it_is_given(tmp_path: Path, sign: int, won: float) -> None:
    """Data that agree with the shipped constants win, data that say the opposite lose."""
    write_tables(tmp_path, sign)
    command = [sys.executable, ROOT / "benchmarks" / "validate_quality.py", "--no-refit"]
    options = ["--sensitivities", tmp_path, "--recipes", tmp_path / "recipes.csv"]
    done = subprocess.run(
        [*map(str, command), *map(str, options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n_models"] == 1
    assert found["n_pairs"] == 1
    assert found["pairs_right"] == won
    assert found["spearman_min"] * sign > 0.95
    assert found["n_uniform"] == found["uniform_within_1_5"] == 1
    assert "no inventory of it: Unheard-Of-7B" in done.stdout
    assert "no known error of Q9: c" in done.stdout
