"""A server on the loopback interface that sends ranges of files, as well as it is told to."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


class Handler(BaseHTTPRequestHandler):
    """Serves the ranges of a folder's files, with a fault if one is set.

    Attributes:
        folder: What is served.
        fault: What goes wrong, but for the first byte of a file.
        n_faults: How often.
        requests: First and last byte of every request.
        token: Who does not show it is refused; empty to let everyone read.
        shown: The authorization of every request, None where there was none.
        elsewhere: Where all requests are sent on to; empty to answer them.
        held_from: Ranges that begin here or later are not answered before they may be.
        may_go_on: Whether they may be.
    """

    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    fault: ClassVar[str] = ""
    n_faults: ClassVar[int] = 0
    requests: ClassVar[list[tuple[int, int]]] = []
    token: ClassVar[str] = ""
    shown: ClassVar[list[str | None]] = []
    elsewhere: ClassVar[str] = ""
    held_from: ClassVar[float] = math.inf
    may_go_on: ClassVar[threading.Event]

    def do_GET(self) -> None:
        type(self).shown.append(self.headers["Authorization"])
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self.send_error(401)
            return
        if self.elsewhere:
            self._send_on(f"{self.elsewhere}{self.path}")
            return
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        raw = path.read_bytes()
        wanted = self.headers["Range"] or f"bytes=0-{len(raw) - 1}"
        begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
        cls = type(self)
        cls.requests.append((begin, end))
        if begin >= cls.held_from:
            cls.may_go_on.wait()
        fault = ""
        if cls.n_faults and begin:
            cls.n_faults -= 1
            fault = cls.fault
        if fault == "busy":
            self.send_error(503)
            return
        if fault == "moved":
            self._send_on(f"{self.path}?moved")
            return
        part = raw[begin : end + 1]
        if fault == "whole" or self.headers["Range"] is None:
            self.send_response(200)
            part = raw
        else:
            self.send_response(206)
        span = (begin + 1, end + 1) if fault == "shifted" else (begin, end)
        size = len(raw) + 7 if fault == "size" else len(raw)
        self.send_header("Content-Range", f"bytes {span[0]}-{span[1]}/{size}")
        self.send_header("ETag", '"other"' if fault == "changed" else '"one"')
        part = part[: len(part) // 2] if fault == "short" else part
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "stall":
            self.rfile.read(1)  # until the client gives the connection up
        self.wfile.write(part[: len(part) // 2] if fault == "drop" else part)
        if fault == "drop":
            self.close_connection = True

    def _send_on(self, url: str) -> None:
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class QuietServer(ThreadingHTTPServer):
    """A server whose client may go away."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serve(folder: Path, fault: str = "", n_faults: int = 0) -> Iterator[tuple[str, type[Handler]]]:
    """Serves a folder, with a number of faults once a file is open."""
    may_go_on = threading.Event()
    handler = type(
        "Served",
        (Handler,),
        {
            "folder": folder, "fault": fault, "n_faults": n_faults, "requests": [], "shown": [],
            "may_go_on": may_go_on,
        },
    )  # fmt: skip
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        may_go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
