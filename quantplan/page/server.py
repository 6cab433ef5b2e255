"""The page live on this machine: it asks for plans and shows them.

Only 127.0.0.1 is listened on. A site that a browser visits cannot reach it: requests must name this
machine as their host (against DNS rebinding) and send JSON, which no other site may do unasked.
"""

import math
import socket
import threading
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from quantplan.errors import InputError, MissingPackageError, QuantplanError
from quantplan.hardware.machine import Machine
from quantplan.hardware.table import gpu_presets
from quantplan.inventory import Inventory
from quantplan.inventory.catalog import catalog_names
from quantplan.inventory.sources import read_inventory
from quantplan.llama_cpp import KVType
from quantplan.page.content import Content, page_content
from quantplan.page.document import live_html
from quantplan.page.others import other_plans
from quantplan.planner.linear import before_every_run
from quantplan.plans.plan import plan
from quantplan.plans.result import Plan
from quantplan.policy import policy_names
from quantplan.schema import Frozen
from quantplan.workload import MAX_CONTEXT, Workload

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingPackageError("quantplan ui", "starlette and uvicorn", "ui") from error

ADDRESS = "127.0.0.1"
_HOSTS = [ADDRESS, "localhost"]
_LARGEST_REQUEST = 2**16
_SEARCH_S = 20.0
_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 2048, 2**20


class Question(Frozen):
    """What the form asks.

    Attributes:
        model: Catalog name, GGUF file or URL.
        machine: Text for `Machine.parse`.
        context: Tokens of context.
        kv: Type of the KV cache.
        min_tps: Least decode speed in tokens per second; None where the policy decides.
        policy: Name of a policy.
        wants: The plan alone (fast), or with plain answers and the frontier.
        page: Which of the open pages asks.
        number: Of the question on that page. Requests may arrive in another order.
    """

    model: str = Field(min_length=1, max_length=4096)
    machine: str = Field(min_length=1, max_length=4096)
    context: int = Field(ge=1, le=MAX_CONTEXT)
    kv: KVType = "f16"
    min_tps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    policy: str = "quality"
    wants: Literal["plan", "frontier"] = "plan"
    page: str = Field(default="", max_length=64)
    number: int = 0


class _NewerQuestionError(Exception):
    """The page has asked something newer; raised to end what is being worked out."""


class Planner:
    """Answers questions one at a time; a page that asks anew gives up what it asked before.

    A plan does not wait for a frontier that nobody wants any more: each kind has its own turn.
    """

    def __init__(self, points: int = 10) -> None:
        """Starts with nothing asked.

        Args:
            points: Points of each frontier.
        """
        self._points = points
        self._turns = {"plan": threading.Lock(), "frontier": threading.Lock()}
        self._newest: dict[str, int] = {}
        self._numbers = threading.Lock()

    def answer(self, question: Question) -> Content | None:
        """The content of the page; None where the page has asked something newer.

        Raises:
            QuantplanError: There is no plan; the message says what to change.
        """
        page, number = question.page, question.number
        with self._numbers:
            self._newest[page] = max(number, self._newest.get(page, number))

        def go_on() -> None:
            if number != self._newest[page]:
                raise _NewerQuestionError

        # It may be in the middle of a search, which would slow down the one for the newer question.
        with suppress(_NewerQuestionError), self._turns[question.wants], before_every_run(go_on):
            go_on()
            return _answer(question, self._points)
        return None


def _answer(question: Question, points: int) -> Content:
    inventory = _inventory(question.model)
    if question.wants == "plan":
        return page_content(_plan(question, inventory, baselines=False), inventory=inventory)
    made = _plan(question, inventory, baselines=True)
    others = other_plans(
        made, inventory, policy=question.policy, points=points, time_limit_s=_SEARCH_S
    )  # fmt: skip
    reason = None if others else "No other plan is as good at another speed."
    return page_content(made, others, inventory=inventory, without_frontier=reason)


def _plan(question: Question, inventory: Inventory, *, baselines: bool) -> Plan:
    return plan(
        inventory,
        Machine.parse(question.machine),
        Workload(context=question.context, kv_type=question.kv),
        min_decode_tps=question.min_tps,
        policy=question.policy,
        time_limit_s=_SEARCH_S,
        baselines=baselines,
    )


# Models are read once; a file that changes meanwhile is read anew when the page is started again.
@lru_cache(maxsize=8)
def _inventory(source: str) -> Inventory:
    return read_inventory(source)


def application(planner: Planner) -> Starlette:
    """The web application: the page, and plans as JSON."""
    page = live_html(_form_options())

    async def show(_: Request) -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    async def answer(request: Request) -> Response:  # noqa: PLR0911 (one return per fault)
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return _problems(["send JSON"], 415)
        if int(request.headers.get("content-length", _LARGEST_REQUEST + 1)) > _LARGEST_REQUEST:
            return _problems([f"a request has a length of at most {_LARGEST_REQUEST} bytes"], 413)
        # What cannot be planned is an answer too: browsers write other codes to their console.
        try:
            question = Question.model_validate_json(await request.body())
            content = await run_in_threadpool(planner.answer, question)
        except ValidationError as error:
            return _problems([_fault(fault) for fault in error.errors()])
        except InputError as error:
            return _problems(list(error.faults))
        except QuantplanError as error:
            return _problems(str(error).split("\n"))
        if content is None:
            return Response(status_code=204)
        return Response(content.model_dump_json(), media_type="application/json")

    return Starlette(
        routes=[Route("/", show), Route("/plan", answer, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False)],
    )


def _problems(texts: list[str], status: int = 200) -> Response:
    return JSONResponse({"problems": texts}, status_code=status)


def _fault(fault: Any) -> str:
    return f"{'.'.join(map(str, fault['loc'])) or 'request'}: {fault['msg']}"


def _form_options() -> dict[str, object]:
    return {
        "models": list(catalog_names()),
        "gpus": list(gpu_presets()),
        "kv": list(get_args(KVType)),
        "policies": list(policy_names()),
        "contexts": _contexts(),
        "first": {
            "model": "GLM-4.5-Air",
            "machine": "RTX 4090 + 64GiB@80GB/s",
            "context": 32768,
            "kv": "q8_0",
            "policy": "quality",
        },
    }


def _contexts() -> list[int]:
    """Stops of the slider: powers of two, and half-way between them."""
    powers = range(round(math.log2(_SHORTEST_CONTEXT)), round(math.log2(_LONGEST_CONTEXT)))
    return [n for p in powers for n in (2**p, 3 * 2 ** (p - 1))] + [_LONGEST_CONTEXT]


class Server(uvicorn.Server):
    """The server of the page; it listens as soon as it is made."""

    def __init__(self, port: int, planner: Planner | None = None) -> None:
        """Takes the port.

        Args:
            port: 0 stands for any free one.
            planner: Who answers.

        Raises:
            InputError: The port is taken, or not allowed.
        """
        app = application(planner or Planner())
        super().__init__(uvicorn.Config(app, host=ADDRESS, port=port, log_level="warning"))
        try:
            self._socket = socket.create_server((ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"port {port} of {ADDRESS} cannot be used: {error}; choose "
                "another one with --port, or 0 for any"
            ) from error
        self.url = f"http://{ADDRESS}:{self._socket.getsockname()[1]}/"

    def serve_until_interrupted(self) -> None:
        """Answers until it is told to end."""
        with suppress(KeyboardInterrupt), self._socket:
            self.run(sockets=[self._socket])
