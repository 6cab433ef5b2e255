"""ik_llama.cpp: its KV caches, placement and defaults, against published load logs.

The figures are what ik_llama.cpp printed in the public threads named beside them, with the models'
dimensions as the same logs print them.
"""

import datetime
from typing import Any

import pytest

import quantplan as qp
from quantplan.inventory import Inventory, Tensor

THREADS = "https://github.com/ikawrakow/ik_llama.cpp/"
RAM = " + 2000GiB@300GB/s"
LATENT = {
    "block_count": 61, "embedding_length": 7168, "context_length": 163840,
    "attention.head_count": 128, "attention.head_count_kv": 128,
    "attention.key_length": 192, "attention.value_length": 128,
    "attention.kv_lora_rank": 512, "rope.dimension_count": 64,
}  # fmt: skip
# Files made for llama.cpp's latent attention say the same in other words.
LATENT_NEW = LATENT | {
    "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
    "attention.key_length_mla": 192, "attention.value_length_mla": 128,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-R1": ("deepseek2", LATENT),
    "DeepSeek-V3.1": ("deepseek2", LATENT_NEW),
    "Kimi-K2": (
        "deepseek2",
        LATENT | {"attention.head_count": 64, "attention.head_count_kv": 64,
                  "context_length": 131072},
    ),
    "GLM-4.5-Air": (
        "glm4moe",
        {"block_count": 47, "nextn_predict_layers": 1, "embedding_length": 4096,
         "context_length": 131072, "attention.head_count": 96, "attention.head_count_kv": 8,
         "attention.key_length": 128, "attention.value_length": 128},
    ),
    "Qwen3-235B-A22B": (
        "qwen3moe",
        {"block_count": 94, "embedding_length": 4096, "context_length": 40960,
         "attention.head_count": 64, "attention.head_count_kv": 4,
         "attention.key_length": 128, "attention.value_length": 128},
    ),
    "gemma-3-27b": (
        "gemma3",
        {"block_count": 62, "embedding_length": 5376, "context_length": 131072,
         "attention.head_count": 32, "attention.head_count_kv": 16, "attention.key_length": 128,
         "attention.value_length": 128, "attention.sliding_window": 1024},
    ),
    "gpt-oss-120b": (
        "gpt-oss",
        {"block_count": 36, "embedding_length": 2880, "context_length": 131072,
         "attention.head_count": 64, "attention.head_count_kv": 8, "attention.key_length": 64,
         "attention.value_length": 64, "attention.sliding_window": 128},
    ),
    "Laguna-XS-2.1": (
        "laguna",
        {"block_count": 40, "embedding_length": 2048, "context_length": 262144,
         "attention.head_count": 16, "attention.head_count_kv": 8, "attention.key_length": 128,
         "attention.value_length": 128, "attention.sliding_window": 512},
    ),
}  # fmt: skip


def model(name: str, tensors: tuple[Tensor, ...] = ()) -> Inventory:
    architecture, values = MODELS[name]
    metadata = {f"{architecture}.{key}": value for key, value in values.items()}
    return Inventory(
        name=name,
        source=name,
        header_sha256="0" * 64,
        metadata={"general.architecture": architecture} | metadata,
        array_lengths={},
        tensors=tensors,
    )


def kv_mib(
    name: str, flags: str, *, gpus: str = "24GiB", day: str | None = None
) -> dict[str, float]:
    """MiB of KV cache on every device that has some."""
    found = qp.predict(
        model(name),
        flags,
        qp.Machine.parse(gpus + RAM),
        engine="ik_llama.cpp",
        engine_date=datetime.date.fromisoformat(day) if day else None,
    )
    return {use.name: use.kv_bytes / 2**20 for use in found.devices if use.kv_bytes}


