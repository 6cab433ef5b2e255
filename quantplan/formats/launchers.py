"""Files that start a model: a shell script, a systemd unit, a docker-compose file."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence

from quantplan.errors import RecipeError
from quantplan.formats.llama_cpp import BASE_FTYPE

_IMAGE = "ghcr.io/ggml-org/llama.cpp:server"
# llama.cpp's image for each kind of GPU, and what else its container needs.
_RENDER_NODES = "    devices: [/dev/dri]\n"
_OF_BACKEND = {
    None: ("", ""),
    "CUDA": (
        "-cuda",
        "    deploy:\n      resources:\n        reservations:\n"
        "          devices: [{driver: nvidia, count: all, capabilities: [gpu]}]\n",
    ),
    "ROCm": (
        "-rocm",
        "    devices: [/dev/kfd, /dev/dri]\n"
        "    # If it finds no GPU: group_add with this host's numbers of groups video and render\n",
    ),
    "SYCL": ("-intel", _RENDER_NODES),
    "Vulkan": ("-vulkan", _RENDER_NODES),
}
# llama.cpp's Dockerfiles leave GGML_RPC off, its default, with which llama-server has no --rpc.
_RPC_NOTE = """\
    # llama.cpp's images come without RPC as a rule, and then refuse --rpc: build one with
    # -DGGML_RPC=ON added in .devops/{dockerfile}.Dockerfile, --target server, and name it above.
    # In a container 127.0.0.1 is not its host.
"""
_COMPOSE_COMMAND = re.compile(r"^\s*command:\s*(\[.*\])\s*$", re.MULTILINE)
_PROGRAMS = {"llama-quantize", "llama-server", "llama-cli", "llama-bench", "koboldcpp"}
# Lines go on behind these in a shell, in Windows' command prompt and in PowerShell; blanks behind
# them are never meant.
_GOES_ON = re.compile(r"[\\^`][ \t]*\n")
_OPERATORS = "();<>|&"
_NUMBERED_OUTPUT = re.compile(r"(?<=\s)\d(?=[<>])")


def shell_script(model: str, quantize: Sequence[str], serve: Sequence[str]) -> str:
    """A POSIX shell script that quantizes a model, unless that is done, and serves it.

    Args:
        model: What the comment calls the model.
        quantize: Arguments of llama-quantize that name the types.
        serve: Flags of llama-server.
    """
    words = [shlex.quote(word) for word in quantize]
    title = " ".join(model.split())
    return "\n".join(
        [
            "#!/bin/sh",
            f"# Quantizes {title}, and serves it.",
            "# Usage: sh SCRIPT SOURCE.gguf TARGET.gguf [IMATRIX]",
            "set -eu",
            'if [ ! -e "$2" ]; then',
            '  llama-quantize ${3:+--imatrix "$3"} \\',
            *(f"    {line} \\" for line in _lines(words)),
            f'    "$1" "$2.part" {BASE_FTYPE}',
            '  mv "$2.part" "$2"',
            "fi",
            'exec llama-server -m "$2" \\',
            " \\\n".join(f"  {line}" for line in _lines(list(map(shlex.quote, serve)))),
            "",
        ]
    )


def _lines(words: Sequence[str]) -> list[str]:
    """A line for every flag with its values."""
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines


def systemd_unit(model: str, command: Sequence[str]) -> str:
    """A systemd service; the command's paths should be absolute."""
    return "\n".join(
        [
            "[Unit]",
            f"Description=llama-server with {' '.join(model.split()).replace('%', '%%')}",
            "After=network.target",
            "",
            "[Service]",
            f"ExecStart={' '.join([command[0], *map(_systemd_word, command[1:])])}",
            "Restart=on-failure",
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ]
    )


def _systemd_word(word: str) -> str:
    """A word that systemd reads as meant: it expands % and $, and reads C escapes."""
    for character in ("\\", '"'):
        word = word.replace(character, f"\\{character}")
    return f'"{word.replace("%", "%%").replace("$", "$$")}"'


