"""The HTTP face over a real store, from outside: what it answers, and what it never does."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from fastapi.testclient import TestClient

from cluster.artifact import Artifact
from cluster.storage import StorageError, Store
from pipelines.metrics import MetricsWriter
from pipelines.runs import Run, StageStatus
from pipelines.service.api import build_api
from pipelines.service.index import RunIndex
from pipelines.service.loop import Orchestrator
from pipelines.training_folder import METRICS
from tests.pipelines.reports import report
from tests.pipelines.service.fakes import RECIPE, Clock, FakeCluster

TOKEN = "a-token-of-some-length"
BODY = {"recipe": RECIPE, "until": "shards", "run_id": "r", "tags": {"user": "ana"}, "priority": 3}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def cluster(store: Store) -> FakeCluster:
    return FakeCluster(store)


@pytest.fixture
def service(store: Store, cluster: FakeCluster) -> Orchestrator:
    made = Orchestrator(store, cluster, cluster, clock=Clock())
    made.tick()
    return made


@pytest.fixture
def http(service: Orchestrator) -> Iterator[TestClient]:
    with TestClient(build_api(service), base_url="http://127.0.0.1") as client:
        client.headers["content-type"] = "application/json"
        yield client


def error(response: Any, status: int) -> str:
    """The message of an answer that is an error, in the one shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) <= {"message", "field"}
    assert "\n" not in body["error"]["message"] and "Traceback" not in response.text
    return body["error"]["message"]


def test_a_run_is_submitted_shown_stopped_resumed_and_deleted(
    http: TestClient, service: Orchestrator, cluster: FakeCluster
) -> None:
    made = http.post("/api/runs", json=BODY)
    assert made.status_code == 201
    assert {name: made.json()[name] for name in ("id", "name", "state", "priority", "tags", "until")} == {
        "id": "r",
        "name": "tiny",
        "state": "queued",
        "priority": 3,
        "tags": {"user": "ana"},
        "until": "shards",
    }
    service.tick()
    cluster.begin("r")
    service.tick()
    shown = http.get("/api/runs/r").json()
    assert (shown["state"], shown["submission"]["job_id"], shown["submission"]["needs"]) == (
        "running",
        "r",
        {"CPU": 1.0},
    )
    assert http.post("/api/runs/r/stop", json={}).json()["state"] == "stopping"
    assert "stop it first" in error(http.delete("/api/runs/r"), 409)
    assert "goes on by itself" in error(http.post("/api/runs/r/resume", json={}), 409)
    service.tick()
    cluster.end("r", "failed", "interrupted")
    cluster.set("r", "STOPPED")
    service.tick()
    assert http.get("/api/runs/r").json()["state"] == "stopped"
    assert "is stopped already" in error(http.post("/api/runs/r/stop", json={}), 409)
    assert http.post("/api/runs/r/resume", json={}).json()["state"] == "queued"
    http.post("/api/runs/r/stop", json={})
    assert http.delete("/api/runs/r").status_code == 204
    assert "no run 'r'" in error(http.get("/api/runs/r"), 404)


def test_a_recipe_may_be_text_and_its_resolved_form_is_given_back(http: TestClient) -> None:
    body = {**BODY, "recipe": yaml.safe_dump(RECIPE), "overrides": ["train.steps=7"]}
    assert http.post("/api/runs", json=body).status_code == 201
    found = http.get("/api/runs/r/recipe")
    assert yaml.safe_load(found.text)["train"]["steps"] == 7 and found.headers["content-type"] == "application/yaml"
    assert "exists already" in error(http.post("/api/runs", json=body), 409)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"recipe": None}, "recipe", "recipe"),
        ({"recipe": "name: ["}, "recipe", "not valid YAML"),
        ({"overrides": ["train.stepz=1"]}, "recipe", "train.steps"),
        ({"overrides": ["data.sources[0].uri=/etc/passwd"]}, "data.sources[0].uri", "not in the store"),
        ({"overrides": ["tokenizer.path=/etc"]}, "tokenizer.path", "not in the store"),
        ({"until": "training"}, "until", "choose one of"),
        ({"priority": 1000}, "priority", "less than or equal to 100"),
        ({"priority": "high"}, "priority", "integer"),
        ({"priority": False}, "priority", "integer"),
        ({"keep": 1}, "keep", "boolean"),
        ({"tags": {"a": 1}}, "tags.a", "string"),
        ({"run_id": "../../etc/x"}, "run_id", "malformed"),
        ({"run_id": ""}, "run_id", "malformed"),
        ({"unknown": 1}, "unknown", "Extra inputs"),
    ],
)
def test_a_bad_request_says_what_is_wrong(
    http: TestClient, store: Store, change: dict[str, Any], field: str, words: str
) -> None:
    response = http.post("/api/runs", json={**BODY, **change})
    assert words in error(response, 400)
    assert response.json()["error"]["field"].startswith(field)
    assert store.list() == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(http: TestClient, body: bytes) -> None:
    assert error(http.post("/api/runs", content=body), 400)


