"""Measurements narrow a machine's factors."""

import json
import math
from pathlib import Path

import pytest

from quantplan import InputError, Inventory, Machine, Workload
from quantplan import read_inventory as read
from quantplan.calibrate import calibrate_machine
from quantplan.costs import load_data
from quantplan.costs.calibration import Measurement, calibrate, for_model
from quantplan.costs.decode import decode_s
from quantplan.costs.traffic import Traffic, collect
from quantplan.errors import RecipeError
from quantplan.formats.bench_flags import bench_flags
from quantplan.formats.llama_args import parse_flags
from quantplan.formats.llama_bench import parse_bench
from tests.support.models import toy_moe
from tests.test_cli import quantplan as run

HYBRID = Machine.parse("RTX 4090 + 128GiB@80GB/s")


def traffic_of(inventory: Inventory, experts_on: str) -> Traffic:
    """The model as Q8_0 with its experts on a device and the rest on the GPU."""
    assignment = {
        t.name: (
            "F32" if t.qtype == "F32" else "Q8_0",
            experts_on if "_exps" in t.name else "CPU" if t.role == "token_embd" else "GPU0",
        )
        for t in inventory.tensors
    }
    return collect(inventory, assignment, ["GPU0"] * inventory.architecture.n_layers, "GPU0")


AIR = read("GLM-4.5-Air")
IN_RAM, ON_GPU = traffic_of(AIR, "CPU"), traffic_of(AIR, "GPU0")


def measured(traffic: Traffic, slowdown: float, depth: float = 0.0) -> Measurement:
    """What a machine measures that is slower than predicted by a factor."""
    seconds = decode_s(traffic, HYBRID, Workload(), depth) * slowdown
    return Measurement(traffic, Workload(), depth, 1 / seconds)


@pytest.mark.parametrize("slowdown", [0.8, 1.1, 1.3])
def test_a_measurement_pulls_its_prediction_towards_itself(slowdown: float) -> None:
    """After a measurement the prediction lies between the old one and what was measured."""
    machine = calibrate(HYBRID, [measured(IN_RAM, slowdown)], ["a run"])
    before, after = (decode_s(IN_RAM, m, Workload(), 0) for m in (HYBRID, machine))
    moved = math.log(after / before) / math.log(slowdown)
    assert 0.3 < moved < 1
    assert machine.measured == ("a run",)


def test_what_did_nothing_stays_as_it_was() -> None:
    """A run on the GPU alone says next to nothing about the CPU."""
    machine = calibrate(HYBRID, [measured(ON_GPU, 1.3)])
    assert machine.gpus[0].decode_slowdown > 1.1
    assert machine.ram.decode_slowdown == pytest.approx(1, abs=0.01)
    assert machine.gpus[0].prefill_slowdown == 1


def test_agreeing_measurements_change_nothing_but_the_interval() -> None:
    """Where the prediction was right, only its interval becomes narrower."""
    machine = calibrate(HYBRID, [measured(IN_RAM, 1.0), measured(ON_GPU, 1.0)])
    assert [d.decode_slowdown for d in machine.devices] == pytest.approx([1.0, 1.0])
    assert machine.speed_log_sd is not None
    assert machine.speed_log_sd < 0.25


def test_the_depths_of_one_run_count_as_one_measurement() -> None:
    """Ten depths of one run move the prediction as far as one."""
    one = calibrate(HYBRID, [measured(ON_GPU, 1.3)])
    ten = calibrate(HYBRID, [measured(ON_GPU, 1.3)] * 10)
    assert ten.gpus[0].decode_slowdown == pytest.approx(one.gpus[0].decode_slowdown)


def test_a_measurement_is_the_models_own() -> None:
    """Of another model only what no two models differ by counts, and the interval is wide again."""
    other = read("Qwen3-30B-A3B").architecture
    slow = calibrate(HYBRID, [measured(ON_GPU, 1.3)])
    assert for_model(slow, AIR.with_qtypes({}).architecture) == slow
    assert for_model(slow, other) == HYBRID
    slower = calibrate(HYBRID, [measured(ON_GPU, 4.0)])
    known = for_model(slower, other)
    assert 1.5 < known.gpus[0].decode_slowdown < slower.gpus[0].decode_slowdown
    assert known.speed_log_sd is None
    assert for_model(known, AIR.architecture) == known


