"""Published measurements are read as their authors wrote them."""

from typing import Any

import pytest

from benchmarks.speed_cases import UnusableError, read_case, read_cases
from benchmarks.speed_recipes import types_from_counts, types_from_name, types_in
from benchmarks.validate_speed import spearman, totals
from quantplan import read_inventory as read
from quantplan import stock_mix
from quantplan.costs.factors import shipped

AIR = read("GLM-4.5-Air")


def row(**changes: Any) -> dict[str, Any]:
    """A measurement with some fields changed."""
    hardware = {"cpu": "AMD Ryzen 9950X (16c)", "ram": "96GB DDR5-6400", "ram_bw_gbs": 86}
    return {
        "id": "A1",
        "kind": "speed",
        "engine": "llama.cpp b6181",
        "model": "GLM 4.5 Air",
        "quant": "Q4_K_M",
        "file_size_gib": None,
        "placement": "-ot exps=CPU",
        "flags": "-ngl 99 -ot exps=CPU -ub 1024 -ctk q8_0 -ctv q8_0 -t 8",
        "hardware": hardware | {"gpus": "2x RTX 3090 24GB"},
        "pp": {"n": 2048, "depth": 0, "tps": 400.0},
        "tg": {"n": 128, "depth": 0, "tps": 12.0},
        "sweep": None,
        "source": "someone/something#12 (https://...): line 3",
    } | changes


def test_a_row_becomes_a_case() -> None:
    """Model, types, placement, machine, workload and speeds are those of the row."""
    case = read_case(row())
    assert (case.thread, case.where, case.runtime) == (
        "someone/something#12",
        "hybrid",
        "llama.cpp",
    )
    assert [gpu.model for gpu in case.machine.gpus] == ["RTX 3090", "RTX 3090"]
    assert case.machine.ram.bandwidth_bytes_per_s == 86e9
    assert case.machine.ram.flops_per_s == pytest.approx(8 * 134e9)
    assert (case.workload.ubatch, case.workload.kv_type_k) == (1024, "q8_0")
    assert [(m.depth, m.tps) for m in case.decode] == [(64, 12.0)]
    assert [(m.depth, m.n_tokens) for m in case.prefill] == [(512, 1024)]
    experts = [r for r in case.traffic.reads["CPU"] if r.is_expert]
    assert sum(r.held_weights for r in experts) == pytest.approx(45 * 3 * 4096 * 1408 * 128)


@pytest.mark.parametrize(
    ("changes", "where", "n_hops"),
    [
        ({"flags": "-ngl 99", "placement": "all on GPU", "quant": "IQ2_XXS"}, "gpu", 0.5),
        ({"flags": "-ngl 99 --n-cpu-moe 11"}, "hybrid", 10.5),
        ({"flags": "", "placement": "ffn of layers 10-19 on CPU"}, "hybrid", 10.5),
        ({"flags": "", "placement": "all experts on CPU, rest on GPU"}, "hybrid", 45.5),
        ({"flags": "-t 8", "placement": "CPU only"}, "cpu", 0),
    ],
)
def test_placements_in_flags_or_in_words(
    changes: dict[str, Any], where: str, n_hops: float
) -> None:
    """Placements are read from flags, else from what people say; two GPUs are half a hop apart."""
    hardware = row()["hardware"] | {"gpus": "RTX PRO 6000 Blackwell, RTX PRO 6000 Blackwell"}
    case = read_case(row(**changes, hardware=hardware))
    assert case.where == where
    assert case.traffic.n_crossings == pytest.approx(n_hops)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "abacus"}, "unknown model"),
        ({"quant": "see page"}, "quant is not known"),
        ({"flags": None, "placement": "hybrid (details on page)"}, "placement is not known"),
        ({"hardware": {"gpus": "abacus"}}, "unknown GPU"),
        ({"hardware": {"cpu": None, "ram": None, "gpus": None}}, "bandwidth is not known"),
        ({"pp": None, "tg": None}, "no speed is given"),
        ({"flags": "-ngl 99", "placement": "all on GPU"}, "do not fit"),
        ({"file_size_gib": 500.0}, "does not fit GLM-4.5-Air"),
    ],
)
def test_what_cannot_be_predicted_has_a_reason(changes: dict[str, Any], reason: str) -> None:
    """A row that lacks what a prediction needs is refused with what is missing."""
    with pytest.raises(UnusableError, match=reason):
        read_case(row(**changes))


