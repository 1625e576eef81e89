"""The published description against what the service answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.metrics import MetricsWriter
from pipelines.pretrain import METRICS
from pipelines.runs import Run, StageStatus
from pipelines.service.api import build_api
from pipelines.service.loop import Orchestrator
from tests.pipelines.reports import report
from tests.pipelines.service.fakes import RECIPE, FakeCluster

TOKEN = "a-token-of-some-length"


@pytest.fixture
def service(tmp_path: Path) -> Orchestrator:
    store = Store(tmp_path / "store")
    cluster = FakeCluster(store)
    service = Orchestrator(store, cluster, cluster)
    service.tick()
    return service


@pytest.fixture
def http(service: Orchestrator) -> Iterator[TestClient]:
    with TestClient(build_api(service, TOKEN), base_url="http://127.0.0.1") as client:
        client.headers |= {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
        yield client


@pytest.fixture
def published(http: TestClient) -> dict[str, Any]:
    return http.get("/api/openapi.json").json()


def check(published: dict[str, Any], operation: dict[str, Any], response: Any) -> Any:
    """That the answer is one of those described, every part of it; returns it."""
    described = operation["responses"][str(response.status_code)]
    (schema,) = (content["schema"] for content in described["content"].values())
    body = response.json()
    # `additionalProperties` is left open for clients, not for what is described here
    closed = {
        name: {"additionalProperties": False, **part} for name, part in published["components"]["schemas"].items()
    }
    jsonschema.Draft202012Validator({**schema, "components": {"schemas": closed}}).validate(body)
    return body


def test_every_answer_is_as_described(http: TestClient, service: Orchestrator, published: dict[str, Any]) -> None:
    run = Run.create(service.store, "name: x\n", "r")
    run.status.stages = {"ingest": StageStatus("done", "k1"), "pretrain": StageStatus("running", "k2")}
    run.save()
    attempt = Artifact(service.store.child("artifacts", "ingest", "k1")).begin()
    attempt.store.write_bytes("part", b"12345")
    attempt.commit({})
    writer = MetricsWriter(service.store.child("artifacts", "pretrain", "k2", METRICS), "w")
    writer.write(report(1))
    writer.flush()
    service.load()
    paths = published["paths"]
    made = http.post("/api/runs", json={"recipe": RECIPE, "run_id": "s", "tags": {"user": "ana"}})
    check(published, paths["/api/runs"]["post"], made)
    for path in ("/api/runs", "/api/cluster", "/api/health"):
        body = check(published, paths[path]["get"], http.get(path))
        assert path != "/api/runs" or body["total"] == 2
    for path in ("", "/artifacts", "/metrics", "/files"):
        operation = paths["/api/runs/{run_id}" + path]["get"]
        for run_id in ("r", "s"):
            assert check(published, operation, http.get(f"/api/runs/{run_id}{path}"))
        check(published, operation, http.get(f"/api/runs/none{path}"))
        check(published, operation, http.get(f"/api/runs/r{path}", headers={"authorization": "Bearer wrong"}))
    assert http.get("/api/runs/r/artifacts").json()["artifacts"][0]["created"].startswith("20")
    for path, status in (("stop", 200), ("stop", 409), ("resume", 200)):
        answer = http.post(f"/api/runs/s/{path}", json={})
        assert answer.status_code == status
        check(published, paths["/api/runs/{run_id}/" + path]["post"], answer)
    check(published, paths["/api/runs"]["post"], http.post("/api/runs", json={"recipe": 3}))
    check(published, paths["/api/runs"]["post"], http.post("/api/runs", content="{}", headers={"content-type": "a/b"}))


def test_every_operation_says_how_it_is_refused(published: dict[str, Any]) -> None:
    for path, operations in published["paths"].items():
        for method, operation in operations.items():
            statuses = {int(status) for status in operation["responses"]}
            assert {400, 401, 403, 408, 413, 500} <= statuses and 422 not in statuses
            assert (415 in statuses) == (method == "post")
            assert (404 in statuses) == ("{run_id}" in path)
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "run_id":
                    assert parameter["schema"]["pattern"] == "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def test_who_needs_a_token_is_said(service: Orchestrator, published: dict[str, Any]) -> None:
    assert published["security"] == [{"token": []}]
    assert published["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
    assert published["paths"]["/api/health"]["get"]["security"] == [{}, {"token": []}]
    with TestClient(build_api(service), base_url="http://127.0.0.1") as http:
        assert "security" not in http.get("/api/openapi.json").json()
