"""The checks of the store and of Ray, against a folder, a server that says what Ray's dashboard says, and files."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster import session
from cluster.head import ClusterRecord
from cluster.storage import StorageError, Store
from pipelines import doctor_cluster
from tests.swift import Swift


@contextmanager
def dashboard(answers: dict[str, tuple[int, object]], host: str = "127.0.0.1") -> Iterator[str]:
    """A server that listens on `host`; `answers` by path. Whatever else is asked is 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, value = answers.get(self.path, (404, None))
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def by_name(findings) -> dict[str, tuple[str, str]]:
    found = list(findings)
    assert all(bool(each.remedy) == (each.state != "ok") for each in found), found
    return {each.name: (each.state, each.found) for each in found}


OURS = (200, {"ray_version": version("ray")})


def test_a_store_that_works_is_timed_and_left_as_it_was(tmp_path: Path) -> None:
    found = by_name(doctor_cluster.round_trip(Store(tmp_path)))
    assert found["store"][0] == found["clock"][0] == "ok" and "write" in found["store"][1]
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_store_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(method: str, value: object) -> tuple[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(Store, method, lambda self, *arguments, **options: value)
            return by_name(doctor_cluster.round_trip(Store(tmp_path)))["store"]

    assert broken("read_bytes", b"other")[0] == "fail"
    assert broken("sizes", {})[0] == "warn"
    assert "deleted" in broken("delete", None)[1]

    def refuse(self: Store, *arguments: object, **options: object) -> None:
        raise StorageError("s3://bucket: cannot write 'probe': access denied; check the keys")

    monkeypatch.setattr(Store, "write_bytes", refuse)
    assert by_name(doctor_cluster.round_trip(Store(tmp_path)))["store"][0] == "fail"


@pytest.mark.integration
def test_a_store_of_s3_and_keys_that_are_wrong(swift: Swift, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = swift.uri(swift.make_bucket(), "prefix")
    found = by_name(doctor_cluster.round_trip(Store(uri)))
    assert found["store"][0] != "fail" and found["clock"][0] == "ok", found
    assert Store(uri).list() == []
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    state, told = by_name(doctor_cluster.round_trip(Store(uri)))["store"]
    assert state == "fail" and "wrong" not in told


def test_a_clock_that_is_off() -> None:
    now = time.time()
    assert doctor_cluster.clock(now, now - 1, now + 1).state == "ok"
    assert doctor_cluster.clock(now + 900, now - 1, now + 1).state == "fail"
    assert doctor_cluster.clock(now - 900, now - 1, now + 1).state == "fail"


def test_the_token_and_who_may_read_it(tmp_path: Path) -> None:
    def look(environment: dict[str, str], file: Path = tmp_path / "none") -> tuple[str, str]:
        return by_name(doctor_cluster.token(environment, file))["token"]

    secret = tmp_path / "auth_token"
    secret.write_text("very-secret")
    secret.chmod(0o644)
    assert look({"RAY_AUTH_MODE": "token"}, secret)[0] == "fail"
    secret.chmod(0o600)
    assert look({"RAY_AUTH_MODE": "token"}, secret)[0] == "ok"
    assert look({}, secret)[0] == "warn", "Ray turns authentication on by itself"
    assert look({"RAY_AUTH_MODE": "disabled"}, secret)[0] == "ok"
    assert look({"RAY_AUTH_MODE": "token"})[0] == "fail"
    state, told = look({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "very-secret"})
    assert state == "ok" and "very-secret" not in told
    assert look({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret)})[0] == "ok"


def test_an_open_dashboard_is_a_failure_but_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard({"/api/version": OURS, "/api/jobs/": (200, [])}) as url:
        found = by_name(doctor_cluster.dashboard(url))
        assert found["ray"][0] == found["dashboard"][0] == "ok"
        monkeypatch.setattr(session, "is_loopback", lambda address: False)  # as seen from another machine
        state, told = by_name(doctor_cluster.dashboard(url))["dashboard"]
        assert state == "fail" and "no token is asked" in told


def test_one_that_listens_on_every_interface_is_seen_from_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe(socket.socket):
        """As on a machine whose own address is 127.0.0.2, which leaves it."""

        def connect(self, address: tuple[str, int]) -> None:
            super().connect(address if self.type == socket.SOCK_STREAM else ("127.0.0.1", 9))

        def getsockname(self) -> tuple[str, int]:
            return ("127.0.0.2", 1) if self.type == socket.SOCK_DGRAM else super().getsockname()

    real = session.is_loopback
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(session, "is_loopback", lambda address: real(address) and "127.0.0.2" not in address)
    answers = {"/api/version": OURS, "/api/jobs/": (200, [])}
    with dashboard(answers) as url:
        assert by_name(doctor_cluster.dashboard(url))["dashboard"][0] == "ok"
    with dashboard(answers, host="0.0.0.0") as url:
        state, told = by_name(doctor_cluster.dashboard(url))["dashboard"]
        assert state == "fail" and "127.0.0.2:" in told


def test_a_dashboard_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_loopback", lambda address: False)
    with dashboard({"/api/version": OURS, "/api/jobs/": (401, None)}) as url:
        assert by_name(doctor_cluster.dashboard(url))["dashboard"] == ("ok", "its Jobs API asks for a token")
    with dashboard({"/api/version": (403, None), "/api/jobs/": (401, None)}) as url:
        state, told = by_name(doctor_cluster.dashboard(url))["ray"]
        assert state == "fail" and "refuses us (403)" in told


def test_another_version_and_something_else_altogether() -> None:
    with dashboard({"/api/version": (200, {"ray_version": "2.9.0"})}) as url:
        state, told = by_name(doctor_cluster.dashboard(url))["ray"]
        assert state == "fail" and "2.9.0" in told and version("ray") in told
    with dashboard({}) as url:
        assert "no Ray dashboard" in by_name(doctor_cluster.dashboard(url))["ray"][1]
    assert "no dashboard answers" in by_name(doctor_cluster.dashboard(url))["ray"][1]  # it is gone now


def test_a_head_that_has_ended_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert set(by_name(doctor_cluster.cluster(None))) == {"ray"}
    gone = ClusterRecord(os.getpid(), 1.0, "127.0.0.1:1", "http://127.0.0.1:1")  # another start: another process
    Store(tmp_path).write_json("cluster.json", gone.__dict__)
    found = by_name(doctor_cluster.cluster(None))
    assert found["cluster"][0] == "fail" and "127.0.0.1:1" in found["cluster"][1] and found["ray"][0] == "ok"
    assert by_name(doctor_cluster.cluster("127.0.0.1:1"))["ray"][0] == "fail"
