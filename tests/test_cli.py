"""The command line: thin over the API, exit codes, output that parses."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quantplan as qp
from tests.support.http_server import serve
from tests.support.models import toy_moe
from tests.support.quantizer import recipe_for, sparse

AIR = ["plan", "GLM-4.5-Air", "--machine", "RTX 4090 + 64GiB@80GB/s", "--ctx", "32768"]
FULL_AIR = [*AIR, "--kv", "q8_0", "--min-tps", "10"]


def quantplan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantplan.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_json_output_is_the_plan_itself() -> None:
    """`--json` prints nothing but the plan, and the plan loads back from it."""
    done = quantplan(*FULL_AIR, "--json")
    assert done.returncode == 0, done.stderr
    found = qp.Plan.model_validate_json(done.stdout)
    assert found.predicted.decode_tps >= 10
    assert found.gap <= 1e-3
    assert json.loads(done.stdout)["devices"][0]["name"] == "GPU0"


def test_command_shown_holds_exactly_the_flags() -> None:
    """The command that a person pastes has the flags of the plan, and names their file."""
    found = qp.Plan.model_validate_json(quantplan(*FULL_AIR, "--json").stdout)
    shown = quantplan(*FULL_AIR, "--gguf-name", "my air.gguf").stdout.splitlines()[-1]
    assert shlex.split(shown) == ["llama-server", "-m", "my air.gguf", *found.flags]


def test_rules_of_the_command_line_hold() -> None:
    """`--pin` and `--allow` decide types, pins first, and the plan says which rules it had."""
    rules = ["--allow", "exps=Q8_0,Q5_0", "--pin", "ffn_up_exps=Q4_K", "--pin", "gate_exps=Q4_K"]
    done = quantplan(*AIR, "--policy", "compact", *rules, "--json")
    assert done.returncode == 0, done.stderr
    found = qp.Plan.model_validate_json(done.stdout)
    kinds = {(a.tensor.split(".")[2], a.qtype) for a in found.assignments if "_exps" in a.tensor}
    assert {q for role, q in kinds if role in {"ffn_up_exps", "ffn_gate_exps"}} == {"Q4_K"}
    assert {q for role, q in kinds if role == "ffn_down_exps"} <= {"Q8_0", "Q5_0"}
    assert found.provenance.policy_text.startswith("compact, ffn_up_exps=Q4_K")


def test_faults_in_rules_are_told_together() -> None:
    """Rules that cannot be read are all named, with exit code 2."""
    done = quantplan(*AIR, "--pin", "attn", "--pin", "attn=Q4_K,Q5_K", "--allow", "attn=Q9")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 3


def test_saved_recipe_is_shown_again(tmp_path: Path) -> None:
    """A recipe that `plan` saves is what `show` prints."""
    recipe = tmp_path / "air.json"
    assert quantplan(*FULL_AIR, "--recipe", recipe).returncode == 0
    shown = quantplan("show", recipe)
    assert shown.returncode == 0
    assert "GLM-4.5-Air" in shown.stdout
    as_json = quantplan("show", recipe, "--json")
    assert qp.Recipe.model_validate_json(as_json.stdout) == qp.Recipe.load(recipe)


def test_a_recipe_is_known_by_its_content(tmp_path: Path) -> None:
    """A recipe is shown whatever its name."""
    source = toy_moe(tmp_path / "toy.gguf")
    recipe = tmp_path / "toy.recipe"
    recipe_for(source, {}).save(recipe)
    shown = quantplan("show", recipe, "--json")
    assert shown.returncode == 0, shown.stderr
    assert qp.Recipe.model_validate_json(shown.stdout) == qp.Recipe.load(recipe)


def test_show_prints_a_model_in_a_stock_mix() -> None:
    """`show --ftype` prints the size and types of a file that carries the ftype in its name."""
    done = quantplan("show", "GLM-4.5-Air", "--ftype", "q4_k_m")
    assert done.returncode == 0, done.stderr
    assert "67.85 GiB" in done.stdout
    assert re.search(r"22x ffn_down_exps +1408x4096x128 +Q8_0", done.stdout)


def test_a_recipe_is_not_shown_in_a_stock_mix(tmp_path: Path) -> None:
    """A recipe has its own types, so that an ftype beside it is refused."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{}")
    done = quantplan("show", recipe, "--ftype", "Q4_K_M")
    assert (done.returncode, "--ftype needs a model" in done.stderr) == (2, True)


