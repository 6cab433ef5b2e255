"""Recipes that go out in the words of other programs and come back."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import app
from quantplan.errors import RecipeError
from quantplan.exchange import ExportFormat, ImportFormat, export_recipe, import_recipe
from quantplan.formats.llama_cpp import options
from quantplan.recipe import Recipe
from quantplan.report import recipe_text
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.models import toy_moe
from tests.support.quantizer import llama_chooses, llama_quantize, recipe_for, spread

MACHINE = qp.Machine.parse("RTX 4090 + 64GiB@80GB/s")
AIR = qp.read_inventory("GLM-4.5-Air")
SUFFIXES: dict[ExportFormat, tuple[str, ImportFormat | None]] = {
    "llama-quantize": (".txt", "llama-quantize"),
    "llama-quantize-command": (".txt", "command"),
    "ik-custom-q": (".txt", "ik-custom-q"),
    "ik-quantize-command": (".sh", None),
    "gguf-tool-suite": (".recipe", None),
    "shell": (".sh", None),
}
RUNNING: tuple[ExportFormat, ...] = (
    "llama-server", "llama-cli", "llama-bench", "koboldcpp", "shell", "systemd", "docker-compose",
)  # fmt: skip


@pytest.fixture(scope="module")
def planned() -> Recipe:
    """A plan for a real model, with tensors on both devices."""
    work = qp.Workload(context=32768, kv_type="q8_0")
    return qp.plan(AIR, MACHINE, work, min_decode_tps=10).recipe


def test_an_export_for_ik_llama_cpp_says_where_it_does_not_fit(tmp_path: Path) -> None:
    """ik_llama.cpp's caches are as long as the context; the command is printed with a warning."""
    path = tmp_path / "recipe.json"
    model = qp.read_inventory("gemma-3-27b-it")
    qp.plan(model, MACHINE, qp.Workload(context=16384), baselines=False).recipe.save(path)
    done = CliRunner().invoke(app, ["export", str(path), "ik-server"])
    assert done.exit_code == 0
    assert done.stdout.startswith("llama-server -m")
    assert "warning: ik_llama.cpp needs more memory than was planned" in done.stderr


@pytest.mark.parametrize("program", ["llama-cli", "koboldcpp"])
def test_a_program_without_slots_is_predicted_with_one(
    program: ExportFormat, tmp_path: Path
) -> None:
    """A command of a program that serves one request at a time takes the memory of one slot."""
    model, path = qp.read_inventory("gemma-3-27b-it"), tmp_path / "run.sh"
    work = qp.Workload(context=16384)
    made = qp.plan(model, MACHINE, work, policy="compact", baselines=False)
    path.write_text(export_recipe(made.recipe, program), encoding="utf-8")
    typed = model.with_qtypes(types(made.recipe))
    back = import_recipe(typed, path, machine=MACHINE)
    kv = [use.kv_bytes for use in qp.predict(typed, back, MACHINE).devices]
    assert kv == [use.kv_bytes for use in made.devices]


def types(recipe: Recipe) -> dict[str, str]:
    """Types by tensor."""
    return {t.tensor: t.qtype for t in recipe.tensors}


def compose_of(recipe: Recipe, machine: str, flags: tuple[str, ...] | None = None) -> str:
    """The compose file of a recipe for another machine, whose GPUs are not what it was made for."""
    provenance = recipe.provenance.model_copy(update={"machine": qp.Machine.parse(machine)})
    changes = {"provenance": provenance, "flags": flags or recipe.flags}
    return export_recipe(recipe.model_copy(update=changes), "docker-compose")


