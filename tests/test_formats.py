"""Flags and files in llama.cpp's words, read back as llama.cpp reads them."""

import re
import shlex
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import (
    buffer_types,
    placement_flags,
    server_command,
    tensor_type_file,
    workload_flags,
)
from quantplan.hardware.machine import Machine
from quantplan.inventory.sources import read_inventory
from quantplan.llama_cpp import KVType
from quantplan.placement import MAX_OVERRIDES
from quantplan.qtypes import QTYPES
from quantplan.workload import Workload

GPUS = ("GPU0", "GPU1", "GPU2")


def buffers_of(gpus: Sequence[str]) -> dict[str, str]:
    """What -ot calls the memory of GPUs and of the CPU."""
    return {**{gpu: gpu.replace("GPU", "CUDA") for gpu in gpus}, "CPU": "CPU"}


def value_of(flags: Sequence[str], flag: str) -> str | None:
    """The argument that follows a flag, which occurs at most once."""
    assert flags.count(flag) <= 1
    return flags[flags.index(flag) + 1] if flag in flags else None


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        ("RTX 3090 + 24GiB", ["CUDA0", "CUDA1"]),
        ("24GiB + 24GiB@936GB/s", ["CUDA0", "CUDA1"]),
        ("RX 7900 XTX + 16GiB", ["ROCm0", "ROCm1"]),
        ("2x Arc B580", ["SYCL0", "SYCL1"]),
        ("RPC a:1 RTX 3090@1Gbit/s,1ms + M2 Ultra", ["RPC0[a:1]", "MTL0"]),
        ("RTX 3090 + RX 7900 XTX", ["Vulkan0", "Vulkan1"]),
    ],
)
def test_gpus_are_named_as_in_builds_for_their_vendor(gpus: str, names: list[str]) -> None:
    """-ot calls GPUs as the build for their vendor does, and those of several as Vulkan does."""
    buffers = buffer_types(Machine.parse(f"{gpus} + 64GiB@80GB/s"))
    assert [buffers[name] for name in ("GPU0", "GPU1")] == names
    assert buffers["CPU"] == "CPU"


def devices_by_llama_cpp(flags: Sequence[str], n_layers: int, gpus: Sequence[str]) -> list[str]:
    """Where llama.cpp puts every layer and, last, the output matrix.

    The last -ngl of the layers and the output are on GPUs; of these, one whose position is at a
    share x of them goes to the first GPU whose cumulated share of -ts exceeds x. In single
    precision, as there.
    """
    n_on_gpu = min(int(value_of(flags, "-ngl") or 0), n_layers + 1)
    first = n_layers + 1 - n_on_gpu
    shares = [np.float32(share) for share in (value_of(flags, "-ts") or "1").split(",")]
    cumulated = [np.float32(share) / sum(shares) for share in accumulate(shares)]
    places = []
    for index in range(n_layers + 1):
        if index < first:
            places.append("CPU")
        else:
            position = np.float32(index - first) / np.float32(n_on_gpu)
            places.append(gpus[int(np.searchsorted(cumulated, position, side="right"))])
    return places


def overridden(flags: Sequence[str], names: Sequence[str]) -> set[str]:
    """The tensors that -ot moves to the CPU: split at commas, searched, first match wins."""
    text = value_of(flags, "-ot")
    rules = [part.split("=", 1) for part in text.split(",")] if text else []
    assert all(device == "CPU" for _, device in rules)
    return {name for name in names if any(re.search(pattern, name) for pattern, _ in rules)}


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, list[str], str, tuple[str, ...]]:
    """Layers in all, devices of the loaded ones, device of the output, and the GPUs."""
    gpus = GPUS[: draw(st.integers(1, 3))]
    n_loaded = draw(st.integers(1, 100))
    cuts = sorted(draw(st.integers(0, n_loaded)) for _ in gpus)
    ends = [*cuts[1:], n_loaded]
    layers = ["CPU"] * cuts[0]
    for gpu, begin, end in zip(gpus, cuts, ends, strict=True):
        layers += [gpu] * (end - begin)
    last = layers[-1]
    output = draw(st.sampled_from(gpus[gpus.index(last) :] if last in gpus else gpus))
    return n_loaded + draw(st.integers(0, 3)), layers, output, gpus