def test_a_list_is_filtered_sorted_and_cut(http: TestClient, service: Orchestrator) -> None:
    for number in range(5):
        tags = {"user": "ana" if number % 2 else "bo"}
        http.post("/api/runs", json={**BODY, "run_id": f"r{number}", "tags": tags, "priority": number})

    def ids(query: str) -> list[str]:
        return [run["id"] for run in http.get(f"/api/runs?{query}").json()["runs"]]

    assert ids("sort=priority") == ["r4", "r3", "r2", "r1", "r0"]
    assert ids("sort=priority&ascending=true&limit=2&offset=1") == ["r1", "r2"]
    assert ids("tag=user=ana&sort=id&ascending=true") == ["r1", "r3"]
    assert ids("state=done&state=running") == []
    assert ids("state=queued&name=r3") == ["r3"]
    assert http.get("/api/runs?limit=2").json()["total"] == 5
    for query in ("state=nothing", "limit=0", "limit=5000", "offset=-1", "sort=size", "tag=user", "since=x"):
        error(http.get(f"/api/runs?{query}"), 400)


@pytest.mark.parametrize("path", ["/api/runs?stat=queued", "/api/cluster?x", "/api/runs/r/logs?folow=true"])
def test_a_parameter_that_would_be_ignored_is_refused(http: TestClient, path: str) -> None:
    assert "unknown parameter" in error(http.get(path), 400)
    assert "there are follow" in error(http.get("/api/runs/r/logs?folow=true"), 400)


def test_logs_are_the_job_s(http: TestClient, service: Orchestrator, cluster: FakeCluster, store: Store) -> None:
    http.post("/api/runs", json=BODY)
    assert "has no log here" in error(http.get("/api/runs/r/logs"), 404)
    service.tick()
    assert http.get("/api/runs/r/logs").text == "log of r\n"
    assert http.get("/api/runs/r/logs?follow=true").text == "log of r\nand more\n"
    cluster.error = "the Jobs API failed"
    for query in ("", "?follow=true"):
        assert "Jobs API" in error(http.get(f"/api/runs/r/logs{query}"), 503)


def test_artifacts_metrics_and_files_of_a_run(http: TestClient, store: Store) -> None:
    run = Run.create(store, "name: x\n", "r")
    run.status.stages = {
        "ingest": StageStatus("done", "k1"),
        "pretrain": StageStatus("running", "k2"),
        "deploy": StageStatus("pending"),
    }
    run.save()
    attempt = Artifact(store.child("artifacts", "ingest", "k1")).begin()
    attempt.store.write_bytes("part", b"12345")
    attempt.commit({})
    writer = MetricsWriter(store.child("artifacts", "pretrain", "k2", METRICS), "w")
    for step in (1, 2, 3):
        writer.write(report(step))
    writer.flush()
    run.directory.write_bytes("plots/loss.png", b"png")

    found = http.get("/api/runs/r/artifacts").json()["artifacts"]
    assert [(each["stage"], each["key"], each["committed"], each["size"]) for each in found] == [
        ("ingest", "k1", True, 5),
        ("pretrain", "k2", False, None),
    ]
    assert found[0]["uri"] == store.child("artifacts", "ingest", "k1").uri
    curve = http.get("/api/runs/r/metrics?from_step=2&limit=1").json()
    assert [row["step"] for row in curve["rows"]] == [2] and curve["next"] == 3
    assert http.get("/api/runs/r/metrics").json()["next"] is None
    listed = {each["name"]: each["size"] for each in http.get("/api/runs/r/files").json()["files"]}
    assert listed == {name: store.size(f"runs/r/{name}") for name in ("recipe.yaml", "status.json", "plots/loss.png")}
    got = http.get("/api/runs/r/files/plots/loss.png")
    assert got.content == b"png" and got.headers["content-type"] == "image/png"
    assert got.headers["x-content-type-options"] == "nosniff"


