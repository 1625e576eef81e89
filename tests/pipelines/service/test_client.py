"""The client against the service's own application, without a socket in between, and against what is no service."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from cluster import head
from cluster.storage import Store
from pipelines.service import client as clients
from pipelines.service.api import build_api
from pipelines.service.client import ServiceClient, ServiceRefused, ServiceUnavailable, find_service
from pipelines.service.loop import Orchestrator
from tests.pipelines.service.fakes import RECIPE, FakeCluster, client_of

TOKEN = "a-token-of-some-length"


@pytest.fixture
def service(tmp_path: Path) -> Orchestrator:
    store = Store(tmp_path / "store")
    cluster = FakeCluster(store)
    made = Orchestrator(store, cluster, cluster)
    made.tick()
    return made


@pytest.fixture
def client(service: Orchestrator) -> Iterator[ServiceClient]:
    with TestClient(build_api(service, TOKEN)) as inner:
        made = client_of(inner, TOKEN)
        yield made
        made.close()


def test_everything_that_the_commands_ask(client: ServiceClient, service: Orchestrator) -> None:
    assert client.health()["store"] == service.store.uri
    body = {"recipe": RECIPE, "run_id": "r", "until": "shards", "tags": {"user": "ana"}}
    assert client.submit(body)["state"] == "queued"
    service.tick()
    assert client.run("r")["state"] == "starting"
    assert "".join(client.logs("r")) == "log of r\n"
    assert "".join(client.logs("r", follow=True)) == "log of r\nand more\n"
    found = client.runs({"tag": ["user=ana"], "state": ["starting", "done"], "since": None, "limit": 5})
    assert [run["id"] for run in found["runs"]] == ["r"]
    assert client.stop("r")["state"] == "stopping"
    assert client.await_state("r", frozenset(("stopped",)), 0.0)["state"] == "stopping"
    for refused in (client.resume, client.delete):
        with pytest.raises(ServiceRefused, match="'r' is stopping") as caught:
            refused("r")
        assert caught.value.status == 409


@pytest.mark.parametrize("run_id", ["../health", "a/b", "a b", "?x", "..", "é"])
def test_an_id_stays_one_part_of_the_path(client: ServiceClient, run_id: str) -> None:
    for call in (client.run, client.stop, client.delete, lambda run_id: list(client.logs(run_id))):
        with pytest.raises(ServiceRefused) as caught:
            call(run_id)
        assert caught.value.status in (404, 405)


def test_what_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_COMING_BACK_SECONDS", 0.6)
    client = ServiceClient("http://127.0.0.1:1")
    for call in (client.health, lambda: client.run("r"), lambda: list(client.logs("r"))):
        with pytest.raises(ServiceUnavailable, match="the service at http://127.0.0.1:1 does not answer"):
            call()
    client.close()


def test_a_service_that_is_coming_back_is_waited_for() -> None:
    tries = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(request.url.path)
        if len(tries) < 3:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"service": "caravan"})

    client = ServiceClient("http://x", transport=httpx.MockTransport(answer))
    assert client.health() == {"service": "caravan"} and len(tries) == 3


def test_a_request_that_may_have_been_taken_is_not_sent_twice() -> None:
    tries = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(request.url.path)
        raise httpx.ReadTimeout("no answer")

    client = ServiceClient("http://x", transport=httpx.MockTransport(answer))
    with pytest.raises(ServiceUnavailable):
        client.submit({})
    assert len(tries) == 1


@pytest.mark.parametrize("response", [httpx.Response(200, text="hello"), httpx.Response(500, text="oh")])
def test_what_is_no_service_says_so(response: httpx.Response) -> None:
    client = ServiceClient("http://x", transport=httpx.MockTransport(lambda request: response))
    with pytest.raises((ServiceUnavailable, ServiceRefused)):
        client.health()


def test_the_recorded_service_is_asked_unless_another_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", clients.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)
    record = head.ClusterRecord(1, 1.0, "127.0.0.1:2", "http://127.0.0.1:3", "http://127.0.0.1:4")
    monkeypatch.setattr(clients, "recorded", lambda: record)
    found = find_service(None)
    assert found is not None and found.url == "http://127.0.0.1:4"
    assert find_service("127.0.0.1:2") is None and find_service("auto") is None
    assert find_service("http://127.0.0.1:1") is None, "nothing answers there as the service would"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert find_service(None) is None
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(clients, "recorded", lambda: None)
    assert find_service(None) is None