def test_no_row_is_dropped_silently() -> None:
    """Every row is a case or has a reason, whatever odd things are in it."""
    rows = [row(), row(id="A2", model=None), {"id": "A3"}, row(id="A4", sweep="many")]
    cases, unusable = read_cases(rows)
    assert [c.id for c in cases] == ["A1"]
    assert [identity for identity, _ in unusable] == ["A2", "A3", "A4"]
    assert all(reason for _, reason in unusable)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Q4_K_M", ["Q4_K"]),
        ("UD-IQ2_XXS", ["IQ2_XXS"]),
        ("IQ4_KS_R4 - 4.25 bpw", ["IQ4_KS_R4"]),
        ("experts IQ4_XS, attn Q5_K, output Q6_K", ["IQ4_XS", "Q5_K", "Q6_K"]),
        ("mxfp4 (ggml-org)", ["MXFP4"]),
        ("HQ4_K (someone)", ["Q4_K"]),
    ],
)
def test_names_of_quants(text: str, names: list[str]) -> None:
    """The types that a quant's name speaks of are found in it."""
    assert types_in(text) == names


def test_counts_of_types_are_dealt_out() -> None:
    """Few bits go to the experts, more to the down experts, most to everything else."""
    inventory = read("Qwen3-235B-A22B")
    found = types_from_counts(inventory, {"f32": 471, "iq3_k": 188, "iq4_k": 94, "q8_0": 378})
    assert found["blk.5.ffn_up_exps.weight"] == found["blk.5.ffn_gate_exps.weight"] == "IQ3_K"
    assert found["blk.5.ffn_down_exps.weight"] == "IQ4_K"
    assert found["blk.5.attn_q.weight"] == found["output.weight"] == "Q8_0"


def test_words_beside_a_quants_name() -> None:
    """Types named for experts, attention and output are theirs."""
    found = types_from_name(AIR, "experts IQ4_XS, attn Q5_K, output Q6_K")
    assert found is not None
    assert found["blk.5.ffn_down_exps.weight"] == "Q8_0"  # its rows do not fit IQ4_XS
    assert found["blk.5.ffn_up_exps.weight"] == "IQ4_XS"
    assert (found["blk.5.attn_q.weight"], found["output.weight"]) == ("Q5_K", "Q6_K")


@pytest.mark.parametrize("quant", ["Q4_K_M", "q4_k_m (bartowski)"])
def test_a_stock_mix_is_what_llama_quantize_makes_of_it(quant: str) -> None:
    """A quant that is named like a stock mix has that mix's types, and others have not."""
    assert types_from_name(AIR, quant) == stock_mix(AIR, "Q4_K_M", has_imatrix=True)
    assert types_from_name(AIR, "UD-Q4_K_XL") != stock_mix(AIR, "Q4_K_M", has_imatrix=True)


def test_the_totals_can_be_wrong() -> None:
    """A measurement twice as fast as predicted is an error of a half, and outside the interval."""
    case = read_case(row())
    fast = read_case(row(tg={"n": 128, "depth": 0, "tps": 1e6}))
    found = totals([case, fast], lambda c: shipped(c.runtime))
    assert found["n_decode"] == 2
    assert found["decode_p90_err"] == pytest.approx(0.9, abs=0.1)
    assert found["decode_coverage80"] in (0.0, 0.5)


def test_rank_correlation() -> None:
    """Spearman's rho is 1 for the same order, -1 for the opposite one, and shares ranks of ties."""
    assert spearman([1, 2, 5], [10, 11, 90]) == pytest.approx(1)
    assert spearman([1, 2, 5], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