def test_show_lists_a_model_without_reading_weights(tmp_path: Path) -> None:
    """`show` names the architecture and every role of a GGUF."""
    done = quantplan("show", toy_moe(tmp_path / "toy.gguf"))
    assert done.returncode == 0
    assert "glm4moe" in done.stdout
    assert "ffn_down_exps" in done.stdout


def test_plan_then_quantize_on_the_command_line(tmp_path: Path) -> None:
    """The two commands turn a float GGUF into one with the planned types."""
    source, target = toy_moe(tmp_path / "toy.gguf"), tmp_path / "out.gguf"
    recipe = tmp_path / "toy.json"
    machine = "10MiB@300GB/s + 20MiB@20GB/s"
    planned = quantplan("plan", source, "--machine", machine, "--ctx", "256", "--recipe", recipe)
    assert planned.returncode == 0, planned.stderr
    done = quantplan("quantize", recipe, source, target, "--verify", "--resume")
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(target.read_bytes()).hexdigest() in done.stdout
    assert "relative squared error" in done.stdout
    written = qp.read_inventory(target)
    wanted = {t.tensor: t.qtype for t in qp.Recipe.load(recipe).tensors}
    assert {t.name: t.qtype for t in written.tensors} == wanted
    assert len(set(wanted.values())) > 2


def test_a_plan_does_where_a_recipe_is_asked_for(tmp_path: Path) -> None:
    """What `plan --json` prints is shown, exported and compared as the recipe that it has."""
    recipe, plan = tmp_path / "recipe.json", tmp_path / "plan.json"
    made = quantplan("plan", "gemma-3-270m", *_ON, "--recipe", recipe, "--json")
    plan.write_text(made.stdout, encoding="utf-8")
    assert quantplan("show", plan, "--json").stdout == quantplan("show", recipe, "--json").stdout
    exported = quantplan("export", plan, "shell")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout == quantplan("export", recipe, "shell").stdout
    assert "the same types, places and flags" in quantplan("diff", recipe, plan).stdout


def test_recipes_go_out_come_in_and_are_compared(tmp_path: Path) -> None:
    """`export`, `import` and `diff` hand a plan through a shell script without a difference."""
    recipe, script, back = (tmp_path / name for name in ("air.json", "air.sh", "back.json"))
    assert quantplan(*AIR, "--recipe", recipe).returncode == 0
    assert quantplan("export", recipe, "shell", "--output", script).returncode == 0
    assert quantplan("export", recipe, "shell").stdout == script.read_text(encoding="utf-8")
    machine = AIR[AIR.index("--machine") + 1]
    done = quantplan("import", "GLM-4.5-Air", script, "--recipe", back, "--machine", machine)
    assert done.returncode == 0, done.stderr
    assert "types from air.sh (command)" in done.stdout
    assert "the same types, places and flags" in quantplan("diff", recipe, back).stdout
    found = qp.RecipeDifference.model_validate_json(
        quantplan("diff", recipe, back, "--json").stdout
    )
    assert found.is_empty
    assert found.n_bytes[0] == found.n_bytes[1] > 0


def test_prediction_takes_a_recipe_in_place_of_flags(tmp_path: Path) -> None:
    """A saved recipe is predicted with its own types and flags."""
    recipe, machine = tmp_path / "air.json", "RTX 4090 + 64GiB@80GB/s"
    assert quantplan(*FULL_AIR, "--recipe", recipe).returncode == 0
    command = ["predict", "GLM-4.5-Air", "--machine", machine, "--json"]
    done = quantplan(*command, "--recipe", recipe)
    found = qp.MemoryPrediction.model_validate_json(done.stdout)
    inventory, described = qp.read_inventory("GLM-4.5-Air"), qp.Machine.parse(machine)
    assert found == qp.predict(inventory, qp.Recipe.load(recipe), described)