@pytest.mark.parametrize(
    ("name", "flags", "day", "mib", "thread"),
    [
        # Latent attention, stored in full, with transposed values, and once.
        ("DeepSeek-R1", "-c 8192 -ctk q8_0 -fa -mla 0", "2025-05-07", 28060, "issues/389"),
        ("Kimi-K2", "-c 512 -mla 1", "2025-07-20", 64.81, "pull/616"),
        ("Kimi-K2", "-c 512", "2025-07-20", 1220, "pull/616"),
        ("DeepSeek-V3.1", "-c 512 -mla 1 -fa", "2025-08-22", 34.31, "issues/651"),
        ("DeepSeek-R1", "-c 41000 -ctk q8_0 -mla 3 -fa", "2025-05-20", 1467.40, "discussions/258"),
        # Sliding windows keep the full context.
        ("gemma-3-27b", "-c 32768 -fa", "2025-04-27", 15872, "discussions/334"),
        # Cells are padded to 256, or to 32 without flash attention.
        ("gpt-oss-120b", "-c 16768", "2025-11-04", 1188, "issues/895"),
        # The cache of the next-token-prediction block was dropped in pull request 843.
        ("GLM-4.5-Air", "-c 64000 -ctk q8_0 -ctv q8_0 -fa", "2025-09-02", 6242.19,
         "discussions/753"),
        # A compacted window has room for one ubatch.
        ("Laguna-XS-2.1", "-c 32768 -ctk q8_0 -ctv q8_0", None, 2720, "pull/2310"),
        ("Laguna-XS-2.1", "-c 32768 -ctk q8_0 -ctv q8_0 --swa-compress", None, 743.75, "pull/2310"),
        ("Laguna-XS-2.1", "-c 262144 -ctk q8_0 -ctv q8_0 --swa-compress", None, 5503.75,
         "pull/2310"),
    ],
)  # fmt: skip
def test_caches_are_what_was_printed(
    name: str, flags: str, day: str | None, mib: float, thread: str
) -> None:
    """KV caches have the size that ik_llama.cpp printed, to the last digit."""
    found = kv_mib(name, flags + " -ngl 99", day=day)
    assert sum(found.values()) == pytest.approx(mib, abs=0.006), THREADS + thread


@pytest.mark.parametrize(
    ("name", "flags", "gpus", "mib", "thread"),
    [
        # One layer for each of three GPUs: -ngl counts the output layer last.
        ("DeepSeek-R1", "-c 512 -ngl 3 -mla 0 -fa off", "24GiB + 24GiB + 24GiB",
         [40, 40, 40, 2320], "discussions/242"),
        ("GLM-4.5-Air", "-c 64000 -ngl 9999 -ts 0.55,0.45 -fa -ctk q8_0 -ctv q8_0",
         "32GiB + 24GiB",
         [3585.95, 2656.26], "discussions/753"),
        ("Kimi-K2", "-c 131072 -ngl 62 -ts 15,25,30,30 -mla 3 -fa -ctk q8_0",
         "24GiB + 24GiB + 24GiB + 24GiB", [765, 1147.51, 1453.51, 1300.51], "issues/756"),
        # This split was left to llama.cpp, which went by free memory.
        ("Qwen3-235B-A22B", "-c 65536 -ngl 63 -ctk q8_0 -fa -ts 49,51", "24GiB + 24GiB",
         [3038.02, 3136.02, 3038], "issues/437"),
    ],
)  # fmt: skip
def test_layers_are_where_they_were(
    name: str, flags: str, gpus: str, mib: list[float], thread: str
) -> None:
    """Every device has the KV cache of its layers; CUDA pads quantized rows by up to 0.05 MiB."""
    found = kv_mib(name, flags, gpus=gpus, day="2025-09-02")
    assert list(found.values()) == pytest.approx(mib, abs=0.05), THREADS + thread