@given(placements())
@settings(max_examples=300, deadline=None)
def test_llama_cpp_puts_layers_where_the_plan_does(
    placement: tuple[int, list[str], str, tuple[str, ...]],
) -> None:
    """Read as llama.cpp reads them, the flags put each loaded layer and the output in place."""
    n_layers, layers, output, gpus = placement
    flags = placement_flags(
        n_layers=n_layers,
        layer_devices=layers,
        output_device=output,
        buffers=buffers_of(gpus),
        moved={},
    )
    found = devices_by_llama_cpp(flags, n_layers, gpus)
    assert found[: len(layers)] == layers
    assert found[-1] == output


def test_one_gpu_needs_no_split() -> None:
    """With all on a single GPU, every layer and the output are counted and nothing is split."""
    flags = placement_flags(
        n_layers=47,
        layer_devices=["GPU0"] * 46,
        output_device="GPU0",
        buffers=buffers_of(["GPU0"]),
        moved={},
    )
    assert flags == ["-ngl", "48"]


@pytest.mark.parametrize("n_first", [0, 1, 20, 45, 46])
def test_two_gpus_share_every_layer(n_first: int) -> None:
    """The counts of -ts sum to the layers, the skipped ones included, and the output."""
    flags = placement_flags(
        n_layers=47,
        layer_devices=["GPU0"] * n_first + ["GPU1"] * (46 - n_first),
        output_device="GPU1",
        buffers=buffers_of(["GPU0", "GPU1"]),
        moved={},
    )
    assert value_of(flags, "-sm") == "layer"
    counts = [int(count) for count in (value_of(flags, "-ts") or "").split(",")]
    assert counts == [n_first, 48 - n_first]
    assert value_of(flags, "-ngl") == "48"


def test_layers_on_the_cpu_are_not_counted() -> None:
    """Layers in RAM are those at the front that -ngl does not reach, and -ts leaves them out."""
    flags = placement_flags(
        n_layers=30,
        layer_devices=["CPU"] * 12 + ["GPU0"] * 10 + ["GPU1"] * 8,
        output_device="GPU1",
        buffers=buffers_of(["GPU0", "GPU1"]),
        moved={},
    )
    assert value_of(flags, "-ngl") == "19"
    assert value_of(flags, "-ts") == "10,9"


@pytest.mark.parametrize("gpus", [(), ("GPU0",), GPUS])
def test_nothing_on_the_gpu(gpus: tuple[str, ...]) -> None:
    """With everything in RAM no layer is offloaded and nothing needs an override."""
    flags = placement_flags(
        n_layers=30,
        layer_devices=["CPU"] * 30,
        output_device="CPU",
        buffers=buffers_of(gpus),
        moved={},
    )
    assert flags == ["-ngl", "0"]


@given(begin=st.integers(0, 45), end=st.integers(0, 46), step=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_overrides_move_the_planned_tensors_alone(begin: int, end: int, step: int) -> None:
    """Of all tensors of a real model, exactly those planned for RAM match an override."""
    names = [tensor.name for tensor in read_inventory("GLM-4.5-Air").tensors]
    moved = {
        f"blk.{layer}.ffn_{part}_exps.weight"
        for layer in range(begin, end, step)
        for part in (("up", "gate", "down") if layer % 5 else ("down",))
    }
    flags = placement_flags(
        n_layers=47,
        layer_devices=["GPU0"] * 46,
        output_device="GPU0",
        buffers=buffers_of(["GPU0"]),
        moved=dict.fromkeys(sorted(moved), "CPU"),
    )
    assert overridden(flags, names) == moved & set(names)
    assert ("-ot" in flags) == bool(moved)


def distinct_sets(n_roles: int) -> list[str]:
    """Names of so many roles, no two of which occur in the same set of layers."""
    return [
        f"blk.{layer}.r{role}.weight"
        for role in range(1, n_roles + 1)
        for layer in range(13)
        if role >> layer & 1
    ]


def test_too_many_overrides_are_refused() -> None:
    """llama.cpp takes 4095 overrides; one more, at which it aborts, is refused."""
    move = partial(
        placement_flags,
        n_layers=13,
        layer_devices=["GPU0"] * 13,
        output_device="GPU0",
        buffers=buffers_of(["GPU0"]),
    )
    flags = move(moved=dict.fromkeys(distinct_sets(4095), "CPU"))
    assert MAX_OVERRIDES == len((value_of(flags, "-ot") or "").split(",")) == 4095
    with pytest.raises(RecipeError, match=r"needs 4096 -ot patterns, llama\.cpp takes 4095"):
        move(moved=dict.fromkeys(distinct_sets(4096), "CPU"))


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "iq4_nl"])
def test_workload_flags_say_everything(kv_type: KVType) -> None:
    """Every number that memory depends on is said, so that no default can differ."""
    workload = Workload(context=12345, batch=1024, ubatch=256, kv_type_k=kv_type, kv_type_v="bf16")
    flags = workload_flags(workload)
    said = {flag: value_of(flags, flag) for flag in flags if flag.startswith("-")}
    assert said == {
        "-c": "12345",
        "-np": "1",
        "-b": "1024",
        "-ub": "256",
        "-ctk": kv_type,
        "-ctv": "bf16",
        "-fa": "on",
        "-lm": "none",
        "--fit": "off",
    }