@pytest.mark.parametrize(
    ("gpus", "image", "devices"),
    [
        ("RTX 4090", "server-cuda", "devices: [{driver: nvidia, count: all, capabilities: [gpu]}]"),
        ("24GiB", "server-cuda", "driver: nvidia"),
        ("2x RX 7900 XTX", "server-rocm", "devices: [/dev/kfd, /dev/dri]"),
        ("Arc A770", "server-intel", "devices: [/dev/dri]"),
        ("Arc A770 + RX 7900 XTX", "server-vulkan", "devices: [/dev/dri]"),
    ],
)
def test_containers_are_for_the_vendor_of_the_gpus(
    planned: Recipe, gpus: str, image: str, devices: str
) -> None:
    """The image is built for the GPUs of the recipe's machine, and gets these GPUs alone."""
    said = compose_of(planned, f"{gpus} + 64GiB@80GB/s")
    assert f"image: ghcr.io/ggml-org/llama.cpp:{image}\n" in said
    assert devices in said
    assert ("nvidia" in said) == (image == "server-cuda")


@pytest.mark.parametrize(
    ("machine", "flags"),
    [("64GiB@80GB/s", None), ("RTX 4090 + 64GiB@80GB/s", ("-ngl", "0", "-c", "64"))],
)
def test_a_container_without_a_gpu_asks_for_none(
    planned: Recipe, machine: str, flags: tuple[str, ...] | None
) -> None:
    """Where all is in RAM, the plain image runs, on hosts without GPUs too."""
    said = compose_of(planned, machine, flags)
    assert "image: ghcr.io/ggml-org/llama.cpp:server\n" in said
    assert "devices" not in said
    assert "deploy" not in said


def test_a_container_that_needs_rpc_says_which_image_has_it(planned: Recipe) -> None:
    """Where devices of other hosts are used, the file says that the image may lack RPC, and what to
    build instead.
    """
    plain = compose_of(planned, "RTX 4090 + 64GiB@80GB/s")
    flags = ("--rpc", "10.0.0.7:50052", *planned.flags)
    said = compose_of(planned, "RPC 10.0.0.7:50052 RTX 3090@1Gbit/s,0.2ms + 64GiB@80GB/s", flags)
    assert "-DGGML_RPC=ON added in .devops/cpu.Dockerfile" in said
    assert "RPC" not in plain
    assert yaml.safe_load(said)["services"]["llama-server"]["command"][2:4] == list(flags[:2])


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        ("M2 Ultra", "containers cannot use GPUs .*Apple's"),
        ("RTX 4090 + Arc A770", "intel, nvidia"),
    ],
)
def test_gpus_that_no_container_gets_are_refused(planned: Recipe, gpus: str, says: str) -> None:
    """Apple's GPUs are not there in containers, and no image is for NVIDIA's and others."""
    with pytest.raises(RecipeError, match=says):
        compose_of(planned, f"{gpus} + 64GiB@80GB/s")


@pytest.mark.parametrize("target", SUFFIXES)
def test_types_come_back_from_every_format(
    tmp_path: Path, planned: Recipe, target: ExportFormat
) -> None:
    """What is exported for a quantizer is imported again with the same type for every tensor."""
    suffix, source_format = SUFFIXES[target]
    path = tmp_path / f"types{suffix}"
    path.write_text(export_recipe(planned, target), encoding="utf-8")
    found = import_recipe(AIR, path, source_format=source_format)
    assert types(found) == types(planned)
    assert found.provenance.origin is not None
    assert found.provenance.origin.startswith(path.name)
    assert found.provenance.header_sha256 == planned.provenance.header_sha256


@pytest.mark.parametrize("target", RUNNING)
def test_places_come_back_from_every_command(
    tmp_path: Path, planned: Recipe, target: ExportFormat
) -> None:
    """What is exported to run a model puts every tensor on the same device when it is imported."""
    path = tmp_path / "run"
    path.write_text(export_recipe(planned, target, model_path="/m/air.gguf"), encoding="utf-8")
    quantized = AIR.with_qtypes(types(planned))
    found = import_recipe(quantized, path, source_format="command", machine=MACHINE)
    assert {t.tensor: t.device for t in found.tensors} == {
        t.tensor: t.device for t in planned.tensors
    }
    if target in ("llama-server", "shell", "systemd"):
        assert found.flags == planned.flags


