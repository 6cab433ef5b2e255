"""quantplan asks the llama.cpp of this machine: find it, lay a model out, believe what it says."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import quantplan as qp
from quantplan import Machine
from quantplan.cli import app
from quantplan.errors import LlamaCppError
from quantplan.inventory.catalog import catalog_names
from quantplan.runtime import (
    LlamaCpp,
    MeasuredDevice,
    MemoryMeasurement,
    calibrated,
    find_llama_cpp,
    measure_memory,
    predict_calibrated,
)
from quantplan.runtime.locate import packaged_program
from quantplan.runtime.log import Buffers, Devices, has_reserved, read_table
from quantplan.runtime.memory import read_loaded
from quantplan.runtime.process import running
from quantplan.runtime.sparse import write_sparse
from tests.support.buffers import BUILD
from tests.support.llama_cpp import (
    needs_llama_cpp,
    packaged_folder,
    portable_cpu,
    rpc_server,
)
from tests.support.models import smollm2_path, toy_moe

MIB = 2**20
# llama.cpp prints MiB with two decimals; two buffers may add up on one device.
PRINTED_BYTES = 0.0101 * MIB


@pytest.fixture(scope="module")
def llama_cpp() -> LlamaCpp:
    """The llama.cpp of the Python package."""
    return find_llama_cpp(packaged_folder())


@pytest.fixture(scope="module")
def gpu() -> Iterator[str]:
    """The flags of one RPC device that serves as a GPU."""
    with rpc_server() as endpoint:
        yield f"--rpc {endpoint}"


@pytest.fixture
def vulkan(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """As many Vulkan GPUs as the parameter says; Mesa's driver computes them on the CPU."""
    variables = {"GGML_VK_VISIBLE_DEVICES": ",".join(["0"] * request.param)}
    for key, text in (variables | portable_cpu(tmp_path)).items():
        monkeypatch.setenv(key, text)
    if len(find_llama_cpp(packaged_folder()).devices) != request.param:
        pytest.skip("llama.cpp finds no Vulkan device: install mesa-vulkan-drivers")
    return Machine.parse("24GiB + " * request.param + "64GiB@80GB/s")


def program(folder: Path, script: str) -> Path:
    """Writes a shell script in the place of llama-server."""
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return folder


