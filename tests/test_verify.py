"""What a recipe promised is compared with what the real llama.cpp does."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import app
from quantplan.costs.speed import interval
from quantplan.runtime import find_llama_cpp
from quantplan.runtime.memory import read_loaded
from quantplan.runtime.server import serving
from quantplan.verification.learn import learn
from quantplan.verification.result import Check, Verification
from quantplan.verification.verify import memory_checks, speed_tests
from tests.support.buffers import BUILD
from tests.support.llama_cpp import (
    needs_llama_cpp,
    older_folder,
    packaged_folder,
    portable_cpu,
    rpc_server,
)
from tests.support.models import toy_moe

# Repacked matrices round otherwise, so answers would differ from those of other devices.
PLAIN = ("-nr", "-t", "1")
OLDER_BUILD = 10068


@pytest.fixture(scope="module", autouse=True)
def portable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """llama.cpp computes on this processor, and nothing that was started is left."""
    with pytest.MonkeyPatch.context() as patch:
        for key, text in portable_cpu(tmp_path_factory.mktemp("cpu")).items():
            patch.setenv(key, text)
        yield
    assert psutil.Process().children() == []


@dataclass(frozen=True)
class Quantized:
    """A model that was planned and quantized for the CPU alone.

    Attributes:
        recipe: Its recipe.
        source: What it was quantized from.
        path: The file.
        machines: The text of a machine for each number of other hosts.
    """

    recipe: qp.Recipe
    source: Path
    path: Path
    machines: tuple[str, str, str]

    def plan(self, machine: qp.Machine) -> qp.Plan:
        """The same types for another machine."""
        policy = qp.policy("free")
        for name, qtype in self.recipe.quantizable_types.items():
            policy = policy.allow(f"^{re.escape(name)}$", qtype)
        return qp.plan(
            qp.read_inventory(self.source),
            machine,
            WORK,
            policy=policy,
            baselines=False,
            gap=0.5,
        )

    def placed(self, endpoints: list[str]) -> qp.Recipe:
        """A recipe with the same types for a machine to which other hosts lend devices."""
        if not endpoints:
            return self.recipe
        text = self.machines[len(endpoints)].format(*endpoints)
        plan = self.plan(qp.Machine.parse(text))
        assert {use.name for use in plan.devices if use.weights_bytes} == {
            *(f"GPU{i}" for i in range(len(endpoints))), "CPU"
        }  # fmt: skip
        return plan.recipe


WORK = qp.Workload(context=512, ubatch=64, llama_cpp_build=BUILD)
NETWORK = "@10Gbit/s,0.1ms"


def quantized(source: Path, folder: Path, machines: tuple[str, str, str]) -> Quantized:
    plan = qp.plan(
        qp.read_inventory(source),
        qp.Machine.parse(machines[0]),
        WORK,
        baselines=False,
    )
    path = folder / "quantized.gguf"
    qp.quantize(plan.recipe, source, path)
    return Quantized(plan.recipe, source, path, machines)


@pytest.fixture(scope="module")
def dense(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """SmolLM2."""
    machines = (
        "300MiB@20GB/s",
        f"RPC {{0}} 110MiB@300GB/s{NETWORK} + 300MiB@20GB/s",
        f"RPC {{0}} 60MiB@300GB/s{NETWORK} + RPC {{1}} 80MiB@300GB/s{NETWORK} + 300MiB@20GB/s",
    )
    return quantized(smollm2, tmp_path_factory.mktemp("dense"), machines)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A tiny mixture-of-experts model."""
    folder = tmp_path_factory.mktemp("moe")
    source = toy_moe(folder / "toy.gguf", "qwen3moe")
    machines = (
        "14MiB@20GB/s",
        f"RPC {{0}} 6MiB@300GB/s{NETWORK} + 20MiB@20GB/s",
        f"RPC {{0}} 5MiB@300GB/s{NETWORK} + RPC {{1}} 5MiB@300GB/s{NETWORK} + 20MiB@20GB/s",
    )
    return quantized(source, folder, machines)


def memory_is_exact(found: Verification) -> bool:
    """Whether weights and caches are equal to the last printed digit."""
    exact = [check for check in found.checks if check.what in ("weights", "KV")]
    assert len(exact) == 2 * (len(found.devices) + 1)
    return all(check.held for check in exact)


@needs_llama_cpp
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_memory_is_as_promised_and_places_change_no_word(
    model: str, request: pytest.FixtureRequest
) -> None:
    """On the CPU alone and with one and two other hosts, weights and caches take what the plan said
    to the last printed digit, and the model says the same.
    """
    given: Quantized = request.getfixturevalue(model)
    llama_cpp = find_llama_cpp(packaged_folder())
    answers = []
    with rpc_server() as first, rpc_server() as second:
        for endpoints in ([], [first], [first, second]):
            recipe = given.placed(endpoints)
            found = qp.verify(
                recipe, given.path, llama_cpp=llama_cpp, extra_flags=PLAIN, speed=False
            )
            assert memory_is_exact(found), found.summary()
            assert found.devices == tuple(f"RPC{i}" for i in range(len(endpoints)))
            assert not [note for note in found.notes if "deprecated" in note.lower()]
            answers.append(found.completion)
    assert answers[0]
    assert answers == [answers[0]] * 3
    if model == "dense":
        assert "Paris" in answers[0]