def test_measurements_of_several_models_are_the_machines() -> None:
    """What two models agree on holds for all."""
    small = read("Qwen3-30B-A3B")
    runs = [measured(ON_GPU, 1.3), measured(traffic_of(small, "GPU0"), 1.3)]
    machine = calibrate(HYBRID, runs)
    assert for_model(machine, read("GLM-4.6").architecture) == machine
    assert machine.gpus[0].decode_slowdown > 1.1


def test_the_priors_are_fitted() -> None:
    """How far rigs differ, and how well one repeats, are numbers of the data file."""
    for kind in ("decode", "prefill"):
        assert all(0 < sd < 1 for name, sd in load_data("speed.json")["calibration"][kind].items()
                   if name != "left")  # fmt: skip


BENCH_JSON = [
    {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 300.0, "n_gpu_layers": 99,
     "n_cpu_moe": 99, "n_batch": 2048, "n_ubatch": 512, "type_k": "f16", "type_v": "f16"},
    {"n_prompt": 0, "n_gen": 128, "n_depth": 4096, "avg_ts": 9.0, "n_gpu_layers": 99,
     "n_cpu_moe": 99, "n_batch": 2048, "n_ubatch": 512, "type_k": "f16", "type_v": "f16"},
    {"n_prompt": 512, "n_gen": 128, "n_depth": 0, "avg_ts": 50.0},
]  # fmt: skip
BENCH_TABLE = """
| model          |      size |  params | backend | ngl |            test |             t/s |
| -------------- | --------: | ------: | ------- | --: | --------------: | --------------: |
| glm4moe        | 60.00 GiB | 110.0 B | CUDA    |  99 |           pp512 |   300.00 ± 2.00 |
| glm4moe        | 60.00 GiB | 110.0 B | CUDA    |  99 |   tg128 @ d4096 |     9.00 ± 0.02 |
"""
SWEEP_TABLE = """
|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |
|-------|--------|--------|----------|----------|----------|----------|
|   512 |    128 |   4096 |    1.707 |   300.00 |   14.222 |     9.00 |
"""


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(BENCH_JSON),
        "\n".join(map(json.dumps, BENCH_JSON)),
        f"ggml_cuda_init: found 1\n{BENCH_TABLE}\nbuild: 1234",
        SWEEP_TABLE,
    ],
)
def test_every_output_of_the_tools_is_read(text: str) -> None:
    """JSON, JSON lines and both kinds of table give the same speeds; mixed runs are left out."""
    found = {(r.n_prompt, r.n_generated): r.tps for r in parse_bench(text)}
    assert found == {(512, 0): 300.0, (0, 128): 9.0}
    assert {r.depth for r in parse_bench(text) if r.n_generated} == {4096}


def test_the_real_output_is_read() -> None:
    """What llama-bench of November 2026 (0.5.0-dev, commit 0c1e570, from the sources in
    llama-cpp-python 0.3.36) printed with ``-o json`` gives every speed, its repetitions and flags
    that are understood.
    """
    text = (Path(__file__).parent / "data" / "llama_bench.json").read_text(encoding="utf-8")
    rows, found = json.loads(text), parse_bench(text)
    assert {row["build_commit"] for row in rows} == {"0c1e570"}
    assert [(r.n_prompt, r.n_generated, r.depth) for r in found] == [
        (32, 0, 0), (0, 8, 0), (32, 0, 64), (0, 8, 64)
    ]  # fmt: skip
    assert [list(r.samples_tps) for r in found] == [row["samples_ts"] for row in rows]
    assert [r.tps for r in found] == [row["avg_ts"] for row in rows]
    flags = "-ngl -1 -b 2048 -ub 512 -ctk f16 -ctv f16"
    assert {" ".join(r.flags) for r in found} == {flags}
    assert parse_flags(flags, AIR).n_gpu_layers is None  # all that fit