def test_prediction_takes_a_stock_mix() -> None:
    """`predict --ftype` is about the types that `show --ftype` lists, with and without a matrix."""
    machine, flags = "RTX 4090 + 96GiB@80GB/s", ["-ngl", "99", "--cpu-moe", "-c", "4096"]
    inventory, described = qp.read_inventory("GLM-4.5-Air"), qp.Machine.parse(machine)
    command = ["predict", "GLM-4.5-Air", "--machine", machine, "--ftype", "IQ4_XS", "--json"]
    for options, has_imatrix in (([], False), (["--imatrix"], True)):
        done = quantplan(*command, *options, "--", *flags)
        mix = qp.stock_mix(inventory, "IQ4_XS", has_imatrix=has_imatrix)
        found = qp.MemoryPrediction.model_validate_json(done.stdout)
        assert found == qp.predict(inventory.with_qtypes(mix), flags, described)


def test_a_mix_that_needs_an_importance_matrix_is_told_to_need_it() -> None:
    """A mix that llama-quantize refuses is noted, unless there is an importance matrix."""
    for mix, options, is_noted in (
        ("iq2_m", [], True),
        ("Q2_K_S", [], True),
        ("IQ2_M", ["--imatrix"], False),
        ("IQ4_XS", [], False),
    ):
        shown = quantplan("show", "Qwen3-4B-Instruct-2507", "--ftype", mix, *options)
        assert (f"refuses {mix.upper()} without" in shown.stderr) == is_noted