def get_raw(app: Any, path: str) -> tuple[int, bytes]:
    """Status and body of a path that no client has tidied up."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()  # a client that stays and says nothing more
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "headers": []}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("x", 80)}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(
    "name",
    ["../s/status.json", "..%2Fs%2Fstatus.json", "%2Fetc%2Fpasswd", "/etc/passwd", ".", "..", "plots", "status.json%00"]
    + ["plots/../status.json", "./status.json", "status.json/", "%252e%252e/s/status.json", "nothing", "%00", "%ff"],
)
def test_no_path_of_a_request_reaches_the_disk(service: Orchestrator, store: Store, name: str) -> None:
    for run_id in ("r", "s"):
        Run.create(store, "name: x\n", run_id)
    store.child("runs", "r").write_bytes("plots/a", b"")
    app = build_api(service)
    assert get_raw(app, "/api/runs/r/files/plots/a") == (200, b"")
    for path in (f"r/files/{name}", name, f"{name}/recipe", f"{name}/files", f"{name}/logs", f"{name}/artifacts"):
        assert get_raw(app, f"/api/runs/{path}")[0] == 404, path


def test_a_token_is_needed_for_everything_but_the_health(service: Orchestrator, caplog: Any) -> None:
    with TestClient(build_api(service, TOKEN), base_url="http://anywhere") as http:
        assert http.get("/api/health").json() == {"service": "caravan", "ok": True}
        paths = [("GET", "/api/runs"), ("POST", "/api/runs"), ("GET", "/api/cluster"), ("GET", "/api/openapi.json")]
        paths += [("GET", "/api/runs/r"), ("DELETE", "/api/runs/r"), ("POST", "/api/health"), ("GET", "/nothing")]
        for given in (None, "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer ", "Bearer é"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            for method, path in paths:
                response = http.request(method, path, headers=headers)
                assert "token is needed" in error(response, 401)
                assert response.headers["www-authenticate"].startswith("Bearer")
        twice = [("authorization", "Bearer x"), ("authorization", f"Bearer {TOKEN}")]
        error(http.get("/api/runs", headers=twice), 401)
        known = {"authorization": f"bearer {TOKEN}"}
        assert http.get("/api/runs", headers=known).status_code == 200
        assert http.get("/api/health", headers=known).json()["store"] == service.store.uri
        assert TOKEN not in caplog.text


def test_a_web_page_cannot_ask(service: Orchestrator) -> None:
    with TestClient(build_api(service, local_only=True), base_url="http://evil.example") as http:
        assert "127.0.0.1" in error(http.get("/api/runs"), 403)
        for host in ("127.0.0.1:8", "localhost", "[::1]:80"):
            assert http.get("/api/runs", headers={"host": host}).status_code == 200
        plain = {"host": "localhost", "content-type": "text/plain"}
        for path in ("/api/runs", "/api/runs/r/stop", "/api/runs/r/resume"):
            error(http.post(path, content=b"{}", headers=plain), 415)
        preflight = {"host": "localhost", "origin": "http://evil.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in http.options("/api/runs", headers=preflight).headers


def test_a_body_has_a_limit(http: TestClient) -> None:
    assert "longer than" in error(http.post("/api/runs", json={**BODY, "recipe": "x" * (2 << 20)}), 413)
    error(http.post("/api/runs", content=iter([b"x" * (1 << 19)] * 4)), 413)


def test_a_recipe_that_unfolds_without_end_is_refused(http: TestClient) -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    bomb = "\n".join(layers)
    began = time.monotonic()
    error(http.post("/api/runs", json={**BODY, "recipe": bomb}), 400)
    error(http.post("/api/runs", json={**BODY, "recipe": "[" * 5000}), 400)
    assert time.monotonic() - began < 10


def test_unknown_paths_and_methods_have_the_same_shape(http: TestClient) -> None:
    error(http.get("/"), 404)
    error(http.get("/api/nothing"), 404)
    for method in ("TRACE", "PUT", "PATCH"):
        assert error(http.request(method, "/api/runs", headers={"content-type": ""}), 405)
    for path, methods in (("/api/runs", "GET, POST"), ("/api/runs/r", "DELETE, GET"), ("/api/runs/r/stop", "POST")):
        refused = http.put(path)
        assert "does not take that method" in error(refused, 405) and refused.headers["allow"] == methods
    assert set(http.get("/api/openapi.json").json()["paths"]) >= {"/api/runs", "/api/runs/{run_id}/logs"}


def test_a_store_that_fails_is_503_and_the_list_is_answered_all_the_same(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.post("/api/runs", json=BODY)

    def fail(*_: object, **__: object) -> None:
        raise StorageError("the store cannot be reached")

    for name in ("read_bytes", "exists", "write_bytes"):
        monkeypatch.setattr(Store, name, fail)
    response = http.get("/api/runs/r")
    assert "cannot be reached" in error(response, 503) and response.headers["retry-after"] == "5"
    error(http.post("/api/runs", json={**BODY, "run_id": "s"}), 503)
    error(http.post("/api/runs/r/stop", json={}), 503)
    assert [run["id"] for run in http.get("/api/runs").json()["runs"]] == ["r"]


def test_a_store_that_hangs_lets_callers_go(service: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(RunIndex, "refresh", lambda self: None)
    with TestClient(build_api(service, answer_seconds=0.3), base_url="http://x") as http:
        monkeypatch.setattr(Store, "exists", lambda *_: hang.wait(20))
        try:
            began = time.monotonic()
            assert "does not answer" in error(http.get("/api/runs/r"), 503)
            assert http.get("/api/runs").json() == {"runs": [], "total": 0}
            assert http.get("/api/health").json()["service"] == "caravan"
            assert http.get("/api/cluster").status_code == 200
            assert time.monotonic() - began < 10
        finally:
            hang.set()


def test_a_defect_is_500_without_a_word_of_it(service: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "rows", lambda: 1 / 0)
    with TestClient(build_api(service), base_url="http://x", raise_server_exceptions=False) as http:
        assert "division" not in error(http.get("/api/runs"), 500)