@pytest.mark.parametrize("text", ["", "nothing", "[1]", "{", '{"avg_ts": 1}', "| test | t/s |"])
def test_other_text_is_refused(text: str) -> None:
    """What is no benchmark's output is an error that says what to give."""
    with pytest.raises(InputError, match=r"benchmark's output|llama-bench"):
        parse_bench(text)


def test_a_benchmark_calibrates_the_devices_that_it_used() -> None:
    """A slow run with the experts in RAM slows the CPU's decoding, and prefill on the GPU."""
    machine = calibrate_machine(HYBRID, AIR.with_qtypes({}), json.dumps(BENCH_JSON))
    assert machine.ram.decode_slowdown != 1
    assert machine.gpus[0].prefill_slowdown != 1
    assert machine.measured == (
        "GLM-4.5-Air: decode 9.0 tokens/s at depth 4096, prefill 300.0 tokens/s at depth 0",
    )


def test_the_command_writes_a_profile_that_machine_accepts(tmp_path: Path) -> None:
    """`quantplan calibrate` saves a profile, and the profile is a machine for other commands."""
    bench, profile = tmp_path / "bench.json", tmp_path / "machine.json"
    bench.write_text(json.dumps(BENCH_JSON), encoding="utf-8")
    text = "RTX 4090 + 128GiB@80GB/s"
    done = run("calibrate", "GLM-4.5-Air", "--machine", text, "--bench", bench, "--save", profile)
    assert done.returncode == 0, done.stderr
    assert "times as long as predicted" in done.stdout
    known = Machine.parse(str(profile))
    assert known.measured
    assert known == Machine.load(profile)
    assert known.calibrated_with == "glm4moe, 46 layers of 4096, 128 experts"


SERVER_FLAGS = "-ot -c -t -ngl"
BENCH_FLAGS = (
    "-p -n -d -r -o -rpc -dev -ngl -ncmoe -ot -ts -sm -mg -ctk -ctv -fa -t -b -ub -lm -nkvo -nopo "
    "--no-host --repack"
)


def llama_cpp(folder: Path, bench: str) -> Path:
    """Puts a llama.cpp without GPU in place whose llama-bench is a shell script."""
    usage = f'[ "$1" = --help ] && echo "--list-devices {SERVER_FLAGS}"'
    bench = f'[ "$1" = --help ] && echo "{BENCH_FLAGS}" && exit\n{bench}'
    server = f'{usage}; echo "version: 7000 (0123abcd)"'
    for name, script in (("llama-server", server), ("llama-bench", bench)):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    return folder


def test_calibrate_runs_llama_bench(tmp_path: Path) -> None:
    """Without output to read, llama-bench runs the model with the flags in its own words."""
    rows = [
        {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 30.0, "samples_ts": [29.0, 31.0]},
        {"n_prompt": 512, "n_gen": 0, "n_depth": 2048, "avg_ts": 20.0, "samples_ts": [20.0]},
        {"n_prompt": 0, "n_gen": 32, "n_depth": 0, "avg_ts": 9.0, "samples_ts": [8.0, 9.0, 9.5]},
        {"n_prompt": 0, "n_gen": 32, "n_depth": 2048, "avg_ts": 7.0, "samples_ts": [7.0]},
    ]
    lines = "\n".join(f"echo '{json.dumps(row)}'" for row in rows)
    folder = llama_cpp(tmp_path, f'echo "$@" > {tmp_path}/arguments\necho loading >&2\n{lines}')
    model, profile = toy_moe(tmp_path / "toy.gguf"), tmp_path / "machine.json"
    command: list[str | Path] = ["calibrate", model, "--machine", "64GiB@80GB/s", "--save", profile]
    flags = ["--", "-ot", "up=CPU,down=CPU", "-c", "4096", "-t", "4"]
    done = run(*command, "--llama-cpp", folder, *flags)
    assert done.returncode == 0, done.stderr
    known = Machine.load(profile)
    assert "decode 9.0 to 7.0 tokens/s at depth 0 to 2048" in known.measured[0]
    assert "prefill 30.0 to 20.0 tokens/s at depth 0 to 2048" in known.measured[0]
    assert "llama-bench, llama.cpp b7000" in known.measured[0]
    assert known.ram.decode_slowdown != 1
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8")
    assert "-ot up=CPU;down=CPU -t 4" in arguments
    assert f"-m {model}" in arguments