@needs_llama_cpp
def test_llama_cpp_is_found(llama_cpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, runtime and flags are known, wherever the program is looked for."""
    assert (llama_cpp.runtime, llama_cpp.build) == ("llama.cpp", BUILD)
    assert llama_cpp.has_load_mode
    assert llama_cpp.has_unified_cache
    assert llama_cpp.has_fit
    folder = packaged_folder()
    assert packaged_program("llama-server") == folder / "llama-server"
    assert find_llama_cpp(folder.parent) == llama_cpp
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert find_llama_cpp() == llama_cpp


def test_a_folder_without_llama_cpp_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong folder, given or in the environment, is an error; nothing else is tried."""
    with pytest.raises(LlamaCppError, match="no llama-server"):
        find_llama_cpp(tmp_path)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(LlamaCppError, match=re.escape(str(tmp_path))):
        find_llama_cpp()


def test_a_program_for_another_processor_is_told_plainly(tmp_path: Path) -> None:
    """An illegal instruction is explained."""
    with pytest.raises(LlamaCppError, match=r"SIGILL.*instructions that this processor"):
        find_llama_cpp(program(tmp_path, "kill -ILL $$"))


def test_the_fork_is_told_from_its_flags(tmp_path: Path) -> None:
    """ik_llama.cpp knows flags of its own; its build number is that of its version line."""
    answer = '[ "$1" = --help ] && echo "-m, --model  -rtr, --run-time-repack  --no-mmap --fit"'
    folder = program(tmp_path, f"{answer}\necho 'version: 4056 (0123abcd)'")
    found = find_llama_cpp(folder)
    assert (found.runtime, found.build, found.has_fit) == ("ik_llama.cpp", 4056, False)
    with pytest.raises(LlamaCppError, match="give the GGUF file"):
        measure_memory(found, qp.read_inventory("GLM-4.5-Air"), "-ngl 99")


def test_a_sparse_file_has_the_dimensions_and_no_weights(tmp_path: Path) -> None:
    """The stand-in for a model of 200 GiB takes next to no space and reads as the same model."""
    inventory = qp.read_inventory("GLM-4.5-Air")
    path = write_sparse(inventory, tmp_path / "model.gguf")
    assert path.stat().st_blocks * 512 < MIB
    assert path.stat().st_size > inventory.n_bytes
    found = qp.read_inventory(path)
    assert found.tensors == inventory.tensors
    assert found.architecture == inventory.architecture


# Their layouts are ik_llama.cpp's own.
ONLY_IK = {"BitNet-b1.58-2B-4T", "DeepSeek-V3-ik-MLA", "Kimi-K2-Instruct-ik-MLA"}


@needs_llama_cpp
@pytest.mark.parametrize("name", [n for n in catalog_names() if n not in ONLY_IK])
def test_catalog_models_take_what_was_predicted(llama_cpp: LlamaCpp, gpu: str, name: str) -> None:
    """Every model of the catalog, at full size: weights and caches equal llama.cpp's to the MiB."""
    inventory = qp.read_inventory(name)
    flags = f"{gpu} -ngl 99 -c 40000 -np 2 -ot exps=CPU"
    machine = Machine.parse("24GiB + 64GiB@80GB/s")
    predicted = qp.predict(inventory, flags, machine, llama_cpp_build=BUILD)
    measured = measure_memory(llama_cpp, inventory, flags)
    for use, device in zip(predicted.devices, measured.devices, strict=True):
        assert 0 <= use.weights_bytes - device.weights_bytes < device.rounding_bytes
        assert use.kv_bytes // MIB == device.cache_bytes // MIB


@needs_llama_cpp
@pytest.mark.parametrize("flags", ["-ngl 99 -c 4096 -np 1", "-ngl 20 -c 4096 -ub 128 -fa off"])
def test_a_dry_run_says_what_loading_says(
    llama_cpp: LlamaCpp, gpu: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out or loaded: the compute buffers are equal, to the last digit that is printed."""
    path = smollm2_path()
    assert path is not None
    inventory = qp.read_inventory(path)
    dry = measure_memory(llama_cpp, inventory, f"{gpu} {flags}")
    for key, text in portable_cpu(tmp_path).items():
        monkeypatch.setenv(key, text)
    loaded = measure_memory(loading(llama_cpp), inventory, f"{gpu} {flags} -lm none")
    assert dry.is_dry_run
    assert not loaded.is_dry_run
    assert [d.name for d in loaded.devices] == [d.name for d in dry.devices]
    for asked, real in zip(dry.devices, loaded.devices, strict=True):
        assert asked.compute_bytes == real.compute_bytes
        assert asked.weights_bytes // MIB == real.weights_bytes // MIB
        assert asked.cache_bytes // MIB == real.cache_bytes // MIB


@needs_llama_cpp
def test_nothing_but_the_given_flags_counts(
    llama_cpp: LlamaCpp, gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's configuration, variables, and flags about models, ports and logs do not."""
    inventory = qp.read_inventory("Qwen3-4B-Instruct-2507")
    plain = measure_memory(llama_cpp, inventory, f"{gpu} -ngl 99 -c 4096")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "config.ini").write_text("ubatch-size = 64\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_ARG_CACHE_TYPE_K", "q8_0")
    flags = f"llama-server {gpu} -m other.gguf -lv 0 -v --port 1 --fit off -ngl 99 -c 4096"
    assert [device.name for device in plain.devices] == ["RPC0", "Host"]
    assert measure_memory(llama_cpp, inventory, flags) == plain
    assert MemoryMeasurement.model_validate_json(plain.model_dump_json()) == plain


@needs_llama_cpp
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("-ngl 99 --no-such-flag", "does not know one of the flags.*--no-such-flag"),
        ("-ctv q8_0 -fa off", "could not lay the model out.*V cache requires.*All that it printed"),
    ],
)
def test_a_failure_says_why(llama_cpp: LlamaCpp, flags: str, says: str) -> None:
    """What llama.cpp complained of is quoted, with its likely cause, and a long log is kept."""
    with pytest.raises(LlamaCppError, match=f"(?s){says}") as caught:
        measure_memory(llama_cpp, qp.read_inventory("Qwen3-4B-Instruct-2507"), flags)
    if kept := re.search(r"All that it printed: (\S+)", str(caught.value)):
        assert "llama_model_loader" in Path(kept[1]).read_text()
        Path(kept[1]).unlink()


