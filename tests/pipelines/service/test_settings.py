import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store
from pipelines.service.actor import choose_port
from pipelines.service.settings import ServiceSettings
from pipelines.webhook import SIGNATURE, Event, WebhookError, verify
from tests.conftest import find_free_port


def test_what_an_operator_sets_is_what_the_parts_get(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    given = {
        "store": str(tmp_path),
        "token_file": str(token),
        "allow": ["/data"],
        "modules": ["m"],
        "caps": {"user": 2},
    }
    settings = ServiceSettings.model_validate({**given, "ageing_seconds": 5})
    assert (settings.queue().caps, settings.queue().ageing_seconds) == ({"user": 2}, 5)
    recipes = settings.recipes()
    assert (recipes.store, recipes.prefixes, recipes.modules) == (Store(tmp_path).uri, ("/data",), ("m",))
    assert settings.token() == "0123456789abcdef"
    assert ServiceSettings(store=str(tmp_path)).token() is None


@pytest.mark.parametrize(
    "change",
    [
        {"store": ""},
        {"store": "ftp://x"},
        {"store": "s3://key:word@bucket/x"},
        {"allow": ["s3:/bucket"]},
        {"allow": ["s3://key:word@bucket"]},
        {"caps": {"user": 0}},
        {"ageing_seconds": 0},
        {"unknown": 1},
        {"webhooks": ["https://example.org/word"]},
        {"webhook_secret_file": "/x"},
        {"webhook_allow": ["10.0.0.0/8"]},
        {"webhook_loopback_http": True},
        {"webhooks": ["http://127.0.0.1/word"], "webhook_secret_file": "/x"},
        {"webhooks": ["https://key:word@example.org"], "webhook_secret_file": "/x"},
        {"webhooks": ["https://example.org/word"], "webhook_secret_file": "/x", "webhook_allow": ["10.0.0.1/8"]},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        ServiceSettings.model_validate({"store": "/x", **change})
    assert "carries credentials" in str(caught.value) or "word" not in str(caught.value)


def test_who_is_told_is_what_an_operator_sets(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("only-for-this-test")
    secret.chmod(0o600)
    received: list[tuple[str, bytes]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.headers[SIGNATURE], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    serving = threading.Thread(target=server.serve_forever, args=(0.05,))
    serving.start()
    url = f"http://127.0.0.1:{server.server_port}/a-secret-path"
    try:
        settings = ServiceSettings(
            store=str(tmp_path), webhooks=(url,), webhook_secret_file=str(secret), webhook_loopback_http=True
        )
        assert "a-secret-path" not in repr(settings)
        settings.check_files()
        hooks = settings.told()
        hooks.send(event := Event("run.done", "r", "tiny", "done"))
        hooks.close()
    finally:
        server.shutdown()
        server.server_close()
        serving.join()
    ((signature, body),) = received
    assert body == event.body()
    verify(b"only-for-this-test", signature, body, time.time())
    secret.chmod(0o644)
    for use in (settings.check_files, settings.told):
        with pytest.raises(WebhookError, match="may be used by others; chmod 600"):
            use()
    nobody = ServiceSettings(store=str(tmp_path)).told()
    nobody.send(event)
    nobody.close()


def test_a_taken_port_is_one_clear_line() -> None:
    import socket

    from cluster.head import ClusterError

    assert choose_port(port := find_free_port()) == port
    assert choose_port(None) > 0
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ClusterError, match=f"service_port={port} cannot"):
        choose_port(port)
    with pytest.raises(ClusterError, match="service_port=70000"):
        choose_port(70_000)


def test_under_serve_a_token_is_not_optional(tmp_path: Path) -> None:
    from pipelines.service.app import build

    with pytest.raises(ValueError, match="token_file is missing"):
        build(ServiceSettings(store=str(tmp_path)))
    assert build(ServiceSettings(store=str(tmp_path), token_file="/x")) is not None