def test_a_benchmark_that_fails_is_shown(tmp_path: Path) -> None:
    """What llama-bench said last is in the message, and no profile is written."""
    folder = llama_cpp(tmp_path, "echo 'error: unknown model architecture: x' >&2; exit 3")
    model, profile = toy_moe(tmp_path / "toy.gguf"), tmp_path / "machine.json"
    command: list[str | Path] = ["calibrate", model, "--machine", "64GiB@80GB/s", "--save", profile]
    done = run(*command, "--llama-cpp", folder)
    assert done.returncode == 1
    assert "too old for the model" in done.stderr
    assert not profile.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "-fa 1 -ngl 999"),
        ("--gpu-layers 20 -fa off -np 1 -c 512 -no-kvu", "-fa 0 -ngl 20"),
        ("-ngl all -ot a=CPU -ot b=CUDA1,c=CPU -ts 3,1",
         "-fa 1 -ngl 999 -ot a=CPU;b=CUDA1;c=CPU -ts 3/1"),
        ("-ngl 9 -dev CUDA0,CUDA1 --rpc h:1,h:2 -ot a=RPC0[h:1]",
         "-rpc h:1,h:2 -dev CUDA0/CUDA1 -fa 1 -ngl 9 -ot a=RPC0[h:1]"),
        ("-lm none -nkvo --no-op-offload -nr",
         "-fa 1 -ngl 999 -lm none -nkvo 1 -nopo 1 --repack 0"),
        ("--swa-full", None),
        ("-t", None),
        ("--no-mmap", None),
    ],
)  # fmt: skip
def test_flags_are_translated_or_left_to_the_server(flags: str, words: str | None) -> None:
    """llama-bench gets flags in its own words, or does not run where it has none for one."""
    known = frozenset(BENCH_FLAGS.split())
    if words is None:
        with pytest.raises(RecipeError, match=flags):
            bench_flags(flags.split(), known)
    else:
        assert " ".join(bench_flags(flags.split(), known)) == words


def test_load_modes_are_said_as_an_older_benchmark_says_them() -> None:
    """Before -lm, llama-bench mapped files or did not; it locked none into memory."""
    older = frozenset(BENCH_FLAGS.replace("-lm", "-mmp").split())
    assert bench_flags(["-lm", "none"], older) == ("-fa", "1", "-ngl", "999", "-mmp", "0")
    assert bench_flags(["--no-mmap"], older) == ("-fa", "1", "-ngl", "999", "-mmp", "0")
    with pytest.raises(RecipeError, match="-lm mlock"):
        bench_flags(["-lm", "mlock"], older)


def test_a_machine_of_another_kind_is_not_calibrated(tmp_path: Path) -> None:
    """A machine with a GPU is not calibrated by a llama.cpp that has none, nor without a file."""
    folder, model = llama_cpp(tmp_path, "exit 1"), toy_moe(tmp_path / "toy.gguf")
    command: list[str | Path] = ["--save", tmp_path / "m.json", "--llama-cpp", folder, "--machine"]
    done = run("calibrate", model, *command, "RTX 4090 + 64GiB@80GB/s")
    assert done.returncode == 2
    assert "has no GPU here, but the machine has 1" in done.stderr
    done = run("calibrate", "GLM-4.5-Air", *command, "64GiB@80GB/s")
    assert "give a GGUF, or --bench" in done.stderr
