"""The operator's routes, with several ingress processes that are objects here."""

from dataclasses import replace

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from cluster.serve.api_error import ApiError
from cluster.serve.observer import Observer
from cluster.serve.observing import Observing
from cluster.serve.siblings import Sibling
from cluster.serve.state import RoutingState
from tests.cluster.serve.test_metrics import _samples, _value
from tests.cluster.serve.test_record import _answered


class _Ingress(Sibling):
    def __init__(self, observer: Observer) -> None:
        self._observer = observer


class _Siblings:
    """The processes behind Serve's broadcast; of a frozen one nobody hears."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers
        self.frozen = False

    async def ask(self, method: str, *args):
        if self.frozen:
            raise TimeoutError
        return [await getattr(_Ingress(observer), method)(*args) for observer in self.observers]


@pytest.fixture
def siblings() -> _Siblings:
    observers = [Observer(RoutingState(), model="m", ingress=name) for name in ("one", "two")]
    for number, (observer, name) in enumerate(zip(observers * 2, ("a", "b-0", "b-1", "c"), strict=True)):
        record = replace(_answered(), request_id=name, arrived_at=100.0 * number)
        observer.records.add(record)
        observer.metrics.record(record)
    return _Siblings(*observers)


@pytest.fixture
def client(siblings) -> TestClient:
    api = FastAPI()
    observing = Observing(siblings.observers[0], siblings, RoutingState())
    observing.add_routes(api)
    api.add_exception_handler(ApiError, lambda _, error: JSONResponse(error.body(), error.status))
    return TestClient(api)


def _names(response) -> list[str]:
    assert response.status_code == 200
    return [record["request_id"] for record in response.json()["requests"]]


def test_a_request_is_found_whichever_process_served_it_and_however_it_is_named(client):
    assert _names(client.get("/caravan/requests/a")) == ["a"]
    assert _names(client.get("/caravan/requests/cmpl-c")) == ["c"]
    assert _names(client.get("/caravan/requests/chatcmpl-c")) == ["c"]
    # Its prompts were two requests, and these may be in any process.
    assert _names(client.get("/caravan/requests/cmpl-b")) == ["b-1", "b-0"]
    missing = client.get("/caravan/requests/d")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "request_not_found"


def test_the_newest_of_all_processes_come_first(client):
    assert _names(client.get("/caravan/requests")) == ["c", "b-1", "b-0", "a"]
    assert _names(client.get("/caravan/requests?limit=2")) == ["c", "b-1"]
    for limit in ("0", "1001", "-1", "x", "", "2.5", "²"):
        refused = client.get("/caravan/requests", params={"limit": limit})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit"), limit


def test_metrics_are_those_of_all_processes_and_of_one_when_another_is_frozen(client, siblings):
    samples = _samples(client.get("/metrics").content)
    assert _value(samples, "caravan_requests_total") == 4
    assert _value(samples, "caravan_requests_total", ingress="two") == 2
    siblings.frozen = True
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert _value(_samples(answer.content), "caravan_requests_total") == 2
    lost = client.get("/caravan/requests")
    assert (lost.status_code, lost.json()["error"]["code"]) == (503, "ingress_lost")
