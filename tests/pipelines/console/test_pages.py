"""The console over a real store, from outside: who gets in, and what the pages say. The pages' life, which is a
browser's, is shown by tests/evidence/console.py."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from cluster.storage import StorageError, Store
from pipelines.console import endpoint_page, new_page, run_page, runs_page
from pipelines.console.desk import Curve, Desk, told, told_until_over
from pipelines.console.endpoint import Endpoints
from pipelines.console.mount import mount
from pipelines.metrics import MetricsWriter
from pipelines.runs import Run, StageStatus
from pipelines.serve_status import ReplicaView
from pipelines.service.answers import ArtifactRow
from pipelines.service.api import build_api
from pipelines.service.errors import RequestRefused
from pipelines.service.intake import RunRequest
from pipelines.service.known import RunRow
from pipelines.service.loop import Orchestrator
from pipelines.service.passes import COOKIE
from pipelines.service.submission import STATES
from pipelines.training_folder import METRICS
from tests.pipelines.reports import report
from tests.pipelines.service.fakes import RECIPE, Clock, FakeCluster

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # NiceGUI looks at every object there is

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Orchestrator:
    store = Store(tmp_path_factory.mktemp("console") / "store")
    cluster = FakeCluster(store)
    made = Orchestrator(store, cluster, cluster, clock=Clock())
    made.tick()
    made.submit(RunRequest(RECIPE, run_id="r", tags={"user": "<b>ana</b>"}))
    return made


@pytest.fixture(scope="module")
def http(service: Orchestrator) -> Iterator[TestClient]:
    """A browser that has not entered yet; a process has one console."""
    api = build_api(service, TOKEN, local_only=True)
    mount(api, service, "http://127.0.0.1:1", TOKEN)
    with TestClient(api, base_url="http://127.0.0.1", follow_redirects=False) as client:
        yield client


@pytest.fixture
def entered(http: TestClient) -> Iterator[TestClient]:
    answer = http.post("/console/login", data={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/")
    http.cookies.set(COOKIE, answer.cookies[COOKIE])
    yield http
    http.cookies.clear()


def test_the_token_is_asked_for_and_never_shown(http: TestClient) -> None:
    assert http.get("/console/").headers["location"] == "/console/login"
    asked = http.get("/console/login")
    assert asked.status_code == 200 and "password" in asked.text and "<script" not in asked.text
    for wrong in ("", "not-the-token", TOKEN[:-1], f"{TOKEN}x", "<script>alert(1)</script>"):
        refused = http.post("/console/login", data={"token": wrong})
        assert refused.status_code == 401 and "not the token" in refused.text and "set-cookie" not in refused.headers
        assert not wrong or wrong not in refused.text


@pytest.mark.parametrize("form", [b"&".join([b"a=1"] * 9), b"token", b"token=%ff%fe", b"\xff\x00", b""])
def test_what_is_no_such_form_is_a_wrong_token(http: TestClient, form: bytes) -> None:
    assert http.post("/console/login", content=form).status_code == 401


def test_the_cookie_stays_on_https_where_the_browser_came_by_it(http: TestClient) -> None:
    def made(origin: str) -> str:
        headers = {"origin": origin, "host": "127.0.0.1"}
        return http.post("/console/login", data={"token": TOKEN}, headers=headers).headers["set-cookie"].lower()

    assert "secure" in made("https://127.0.0.1") and "secure" not in made("http://127.0.0.1")
    http.cookies.clear()


def test_the_cookie_is_kept_from_scripts_and_from_other_sites(http: TestClient) -> None:
    made = http.post("/console/login", data={"token": TOKEN}).headers["set-cookie"].lower()
    http.cookies.clear()
    assert "httponly" in made and "samesite=strict" in made and "path=/console" in made and TOKEN not in made


@pytest.mark.parametrize(
    "path", ["/console/", "/console/runs/r", "/console/runs/none", "/console/new", "/console/endpoint"]
)
def test_a_page_fetches_nothing_from_elsewhere(entered: TestClient, path: str) -> None:
    page = entered.get(path)
    assert page.status_code == 200
    assert "http://" not in page.text.replace("http://www.w3.org/", "") and "https://" not in page.text


def test_a_file_of_a_run_is_shown_and_none_else(entered: TestClient, service: Orchestrator) -> None:
    shown = entered.get("/console/files/r/recipe.yaml")
    assert (shown.status_code, "name: tiny" in shown.text) == (200, True)
    assert shown.headers.get_list("content-security-policy") == ["sandbox", "frame-ancestors 'none'"]
    for name in ("none", "%2e%2e%2fr%2frecipe.yaml", "sub/../recipe.yaml%00", "/etc/passwd"):
        assert entered.get(f"/console/files/r/{name}").status_code == 404
    assert entered.get("/console/files/none/recipe.yaml").status_code == 404


def test_the_api_stays_as_it_is(entered: TestClient) -> None:
    assert entered.get("/api/runs").status_code == 401
    there = entered.get("/api/nothing", headers={"authorization": f"Bearer {TOKEN}"})
    assert (there.status_code, there.json()) == (404, {"error": {"message": "there is nothing here"}})


# -- what stands in the tables


def row(**changed: object) -> RunRow:
    return RunRow(**{"id": "r", "name": "tiny", "state": "running", "created": 100.0, **changed})  # type: ignore[arg-type]


def test_a_run_in_the_list() -> None:
    shown = runs_page.cells(row(started=130.0, stage="pretrain", priority=2, tags={"user": "ana"}), now=190.0)
    assert shown == {
        "id": "r", "run": "r", "name": "tiny", "state": "running", "color": "primary", "created": "90 s ago",
        "took": "60 s", "priority": 2, "about": "at pretrain · user=ana",
    }  # fmt: skip
    assert runs_page.cells(row(state="queued", waits_for="waits for 2 CPUs"))["about"] == "waits for 2 CPUs"
    assert runs_page.cells(row(state="failed", error="it broke", stage="x"))["about"] == "it broke"
    assert all(runs_page.cells(row(state=state))["color"] for state in STATES)


def test_the_cluster_in_one_line() -> None:
    cluster = {
        "capacity": {"CPU": 4.0, "GPU": 0.0},
        "others": {"CPU": 1.0},
        "running": {"a": {"CPU": 1.0}, "b": {"CPU": 1.5}},
        "waiting": {"c": {}},
    }
    assert runs_page.in_one_line(cluster) == "CPU: 2.5 of 4 taken by runs, 1 by others; 1 waiting"
    assert "not been looked at" in runs_page.in_one_line({"capacity": {}, "others": {}, "running": {}, "waiting": {}})


def test_a_run_s_head_and_its_stages() -> None:
    ended = row(state="failed", started=110.0, ended=140.0, error="pretrain: it broke", tags={"user": "ana"})
    assert run_page.about(ended, now=200.0) == "tiny · created 2 min ago · took 30 s · user=ana\npretrain: it broke"
    stage = StageStatus("running", "k", started=100.0, progress="step 3/10")
    assert run_page.stage_cells("pretrain", stage, now=105.0) == {
        "stage": "pretrain", "state": "running", "color": "primary", "time": "5 s", "says": "step 3/10",
    }  # fmt: skip


def test_an_artifact() -> None:
    found = ArtifactRow("shards", "k", "file:///s", True, 3 * 2**20, "2026-01-31T12:00:00.5+00:00")
    assert run_page.artifact_cells(found) == {
        "stage": "shards", "state": "committed", "size": "3.1 MB", "made, UTC": "2026-01-31 12:00:00",
        "where": "file:///s",
    }  # fmt: skip


def test_a_replica_of_which_nothing_is_known_has_dashes() -> None:
    shown = endpoint_page.cells(ReplicaView("a", "STARTING", None, None))
    assert (shown["state"], shown["kv"], shown["hits"], shown["weights"]) == ("STARTING", "–", "–", "–")
    known = ReplicaView(
        "a", "RUNNING", 1, "n", fresh=False, running=3, kv_used=0.255, hit_rate=0.5, tokens_per_s=1234.5
    )
    shown = endpoint_page.cells(known)
    assert (shown["state"], shown["running"], shown["kv"], shown["hits"], shown["speed"]) == (
        "RUNNING, stale", "3", "26%", "50%", "1,234",
    )  # fmt: skip


# -- the form


FORM = {"overrides": "", "until": "", "from_stage": "", "force": "", "tags": "", "priority": "0"}


def test_the_form_is_a_request() -> None:
    values = FORM | {
        "overrides": "a.b=1  c=2",
        "until": " export ",
        "force": "ingest",
        "tags": "user=ana",
        "priority": "-3",
    }
    asked = new_page.request("name: x", values, "r", keep=True)
    assert (asked.overrides, asked.until, asked.from_stage, asked.force) == (
        ["a.b=1", "c=2"],
        "export",
        None,
        ["ingest"],
    )
    assert (asked.tags, asked.priority, asked.keep, asked.recipe) == ({"user": "ana"}, -3, True, "name: x")
    assert asked.run_id == "r"


@pytest.mark.parametrize(("field", "value", "named"), [("priority", "high", "priority"), ("tags", "ana", "tag")])
def test_what_the_form_cannot_be_is_refused(field: str, value: str, named: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        new_page.request("name: x", FORM | {field: value}, "r", keep=False)
    assert refused.value.field == named


def test_the_recipes_to_begin_with_are_the_project_s() -> None:
    assert {"quickstart.yaml", "sft.yaml"} <= set(new_page.examples())


# -- what goes wrong


def test_a_failure_is_told_in_one_line_and_a_defect_without_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    prompt = " ".join(["what", "nobody", "reads"])
    with told(lines.append):
        raise StorageError("the store is away\nand more")
    with told(lines.append):
        raise TypeError(prompt)
    assert lines == ["the store is away", "the console failed on this; the service's log says where"]
    assert "TypeError" in caplog.text and "test_pages.py" in caplog.text and prompt not in caplog.text


def test_what_fails_is_told_until_it_works_again_and_is_not_unsaid_while_it_is_tried() -> None:
    lines: list[str] = []
    for fails in (True, True, False):
        with told_until_over(lines.append):
            if fails:
                raise StorageError("the store is away")
    assert lines == ["the store is away", "the store is away", ""]


def test_a_store_that_hangs_leaves_the_endpoint_to_be_seen(service: Orchestrator) -> None:
    hangs, seen = threading.Event(), object()
    desk = Desk(service, SimpleNamespace(look=lambda key, before: seen))  # type: ignore[arg-type]

    async def scenario() -> object:
        asked = [asyncio.ensure_future(desk.ask(hangs.wait, 20)) for _ in range(100)]
        await asyncio.sleep(0)
        found = await asyncio.wait_for(desk.look(None, None), 10)  # type: ignore[arg-type]
        assert not any(each.done() for each in asked)
        hangs.set()
        await asyncio.gather(*asked)
        return found

    try:
        assert asyncio.run(scenario()) is seen
    finally:
        hangs.set()
        desk.close()


def test_the_runs_are_gone_through_once_for_all_pages(service: Orchestrator) -> None:
    desk = Desk(service, Endpoints("http://127.0.0.1:1"))
    first = desk.rows()
    assert [row.id for row in first] == ["r"] and desk.rows() is first
    desk.close()


# -- the log


def test_a_log_s_lines_are_whole_and_what_was_printed_over_is_not_among_them() -> None:
    text = "one\r\n10%\r50%\r100%\r\n\ntwo\nthr"
    for cut in range(len(text)):
        first, rest = run_page.lines_of("", text[:cut])
        second, rest = run_page.lines_of(rest, text[cut:])
        assert ([*first, *second], rest) == (["one", "100%", "", "two"], "thr")


def test_a_line_without_an_end_is_kept_short() -> None:
    rest = ""
    for piece in ["x" * 1000] * 5 + ["\r" + "y" * 5000]:
        lines, rest = run_page.lines_of(rest, piece)
        assert not lines and len(rest) <= run_page.LINE_CHARACTERS
    assert run_page.lines_of(rest, "z\n") == (["y" * run_page.LINE_CHARACTERS], "")


# -- the curve


def test_a_curve_says_when_it_has_grown(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = Run.create(store, "name: x", "r")
    curve = Curve(store, "r")
    assert curve.poll() is None
    run.status.stages["pretrain"] = StageStatus("running", "k")
    run.save()
    writer = MetricsWriter(store.child("artifacts", "pretrain", "k", METRICS), "w")
    writer.write(report(1))
    first = curve.poll()
    assert first is not None and [row["step"] for row in first] == [1]
    assert curve.poll() is None
