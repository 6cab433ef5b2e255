"""A program in the place of llama-server that loads any model and then answers wrongly.

The real llama-server cannot be brought to do so.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from quantplan.runtime import LlamaCpp

ROOT = Path(__file__).parents[2]
HELP = "-m, --model FNAME  --host --port --no-warmup -lv, --verbosity -c -ngl -np"
N_CONTEXT = 4096


def faulty_server(folder: Path, fault: str) -> LlamaCpp:
    """Puts a llama-server into a folder that has one of the faults of `Faulty.do_POST`."""
    path = folder / "llama-server"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.support.faulty_server import main\nmain({fault!r})\n"
    )
    path.chmod(0o755)
    return LlamaCpp(
        server=path, runtime="llama.cpp", build=1000, devices=(),
        has_load_mode=False, has_unified_cache=False, has_fit=False,
    )  # fmt: skip


class Faulty(BaseHTTPRequestHandler):
    """Answers what is asked before a text is to be continued, and then no more."""

    fault = ""

    def do_GET(self) -> None:
        """The model is loaded, and there is room."""
        self._answer({"default_generation_settings": {"n_ctx": N_CONTEXT}})

    def do_POST(self) -> None:
        """Tokens are given; what is to be continued goes wrong."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._answer({"tokens": [1, 2, 3]})
        elif self.fault == "hangs":
            time.sleep(60)
        elif self.fault in ("endless", "trickles"):
            self._send_on(1 if self.fault == "trickles" else 2**20)
        elif self.fault in ("SEGV", "ILL"):
            os.kill(os.getpid(), getattr(signal, f"SIG{self.fault}"))
        elif self.fault == "refuses":
            self._answer({"error": "no slot is free"}, 503)
        elif self.fault == "garbage":
            self._answer(b"\x00\xffgarbage")
        elif self.fault == "list":
            self._answer(b"[1, 2]")
        else:
            self._answer(self._result(body))

    def _result(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A result of the right form that has a fault or none."""
        n_prompt = len(body["prompt"]) if body["cache_prompt"] is False else 8
        n_tokens = body["n_predict"]
        result: dict[str, Any] = {"content": " a text"}
        result["timings"] = {
            "prompt_n": n_prompt + (self.fault == "reads more" and n_tokens == 2),
            "prompt_ms": 1.0,
            "predicted_n": n_tokens - (self.fault == "stops"),
            "predicted_ms": 1.0,
        }
        if self.fault in result:
            del result[self.fault]
        elif self.fault in result["timings"]:
            result["timings"][self.fault] = "much"
        return result

    def _answer(self, content: bytes | Mapping[str, Any], status: int = 200) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _send_on(self, n_bytes: int) -> None:
        """An answer of a minute, which is more than anyone waits for."""
        self.send_response(200)
        self.end_headers()
        for _ in range(6000):
            self.wfile.write(b"x" * n_bytes)
            time.sleep(0.01)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def main(fault: str) -> None:
    """Listens where it is told to."""
    if "--help" in sys.argv:
        print(HELP)
        return
    Faulty.fault = fault
    print("graph splits = 1", flush=True)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Faulty).serve_forever()