def test_ik_commands_come_back(tmp_path: Path, planned: Recipe) -> None:
    """ik_llama.cpp's flags are read as its own, and are not handed on as llama.cpp's."""
    path = tmp_path / "ik.sh"
    path.write_text(export_recipe(planned, "ik-server"), encoding="utf-8")
    found = import_recipe(
        AIR.with_qtypes(types(planned)), path, engine="ik_llama.cpp", machine=MACHINE
    )
    assert [t.device for t in found.tensors] == [t.device for t in planned.tensors]
    assert export_recipe(found, "ik-server") == path.read_text()
    with pytest.raises(qp.RecipeError, match=r"flags are ik_llama\.cpp's"):
        export_recipe(found, "llama-server")


def test_imported_recipes_are_saved_and_predicted(tmp_path: Path, planned: Recipe) -> None:
    """An imported recipe survives a trip through JSON, and its memory is the plan's."""
    path = tmp_path / "run.sh"
    path.write_text(export_recipe(planned, "shell"), encoding="utf-8")
    import_recipe(AIR, path, machine=MACHINE).save(tmp_path / "back.json")
    found = Recipe.load(tmp_path / "back.json")
    assert found == import_recipe(AIR, path, machine=MACHINE)
    uses = zip(qp.predict(AIR, found, MACHINE).devices, planned.memory, strict=True)
    assert all(use.weights_bytes == memory.weights_bytes for use, memory in uses)


