"""Commands and files that run a model in other programs, read back as those programs read them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.errors import RecipeError
from quantplan.exchange import export_recipe
from quantplan.formats.bench_flags import bench_flags, from_bench_flags
from quantplan.formats.ik_llama import ik_flags
from quantplan.formats.koboldcpp import from_koboldcpp_flags, koboldcpp_flags
from quantplan.formats.launchers import commands_in, compose_file, shell_script, systemd_unit
from quantplan.formats.llama_args import parse_flags
from quantplan.formats.llama_cpp import (
    cli_flags,
    placement_flags,
    rpc_flags,
    workload_flags,
)
from quantplan.hardware.machine import Machine
from quantplan.inventory.sources import read_inventory
from quantplan.placement import place
from quantplan.workload import Workload
from tests.support.models import toy_moe
from tests.support.quantizer import recipe_for

AIR = read_inventory("GLM-4.5-Air")
TWO = Machine.parse("2x RTX 3090 + 128GiB@80GB/s")
EXPERTS = [t.name for t in AIR.tensors if t.role == "ffn_down_exps" and (t.layer or 0) < 46]


def buffers_of(gpus: list[str]) -> dict[str, str]:
    """What -ot calls the memory of GPUs and of the CPU."""
    return {**{gpu: gpu.replace("GPU", "CUDA") for gpu in gpus}, "CPU": "CPU"}


def flags(n_cpu: int, n_first: int, on_cpu: list[str], **workload: Any) -> list[str]:
    """Flags with so many layers in RAM and on the first of two GPUs."""
    layers = ["CPU"] * n_cpu + ["GPU0"] * n_first + ["GPU1"] * (46 - n_cpu - n_first)
    placement = placement_flags(
        n_layers=47, layer_devices=layers, output_device="GPU1",
        buffers=buffers_of(["GPU0", "GPU1"]), moved=dict.fromkeys(on_cpu, "CPU"),
        others=[t.name for t in AIR.tensors if t.name not in set(on_cpu)],
    )  # fmt: skip
    return [*placement, *workload_flags(Workload(**workload))]


@given(st.integers(0, 45), st.integers(0, 46), st.sets(st.sampled_from(EXPERTS), max_size=20))
@settings(max_examples=40, deadline=None)
def test_ik_llama_cpp_places_every_tensor_alike(n_cpu: int, n_first: int, on_cpu: set[str]) -> None:
    """ik_llama.cpp, whose -ngl counts the output layer last, puts tensors in the same places."""
    ours = flags(n_cpu, min(n_first, 46 - n_cpu), sorted(on_cpu))
    theirs = ik_flags(ours, n_layers=47, has_output=True)
    assert not {"-lm", "--fit", "-kvu"} & set(theirs)
    wanted = place(AIR, TWO, parse_flags(ours, AIR))
    found = place(AIR, TWO, parse_flags(theirs, AIR, engine="ik_llama.cpp"))
    assert found.tensors == wanted.tensors
    assert found.caches[:46] == wanted.caches[:46]


def test_what_ik_llama_cpp_cannot_do_is_refused() -> None:
    """A tied output on a GPU beside layers in RAM, and a cache for each slot, are refused."""
    with pytest.raises(RecipeError, match="tied output"):
        ik_flags(flags(3, 20, []), n_layers=47, has_output=False)
    with pytest.raises(RecipeError, match="one KV cache for all slots"):
        ik_flags(flags(0, 20, [], slots=2, kv_unified=False), n_layers=47, has_output=True)


def test_llama_bench_gets_its_own_separators() -> None:
    """Overrides are joined by ; and proportions by /, since , parts test cases; nothing is lost."""
    ours = flags(2, 20, EXPERTS[5::7], kv_type="q8_0")
    ours[ours.index("-ot") + 1] += ",^output=CUDA1"
    theirs = bench_flags(ours)
    assert not any("," in word for word in theirs)
    assert theirs[theirs.index("-ts") + 1] == "20/26"
    assert theirs[theirs.index("-fa") + 1] == "1"
    assert theirs[theirs.index("-ot") + 1].endswith("=CPU;^output=CUDA1")
    assert not {"-c", "-np", "--fit"} & set(theirs)
    back = from_bench_flags(theirs)
    assert sorted(zip(back[::2], back[1::2], strict=True)) == sorted(
        (flag, value)
        for flag, value in zip(ours[::2], ours[1::2], strict=True)
        if flag not in ("-c", "-np", "--fit")
    )


def test_devices_of_other_hosts_are_named_wherever_flags_are_written() -> None:
    """llama-bench learns of a server before tensors go there; KoboldCpp, which cannot, refuses."""
    machine = Machine.parse("RPC 10.0.0.2:50052 RTX 3090@1Gbit/s,0.2ms + RTX 3090 + 64GiB@80GB/s")
    ours = [*rpc_flags(machine), *flags(0, 20, []), "-sm", "none", "-mg", "1", "--swa-full"]
    theirs = bench_flags([*rpc_flags(machine), *flags(0, 20, [])])
    assert theirs[:2] == ("-rpc", "10.0.0.2:50052")
    assert from_bench_flags(theirs)[:2] == ["--rpc", "10.0.0.2:50052"]
    with pytest.raises(RecipeError) as caught:
        koboldcpp_flags(ours)
    assert [fault.split()[-1] for fault in caught.value.faults] == [
        "10.0.0.2:50052", "none", "1", "--swa-full",
    ]  # fmt: skip


def test_llama_cli_has_no_slots() -> None:
    """llama-cli gets all flags but those of slots."""
    ours = flags(0, 20, [], slots=3)
    theirs = cli_flags(ours)
    assert set(ours) - set(theirs) == {"-np", "3", "-kvu"}


def test_koboldcpp_takes_words_and_its_own_names() -> None:
    """KoboldCpp's flags say the same, and are read back; what it cannot do is refused at once."""
    ours = flags(2, 20, EXPERTS[:9], kv_type="q8_0", context=8192)
    theirs = koboldcpp_flags(ours)
    assert theirs[theirs.index("--tensor_split") + 1 :][:2] == ["20", "26"]
    assert theirs[-2:] == ["--quantkv", "1"]
    assert "--overridetensors" in theirs
    back = from_koboldcpp_flags(theirs)
    assert place(AIR, TWO, parse_flags(back, AIR)) == place(AIR, TWO, parse_flags(ours, AIR))
    assert parse_flags(back, AIR).workload.kv_type_v == "q8_0"
    impossible = flags(0, 20, [], slots=4, kv_type_k="q5_1", kv_type_v="f16")
    with pytest.raises(RecipeError) as caught:
        koboldcpp_flags(impossible)
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    ("path", "volume"),
    [("models/m.gguf", "./models"), ("m.gguf", "."), ("../m.gguf", ".."), ("/a/m.gguf", "/a")],
)
def test_compose_mounts_a_folder_and_no_volume(path: str, volume: str) -> None:
    """A folder is named so that Compose does not take it for the name of a volume."""
    assert f'"{volume}:/models:ro"' in compose_file(path, [])