def test_no_process_is_left(tmp_path: Path) -> None:
    """A program ends with its block; one that takes too long is an error with its last lines."""
    path = program(tmp_path, "echo $((6 * 7)); exec sleep 60") / "llama-server"
    with (
        pytest.raises(LlamaCppError, match=r"not ready after 0 s(?s:.*)Its last lines:\n42"),
        running([str(path)]) as process,
    ):
        process.wait_until(lambda: "42" in process.log, limit_s=60)
        process.wait_until(lambda: False, limit_s=0.2)
    assert process.popen.poll() is not None


LOG = """
0.00.059 I llama_prepare_model_devices: using device CUDA0 (NVIDIA A) (0000:01:00.0) - 9 MiB free
0.00.060 I llama_prepare_model_devices: using device RPC1 (127.0.0.1:7) (unknown id) - 9 MiB free
llama_context:  CUDA_Host  output buffer size =     0.58 MiB
sched_reserve:      CUDA0 compute buffer size =   136.01 MiB
sched_reserve: RPC0[127.0.0.1:7] compute buffer size =   117.79 MiB
sched_reserve:  CUDA_Host compute buffer size =   178.26 MiB
common_memory_breakdown_print: | memory breakdown [MiB] | total   free     self |
common_memory_breakdown_print: |   - CUDA0 (NVIDIA A)   |  2048 = 2048 + (9263 = 6055 + 3072 + 136) + -7215 |
common_memory_breakdown_print: |   - RPC1 (127.0.0.1:7) |  2048 = 2048 + (8408 = 5347 + 2944 + 117) + -6360 |
common_memory_breakdown_print: |   - Host               |                 2178 = 2000 +    0 + 178          |
common_params_fit_impl: projected to use 2178 MiB of host memory vs. 24105 MiB of total host memory
"""  # noqa: E501


def test_buffers_are_told_apart_by_device() -> None:
    """Pinned and mapped buffers are in RAM; RPC buffers are known by their address."""
    devices = Devices.parse(LOG)
    assert devices.names == ("CUDA0", "RPC1")
    homes = {name: devices.holding(name) for name in Buffers.parse(LOG).compute}
    assert homes == {"CUDA0": "CUDA0", "RPC0[127.0.0.1:7]": "RPC1", "CUDA_Host": "Host"}
    assert {devices.holding(name) for name in ("CPU", "CPU_Mapped", "CPU_REPACK")} == {"Host"}
    assert devices.holding("CUDA0_Mapped") == "CUDA0"
    assert [row.model_mib for row in read_table(LOG)] == [6055, 5347, 2000]


# As ik_llama.cpp prints it: no devices are listed, and weights have no word of their own.
OLDER_LOG = """
llm_load_tensors:        CPU buffer size =   938.98 MiB
llm_load_tensors:      CUDA0 buffer size = 13995.99 MiB
llm_load_tensors:     CUDA10 buffer size = 13730.03 MiB
llm_load_tensors:      CUDA9 buffer size = 13730.03 MiB
llama_kv_cache_init:      CUDA0 KV buffer size =   640.00 MiB
llama_new_context_with_model:  CUDA_Host  output buffer size =     0.49 MiB
llama_new_context_with_model:      CUDA0 compute buffer size =   164.00 MiB
llama_new_context_with_model:  CUDA_Host compute buffer size =    32.01 MiB
llama_new_context_with_model: graph splits = 3
"""


def test_older_logs_are_read_too() -> None:
    """Logs that list no devices are asked for their buffers, in the order of their numbers."""
    devices, buffers = Devices.parse(OLDER_LOG), Buffers.parse(OLDER_LOG)
    assert devices.names == ("CUDA0", "CUDA9", "CUDA10")
    assert buffers.model == {
        "CPU": 938.98,
        "CUDA0": 13995.99,
        "CUDA10": 13730.03,
        "CUDA9": 13730.03,
    }
    assert buffers.kv == {"CUDA0": 640.0}
    assert buffers.compute == {"CUDA0": 164.0, "CUDA_Host": 32.01}
    assert buffers.output == {"CUDA_Host": 0.49}