def compose_file(model_path: str, flags: Sequence[str], backend: str | None = "CUDA") -> str:
    """A docker-compose file with llama.cpp's own image; the model's folder is mounted.

    Args:
        model_path: The quantized GGUF.
        flags: Flags of llama-server.
        backend: What ``-ot`` calls the GPUs, which says what the image is built for; None for the
            CPU alone.

    Raises:
        RecipeError: There is no such image.
    """
    if backend not in _OF_BACKEND:
        raise RecipeError(
            f"containers cannot use GPUs that llama.cpp calls {backend}, such as Apple's: export "
            "llama-server or shell, or plan for the RAM alone"
        )
    image, needs = _OF_BACKEND[backend]
    folder, name = os.path.split(model_path)
    command = ["-m", f"/models/{name}", *flags, "--host", "0.0.0.0"]  # noqa: S104 (in a container)
    words = json.dumps([word.replace("$", "$$") for word in command])
    # Compose takes a folder whose path has no root and no dot in front for a volume's name.
    place = folder if folder.startswith(("/", ".", "~")) else f"./{folder}".rstrip("/")
    volume = json.dumps(f"{place}:/models:ro".replace("$", "$$"))
    note = _RPC_NOTE.format(dockerfile=image[1:] or "cpu") if "--rpc" in flags else ""
    return f"""services:
  llama-server:
    image: {_IMAGE}{image}
{note}    command: {words}
    volumes: [{volume}]
    ports: ["8080:8080"]
    restart: unless-stopped
{needs}"""


def commands_in(text: str) -> list[list[str]]:
    """The commands of llama.cpp and its kin in a command line, script, unit or compose file.

    Of a compose file, ``command`` must be on one line, as a list; it is llama-server's.

    Raises:
        RecipeError: There is none, or its quotes do not match.
    """
    composed = _COMPOSE_COMMAND.search(text)
    if composed:
        try:
            words = json.loads(composed[1])
        except ValueError as error:
            raise RecipeError(
                f"the compose file's command is no list of strings: {error}"
            ) from error
        return [["llama-server", *(str(word).replace("$$", "$") for word in words)]]
    found = []
    for line in _GOES_ON.sub(" ", text).splitlines():
        is_unit, _, unit_command = line.strip().partition("ExecStart=")
        try:
            if not is_unit and unit_command:
                found += _programs(_unit_words(unit_command))
            elif any(name in line for name in _PROGRAMS) and not line.lstrip().startswith("#"):
                found += [p for words in _shell_commands(line) for p in _programs(words)]
        except ValueError as error:
            raise RecipeError(f"{line.strip()!r} is no command line: {error}") from error
    if not found:
        raise RecipeError(f"no command of {', '.join(sorted(_PROGRAMS))} found")
    return found


def _shell_commands(line: str) -> list[list[str]]:
    """The words of each command in a line of a shell, without redirections and comments."""
    reader = shlex.shlex(_NUMBERED_OUTPUT.sub("", line), posix=True, punctuation_chars=_OPERATORS)
    reader.whitespace_split, reader.commenters = True, ""
    found: list[list[str]] = [[]]
    is_file = False  # what a redirection names is no argument
    for word in reader:
        if word.startswith("#"):
            break
        if set(word) <= set(_OPERATORS):
            is_file = word[-1] in "<>" or word in (">&", "<&")
            if not is_file:
                found.append([])
        elif is_file:
            is_file = False
        else:
            found[-1].append(word)
    return found


def _unit_words(text: str) -> list[str]:
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(text)]


def _programs(words: Iterable[str]) -> list[list[str]]:
    """The words from a program's name on."""
    words = list(words)
    for index, word in enumerate(words):
        name = os.path.basename(word).removesuffix(".exe").removesuffix(".py")  # noqa: PTH119
        if name in _PROGRAMS:
            return [[name, *words[index + 1 :]]]
    return []
