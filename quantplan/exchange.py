"""Recipes in the words of other programs, written and read."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from quantplan.errors import InputError, RecipeError
from quantplan.formats.bench_flags import bench_flags, from_bench_flags
from quantplan.formats.gguf_tool_suite import read_recipe_file, recipe_file
from quantplan.formats.ik_llama import custom_q, ik_flags, read_custom_q
from quantplan.formats.koboldcpp import from_koboldcpp_flags, koboldcpp_flags
from quantplan.formats.launchers import commands_in, compose_file, shell_script, systemd_unit
from quantplan.formats.llama_args import parse_flags
from quantplan.formats.llama_cpp import (
    BASE_FTYPE,
    cli_flags,
    command_line,
    gpu_backend,
    options,
    quantize_arguments,
    read_tensor_type_file,
)
from quantplan.formats.lm_studio import lm_studio_settings
from quantplan.formats.quantize_command import read_quantize_command
from quantplan.formats.rules import (
    IK_QUANTIZE,
    LLAMA_QUANTIZE,
    TOOL_SUITE,
    Dialect,
    Rules,
    read_rules,
    split_rules,
)
from quantplan.given import check_given
from quantplan.hardware.machine import Machine
from quantplan.inventory import Inventory
from quantplan.inventory.sources import read_inventory
from quantplan.llama_cpp import COMMON_BACKEND
from quantplan.placement import place
from quantplan.qtypes import Runtime
from quantplan.recipe import Provenance, Recipe, RecipeTensor
from quantplan.version import __version__
from quantplan.words import listed

ExportFormat = Literal[
    "llama-quantize", "llama-quantize-command", "ik-custom-q", "ik-quantize-command",
    "gguf-tool-suite", "llama-server", "llama-cli", "llama-bench", "ik-server", "koboldcpp",
    "lm-studio", "shell", "systemd", "docker-compose",
]  # fmt: skip
ImportFormat = Literal[
    "gguf", "llama-quantize", "rules", "ik-custom-q", "gguf-tool-suite", "command"
]
# What says which file is served where, which is not the recipe's to say.
_ITS_OWN = {
    "-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "-hff", "--hf-file",
    "-dr", "--docker-repo", "--host", "--port",
}  # fmt: skip
_NAMED = 3
# Programs that serve one request at a time, where llama-server makes four slots by itself.
_WITH_ONE_SLOT = {"llama-cli", "llama-bench", "koboldcpp"}


def export_recipe(recipe: Recipe, target: ExportFormat, *, model_path: str = "model.gguf") -> str:
    """Writes a recipe in the words of another program.

    Args:
        recipe: What to write.
        target: ``llama-quantize`` is its tensor-type file and ``ik-custom-q`` the value of that
            option; ``...-command`` are command lines that name all types; ``gguf-tool-suite`` is a
            ``.recipe`` file; ``lm-studio`` is the file of a model's settings, for versions that
            take llama.cpp arguments; the others run the model.
        model_path: The quantized GGUF, where a command needs it.

    Raises:
        InputError: There is no such format, or systemd gets a relative path.
        RecipeError: The program cannot do what the recipe says, or the recipe has no flags.
    """
    check_given(("recipe", recipe, Recipe))
    writers: dict[str, Callable[[], str]] = {
        "llama-quantize": recipe.tensor_type_file,
        "llama-quantize-command": lambda: _quantize_command(
            quantize_arguments(recipe.quantizable_types), model_path
        ),
        "ik-custom-q": lambda: custom_q(recipe.matrix_types) + "\n",
        "ik-quantize-command": lambda: _quantize_command(
            ["--custom-q", custom_q(recipe.matrix_types)], model_path
        ),
        "gguf-tool-suite": lambda: recipe_file(
            {t.tensor: t.qtype for t in recipe.tensors}, recipe.model
        ),
        "llama-server": lambda: _run("llama-server", model_path, _flags(recipe)),
        "llama-cli": lambda: _run("llama-cli", model_path, cli_flags(_flags(recipe))),
        "llama-bench": lambda: _run("llama-bench", model_path, bench_flags(_flags(recipe))),
        "ik-server": lambda: _run("llama-server", model_path, _ik_flags(recipe)),
        "koboldcpp": lambda: command_line(
            ["koboldcpp", "--model", model_path, *koboldcpp_flags(_flags(recipe))]
        ),
        "lm-studio": lambda: lm_studio_settings(_flags(recipe)),
        "shell": lambda: shell_script(
            recipe.model, quantize_arguments(recipe.quantizable_types), _flags(recipe)
        ),
        "systemd": lambda: systemd_unit(
            recipe.model, ["llama-server", "-m", _absolute(model_path), *_flags(recipe)]
        ),
        "docker-compose": lambda: compose_file(
            model_path, _flags(recipe), _backend_in_container(recipe)
        ),
    }
    if target not in writers:
        raise InputError(f"unknown format {target!r}; known are {', '.join(writers)}")
    return writers[target]()


def _quantize_command(arguments: Sequence[str], model_path: str) -> str:
    words = ["llama-quantize", *arguments, "SOURCE.gguf", model_path, BASE_FTYPE]
    return command_line(words)


def _absolute(model_path: str) -> str:
    if not PurePosixPath(model_path).is_absolute():
        raise InputError(
            f"systemd starts programs in no folder of yours: name {model_path!r} from the root, "
            f"such as --gguf-name /srv/models/{PurePosixPath(model_path).name}"
        )
    return model_path


def _run(program: str, model_path: str, flags: Sequence[str]) -> str:
    return command_line([program, "-m", model_path, *flags])


def _flags(recipe: Recipe) -> tuple[str, ...]:
    if not recipe.flags:
        raise RecipeError(
            f"the recipe of {recipe.model} has types only, and no flags to run it with"
        )
    if recipe.provenance.runtime != "llama.cpp":
        raise RecipeError(f"the recipe's flags are {recipe.provenance.runtime}'s, not llama.cpp's")
    return recipe.flags


def _backend_in_container(recipe: Recipe) -> str | None:
    """What a container's llama.cpp must be built for; None where no GPU of this host is used.

    Raises:
        RecipeError: The GPUs are of NVIDIA and of others, which no one image is for.
    """
    machine, given = recipe.provenance.machine, options(recipe.flags)
    if ["-ngl", "0"] in given:
        return None
    if machine is None:
        return "CUDA"
    vendors = {gpu.vendor for gpu in machine.gpus if not gpu.network}
    if not vendors:
        return None
    backend = gpu_backend(machine)
    if backend == COMMON_BACKEND and "nvidia" in vendors:
        raise RecipeError(
            f"the machine has GPUs of {', '.join(sorted(filter(None, vendors)))}, and a container "
            "gets NVIDIA's in another way than the others: export systemd or shell, or plan for "
            "the GPUs of one vendor"
        )
    return backend


def _ik_flags(recipe: Recipe) -> list[str]:
    if recipe.flags and recipe.provenance.runtime == "ik_llama.cpp":
        return list(recipe.flags)
    layers = [t.layer for t in recipe.inventory_tensors if t.layer is not None]
    machine = recipe.provenance.machine
    return ik_flags(
        _flags(recipe),
        n_layers=max(layers, default=-1) + 1,
        has_output=any(t.tensor == "output.weight" for t in recipe.tensors),
        backend=gpu_backend(machine) if machine else "CUDA",
    )


def import_recipe(
    inventory: Inventory,
    source: str | os.PathLike[str],
    *,
    source_format: ImportFormat | None = None,
    engine: Runtime = "llama.cpp",
    machine: Machine | None = None,
) -> Recipe:
    """Reads types, and flags where there are any, that others have written down for a model.

    Args:
        inventory: The model, unquantized. What is imported does not name keeps its types, but of a
            llama-quantize command it gets those of its ftype.
        source: A file.
        source_format: ``gguf`` clones the types of a quantized file; ``llama-quantize`` is its
            tensor-type file; ``rules`` is the same with ``#`` comments; ``ik-custom-q`` the value
            of that option, on one line or several; ``gguf-tool-suite`` a ``.recipe`` file;
            ``command`` a command line, script, systemd unit or compose file with commands of
            llama-quantize, llama-server, llama-cli, llama-bench or koboldcpp. By default it is told
            from the file's suffix.
        engine: Whose commands they are.
        machine: Where flags are imported: the machine whose devices they put the tensors on.

    Returns:
        A recipe whose provenance names the source. Types are those that the program would write,
        its row fallbacks included.

    Raises:
        SourceError: A GGUF cannot be read.
        InputError: Flags that the engine refuses.
        RecipeError: The file cannot be read or understood. All faults of rules are gathered: no
            regular expressions, patterns that match nothing, types that the program does not have,
            rows that they do not divide.
    """
    check_given(("model", inventory, Inventory))
    path = Path(source)
    chosen = source_format or _format_of(path)
    if chosen not in get_args(ImportFormat):
        raise InputError(
            f"unknown format {chosen!r}; known are {', '.join(get_args(ImportFormat))}"
        )
    qtypes, flags, runtime = _read(inventory, path, chosen, engine)
    devices = _devices(inventory.with_qtypes(qtypes), flags, machine, engine)
    return Recipe(
        model=inventory.name,
        tensors=tuple(
            RecipeTensor(
                tensor=t.name, qtype=qtypes[t.name], device=devices.get(t.name), shape_ne=t.shape_ne
            )
            for t in inventory.tensors
        ),
        flags=tuple(flags),
        provenance=Provenance(
            quantplan_version=__version__,
            source=inventory.source,
            header_sha256=inventory.header_sha256,
            origin=f"{path.name} ({chosen})",
            runtime=runtime,
            machine=machine,
        ),
    )


def _read(
    inventory: Inventory, path: Path, source_format: ImportFormat, engine: Runtime
) -> tuple[dict[str, str], list[str], Runtime]:
    """Types by tensor, flags to run the model with, and whose they are."""
    if source_format == "gguf":
        return _cloned(inventory, path), [], engine
    text = _text(path)
    if source_format != "llama-quantize":  # which takes a mark of Windows' editors for a letter
        text = text.removeprefix("\ufeff")
    if source_format == "command":
        types, flags = _read_commands(text, path.parent, inventory, engine)
        return types, flags, engine
    rules, dialect = _rules_in(source_format, text)
    return read_rules(rules, inventory, dialect), [], dialect.runtime


def _format_of(path: Path) -> ImportFormat:
    """Tells the format from a file's name or content."""
    known: dict[str, ImportFormat] = {
        ".gguf": "gguf", ".recipe": "gguf-tool-suite", ".sh": "command", ".service": "command",
        ".yml": "command", ".yaml": "command",
    }  # fmt: skip
    found = known.get(path.suffix.lower())
    if found is None:
        raise InputError(
            f"{path}: no format is known by the suffix {path.suffix!r}; name one of "
            f"{', '.join(get_args(ImportFormat))}"
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text: {error}") from error


def _rules_in(source_format: str, text: str) -> tuple[Rules, Dialect]:
    if source_format == "llama-quantize":
        return read_tensor_type_file(text), LLAMA_QUANTIZE
    if source_format == "rules":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return split_rules(line for line in lines if line), LLAMA_QUANTIZE
    if source_format == "ik-custom-q":
        return read_custom_q(text), IK_QUANTIZE
    return read_recipe_file(text), TOOL_SUITE


def _cloned(inventory: Inventory, path: Path) -> dict[str, str]:
    """The types of a quantized file.

    Raises:
        RecipeError: The files do not have the same tensors in the same shapes.
    """
    theirs = read_inventory(path).by_name
    missing = [t.name for t in inventory.tensors if t.name not in theirs]
    unknown = [name for name in theirs if name not in inventory.by_name]
    faults = [
        f"{name} is {ours.shape_ne} in {inventory.name}, {theirs[name].shape_ne} in {path}"
        for name, ours in inventory.by_name.items()
        if name in theirs and theirs[name].shape_ne != ours.shape_ne
    ]
    for names, where in ((missing, path), (unknown, inventory.name)):
        if names:
            faults.append(f"{where} lacks {len(names)} tensors: {', '.join(names[:_NAMED])}")
    if faults:
        raise RecipeError(faults)
    return {t.name: theirs[t.name].qtype for t in inventory.tensors}


def _read_commands(
    text: str, folder: Path, inventory: Inventory, engine: Runtime
) -> tuple[dict[str, str], list[str]]:
    """The types that llama-quantize gives, and the flags of the command that runs the model."""
    types = {tensor.name: tensor.qtype for tensor in inventory.tensors}
    flags: list[str] = []
    dialect = LLAMA_QUANTIZE if engine == "llama.cpp" else IK_QUANTIZE
    commands = commands_in(text)
    makes = [program for program, *_ in commands if program == "llama-quantize"]
    runs = [program for program, *_ in commands if program != "llama-quantize"]
    faults = [
        f"there are {len(each)} commands of {listed(list(dict.fromkeys(each)))}: leave the one "
        "that is meant"
        for each in (makes, runs)
        if len(each) > 1
    ]
    if faults:
        raise RecipeError(faults)
    for program, *arguments in commands:
        if program == "llama-quantize":
            command = read_quantize_command(arguments, dialect, lambda name: _text(folder / name))
            types = command.types_of(inventory)
            continue
        own = [o for o in options(arguments) if o[0] not in _ITS_OWN]
        words = [word for option in own for word in option]
        if program == "llama-bench":
            words = from_bench_flags(words)
        elif program == "koboldcpp":
            words = from_koboldcpp_flags(words)
        has_slots = any(option[0] in ("-np", "--parallel") for option in own)
        if program in _WITH_ONE_SLOT and engine == "llama.cpp" and not has_slots:
            words = [*words, "-np", "1"]
        flags = words
    return types, flags


def _devices(
    inventory: Inventory, flags: Sequence[str], machine: Machine | None, engine: Runtime
) -> dict[str, str]:
    """Device of every tensor that is loaded; empty where there are no flags or no machine."""
    if not flags:
        return {}
    launch = parse_flags(flags, inventory, engine=engine)
    if machine is None:
        return {}
    return {name: homes[0] for name, homes in place(inventory, machine, launch).tensors.items()}
