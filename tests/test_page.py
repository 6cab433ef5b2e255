"""The page, as a file and live, in a real Chromium."""

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, expect
from typer.testing import CliRunner

import quantplan as qp
from quantplan.cli import app
from quantplan.costs.quality import LossTable
from quantplan.page import server as page_server
from quantplan.page.content import Content, page_content
from quantplan.page.document import report_html
from quantplan.page.loss import loss_interval
from quantplan.page.others import other_plans, why_not
from quantplan.page.server import Planner, Question, Server
from quantplan.policy import policy
from tests.support.browser import Watched, chromium, file_url

MODEL, MACHINE = "Qwen3-4B-Instruct-2507", "4GiB + 16GiB@60GB/s"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def plans() -> tuple[qp.Plan, list[qp.Plan]]:
    inventory, machine = qp.read_inventory(MODEL), qp.Machine.parse(MACHINE)
    made = qp.plan(inventory, machine, qp.Workload(context=8192), min_decode_tps=15)
    return made, other_plans(made, inventory, policy="quality", points=4)


@pytest.fixture(scope="module")
def report(plans: tuple[qp.Plan, list[qp.Plan]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, others = plans
    path = tmp_path_factory.mktemp("report") / "report.html"
    content = page_content(made, others, inventory=qp.read_inventory(MODEL))
    path.write_text(report_html(content), encoding="utf-8")
    return path


@pytest.fixture
def shown(browser: Browser, report: Path) -> Iterator[Watched]:
    watched = Watched(browser)
    watched.page.goto(file_url(report))
    yield watched
    watched.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server(0, Planner(points=3))
    thread = threading.Thread(target=running.serve_until_interrupted)
    thread.start()
    yield running
    running.should_exit = True
    thread.join()


@pytest.fixture(params=["phone", "desk"])
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_file_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, report: Path, size: str, scheme: str
) -> None:
    """At both widths and in both schemes: no request, no console message, no sideways scrolling,
    and nothing that axe-core calls serious."""
    watched = Watched(browser, size, scheme)
    watched.page.goto(file_url(report))
    assert watched.width() == watched.page.viewport_size["width"]  # type: ignore[index]
    assert watched.violations() == []
    assert watched.complaints == []
    assert watched.requests == [file_url(report)]
    watched.close()


def test_the_file_forbids_requests_by_itself(shown: Watched) -> None:
    """A script that got into the page could not send anything either."""
    with shown.page.expect_console_message(lambda m: "Content Security Policy" in m.text):
        sent = shown.page.evaluate("fetch('https://example.org/').then(() => 'sent', () => 'no')")
    assert sent == "no"


def test_colours_follow_the_scheme(browser: Browser, report: Path) -> None:
    """Who asks for dark pages gets a dark one."""
    brightness = {}
    for scheme in ("light", "dark"):
        watched = Watched(browser, "desk", scheme)
        watched.page.goto(file_url(report))
        colour = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness[scheme] = sum(int(n) for n in re.findall(r"\d+", colour)[:3])
        watched.close()
    assert brightness["dark"] < 150
    assert brightness["light"] > 700


def test_the_answer_says_what_the_plan_says(
    shown: Watched, plans: tuple[qp.Plan, list[qp.Plan]]
) -> None:
    """Command, size, speed with its interval, loss and free memory are the plan's."""
    made, _ = plans
    assert shown.text("#serve") == made.llama_server_command("model.gguf")
    numbers = shown.text("#numbers")
    speed = made.speed.points[-1].decode_tps
    assert f"{made.predicted.file_bytes / 2**30:.2f} GiB" in numbers
    assert f"{speed.expected:.1f} tokens/s" in numbers
    assert f"80 %: {speed.low:.1f} to {speed.high:.1f}" in numbers
    for use in made.devices:
        assert f"{use.name}: {use.free_bytes / 2**30:.2f} GiB free" in numbers


def test_copying_puts_the_command_on_the_clipboard(shown: Watched) -> None:
    """The button copies the whole command and says so."""
    shown.page.click("#copy-serve")
    expect(shown.page.locator("#copied")).to_have_text("Copied.")
    assert shown.page.evaluate("navigator.clipboard.readText()") == shown.text("#serve")


def test_the_slider_picks_another_plan_with_its_own_command(
    shown: Watched, plans: tuple[qp.Plan, list[qp.Plan]]
) -> None:
    """With the keyboard alone: every point shows its command, and the way back works."""
    made, others = plans
    assert len(others) >= 2, "the frontier of this model has several points"
    ordered = sorted([made, *others], key=lambda p: p.predicted.decode_tps)
    slider = shown.page.locator("#point")
    slider.focus()
    shown.page.keyboard.press("Home")
    for i, each in enumerate(ordered):
        assert shown.text("#serve") == each.llama_server_command("model.gguf")
        assert f"{each.predicted.decode_tps:.1f} tokens/s" in shown.text("#point-value")
        said = slider.get_attribute("aria-valuetext") or ""
        assert f"{each.predicted.file_bytes / 2**30:.2f} GiB" in said
        if i < len(ordered) - 1:
            shown.page.keyboard.press("ArrowRight")
    if ordered[-1] is not made:
        assert "another point" in shown.text("#picked")
        shown.page.locator("#point-back").press("Enter")
    assert shown.text("#serve") == made.llama_server_command("model.gguf")


def test_the_recipe_of_every_point_can_be_saved(
    shown: Watched, plans: tuple[qp.Plan, list[qp.Plan]], tmp_path: Path
) -> None:
    """What the button saves is the very recipe of the plan that is shown."""
    made, others = plans
    ordered = sorted([made, *others], key=lambda p: p.predicted.decode_tps)
    for each, key in ((ordered[0], "Home"), (ordered[-1], "End")):
        shown.page.locator("#point").press(key)
        with shown.page.expect_download() as download:
            shown.page.click("#save-recipe")
        path = tmp_path / f"{key}.json"
        download.value.save_as(path)
        assert qp.Recipe.load(path) == each.recipe


def column(shown: Watched, name: str) -> list[str]:
    heads = shown.page.locator("#tensors th").all_inner_texts()
    index = [head.rstrip("▲▼") for head in heads].index(name)
    cells = shown.page.locator(f"#tensors tbody td:nth-child({index + 1})")
    return cells.all_inner_texts()


def test_tensors_sort_by_any_column_both_ways(
    shown: Watched, plans: tuple[qp.Plan, list[qp.Plan]]
) -> None:
    """A click sorts, another one turns the order round; screen readers are told."""
    head = shown.page.locator("#tensors th", has_text="Size")
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    smallest = column(shown, "Tensor")[0]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    sizes = {t.name: t.n_bytes for t in plans[0].recipe.inventory_tensors if t.is_quantizable}
    assert sizes[smallest] == min(sizes.values())
    assert sizes[column(shown, "Tensor")[0]] == max(sizes.values())


def test_tensors_filter_by_name_type_and_device(
    shown: Watched, plans: tuple[qp.Plan, list[qp.Plan]]
) -> None:
    """Only what matches every filter is left, and the count says how much that is."""
    made, _ = plans
    rows = [
        (a.tensor, a.qtype, a.device)
        for a, t in zip(made.assignments, made.recipe.inventory_tensors, strict=True)
        if t.is_quantizable
    ]
    shown.page.fill("#filter-name", "FFN_down")
    wanted = [row for row in rows if "ffn_down" in row[0]]
    assert column(shown, "Tensor") == [row[0] for row in wanted]
    _, qtype, device = wanted[-1]
    shown.page.select_option("#filter-type", qtype)
    shown.page.select_option("#filter-device", device)
    wanted = [row for row in wanted if row[1:] == (qtype, device)]
    assert column(shown, "Tensor") == [row[0] for row in wanted]
    assert shown.text("#tensor-count").startswith(f"{len(wanted)} of {len(made.assignments)} ")
    shown.page.fill("#filter-name", "")
    shown.page.select_option("#filter-type", "")
    shown.page.select_option("#filter-device", "")
    shown.page.uncheck("#filter-matrices")
    assert len(column(shown, "Tensor")) == len(made.assignments)


def test_everything_can_be_reached_with_the_tab_key(shown: Watched) -> None:
    """No button, slider, filter or scrolling table is for the mouse only."""
    reached: set[str] = set()
    for _ in range(60):
        shown.page.keyboard.press("Tab")
        reached.add(shown.page.evaluate("document.activeElement.id"))
    wanted = {
        "save-recipe", "copy-make", "copy-serve", "serve", "point", "filter-name", "filter-type",
        "filter-device", "filter-matrices", "tensors", "baselines", "assumptions",
    }  # fmt: skip
    assert wanted <= reached


def test_plain_answers_and_assumptions_are_all_there(
    shown: Watched, plans: tuple[qp.Plan, list[qp.Plan]]
) -> None:
    """Every plain answer has its row, and every data file of the cost models its source."""
    made, _ = plans
    assert shown.page.locator("#baselines tbody tr").count() == len(made.baselines)
    said = shown.text("#assumptions")
    for what in ("GPU0", "CPU", "Compute buffers", "Speed", "Loss", "Errors of types", "Policy"):
        assert what in said


def test_names_cannot_break_out_of_the_page(
    browser: Browser, plans: tuple[qp.Plan, list[qp.Plan]], tmp_path: Path
) -> None:
    """A model whose name is HTML is shown as text and runs nothing."""
    name = "</script><script>document.title='hit'</script><img src=x onerror=alert(1)>"
    made = plans[0].model_copy(update={"model": name, "notes": (name,)})
    path = tmp_path / "report.html"
    path.write_text(report_html(page_content(made)), encoding="utf-8")
    watched = Watched(browser)
    watched.page.goto(file_url(path))
    assert watched.text("h1") == name
    assert watched.page.title() == f"{name}: quantplan"
    assert watched.complaints == []
    watched.close()


def test_the_interval_of_the_loss_holds_the_prediction(
    plans: tuple[qp.Plan, list[qp.Plan]],
) -> None:
    """The interval is around the plan's own loss, and wider where the family is not known."""
    made, _ = plans
    inventory = qp.read_inventory(MODEL)
    types = {a.tensor: a.qtype for a in made.assignments}
    known = loss_interval(LossTable(inventory), inventory, types)
    assert known.expected == pytest.approx(made.predicted.loss_nats, rel=1e-9)
    assert 0 < known.low < known.expected < known.high
    kept = {t.name: t.qtype for t in inventory.tensors}
    assert loss_interval(LossTable(inventory), inventory, kept).high == 0


def test_a_plan_is_read_back_and_a_recipe_is_told_apart(
    plans: tuple[qp.Plan, list[qp.Plan]], tmp_path: Path
) -> None:
    """What `plan --json` prints is read; a recipe is refused with what it lacks."""
    made, _ = plans
    path = tmp_path / "plan.json"
    path.write_text(made.model_dump_json(), encoding="utf-8")
    assert qp.Plan.load(path) == made
    made.save(path)
    assert qp.Plan.load(path) == made
    made.recipe.save(path)
    with pytest.raises(qp.InputError, match=r"is a recipe: it lacks .* --json > plan.json"):
        qp.Plan.load(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(qp.InputError, match="no plan that this version reads"):
        qp.Plan.load(path)


def test_the_command_writes_the_page(
    browser: Browser, plans: tuple[qp.Plan, list[qp.Plan]], tmp_path: Path
) -> None:
    """`quantplan report` takes what `plan --json` prints, and traces the frontier itself."""
    path, page = tmp_path / "plan.json", tmp_path / "r.html"
    path.write_text(plans[0].model_dump_json(), encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(page), "--points", "3"])
    assert done.exit_code == 0, done.output
    watched = Watched(browser)
    watched.page.goto(file_url(page))
    said = int(re.search(r"(\d+) plans to choose from", done.output)[1])  # type: ignore[index]
    assert said >= 3
    assert int(watched.page.get_attribute("#point", "max") or 0) == said - 1
    watched.close()


def test_a_page_without_its_model_says_what_it_lacks(
    browser: Browser, plans: tuple[qp.Plan, list[qp.Plan]], tmp_path: Path
) -> None:
    """A plan for a file that is gone still has its page, and the reason for what is missing."""
    made = plans[0]
    gone = made.provenance.model_copy(update={"source": str(tmp_path / "gone.gguf")})
    path = tmp_path / "plan.json"
    path.write_text(made.model_copy(update={"provenance": gone}).model_dump_json(), "utf-8")
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    watched = Watched(browser)
    watched.page.goto(file_url(tmp_path / "r.html"))
    assert "give it with --model" in watched.text("#frontier-note")
    assert watched.page.locator("#frontier-tools").is_hidden()
    assert "interval not known" in watched.text("#numbers")
    assert watched.complaints == []
    watched.close()


def test_plans_that_could_not_be_compared_are_not_drawn(
    plans: tuple[qp.Plan, list[qp.Plan]],
) -> None:
    """Another model, policy or loss model than the plan's is a reason for no frontier."""
    made, _ = plans
    inventory = qp.read_inventory(MODEL)
    assert why_not(made, inventory, policy("quality"), None) == ""
    assert "not the model" in why_not(made, qp.read_inventory("Qwen3-32B"), policy("quality"), None)
    assert "--policy" in why_not(made, inventory, policy("free"), None)
    other = made.predicted.model_copy(update={"loss_nats": made.predicted.loss_nats * 1.1})
    changed = made.model_copy(update={"predicted": other})
    assert "--measured" in why_not(changed, inventory, policy("quality"), None)


def ask(server: Server, question: dict[str, Any], **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(
        server.url + "plan",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        with error:
            text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()


QUESTION = {"model": MODEL, "machine": MACHINE, "context": 8192, "kv": "f16", "min_tps": 15}


def test_only_this_machine_is_answered(server: Server) -> None:
    """A foreign Host, a form post and anything but loopback get nothing."""
    status, _ = ask(server, QUESTION, Host="rebound.example")
    assert status == 400
    status, _ = ask(server, QUESTION, **{"Content-Type": "text/plain"})
    assert status == 415
    assert server.url.startswith("http://127.0.0.1:")
    port = int(server.url.rstrip("/").rpartition(":")[2])
    connection = HTTPConnection("127.0.0.1", port)
    connection.putrequest("POST", "/plan")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_what_cannot_be_planned_comes_with_the_next_step(server: Server) -> None:
    """Faults of model, machine and numbers are sentences; an impossible speed is one too."""
    status, body = ask(server, {**QUESTION, "model": "Qwen3-4C"})
    assert (status, "Did you mean" in body["problems"][0]) == (200, True)
    status, body = ask(server, {**QUESTION, "machine": "RTX 9999 + 16GiB"})
    assert (status, len(body["problems"])) == (200, 2)
    status, body = ask(server, {**QUESTION, "context": -1})
    assert (status, "context" in body["problems"][0]) == (200, True)
    status, body = ask(server, {**QUESTION, "min_tps": 1e6})
    assert (status, "tokens/s" in body["problems"][0]) == (200, True)


def test_a_port_that_is_taken_is_an_error_with_a_way_out(server: Server) -> None:
    """The message names the port and the option."""
    port = int(server.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(qp.InputError, match=rf"port {port} .*--port"):
        Server(port)


@pytest.fixture(params=[("phone", "dark"), ("desk", "light")], ids=["phone", "desk"])
def live(browser: Browser, server: Server, request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(browser, *request.param)
    watched.page.goto(address(server))
    expect(watched.page.locator("h1")).to_have_text(MODEL)
    yield watched
    watched.close()


def address(server: Server, **changed: str) -> str:
    asked = {"model": MODEL, "machine": MACHINE, "context": "8192"} | changed
    return f"{server.url}?{urlencode(asked)}"


def test_the_live_page_follows_the_form(live: Watched, server: Server) -> None:
    """A longer context changes the plan; frontier and plain answers follow; nothing complains."""
    before = live.text("#serve")
    slider = live.page.locator("#ask-context")
    slider.press("ArrowLeft")
    live.page.wait_for_function(
        "before => document.querySelector('#serve').innerText !== before", arg=before
    )
    asked = live.text("#ask-context-value").split()[0]
    assert f"-c {asked} " in live.text("#serve")
    expect(live.page.locator("#busy")).to_have_text("Done.")
    assert live.page.locator("#baselines tbody tr").count() > 3
    assert live.width() == live.page.viewport_size["width"]  # type: ignore[index]
    assert live.violations() == []
    assert live.complaints == []
    assert all(url.startswith(server.url) for url in live.requests)
    assert f"context={asked}&" in live.page.url


def test_errors_are_shown_in_the_live_page(browser: Browser, server: Server) -> None:
    """A machine that is not understood is said on the page, and mending it clears the message."""
    watched = Watched(browser)
    watched.page.goto(address(server, machine="RTX 4091 + 16GiB@60GB/s"))
    problem = watched.page.locator("#problem")
    expect(problem).to_contain_text("RTX 4090")
    watched.page.select_option("#ask-gpu", "RTX 4070")
    expect(problem).to_be_hidden(timeout=60_000)
    assert watched.page.input_value("#ask-machine") == "RTX 4070 + 16GiB@60GB/s"
    watched.close()


@pytest.mark.parametrize("page", ["the same", "another"])
def test_a_newer_question_of_a_page_ends_its_older_one(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who moves the slider again does not wait for the frontier of before, which is given up; that
    of another page is not.
    """
    has_begun, may_go_on = threading.Event(), threading.Event()

    def others_later(*arguments: Any, **more: Any) -> list[qp.Plan]:
        has_begun.set()
        may_go_on.wait()
        return other_plans(*arguments, **more)

    monkeypatch.setattr(page_server, "other_plans", others_later)
    planner, answers = Planner(points=3), list[Content | None]()
    asked = {**QUESTION, "wants": "frontier", "page": "the same", "number": 1}
    older = threading.Thread(
        target=lambda: answers.append(planner.answer(Question.model_validate(asked)))
    )
    older.start()
    try:
        assert has_begun.wait(300)
        newer = {**QUESTION, "context": 4096, "page": page, "number": 2}
        content = planner.answer(Question.model_validate(newer))
    finally:
        may_go_on.set()
        older.join()
    assert content is not None
    assert content.plans[0].context == 4096
    assert (answers == [None]) == (page == "the same")


def test_a_request_that_comes_late_takes_nothing_from_a_newer_one() -> None:
    """Where requests arrive in another order than they were sent in, the newer one is answered."""
    planner = Planner()
    newer, older = (
        Question.model_validate({**QUESTION, "page": "one", "number": number}) for number in (2, 1)
    )
    assert planner.answer(newer) is not None
    assert planner.answer(older) is None