@needs_llama_cpp
def test_an_older_llama_cpp_is_told_in_its_own_words(moe: Quantized) -> None:
    """The same recipe runs on a build from before -lm: no flag is deprecated, memory is as planned,
    and a server of another build is not taken for a device.
    """
    folder = older_folder()
    if folder is None:
        pytest.skip("no older llama.cpp here: make test installs one")
    older = find_llama_cpp(folder)
    assert (older.build, older.has_load_mode) == (OLDER_BUILD, False)
    with rpc_server(folder=folder) as endpoint, rpc_server() as newer:
        recipe = moe.placed([endpoint])
        found = qp.verify(recipe, moe.path, llama_cpp=older, extra_flags=PLAIN, speed=False)
        assert memory_is_exact(found), found.summary()
        assert "--no-mmap" in found.command
        assert not {"-lm", "--load-mode"} & set(found.command)
        assert not [note for note in found.notes if "deprecated" in note.lower()]
        assert any("b10434" in note or "newest" in note for note in found.notes) is False
        stranger = moe.placed([newer])
        with pytest.raises(qp.LlamaCppError, match=r"no GPU here.*1 GPUs.*of the same build"):
            qp.verify(stranger, moe.path, llama_cpp=older, extra_flags=PLAIN, speed=False)


@needs_llama_cpp
def test_vulkan_takes_what_was_promised(moe: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Vulkan device, computed on the CPU, holds what the plan gave it."""
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    llama_cpp = find_llama_cpp(packaged_folder())
    if len(llama_cpp.devices) != 1:
        pytest.skip("llama.cpp finds no Vulkan device: install mesa-vulkan-drivers")
    plan = moe.plan(qp.Machine.parse("6MiB@300GB/s + 20MiB@20GB/s"))
    # Its shaders would take a minute to compile, so that it is asked nothing.
    with serving(llama_cpp, moe.path, plan.flags) as server:
        measured = read_loaded(server.process.log)
    assert [device.name for device in measured] == ["Vulkan0", "Host"]
    checks = memory_checks(
        qp.predict(qp.read_inventory(moe.path), plan.flags, plan.machine, llama_cpp_build=BUILD),
        measured,
    )
    assert all(check.held for check in checks if check.what != "compute"), checks


@needs_llama_cpp
def test_other_gpus_than_promised_are_an_error(moe: Quantized) -> None:
    """A recipe for the CPU alone promises nothing of a machine with a device more."""
    llama_cpp = find_llama_cpp(packaged_folder())
    with (
        rpc_server() as endpoint,
        pytest.raises(qp.LlamaCppError, match=r"uses RPC0 here.*has 0 GPUs.*-dev none"),
    ):
        qp.verify(moe.recipe, moe.path, llama_cpp=llama_cpp, extra_flags=["--rpc", endpoint])


@needs_llama_cpp
def test_only_the_recipes_own_file_is_run(moe: Quantized, smollm2: Path) -> None:
    """A file with other tensors or types is refused before anything starts, all faults at once."""
    with pytest.raises(qp.RecipeError, match=r"(?s)lacks .* tensors.*has .* tensors more"):
        qp.verify(moe.recipe, smollm2)
    with pytest.raises(qp.RecipeError, match=r"(?s)no flags.*states no machine"):
        provenance = moe.recipe.provenance.model_copy(update={"machine": None})
        promised = {"flags": (), "provenance": provenance}
        qp.verify(moe.recipe.model_copy(update=promised), moe.path)


@needs_llama_cpp
def test_the_command_line_says_whether_the_promise_held_and_learns(
    dense: Quantized, tmp_path: Path
) -> None:
    """A machine that was taken for much too fast breaks the promise: exit code 3. What was measured
    goes into the profile, so that the next prediction is nearer, with a narrower interval; the
    profile of before is kept.
    """
    known = qp.Machine.parse(dense.machines[0])
    fast = known.ram.model_copy(update={"decode_slowdown": 0.001})
    machine = known.model_copy(update={"ram": fast})
    profile, recipe = tmp_path / "here.json", tmp_path / "recipe.json"
    machine.save(profile)
    dense.recipe.save(recipe)
    saved = tmp_path / "verification.json"
    arguments = ["verify", str(recipe), str(dense.path), "--llama-cpp", str(packaged_folder())]
    arguments += ["--learn", str(profile), "--output", str(saved), "--", *PLAIN]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert "BROKEN" in result.output
    found = Verification.load(saved)
    assert not found.held
    assert memory_is_exact(found)
    decode = [check for check in found.checks if check.what == "decode"]
    assert [check.where for check in decode] == ["@0", "@256"]
    assert all(check.measured < (check.low or 0) for check in decode)
    prefill = [check for check in found.checks if check.what == "prefill"]
    assert [check.where for check in prefill] == ["@0", "@256"]
    assert all(check.predicted > 0 and check.measured > 0 for check in prefill)
    assert "all slots are idle" in saved.with_suffix(".log").read_text()
    learned = qp.Machine.load(profile)
    assert learned.ram.decode_slowdown > machine.ram.decode_slowdown
    assert any("llama-server of llama.cpp b10434" in said for said in learned.measured)
    before, after = (interval("decode", "cpu", m, 1.0) for m in (machine, learned))
    assert after.high - after.low < before.high - before.low
    expected = [
        qp.predict(
            qp.read_inventory(dense.path), dense.recipe.flags, m, llama_cpp_build=BUILD
        ).speed.decode_tps(16).expected
        for m in (machine, learned)
    ]  # fmt: skip
    assert abs(expected[1] - decode[0].measured) < abs(expected[0] - decode[0].measured)
    assert qp.Machine.load(tmp_path / "here.before.json") == machine
    (buffer,) = [check for check in found.checks if check.what == "compute"]
    (use,) = qp.predict(
        qp.read_inventory(dense.path), dense.recipe.flags, learned, llama_cpp_build=BUILD
    ).devices
    assert use.compute_low_bytes == use.compute_high_bytes == buffer.measured
    assert (buffer.low or 0) < (buffer.high or 0)
    again = learn(learned, qp.read_inventory(dense.path), found)
    assert again.compute == learned.compute


@needs_llama_cpp
def test_loss_is_measured_beside_the_unquantized_model(moe: Quantized, tmp_path: Path) -> None:
    """KLD and PPL come with standard errors, and a second run says the same to the last digit."""
    text = tmp_path / "text.txt"
    text.write_text("the rain in the hills then ran on " * 200)
    recipe = tmp_path / "recipe.json"
    moe.recipe.save(recipe)
    arguments = ["verify", str(recipe), str(moe.path), "--llama-cpp", str(packaged_folder())]
    arguments += ["--no-speed", "--kld", str(moe.path.with_name("toy.gguf")), "--text", str(text)]
    arguments += ["--chunks", "2"]
    losses = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        saved = tmp_path / name / "verification.json"
        result = CliRunner().invoke(app, [*arguments, "--output", str(saved), "--", *PLAIN])
        assert result.exit_code in (0, 3), result.output
        assert "KLD" in result.output
        losses.append(Verification.load(saved).loss)
    assert losses[0] is not None
    assert losses[0] == losses[1]
    assert losses[0].kld_nats > 0
    assert losses[0].n_chunks == 2
    assert json.loads(saved.read_text())["loss"]["kld_nats"] == losses[0].kld_nats


@pytest.mark.parametrize(
    ("context", "slots", "depths", "n_prompt"),
    [(64, 1, (0,), 56), (512, 1, (0, 256), 248), (1024, 2, (0, 256), 248),
     (32768, 1, (0, 8192), 512)],
)  # fmt: skip
def test_speeds_are_measured_where_a_slot_has_room(
    context: int, slots: int, depths: tuple[int, ...], n_prompt: int
) -> None:
    """Half of a slot's context, at most 8192 tokens, is the second depth, unless it is too short;
    the prompt is a ubatch where there is room for one behind that.
    """
    work = qp.Workload(context=context, slots=slots, kv_unified=False)
    tests = speed_tests(work.slot_context, work.ubatch)
    assert (tests.depths, tests.n_prompt) == (depths, n_prompt)


@pytest.mark.parametrize(
    ("low", "high", "measured", "held"),
    [(9.0, 11.0, 10.0, True), (9.0, 11.0, 8.9, False), (9.0, 11.0, 11.1, False),
     (None, None, 99.0, True)],
)  # fmt: skip
def test_a_promise_is_an_interval(
    low: float | None, high: float | None, measured: float, held: bool
) -> None:
    """What lies outside breaks it, and is shown with the bounds; without bounds nothing does."""
    check = Check(what="decode", where="@0", predicted=10.0, low=low, high=high, measured=measured)
    assert check.held is held
    assert check.ratio == pytest.approx(measured / 10)
    assert ("BROKEN: promised 9.0 to 11.0" in check.line()) is not held


def test_a_file_that_is_no_verification_is_told(tmp_path: Path) -> None:
    """Another file, or none, is the caller's fault."""
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(qp.InputError, match="no verification"):
        Verification.load(tmp_path / "other.json")
    with pytest.raises(qp.InputError, match="No such file"):
        Verification.load(tmp_path / "none.json")