def test_defaults_follow_the_day_of_the_sources() -> None:
    """Flash attention, latent attention and all layers on the GPU came one after the other."""
    context = "-c 8000 -np 1"

    def totals(flags: str, day: str | None) -> tuple[float, bool]:
        found = kv_mib("DeepSeek-R1", flags, day=day)
        return sum(found.values()), "GPU0" in found

    newest = totals(context, None)
    assert newest == totals(f"{context} -mla 3 -fa on -ngl all", None)
    assert totals(context, "2025-11-20") == (newest[0], False)
    assert totals(context, "2025-11-01") == totals(f"{context} -mla 0 -fa on", "2025-11-20")
    before = totals(context, "2025-10-01")
    assert before == totals(f"{context} -mla 0 -no-fa", "2025-11-20")
    assert before[0] == pytest.approx(61 * 8000 * 128 * (192 + 128) * 2 / 2**20)


def test_without_flash_attention_the_latent_row_has_the_type_of_v() -> None:
    """`-mla 2` and 3 without flash attention keep the latent row in the type of V."""
    rows = kv_mib("DeepSeek-R1", "-c 4096 -fa off -mla 2 -ctk q8_0 -ngl 99")
    assert rows == kv_mib("DeepSeek-R1", "-c 4096 -fa off -mla 2 -ctk f16 -ngl 99")


def test_experts_of_the_last_layers_stay_in_ram() -> None:
    """`-ncmoe N` counts layers with experts from the end, where llama.cpp counts from the front."""
    tensors = tuple(
        Tensor(name=f"blk.{layer}.ffn_up_exps.weight", shape_ne=(256, 8, 4), qtype="Q8_0")
        for layer in range(4)
    )
    inventory = model("GLM-4.5-Air", tensors)
    machine = qp.Machine.parse(f"24GiB{RAM}")
    for engine, on_gpu in (("ik_llama.cpp", "blk.0"), ("llama.cpp", "blk.3")):
        flags = f"-ngl 99 -ncmoe 3 -c 256 -ot {on_gpu}=CPU --fit off"
        found = qp.predict(inventory, flags, machine, engine=engine)  # type: ignore[arg-type]
        assert found.devices[0].weights_bytes == 0
        assert found.warnings == ()


def test_its_flags_are_refused_elsewhere() -> None:
    """llama.cpp refuses `-mla`, which means ik_llama.cpp was meant."""
    machine = qp.Machine.parse(f"24GiB{RAM}")
    with pytest.raises(qp.InputError, match=r"-mla is ik_llama\.cpp's"):
        qp.predict(model("DeepSeek-R1"), "-mla 3", machine)


def test_short_flags_are_not_cut_in_two() -> None:
    """`-cb` and `-cnv` are flags of their own, not `-c` with a value."""
    flags = "-cb -cnv -ser 7,1 -khad -c 4096 -mla 3 -ngl 99"
    assert kv_mib("DeepSeek-R1", flags) == kv_mib("DeepSeek-R1", "-c 4096 -mla 3 -ngl 99")


def test_a_kv_type_of_its_own() -> None:
    """`q6_0` is a KV type of ik_llama.cpp, and llama.cpp says so."""
    flags = "-c 4096 -ctk q6_0 -ctv q6_0 -fa on -ngl 99"
    cells = 94 * 4096 * 2 * 512 // 32 * 26
    assert sum(kv_mib("Qwen3-235B-A22B", flags).values()) == cells / 2**20
    with pytest.raises(qp.WorkloadError, match=r"q6_0, which is ik_llama\.cpp's"):
        qp.predict(model("Qwen3-235B-A22B"), flags, qp.Machine.parse(f"24GiB{RAM}"))


def test_its_types_are_not_llama_cpps() -> None:
    """Types that only ik_llama.cpp loads are pointed out for llama.cpp."""
    tensors = (Tensor(name="blk.0.ffn_up.weight", shape_ne=(256, 8), qtype="IQ4_KS"),)
    inventory, machine = model("Qwen3-235B-A22B", tensors), qp.Machine.parse(f"24GiB{RAM}")
    assert "IQ4_KS" in " ".join(qp.predict(inventory, "-c 256", machine).warnings)
    assert qp.predict(inventory, "-c 256", machine, engine="ik_llama.cpp").warnings == ()