def test_prediction_knows_ik_llama_cpp_and_a_margin() -> None:
    """Engine, day of its sources and margin of the command line are those of the API."""
    options = ["--engine", "ik", "--engine-date", "2025-09-02", "--margin", "2GiB", "--json"]
    command = ["predict", "GLM-4.5-Air", "--machine", "RTX 4090 + 512GiB@80GB/s", *options]
    done = quantplan(*command, "--", "-ngl", "99", "-ncmoe", "40", "-c", "64000", "-fa", "-fmoe")
    found = qp.MemoryPrediction.model_validate_json(done.stdout)
    assert found.devices[0].margin_bytes == 2 * 2**30
    assert found.devices[0].kv_bytes == 47 * 64000 * 2 * 1024 * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "GLM-4.5-Air", "--machine", "24GiB + 64GiB@80GB/s", "--margin", "much"],
         "--margin: 'much' is not an amount"),
        (["predict", "GLM-4.5-Air", "--machine", "24GiB + 64GiB@80GB/s", "--margin", "2"],
         "--margin: '2' has no unit: write 2GiB"),
        (["quantize", "a.json", "a.gguf", "b.gguf", "--split-max-size", "40"],
         "--split-max-size: '40' has no unit: write 40GiB"),
        (["predict", "GLM-4.5-Air", "--machine", "24GiB + 64GiB@80GB/s", "--recipe", "a.json",
          "--", "-ngl", "9"], "not both"),
        (["predict", "GLM-4.5-Air", "--machine", "24GiB + 64GiB@80GB/s", "--recipe", "a.json",
          "--ftype", "Q4_K_M"], "--ftype or --recipe, not both"),
        (["show", "GLM-4.5-Air", "--imatrix"], "name one with --ftype"),
        (["plan", "GLM-4.5-Ai", "--machine", "24GiB + 64GiB@80GB/s"], "GLM-4.5-Air"),
        (["plan", "GLM-4.5-Air", "--machine", "RTX 4091 + 64GiB@80GB/s"], "RTX 4090"),
        (["plan", "GLM-4.5-Air", "--machine", "RTX 4090"], "64GiB@80GB/s"),
        ([*AIR, "--policy", "nope"], "quality"),
        ([*AIR, "--kv", "q9_9"], "q8_0"),
        (["show", "missing.json"], "No such file"),
        (["diff", "missing.json", "missing.json"], "No such file"),
        (["export", "missing.json", "shell"], "No such file"),
        (["import", "GLM-4.5-Air", "a.txt", "--recipe", "b.json"], "gguf-tool-suite"),
        (["quantize", "missing.json", "a.gguf", "b.gguf"], "No such file"),
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2_and_say_what_to_do(arguments: list[str], says: str) -> None:
    """Input that cannot be used ends with exit code 2 and one message without a traceback."""
    done = quantplan(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


_ON = ["--machine", "RTX 4090 + 64GiB@80GB/s"]
MISTAKES = {
    "unknown model": (["plan", "GLM-4.5-Ayr", *_ON], ["GLM-4.5-Ayr", "GLM-4.5-Air"]),
    "missing file": (["plan", "nothing.gguf", *_ON], ["nothing.gguf"]),
    "recipe as model": (["plan", "bad.json", *_ON], ["bad.json", "give a GGUF file"]),
    "size below 0": (["plan", "GLM-4.5-Air", "--machine", "-8GiB + 32GiB@60GB/s"],
                     ["'-8GiB'", "leave it out"]),
    "no bandwidth": (["plan", "GLM-4.5-Air", "--machine", "24GiB + 64GiB"],
                     ["the RAM's bandwidth is missing", "64GiB@80GB/s"]),
    "no unit": (["plan", "GLM-4.5-Air", "--machine", "RTX 4090 + 64@80GB/s"], ["64GiB"]),
    "context in k": ([*AIR[:-1], "32k"], ["--ctx 32k", "32768"]),
    "doubled comma": ([*AIR, "--allow", "exps=Q4_K,,"], ["exps=Q4_K,,", "leave out a comma"]),
    "unknown type": ([*AIR, "--pin", "exps=Q4K"], ["'Q4K'", "Q4_K"]),
    "weights are something else": ([*AIR, "--weights", "bad.json"],
                                   ["bad.json", "quantplan measure-weights"]),
    "weights are no JSON": ([*AIR, "--weights", "no.json"],
                            ["no.json", "quantplan measure-weights"]),
    "measured is missing": ([*AIR, "--measured", "no.csv"], ["no.csv"]),
    "profile is no JSON": (["plan", "GLM-4.5-Air", "--machine", "no.json"],
                           ["no.json", "quantplan machine --save"]),
    "unwritable recipe": ([*AIR, "--recipe", "no/a.json"], ["no/a.json", "no directory no"]),
    "flag with a wrong value": (["predict", "GLM-4.5-Air", *_ON, "--", "-c", "32k"], ["32k"]),
    "recipe that is none": (["show", "bad.json"], ["bad.json", "plan MODEL --recipe"]),
    "recipe that is no JSON": (["diff", "no.json", "no.json"], ["no.json", "plan MODEL --recipe"]),
    "unknown format": (["export", "bad.json", "ollama"], ["bad.json", "plan MODEL --recipe"]),
    "plan that is none": (["report", "bad.json"], ["bad.json", "--json > plan.json"]),
    "unknown tensor": (["explain", "GLM-4.5-Air", "blk.0.nope"], ["blk.0.nope", "quantplan show"]),
    "unknown option": ([*AIR, "--context", "4096"], ["--context"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_likely_mistakes_are_named_with_what_to_do(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the value and what to give, each once; the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"a": 1}')
    Path("no.json").write_text("[1")
    arguments, says = MISTAKES[mistake]
    done = quantplan(*arguments)
    assert done.returncode == 2, done.stderr
    assert [text for text in says if text not in done.stderr] == []
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(set(lines)) == len(lines)
    assert not re.search(r"Traceback|pydantic|: : ", done.stderr)


@pytest.mark.parametrize(
    "command",
    ["plan GLM-4.5-Air --measured kept --recipe kept", "import GLM-4.5-Air kept --recipe ./kept",
     "export kept shell --output link", "report kept -o kept", "calibrate kept --save kept",
     "quantize kept model.gguf kept", "measure-weights kept kept",
     "measure model.gguf kept --text kept", "run kept model.gguf --output kept",
     "verify recipe.json kept --output kept", "verify kept.log model.gguf --output kept.json"],
)  # fmt: skip
def test_no_command_overwrites_what_it_reads(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file to write that is one to read, by any name of it, is refused and stays as it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("kept", "kept.log"):
        Path(name).write_text("much work")
    Path("link").symlink_to("kept")
    done = quantplan(*command.split())
    assert done.returncode == 2
    assert "would be overwritten, but it is to be read" in done.stderr
    assert {Path(name).read_text() for name in ("kept", "kept.log")} == {"much work"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
@pytest.mark.parametrize("arguments", [["show", "GLM-4.5-Air"], ["models", "--json"], ["--help"]])
def test_output_that_cannot_be_written_is_one_message(arguments: list[str]) -> None:
    """A full disk under what is printed ends with exit code 1 and says so."""
    command = [sys.executable, "-m", "quantplan.cli", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "quantplan: what is printed cannot be written: No space left on device; print elsewhere"
    ]


def test_what_is_assumed_of_a_machine_is_told() -> None:
    """Memory that GPU and CPU share is planned for once, and stderr says how it was divided."""
    command = ["predict", "Qwen3-32B", "--machine", "M4 Pro + 48GiB@273GB/s", "--json", "--"]
    done = quantplan(*command, "-ngl", "40", "-c", "8192")
    found = qp.MemoryPrediction.model_validate_json(done.stdout)
    assert sum(device.capacity_bytes for device in found.devices) == 48 * 2**30
    assert not found.fits
    assert "assumed: macOS lets the M4 Pro have 36.00 GiB of the RAM" in done.stderr


def test_without_machine_this_one_is_described(tmp_path: Path) -> None:
    """Without --machine the present machine is planned for; stderr says what it is."""
    source = toy_moe(tmp_path / "toy.gguf")
    done = quantplan("predict", source, "--json", "--", "-ngl", "0", "-c", "256")
    assert done.returncode == 0, done.stderr
    found = qp.MemoryPrediction.model_validate_json(done.stdout)
    assert found.devices[-1].capacity_bytes > 0
    assert re.search(r"this one: .*RAM .* at .*GB/s", done.stderr)
    assert "quantplan machine --save FILE.json" in done.stderr


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["show", "FILE"], "A recipe is what"),
        (["diff", "FILE", "FILE"], "A recipe is what"),
        (["export", "FILE", "shell"], "A recipe is what"),
        (["plan", "GLM-4.5-Air", "--machine", "FILE"], "A profile is what"),
    ],
)
def test_another_output_of_quantplan_is_told_to_be_one(
    command: list[str], wanted: str, tmp_path: Path
) -> None:
    """Instead of the fields that it lacks, the message says what the file is and what is wanted."""
    path = tmp_path / "shown.json"
    path.write_text(quantplan("show", "Qwen3-4B-Instruct-2507", "--json").stdout)
    said = quantplan(*(str(path) if word == "FILE" else word for word in command)).stderr
    first, second = said.splitlines()
    assert first == f"quantplan: {path} holds another output of quantplan: inventory."
    assert second.startswith(wanted)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    """Of more than ten faults the first ten are printed, and the number of the others."""
    source = toy_moe(tmp_path / "toy.gguf")
    recipe = recipe_for(source, {})
    n_faults = len(recipe.tensors)
    tensors = tuple(t.model_copy(update={"shape_ne": (1,)}) for t in recipe.tensors)
    recipe.model_copy(update={"tensors": tensors}).save(tmp_path / "toy.json")
    done = quantplan("quantize", tmp_path / "toy.json", source, tmp_path / "out.gguf")
    assert done.returncode == 2
    assert done.stderr.count("but the recipe was made for (1,)") == 10
    assert done.stderr.splitlines()[-1].endswith(f"and {n_faults - 10} more")


@pytest.mark.parametrize(("missing", "n_lines"), [("toy.json", 2), ("toy.gguf", 1)])
def test_no_progress_is_shown_before_input_errors(
    tmp_path: Path, missing: str, n_lines: int
) -> None:
    """Where a file is missing, the message is all that is printed, with what makes a recipe."""
    source = toy_moe(tmp_path / "toy.gguf")
    recipe_for(source, {}).save(tmp_path / "toy.json")
    (tmp_path / missing).unlink()
    done = quantplan("quantize", tmp_path / "toy.json", source, tmp_path / "out.gguf")
    assert done.returncode == 2
    assert done.stderr.startswith("quantplan: ")
    assert len(done.stderr.splitlines()) == n_lines


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has these signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_file(tmp_path: Path, number: signal.Signals) -> None:
    """`quantize` that is told to end before a tensor is done leaves nothing."""
    source = sparse(tmp_path / "large.gguf", n_rows=1 << 12)
    recipe_for(source, {"blk.0.ffn_up.weight": "Q4_K"}).save(tmp_path / "recipe.json")
    folder = tmp_path / "target"
    folder.mkdir()
    with serve(tmp_path) as (url, server):
        server.held_from = 1 << 20  # the tensor cannot be done before the signal
        names = map(str, (tmp_path / "recipe.json", f"{url}/{source.name}", folder / "q.gguf"))
        command = [sys.executable, "-m", "quantplan.cli", "quantize", *names, "--threads", "1"]
        with subprocess.Popen(
            command,
            stderr=subprocess.DEVNULL,
            # Tests that run in the background ignore SIGHUP, and what they start would too.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509
        ) as running:
            try:
                while not list(folder.iterdir()):
                    assert running.poll() is None
                    time.sleep(0.01)
                running.send_signal(number)
                server.may_go_on.set()
                assert running.wait(timeout=60) == 128 + number
            finally:
                running.kill()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*AIR, "--min-tps", "500"], r"reaches \d+\.\d+ tokens/s"),
        (["plan", "Kimi-K2-Thinking", "--machine", "24GiB + 64GiB@80GB/s"], r"Add \d+\.\d+ GiB"),
    ],
)
def test_no_plan_exits_with_1_and_says_by_how_much(arguments: list[str], says: str) -> None:
    """A sound question without an answer ends with exit code 1 and names what is missing."""
    done = quantplan(*arguments)
    assert done.returncode == 1
    assert re.search(says, done.stderr)
    assert "Traceback" not in done.stderr