@pytest.mark.parametrize(
    ("slots", "unified", "flag"), [(4, True, "-kvu"), (4, False, "-no-kvu"), (64, True, "-kvu")]
)
def test_slots_say_how_they_share_the_cache(slots: int, unified: bool, flag: str) -> None:
    """With several slots the flags say whether they share one KV buffer."""
    flags = workload_flags(Workload(slots=slots, kv_unified=unified))
    assert value_of(flags, "-np") == str(slots)
    assert [f for f in flags if f in ("-kvu", "-no-kvu")] == [flag]


def test_flash_attention_off_is_said() -> None:
    """Flash attention is switched off where the workload says so, and not left to llama.cpp."""
    assert value_of(workload_flags(Workload(flash_attention=False)), "-fa") == "off"


@given(
    model=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    flags=st.lists(st.text("abc -'\"$`\\|()[]^*?&;<>!~#\n", max_size=8), max_size=6),
)
@settings(deadline=None)
def test_commands_survive_the_shell(model: str, flags: list[str]) -> None:
    """A shell splits the command into exactly the model's path and the flags."""
    assert shlex.split(server_command(model, flags)) == ["llama-server", "-m", model, *flags]


def read_tensor_types(text: str) -> list[tuple[str, str]]:
    """The rules as llama-quantize reads them: words, split at the first =, patterns lower-cased."""
    pairs = [word.partition("=") for word in text.split()]
    return [(pattern.lower(), qtype) for pattern, _, qtype in pairs]


printable = st.characters(min_codepoint=33, max_codepoint=126)
odd_names = st.text(printable, min_size=1, max_size=12).map(str.lower)


@given(st.dictionaries(odd_names, st.sampled_from(["Q8_0", "Q4_K", "IQ4_XS"]), max_size=5))
@settings(deadline=None)
def test_any_tensor_type_file_is_right_or_refused(qtype_by_name: dict[str, str]) -> None:
    """Whatever tensors are called, llama-quantize reads the types meant, or there is no file."""
    try:
        text = tensor_type_file(qtype_by_name)
    except RecipeError:
        assert any(re.search(r"[^a-z0-9_.-]", name) for name in qtype_by_name)
        return
    rules = read_tensor_types(text)
    for name, qtype in qtype_by_name.items():
        found = [value for pattern, value in rules if re.search(pattern, name)]
        assert found[0] == qtype.lower()


@pytest.mark.parametrize("name", ["blk.0.Attn.weight", "a b.weight", "a\n.weight", "É.weight"])
def test_names_that_the_file_cannot_hold_are_refused(name: str) -> None:
    """Capital letters, which llama-quantize lowers in patterns, and white space are refused."""
    with pytest.raises(RecipeError, match="llama-quantize cannot match the tensor name"):
        tensor_type_file({"output.weight": "Q6_K", name: "Q8_0"})


def test_a_tensor_type_file_has_one_rule_a_line() -> None:
    """The file holds one pattern=type a line, and no comment, which llama-quantize refuses."""
    names = [t.name for t in read_inventory("GLM-4.5-Air").tensors if t.is_quantizable]
    types = [list(QTYPES)[i % 4] for i in range(len(names))]
    lines = tensor_type_file(dict(zip(names, types, strict=True))).splitlines()
    assert all(re.fullmatch(r"\^[^\s=,#]+\$=[a-z0-9_]+", line) for line in lines)
    assert all(a != b for a, b in pairwise(sorted(lines)))