awkward = st.lists(
    st.text("ab .$%\\\"'{}()|^*?;,=#&~`\u00e9", min_size=1, max_size=12).map(lambda t: f"x{t}"),
    max_size=6,
)


@given(awkward)
@settings(deadline=None)
def test_units_and_compose_files_hold_any_words(words: list[str]) -> None:
    """Dollars, percents, quotes and backslashes of patterns come out as they went in."""
    unit = systemd_unit("100 % model", ["llama-server", "-m", "/m.gguf", *words])
    assert commands_in(unit) == [["llama-server", "-m", "/m.gguf", *words]]
    compose = compose_file("/models/a/m.gguf", words)
    ((program, _, model, *rest),) = commands_in(compose)
    assert (program, model, rest) == (
        "llama-server", "/models/m.gguf", [*words, "--host", "0.0.0.0"]  # noqa: S104
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """systemd's own checker finds no fault with the unit."""
    unit = tmp_path / "model.service"
    command = ["/bin/true", "-m", "/m.gguf", *flags(2, 20, EXPERTS[5::7])]
    unit.write_text(systemd_unit("100 % GLM", command), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],  # noqa: S607 (found above)
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "model.service" not in done.stderr


@pytest.mark.parametrize("imatrix", [[], ["my imatrix.gguf"]])
def test_the_script_runs_the_programs_as_meant(tmp_path: Path, imatrix: list[str]) -> None:
    """A real shell starts llama-quantize once and llama-server each time, with the exact words."""
    for name in ("llama-quantize", "llama-server"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        # The last but one argument of llama-quantize is the file to write.
        program.write_text(
            "#!/bin/sh\n"
            f'printf "%s\\n" {name} "$@" >> "$LOG"\n'
            f"[ {name} = llama-server ] || for word; do "
            'case "$word" in *.part) : > "$word";; esac; done\n'
        )
        program.chmod(0o755)
    quantize = ["--pure", "--tensor-type", r"^blk\.\d+\.(a|b)'$=q8_0"]
    serve = flags(2, 20, EXPERTS[5::7])
    script = tmp_path / "run.sh"
    script.write_text(shell_script("a\nmodel", quantize, serve), encoding="utf-8")
    log, source, target = tmp_path / "log", "so urce.gguf", str(tmp_path / "tar get.gguf")
    for _ in range(2):
        subprocess.run(
            ["/bin/sh", str(script), source, target, *imatrix],
            check=True,
            env={"PATH": f"{program.parent}:/usr/bin:/bin", "LOG": str(log)},
        )
    served = ["llama-server", "-m", target, *serve]
    assert log.read_text(encoding="utf-8").splitlines() == [
        "llama-quantize", *(["--imatrix", *imatrix] if imatrix else []), *quantize, source,
        f"{target}.part", "Q8_0", *served, *served,
    ]  # fmt: skip
    assert [c[0] for c in commands_in(script.read_text())] == ["llama-quantize", "llama-server"]


@pytest.mark.parametrize(
    "text",
    ["X=1 nohup llama-server -m a.gguf -ot 'a|b;c=CPU' -t 2 > log 2>&1 &",
     "echo on; llama-server -m a.gguf -ot 'a|b;c=CPU' -t 2 2>>log | tee all && echo off",
     "( llama-server -m a.gguf -ot 'a|b;c=CPU' -t 2 ) # as ever",
     "llama-server \\\n -m a.gguf \\  \n-ot 'a|b;c=CPU' -t 2",
     "llama-server.exe ^\n -m a.gguf ^\n -ot 'a|b;c=CPU' -t 2",
     "llama-server `\n -m a.gguf `\n -ot 'a|b;c=CPU' -t 2"],
)  # fmt: skip
def test_what_is_the_shells_is_no_argument(text: str) -> None:
    """Pipes, redirections, comments, other commands of a line and the ends of lines that go on, of
    any shell, are not taken for arguments.
    """
    words = ["llama-server", "-m", "a.gguf", "-ot", "a|b;c=CPU", "-t", "2"]
    assert commands_in(text) == [words]


def test_a_file_without_commands_is_refused() -> None:
    """Text without a known program, with odd quotes or a damaged list is refused by its fault."""
    for text, fault in [
        ("echo hello", "no command of"),
        ("llama-server -ot 'x", "is no command line"),
        ("  command: [1, }]", "no list of strings"),
    ]:
        with pytest.raises(RecipeError, match=fault):
            commands_in(text)


def test_a_recipe_without_flags_runs_nothing(tmp_path: Path) -> None:
    """Types alone are exported for quantizers, and refused for programs that need places."""
    recipe = recipe_for(toy_moe(tmp_path / "toy.gguf"), {})
    assert export_recipe(recipe, "gguf-tool-suite").startswith("## test\n")
    for target in ("llama-server", "koboldcpp", "shell", "docker-compose", "ik-server"):
        with pytest.raises(RecipeError, match="types only"):
            export_recipe(recipe, target)
