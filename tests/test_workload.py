"""Workloads: what they accept, and how they refuse the rest."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantplan.errors import WorkloadError
from quantplan.llama_cpp import KVType
from quantplan.workload import Workload

# The types that `llama-server --help` lists for -ctk and -ctv.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
COUNTS = ("context", "slots", "batch", "ubatch", "llama_cpp_build")

workloads = st.builds(
    Workload,
    context=st.integers(1, 2**20),
    slots=st.integers(1, 64),
    kv_unified=st.booleans(),
    batch=st.integers(512, 8192),
    ubatch=st.integers(1, 512),
    kv_type_k=st.sampled_from(KV_TYPES),
    kv_type_v=st.sampled_from(KV_TYPES),
    llama_cpp_build=st.integers(1, 99999),
)


def test_defaults_are_llama_cpps() -> None:
    """What is not said is as llama.cpp does it: batches of 2048 and 512, F16 caches, one slot."""
    workload = Workload()
    assert (workload.batch, workload.ubatch, workload.slots) == (2048, 512, 1)
    assert (workload.kv_type_k, workload.kv_type_v) == ("f16", "f16")
    assert workload.flash_attention


def test_kv_types_are_llama_cpps() -> None:
    """The cache types are those of llama.cpp's help text."""
    assert sorted(get_args(KVType)) == sorted(KV_TYPES)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_one_kv_type_for_both_caches(kv_type: KVType) -> None:
    """`kv_type` stands for the types of both caches."""
    assert Workload(kv_type=kv_type) == Workload(kv_type_k=kv_type, kv_type_v=kv_type)


def test_a_cache_named_by_itself_wins() -> None:
    """A type given for one cache beats the one given for both."""
    workload = Workload(kv_type="q8_0", kv_type_v="f16")
    assert (workload.kv_type_k, workload.kv_type_v) == ("q8_0", "f16")


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -1, "many", None, 1.5])
def test_counts_are_positive_integers(field: str, value: Any) -> None:
    """A count below 1, or no integer, is refused by the field's name with the value."""
    with pytest.raises(WorkloadError, match=rf"workload {field}: .*\(got {value!r}\)"):
        Workload(**{field: value})


def test_llama_cpp_serves_no_more_than_256_at_once() -> None:
    """As many slots as llama.cpp has sequences are fine, one more is refused with the limit."""
    assert Workload(slots=256).slots == 256
    with pytest.raises(WorkloadError, match=r"workload slots: .* 256 \(got 257\)"):
        Workload(slots=257)


def test_all_faults_come_at_once() -> None:
    """Every field out of range is reported in one error."""
    with pytest.raises(WorkloadError) as caught:
        Workload(context=0, slots=-2, kv_type="q3_k", speed=5)
    named = [fault.split(":")[0].removeprefix("workload ") for fault in caught.value.faults]
    assert sorted(named) == ["context", "kv_type_k", "kv_type_v", "slots", "speed"]


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_quantized_v_cache_needs_flash_attention(kv_type: KVType) -> None:
    """llama.cpp refuses a quantized V cache without flash attention, and so does a workload."""
    assert not Workload(kv_type_k=kv_type, flash_attention=False).flash_attention
    if kv_type in ("f32", "f16", "bf16"):
        assert Workload(kv_type=kv_type, flash_attention=False).kv_type_v == kv_type
    else:
        with pytest.raises(WorkloadError, match=f"V cache of type {kv_type} needs flash attention"):
            Workload(kv_type=kv_type, flash_attention=False)


def test_a_ubatch_is_part_of_a_batch() -> None:
    """A physical batch as large as the logical one is fine, a larger one is refused."""
    assert Workload(batch=256, ubatch=256).ubatch == 256
    with pytest.raises(WorkloadError, match=r"ubatch \(257 tokens\) must not be larger"):
        Workload(batch=256, ubatch=257)


@pytest.mark.parametrize("also", [{"context": 0}, {"batch": 8, "ubatch": 16}])
def test_flash_attention_is_among_all_faults(also: dict[str, int]) -> None:
    """A quantized V cache without flash attention is reported along with other faults."""
    with pytest.raises(WorkloadError) as caught:
        Workload(kv_type="q8_0", flash_attention=False, **also)
    assert "flash attention" in str(caught.value)
    assert len(caught.value.faults) == 2


@given(workloads)
@settings(deadline=None)
def test_workloads_survive_json(workload: Workload) -> None:
    """A workload is the same after a trip through JSON."""
    assert Workload.model_validate_json(workload.model_dump_json()) == workload


@given(st.integers(1, 64))
@settings(deadline=None)
def test_streams(slots: int) -> None:
    """A unified cache is one buffer, a split one has a buffer for each slot."""
    assert Workload(slots=slots).n_streams == 1
    assert Workload(slots=slots, kv_unified=False).n_streams == slots


def test_workloads_cannot_change() -> None:
    """A workload is a value: its fields cannot be assigned."""
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Workload(), "context", 1)  # noqa: B010 (mypy knows that this is refused)
