"""Serve's REST interface, spoken by a server that says what a test wants it to, or nothing."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.serve import rest
from cluster.serve.errors import DeployFailed, ServeError
from cluster.serve.rest import ServeClient

VERSION = json.dumps({"ray_version": "2.60.0"})


class Dashboard(ThreadingHTTPServer):
    """Answers every request but that for its version with `status` and `text`; hangs when there is no `status`."""

    status: int | None = 200
    text = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ends = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def _answer(self) -> None:
        is_version = self.path.endswith("version")
        status = 200 if is_version else self.server.status
        if status is None:
            self.server.ends.wait()
            return
        body = (VERSION if is_version else self.server.text).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    server = Dashboard()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.ends.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(dashboard: Dashboard) -> ServeClient:
    return ServeClient(f"http://127.0.0.1:{dashboard.server_port}")


CALLS: list[tuple[Callable[[ServeClient], object], type[ServeError], str]] = [
    (lambda client: client.details(), ServeError, "Serve does not answer"),
    (lambda client: client.declare({}, {}), DeployFailed, "Serve refuses the application"),
    (lambda client: client.scale("a", "b", 2), DeployFailed, "Serve refuses to scale a to 2 replicas"),
    (lambda client: client.remove_all(), ServeError, "Serve does not end"),
]


@pytest.mark.parametrize(("call", "error", "what"), CALLS)
def test_an_answer_that_says_no_is_one_line(client, dashboard, call, error, what):
    dashboard.status, dashboard.text = 500, 'Traceback:\n  File "x"\nValueError: too many\n more of it'
    with pytest.raises(error) as refused:
        call(client)
    assert type(refused.value) is error and str(refused.value) == f"{what}: ValueError: too many"


@pytest.mark.parametrize("call", [call for call, _, _ in CALLS])
def test_a_dashboard_that_hangs_is_not_waited_for_long(client, dashboard, call, monkeypatch):
    monkeypatch.setattr(rest, "ANSWER_S", 0.1)
    dashboard.status = None
    with pytest.raises(ServeError, match="the Ray dashboard does not answer: .*timed out.*; see that it runs") as error:
        call(client)
    assert type(error.value) is ServeError


@pytest.mark.parametrize("call", [call for call, _, _ in CALLS])
def test_a_dashboard_that_has_gone_is_one_line(dashboard, client, call):
    port = dashboard.server_port
    dashboard.shutdown()
    dashboard.server_close()
    with pytest.raises(ServeError, match=f"the Ray dashboard does not answer: .*{port}.*; see that it runs") as error:
        call(client)
    assert type(error.value) is ServeError