# The sizes that llama.cpp 0.5.0-dev (commit 0c1e570, November 2026) prints of a GPU behind --rpc.
NEWER_LOG = """
0.00.086.228 I llama_prepare_model_devices: using device RPC0 (127.0.0.1:7) (unknown id) - 24105 MiB free
0.00.128.819 I load_tensors:          CPU model buffer size =     8.32 MiB
0.00.128.820 I load_tensors: RPC0[127.0.0.1:7] model buffer size =     1.91 MiB
0.00.220.832 I llama_kv_cache: RPC0[127.0.0.1:7] KV buffer size =     2.00 MiB
0.00.242.981 I sched_reserve: RPC0[127.0.0.1:7] compute buffer size =     0.50 MiB
0.00.243.010 I sched_reserve:        CPU compute buffer size =     0.56 MiB
0.00.243.030 I sched_reserve: graph: nodes = 210, splits = 10, input objects = 4, input tensors = 6
"""  # noqa: E501


def test_newer_logs_are_read_too() -> None:
    """A log that words the graph's line otherwise is complete with it, and not before."""
    rpc, host = read_loaded(NEWER_LOG)
    assert (rpc.name, rpc.weights_bytes, rpc.cache_bytes) == ("RPC0", 2002780, 2 * 2**20)
    assert (rpc.compute_bytes, host.compute_bytes) == (2**19, 587203)
    assert has_reserved(NEWER_LOG)
    assert has_reserved(OLDER_LOG)
    assert not has_reserved(NEWER_LOG[: NEWER_LOG.rindex("graph")])


def test_an_unfinished_table_is_none() -> None:
    """A table that is still being printed is not taken for a whole one."""
    assert read_table(LOG[: LOG.rindex("Host")]) == ()
    assert read_table(LOG.rstrip("\n")) == ()


def test_weights_in_a_layout_of_the_cpu_are_in_ram() -> None:
    """A line behind that of RAM adds to it, so the table ends with the first line of no table."""
    table, _, behind = LOG.partition("common_params_fit_impl")
    table += "common_memory_breakdown_print: |   - CPU_REPACK | 2157 =  2157 +  0 +  0  |\n"
    assert read_table(table) == ()
    host = read_table(table + "common_params_fit_impl" + behind)[-1]
    assert (host.name, host.model_mib, host.compute_mib, host.n_lines) == ("Host", 4157, 178, 2)


def measurement(llama_cpp: LlamaCpp, *devices: tuple[str, int]) -> MemoryMeasurement:
    return MemoryMeasurement(
        model="toy",
        header_sha256="",
        llama_cpp=llama_cpp,
        flags=(),
        devices=tuple(
            MeasuredDevice(name=name, weights_bytes=0, cache_bytes=0, compute_bytes=n_bytes)
            for name, n_bytes in devices
        ),
        is_dry_run=False,
    )


@needs_llama_cpp
def test_measured_buffers_take_the_place_of_estimates(llama_cpp: LlamaCpp) -> None:
    """GPUs of one kind go by their number; what fits is decided anew, and the text says so."""
    machine = Machine.parse("2x 24GiB + 64GiB@80GB/s")
    plain = qp.predict(qp.read_inventory("Qwen3-4B-Instruct-2507"), "-ngl 99 -c 4096", machine)
    found = calibrated(plain, measurement(llama_cpp, ("CUDA1", 30 * 2**30), ("Host", 7)))
    assert plain.fits
    assert not found.fits
    assert [use.compute_is_measured for use in found.devices] == [False, True, True]
    assert [use.compute_bytes for use in found.devices[1:]] == [30 * 2**30, 7]
    assert found.devices[0] == plain.devices[0]
    assert found.summary().count("(measured)") == 2
    assert f"llama.cpp b{BUILD}" in found.notes[-1]


@needs_llama_cpp
def test_another_machine_is_no_measure(llama_cpp: LlamaCpp) -> None:
    """A llama.cpp without a GPU says nothing about a machine that has one."""
    inventory = qp.read_inventory("Qwen3-4B-Instruct-2507")
    with pytest.raises(LlamaCppError, match="has no GPU here, but the machine has 1 GPU"):
        predict_calibrated(inventory, "-c 4096", Machine.parse("24GiB + 8GiB@50GB/s"), llama_cpp)


@needs_llama_cpp
@pytest.mark.parametrize("flags", ["", "-lm none", "-nr"])
@pytest.mark.parametrize("is_pure", [False, True])
@pytest.mark.parametrize("name", ["Qwen3-4B-Instruct-2507", "Qwen3-30B-A3B"])
def test_weights_that_the_cpu_repacks_are_no_difference(
    llama_cpp: LlamaCpp, name: str, is_pure: bool, flags: str
) -> None:
    """Without a GPU, calibrating a model with repacked weights warns of nothing."""
    plain = qp.read_inventory(name)
    pure = {tensor.name: "Q4_0" for tensor in plain.tensors if tensor.is_quantizable}
    inventory = plain.with_qtypes(pure if is_pure else qp.stock_mix(plain, "Q4_K_M"))
    machine = Machine.parse("64GiB@80GB/s")
    found = predict_calibrated(inventory, f"-c 4096 -np 1 {flags}", machine, llama_cpp)
    assert found.warnings == ()