def test_help_names_the_commands() -> None:
    """The first page of help leads to every command."""
    done = quantplan("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("plan", "show", "quantize"))


def test_a_loss_is_explained_with_what_was_measured(tmp_path: Path) -> None:
    """`explain` names the prior and the measurement; an unknown tensor and type are both named."""
    name = "blk.3.ffn_down_exps.weight"
    table = tmp_path / "measured.csv"
    table.write_text(f"tensor,qtype,kld\n{name},IQ1_M,0.02\n")
    shown = quantplan("explain", "GLM-4.5-Air", name, "--measured", table)
    assert shown.returncode == 0, shown.stderr
    assert "prior from metadata" in shown.stdout
    assert "measured alone" in shown.stdout
    as_json = quantplan("explain", "GLM-4.5-Air", name, "--measured", table, "--json")
    assert len(json.loads(as_json.stdout)["estimates"]) == 2
    failed = quantplan("explain", "GLM-4.5-Air", "blk.3.nope", "--qtype", "Q9")
    assert failed.returncode == 2
    assert "blk.3.nope" in failed.stderr
    assert "Q9" in failed.stderr


def test_no_loss_is_explained_that_a_tensor_cannot_have() -> None:
    """A type whose blocks do not divide the rows is refused with what would be written, which is
    explained where no type is named; a vector keeps its type.
    """
    narrow = ["explain", "gemma-3-270m", "blk.3.ffn_up.weight"]  # rows of 640 weights
    refused = quantplan(*narrow, "--qtype", "q4_k")
    assert refused.returncode == 2
    assert "cannot be Q4_K: rows of 640 weights" in refused.stderr
    assert "--qtype Q5_0" in refused.stderr
    assert "blk.3.ffn_up.weight at Q5_0" in quantplan(*narrow).stdout
    vector = quantplan("explain", "gemma-3-270m", "blk.3.attn_norm.weight")
    assert vector.returncode == 2
    assert "quantizers leave it F32" in vector.stderr


def test_errors_of_weights_go_into_a_plan(tmp_path: Path) -> None:
    """What `measure-weights` saves, `plan` takes, and says so."""
    source, errors = toy_moe(tmp_path / "toy.gguf"), tmp_path / "errors.json"
    done = quantplan("measure-weights", source, errors, "--rows", "8")
    assert done.returncode == 0, done.stderr
    made = quantplan("plan", source, "--machine", "2GiB@50GB/s", "--weights", errors)
    assert made.returncode == 0, made.stderr
    assert "losses use errors on the weights of" in made.stdout
