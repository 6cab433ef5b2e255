"""Runs what a page of the documentation shows, in order, and compares what it says is printed.

A page is a session at a terminal. Its blocks run in one folder:

- ``console``: lines that start with ``$`` go to a shell as they stand; the lines below them are
  what is printed (see `missing`). A command ends with code 0, unless ``$ echo $?`` follows. Servers
  (``quantplan run``, ``quantplan ui``, ``ggml-rpc-server``) go on until the page ends.
- ``python``: all blocks run in one interpreter, where warnings are errors.
- ``yaml``: a workflow of GitHub Actions. Its ``run`` steps go to a shell, as in ``console``.
- ``json``: is parsed.
- ``text``: is for people, and has no commands.

What a machine for tests cannot do is done in its place: lines that install are held against
`pyproject.toml`, ports are free ones, Hugging Face is a server on the loopback interface, llama.cpp
is on the path wherever ``export LLAMA_CPP_DIR`` says that it is, and what may take ``--minutes``
ends after two runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import yaml

from quantplan.runtime.process import ADDRESS, Process, free_port, running
from tests.support.llama_cpp import accepts

ROOT = Path(__file__).parent.parent.parent
RUN = ("console", "python", "yaml", "json")
"""Languages of blocks that are run or read."""

_COMMAND = re.compile(r" *\$ | {4,}(?:quantplan|pip|curl) ")
_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"\b(?:8080|8765|5005\d)\b")
_HUB = re.compile(
    r"(?:hf:|https://huggingface\.co/)[\w.-]+/[\w.-]+/(?:resolve/main/)?([\w.-]+\.gguf)"
)
_INSTALLS = re.compile(r"(\.venv/bin/)?(pip|python3 -m venv|git clone) |\. \.venv/bin/activate")
_SERVERS = re.compile(r"quantplan run (?!.*--dry-run)|quantplan ui\b|ggml-rpc-server ")
_SET = ("export LLAMA_CPP_DIR=", "export HF_TOKEN=")
_SERVER_LIMIT_S = 120.0
_NEEDS_LLAMA_CPP = re.compile(
    r"^(?:\$ )?(?:ggml-rpc-server |quantplan (?:doctor|verify|run|measure)\b(?!-)"
    r"|quantplan (?:calibrate (?!.*--bench)|predict .*--calibrate))",
    re.MULTILINE,
)
# Their numbers are those of the machine that they run on.
_MEASURES = re.compile(
    r"quantplan (machine|calibrate|measure|quantize|verify|run|doctor)\b(?!-)|machine\.json|curl"
)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
_CLOSE = 0.02
_BROKEN = 3  # exit code of verify
_INTERPRETER = """
import json, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    exec(json.loads(line), names)
    print("\\0", flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: The word behind the fence.
        text: What is inside.
    """

    language: str
    text: str


@dataclass(frozen=True)
class Step:
    """A command and what is shown of its output."""

    command: str
    shown: tuple[str, ...] = ()


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    return [Block(language.strip(), inside) for language, inside in _BLOCK.findall(text)]


def untested(text: str) -> list[str]:
    """What a page shows without a test: blocks of other kinds, and commands in blocks of text.

    What is in braces is a directive of the site, and built with it.
    """
    fenced = blocks(text)
    kinds = {block.language for block in fenced} - {*RUN, "text"}
    prose = [_BLOCK.sub("", text), *(block.text for block in fenced if block.language == "text")]
    hidden = [line for part in prose for line in part.splitlines() if _COMMAND.match(line)]
    return [*(kind for kind in sorted(kinds) if not kind.startswith("{")), *hidden]


def needs_llama_cpp(text: str) -> bool:
    """Tell whether a page has commands that run llama.cpp."""
    return any(_NEEDS_LLAMA_CPP.search(block.text) for block in blocks(text))


def hub_files(text: str) -> set[str]:
    """Names of the files that a page reads from Hugging Face."""
    return set(_HUB.findall(text))


def steps(block: Block) -> list[Step]:
    """The commands of a console block, or of the workflow in a YAML block."""
    if block.language == "yaml":
        jobs = yaml.safe_load(block.text)["jobs"].values()
        scripts = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
        return [Step(line) for script in scripts for line in _joined(script.splitlines())]
    found: list[Step] = []
    for line in _joined(block.text.splitlines()):
        if line.startswith("$ "):
            found.append(Step(line.removeprefix("$ ")))
        elif found:
            found[-1] = Step(found[-1].command, (*found[-1].shown, line))
        else:
            raise AssertionError(f"a console block starts with a command, not with {line!r}")
    return found


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines with those that end in a backslash and the next ones in one."""
    begun = ""
    for line in lines:
        begun += line
        if begun.endswith("\\"):
            begun += "\n"
            continue
        yield begun
        begun = ""


def missing(shown: Iterable[str], printed: str, *, measured: bool) -> list[str]:
    """Lines that a page shows, but that are not printed in that order.

    Lines must agree word by word. Numbers may differ by 2 %, or by one in their last digit, because
    another version of the solver may find another plan within the gap; where they were measured,
    they may differ altogether. A line of three dots stands for any lines, and dots at the end of
    one for the rest of it.

    Args:
        shown: What the page shows.
        printed: What was printed.
        measured: Whether the numbers are those of the machine that it ran on.
    """
    lines = iter([line for line in printed.splitlines() if line.strip()])
    wanted = [line for line in shown if line.strip() not in ("", "...")]
    return [line for line in wanted if not any(_agree(line, real, measured) for real in lines)]


def _agree(shown: str, printed: str, measured: bool) -> bool:
    said, real = " ".join(shown.split()), " ".join(printed.split())
    words, real_words = _NUMBER.sub("#", said), _NUMBER.sub("#", real)
    if words.endswith(" ..."):
        start = words.removesuffix("...").rstrip()
        if not real_words.startswith(start):
            return False
    elif words != real_words:
        return False
    numbers = zip(_NUMBER.findall(said), _NUMBER.findall(real), strict=False)
    return measured or all(_is_close(a, b) for a, b in numbers)


def _is_close(shown: str, printed: str) -> bool:
    last = 10.0 ** -len(shown.partition(".")[2])
    return abs(float(shown) - float(printed)) <= max(_CLOSE * float(shown), 1.001 * last)


@dataclass
class Session(AbstractContextManager["Session"]):
    """A terminal in the present folder.

    Attributes:
        environment: Of its commands.
        hub: Address of the server that stands for Hugging Face.
    """

    environment: dict[str, str]
    hub: str
    _ports: dict[str, str] = field(default_factory=dict)
    _running: ExitStack = field(default_factory=ExitStack)
    _interpreter: subprocess.Popen[str] | None = None

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        self._running.close()

    def run(self, block: Block) -> None:
        """Run a block, and hold what it shows against what is printed.

        Raises:
            AssertionError: A command failed, or something else is printed.
        """
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "python":
            self._execute(block.text)
        else:
            found = steps(block)
            code = 0
            for step, following in pairwise([*found, Step("")]):
                may_fail = following.command == "echo $?"
                code = self._run(step, code, may_fail=may_fail)

    def _run(self, step: Step, code: int, *, may_fail: bool) -> int:
        """Run one command; returns its exit code."""
        command = self._here(step.command)
        if _INSTALLS.match(command):
            check_install(command)
            return 0
        if command.startswith(_SET):
            return 0
        if command == "echo $?":
            printed, code = str(code), 0
        elif _SERVERS.match(command):
            printed = self._serve(command).log
        else:
            done = subprocess.run(
                ["sh", "-c", command],  # noqa: S607 (what is shown is meant for a shell)
                env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            printed, code = done.stdout, done.returncode
            was_slow = code == _BROKEN and _only_speeds_are_broken(printed)
            assert code == 0 or may_fail or was_slow, f"{command}\nended with {code}\n{printed}"
        measured = _MEASURES.search(command) is not None
        lost = "\n".join(missing(map(self._here, step.shown), printed, measured=measured))
        assert not lost, f"{command}\ndoes not print\n{lost}\nbut\n{printed}"
        return code

    def _here(self, text: str) -> str:
        """A command or a line as it is on this machine."""
        text = _PORT.sub(lambda m: self._ports.setdefault(m[0], str(free_port())), text)
        text = re.sub(r"--minutes \d+", r"\g<0> --runs 2", text)
        return _HUB.sub(rf"{self.hub}/\1", text)

    def _serve(self, command: str) -> Process:
        """Start a server and wait until it answers."""
        port = int(re.findall(r"(?:--port|-p) (\d+)", command)[-1])
        process = self._running.enter_context(
            running(["sh", "-c", f"exec {command}"], self.environment)
        )
        path = "/health" if "quantplan run" in command else "/"
        answers = accepts if "rpc" in command else lambda port: _answers(port, path)
        process.wait_until(lambda: answers(port), _SERVER_LIMIT_S)
        return process

    def _execute(self, program: str) -> None:
        """Run Python code in the interpreter of the page."""
        if self._interpreter is None:
            self._interpreter = self._running.enter_context(_interpreter(self.environment))
        given, printed = self._interpreter.stdin, self._interpreter.stdout
        assert given is not None and printed is not None
        given.write(json.dumps(program) + "\n")
        given.flush()
        said = _until_done(printed)
        assert said.endswith("\0\n"), f"{program}\nfailed:\n{said}"


@contextmanager
def _interpreter(environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _INTERPRETER],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as popen:  # fmt: skip
        yield popen
        popen.kill()


def _until_done(printed: IO[str]) -> str:
    said = ""
    for line in printed:
        said += line
        if line.endswith("\0\n"):
            break
    return said


def _answers(port: int, path: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{ADDRESS}:{port}{path}", timeout=5):
            return True
    except OSError:  # refused while it starts, 503 while it loads
        return False


def _only_speeds_are_broken(printed: str) -> bool:
    """Tell whether a verification found nothing but speeds that a busy machine did not reach."""
    broken = [line.split()[0] for line in printed.splitlines() if "BROKEN:" in line]
    return bool(broken) and set(broken) <= {"decode", "prefill"}


def check_install(command: str) -> None:
    """Hold the packages of a line that installs against the project's."""
    if "pip" not in command:
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = command.partition(" install ")[2].replace("'", "").replace('"', "").split()
    assert targets, f"{command} installs nothing"
    for target in targets:
        name, _, extras = target.rstrip("]").partition("[")
        assert name in (".", project["name"]), f"{command}: what is {name}?"
        unknown = set(filter(None, extras.split(","))) - project["optional-dependencies"].keys()
        assert not unknown, f"{command}: there are no extras {unknown}"


def session_environment(folders: Sequence[Path], more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a person who has quantplan and perhaps llama.cpp.

    Args:
        folders: Of programs; into the first goes the command ``quantplan``.
        more: Variables besides.
    """
    command = folders[0] / "quantplan"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m quantplan.cli "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    home = folders[0]
    own = {
        "PATH": path,
        "NO_PROXY": ADDRESS,
        "BROWSER": "true",
        "GITHUB_STEP_SUMMARY": str(home / "summary"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_DATA_HOME": str(home / "data"),
    }
    given = {key: text for key, text in os.environ.items() if key != "LLAMA_CPP_DIR"}
    return {**given, **own, **more}