@needs_llama_cpp
def test_calibrate_on_the_command_line(gpu: str, llama_cpp: LlamaCpp) -> None:
    """`predict --calibrate` prints the numbers that llama.cpp measured."""
    arguments = ["predict", "GLM-4.5-Air", "--machine", "24GiB + 256GiB@80GB/s", "--calibrate"]
    arguments += ["--llama-cpp", str(llama_cpp.server.parent), "--json", "--", *gpu.split()]
    done = CliRunner().invoke(app, [*arguments, "-ngl", "99", "--cpu-moe", "-c", "32768"])
    assert done.exit_code == 0, done.output
    found = qp.MemoryPrediction.model_validate_json(done.output)
    assert all(use.compute_is_measured for use in found.devices)
    assert found.warnings == ()


@needs_llama_cpp
@pytest.mark.parametrize("vulkan", [1, 2], indirect=True)
@pytest.mark.parametrize("mode", ["-lm none", "--no-mmap", "-lm mmap"])
@pytest.mark.parametrize("flags", ["-ngl 99 -ot exps=CPU", "-ngl 3 -np 2 -ctk q8_0 -fa on"])
def test_experts_on_vulkan_take_what_was_predicted(
    vulkan: Machine, flags: str, mode: str, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """Weights and caches of a mixture of experts equal what llama.cpp prints for Vulkan GPUs."""
    path = toy_moe(tmp_path / "toy.gguf")
    check_loaded(llama_cpp, path, f"-c 1024 -np 1 {flags} {mode}", vulkan)


@needs_llama_cpp
@pytest.mark.parametrize("vulkan", [1, 2], indirect=True)
def test_a_dense_model_on_vulkan_takes_what_was_predicted(
    vulkan: Machine, llama_cpp: LlamaCpp
) -> None:
    """SmolLM2 as published takes the predicted bytes on one Vulkan GPU and on two."""
    path = smollm2_path()
    assert path is not None
    check_loaded(llama_cpp, path, "-ngl 99 -c 1024 -np 1 -lm none", vulkan)


def check_loaded(llama_cpp: LlamaCpp, path: Path, flags: str, machine: Machine) -> None:
    """Loads the model and compares every device."""
    inventory = qp.read_inventory(path)
    predicted = qp.predict(inventory, flags, machine, llama_cpp_build=BUILD)
    measured = measure_memory(loading(llama_cpp), inventory, flags)
    assert len(measured.devices) == len(predicted.devices)
    for use, device in zip(predicted.devices, measured.devices, strict=True):
        assert device.cache_bytes == pytest.approx(use.kv_bytes, abs=PRINTED_BYTES)
        # What is mapped is the span of the file from the first tensor in RAM to the last.
        if not (device.name == "Host" and "-lm mmap" in flags):
            assert device.weights_bytes == pytest.approx(use.weights_bytes, abs=PRINTED_BYTES)


def loading(llama_cpp: LlamaCpp) -> LlamaCpp:
    """The same llama.cpp, as if it could not lay a model out without loading it."""
    return llama_cpp.model_copy(update={"has_fit": False})


@needs_llama_cpp
@pytest.mark.parametrize("vulkan", [2], indirect=True)
@pytest.mark.parametrize("flags", ["-ts 3,1", "-sm none -mg 1", "-ngl 2", "-ot exps=Vulkan1"])
def test_two_vulkan_gpus_are_calibrated_in_order(
    vulkan: Machine, flags: str, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """Each GPU gets its own measured buffer, whichever llama.cpp uses, and nothing else differs."""
    inventory = qp.read_inventory(toy_moe(tmp_path / "toy.gguf"))
    found = predict_calibrated(inventory, f"-c 1024 -np 1 {flags}", vulkan, llama_cpp)
    assert found.warnings == ()
    unused = {"GPU0"} if "none" in flags else set()
    assert {u.name for u in found.devices if not u.compute_is_measured} == unused