def test_a_file_that_commands_name_is_read(tmp_path: Path, planned: Recipe) -> None:
    """A llama-quantize command with --tensor-type-file is read with that file, found beside it."""
    (tmp_path / "types.txt").write_text(export_recipe(planned, "llama-quantize"))
    script = tmp_path / "quantize.sh"
    script.write_text(
        "#!/bin/sh\n"
        "./build/bin/llama-quantize --pure --tensor-type-file types.txt \\\n"
        "  in.gguf out.gguf Q8_0\n"
    )
    assert types(import_recipe(AIR, script)) == types(planned)
    (tmp_path / "types.txt").unlink()
    with pytest.raises(qp.RecipeError, match=r"types\.txt: No such file"):
        import_recipe(AIR, script)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("words", "ftype", "changes"),
    [
        ("in.gguf q4_k_m 8", "Q4_K_M", {}),
        ("--imatrix i.gguf in.gguf out.gguf 12", "Q3_K_M", {"imatrix": {"any": [1.0]}}),
        ("--tensor-type attn_v=Q8_0 --tensor-type 'blk\\.[1-2]\\.ffn_down=q6_k' in out Q4_K_M",
         "Q4_K_M", {"rules": [("attn_v", "Q8_0"), (r"blk\.[1-2]\.ffn_down", "Q6_K")]}),
        ("--pure --tensor-type attn=q5_k in out Q3_K_S", "Q3_K_S",
         {"pure": True, "rules": [("attn", "Q5_K")]}),
        ("--output-tensor-type q5_k --token-embedding-type Q8_0 --tensor-type e=q4_0 in out IQ4_XS",
         "IQ4_XS", {"output": "Q5_K", "embedding": "Q8_0", "rules": [("e", "Q4_0")]}),
        ("--leave-output-tensor in out Q5_K_S", "Q5_K_S", {"keeps_output": True}),
        ("--tensor-type attn=q8_0 --token-embedding-type q6_k in out BF16", "BF16",
         {"embedding": "Q6_K", "rules": [("attn", "Q8_0")]}),
    ],
)  # fmt: skip
def test_a_command_gives_the_types_that_llama_quantize_writes(
    words: str, ftype: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """What no rule of a llama-quantize command names gets the types of its ftype, as llama.cpp has
    them with the same options.
    """
    source = toy_moe(tmp_path / "toy.gguf", layers=12)
    (tmp_path / "quantize.sh").write_text(f"llama-quantize {words}\n")
    found = import_recipe(qp.read_inventory(source), tmp_path / "quantize.sh")
    assert types(found) == llama_chooses(source, ftype, **changes)


def test_commands_whose_types_are_not_known_are_refused(tmp_path: Path) -> None:
    """Of an ftype that is none, mixes of ik_llama.cpp and two commands nothing is made up."""
    script = tmp_path / "quantize.sh"
    for words, says in (
        (
            "llama-quantize in.gguf out.gguf $TYPE",
            r"no ftype that is known, in the place of \$TYPE",
        ),
        ("llama-quantize --custom-q attn=q8_0 in out IQ4_KS", r"IQ4_KS gives \d+ tensors that no"),
        ("llama-quantize in out Q8_0\nllama-quantize in out Q4_0", "2 commands of llama-quantize"),
        ("llama-server -m a -c 64; llama-cli -m b", "2 commands of llama-server and llama-cli"),
        (
            "llama-quantize --output-tensor-type Q4_X in out Q8_0",
            "--output-tensor-type: there is no",
        ),
    ):
        script.write_text(words)
        with pytest.raises(qp.RecipeError, match=says):
            import_recipe(AIR, script)


@needs_llama_cpp
def test_llama_cpps_own_file_is_cloned(tmp_path: Path) -> None:
    """The types of a GGUF that llama.cpp wrote, fallbacks and all, become a recipe."""
    source, target = toy_moe(tmp_path / "toy.gguf"), tmp_path / "theirs.gguf"
    llama_quantize(source, target, spread(source, ["Q4_K", "Q6_K", "IQ4_NL", "Q2_K"]))
    found = import_recipe(qp.read_inventory(source), target)
    qp.quantize(found, source, tmp_path / "ours.gguf")
    ours, theirs = (qp.read_inventory(tmp_path / f"{n}.gguf").tensors for n in ("ours", "theirs"))
    assert {t.name: t.qtype for t in ours} == {t.name: t.qtype for t in theirs}
    assert len({t.qtype for t in theirs}) > 4


def test_only_the_same_model_is_cloned(tmp_path: Path) -> None:
    """A GGUF of another model is refused with what differs: tensors on both sides, and shapes."""
    other = toy_moe(tmp_path / "other.gguf", "qwen3moe")
    with pytest.raises(qp.RecipeError, match=r"lacks \d+ tensors") as caught:
        import_recipe(qp.read_inventory(toy_moe(tmp_path / "toy.gguf")), other)
    assert len(caught.value.faults) >= 2


def test_a_list_by_hand_is_read_with_its_comments(tmp_path: Path) -> None:
    """Rules with comments and blank lines are read; what they do not name keeps its type."""
    path = tmp_path / "mine.txt"
    path.write_text("# experts low\nffn_.*_exps=Q4_K\n\nattn_(q|k|v)\\.weight=q8_0  # careful\n")
    found = types(import_recipe(AIR, path, source_format="rules"))
    assert found["blk.5.ffn_up_exps.weight"] == "Q4_K"
    assert found["blk.5.ffn_down_exps.weight"] == "Q5_0"
    assert found["blk.5.attn_q.weight"] == "Q8_0"
    assert found["output.weight"] == AIR.by_name["output.weight"].qtype


def test_tensors_that_nobody_has_placed_are_not_called_unloaded(
    tmp_path: Path, planned: Recipe
) -> None:
    """Types without devices are shown without places; where some have one, the others do not."""
    (tmp_path / "types.txt").write_text("ffn_.*_exps=q4_0")
    found = import_recipe(AIR, tmp_path / "types.txt", source_format="rules")
    assert "ffn_up_exps        46x Q4_0\n" in recipe_text(found)
    assert "not loaded" not in recipe_text(found) + found._repr_html_()
    assert "1x Q8_0 not loaded" in recipe_text(planned)


def test_lists_of_windows_editors_are_read(tmp_path: Path) -> None:
    """The mark that they put in front of UTF-8 is no part of the first pattern, but for
    llama-quantize, which would take it for one.
    """
    path = tmp_path / "types.txt"
    path.write_bytes(b"\xef\xbb\xbfffn_up_exps=q4_0\r\nattn_q=q8_0\r\n")
    formats: tuple[ImportFormat, ...] = ("rules", "ik-custom-q", "gguf-tool-suite")
    for source_format in formats:
        found = types(import_recipe(AIR, path, source_format=source_format))
        assert found["blk.1.ffn_up_exps.weight"] == "Q4_0"
        assert found["blk.1.attn_q.weight"] == "Q8_0"
    with pytest.raises(qp.RecipeError, match="ufeff"):
        import_recipe(AIR, path, source_format="llama-quantize")


def test_published_recipes_are_read(tmp_path: Path) -> None:
    """A .recipe in the style of GGUF-Tool-Suite, unanchored in part, gives each tensor its type."""
    path = tmp_path / "air.recipe"
    path.write_text(
        "## Model head & embeddings\n^output\\.weight$=iq6_k\n^token_embd\\.weight$=q8_0\n"
        "^output_norm\\.weight$=f32\n\n## Attention\n"
        "^blk\\.([0-9]|[1-3][0-9]|4[0-6])\\.attn_.*\\.weight$=iq5_ks\n"
        "blk\\.46\\.ffn_up_exps\\.weight=q4_0\nffn_.*_exps\\.weight=iq3_k\n"
    )
    found = types(import_recipe(AIR, path))
    assert found["output.weight"] == "IQ6_K"
    assert found["blk.46.attn_v.weight"] == "IQ5_KS"
    assert found["blk.46.ffn_up_exps.weight"] == "Q4_0"
    assert found["blk.45.ffn_up_exps.weight"] == "IQ3_K"
    assert found["blk.45.ffn_down_exps.weight"] == "IQ4_NL"
    assert found["output_norm.weight"] == "F32"


def test_units_take_no_relative_path(planned: Recipe) -> None:
    """systemd, which has no current folder, gets the model by its full path or not at all."""
    with pytest.raises(qp.InputError, match=r"--gguf-name /srv/models/air\.gguf"):
        export_recipe(planned, "systemd", model_path="my/air.gguf")


def test_unknown_formats_name_the_known_ones(tmp_path: Path) -> None:
    """A format that does not exist, or that a suffix does not tell, is refused with the choice."""
    recipe = recipe_for(toy_moe(tmp_path / "toy.gguf"), {})
    with pytest.raises(qp.InputError, match=get_args(ExportFormat)[-1]):
        export_recipe(recipe, "ollama")  # type: ignore[arg-type]
    with pytest.raises(qp.InputError, match=get_args(ImportFormat)[-1]):
        import_recipe(AIR, tmp_path / "x.txt", source_format="ollama")  # type: ignore[arg-type]
    with pytest.raises(qp.InputError, match=r"no format is known by the suffix '\.txt'"):
        import_recipe(AIR, tmp_path / "x.txt")
    (tmp_path / "x.recipe").write_bytes(b"\xff\xfe")
    with pytest.raises(qp.RecipeError, match="is no text"):
        import_recipe(AIR, tmp_path / "x.recipe")
    with pytest.raises(qp.RecipeError, match="No such file"):
        import_recipe(AIR, tmp_path / "missing.recipe")


def test_lm_studio_gets_what_the_plan_says(planned: Recipe) -> None:
    """LM Studio's settings state context, batches, KV types and, as llama.cpp's arguments, the
    layers and single tensors; flags that it cannot say are refused by name.
    """
    content = json.loads(export_recipe(planned, "lm-studio"))
    found = {field["key"]: field["value"] for field in content["load"]["fields"]}
    given = {flag: values for flag, *values in options(planned.flags)}
    override = found["llm.load.llama.argumentsOverride"]
    arguments = {item["key"]: item["value"] for item in override["overrideParameters"]}
    assert override["enabled"]
    assert arguments["--n-gpu-layers"] == given["-ngl"][0]
    assert arguments["--override-tensor"] == given["-ot"][0]
    assert found["llm.load.contextLength"] == 32768
    assert found["llm.load.llama.physicalBatchSize"] == int(given["-ub"][0])
    assert found["llm.load.llama.kCacheQuantizationType"] == {"checked": True, "value": "q8_0"}
    assert not found["llm.load.llama.autoFit"]
    odd = planned.model_copy(update={"flags": (*planned.flags, "--swa-full")})
    with pytest.raises(RecipeError, match="LM Studio has no setting for --swa-full"):
        export_recipe(odd, "lm-studio")
