"""Webhooks, sent to real receivers on loopback; what may not be reached is not reached."""

import datetime
import hashlib
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipelines import webhook
from pipelines.webhook import DELIVERY, EVENT, SIGNATURE, Allowed, Event, Receiver, SignatureError, WebhookError

SECRET = b"0123456789abcdef-the-secret"
LOOPBACK = Allowed(loopback_http=True)
QUICK = {"waits": (0.01, 0.05), "try_seconds": 5.0}


class Received:
    """The requests of a receiver, and what it answers: a status for each, the last one for all that follow."""

    def __init__(self, *statuses: int, location: str = "") -> None:
        self.statuses, self.location = list(statuses or (200,)), location
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    def events(self) -> list[dict]:
        return [json.loads(body) for _, _, body in self.requests]


@contextmanager
def receiver(received: Received, tls: ssl.SSLContext | None = None) -> Iterator[Received]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.requests.append((self.path, dict(self.headers), body))
            status = received.statuses.pop(0) if len(received.statuses) > 1 else received.statuses[0]
            self.send_response(status)
            if received.location:
                self.send_header("Location", received.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        received.url = f"http{'s' if tls else ''}://localhost:{server.server_port}/hook?a=b"
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()


def event(run: str = "run-1", kind: str = "run.done") -> Event:
    return Event(kind, run, "quickstart", kind.removeprefix("run."), queued=1.0, ended=2.5)  # type: ignore[arg-type]


def send(url: str, *events: Event, seconds: float = 10.0, **options: object) -> None:
    hooks = webhook.Webhooks([url], SECRET, **{"allowed": LOOPBACK, **QUICK, **options})  # type: ignore[arg-type]
    for each in events or (event(),):
        hooks.send(each)
    hooks.close(seconds)


# -- signatures


def test_a_signature_is_rfc_2104() -> None:
    padded = SECRET.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + b'1700000000.{"a":1}').digest()
    wanted = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()
    assert webhook.sign(SECRET, 1_700_000_000, b'{"a":1}') == f"t=1700000000,v1={wanted}"


def test_only_what_was_signed_now_with_the_secret_is_taken() -> None:
    header, body, now = webhook.sign(SECRET, 1000, b"body"), b"body", 1000.0
    webhook.verify(SECRET, header, body, now)
    webhook.verify(SECRET, header, body, now + 299)
    webhook.verify(SECRET, f"{header},v1={'0' * 64}", body, now)  # while a secret is exchanged there are two
    digest = header.partition("v1=")[2]
    for secret, told, sent, at in [
        (b"another secret of its own", header, body, now),
        (SECRET, header, b"bodY", now),
        (SECRET, header.replace("t=1000", "t=1001"), body, now),
        (SECRET, header, body, now + 301),
        (SECRET, header, body, now - 301),
        (SECRET, "", body, now),
        (SECRET, "t=1000", body, now),
        (SECRET, f"v1={digest}", body, now),
        (SECRET, f"t=1000,t=1000,v1={digest}", body, now),
        (SECRET, f"t=²,v1={digest}", body, now),
        (SECRET, f"t=1000,v1={digest[:-1]}é", body, now),
    ]:
        with pytest.raises(SignatureError):
            webhook.verify(secret, told, sent, at)


def test_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o600)
    assert webhook.read_secret(file) == SECRET
    file.chmod(0o640)
    with pytest.raises(WebhookError, match="chmod 600") as raised:
        webhook.read_secret(file)
    assert SECRET.decode() not in str(raised.value)
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(WebhookError, match="16 bytes"):
        webhook.read_secret(file)
    with pytest.raises(WebhookError, match="No such file"):
        webhook.of_files([], tmp_path / "none", [], False)


# -- delivery


def test_events_come_signed_and_in_order() -> None:
    with receiver(Received()) as got:
        kinds = ["run.queued", "run.started", "run.done"]
        sent = [event(kind=kind) for kind in kinds]
        send(got.url, *sent)
    assert [each["event"] for each in got.events()] == kinds
    for made, (path, headers, body) in zip(sent, got.requests, strict=True):
        webhook.verify(SECRET, headers[SIGNATURE], body, time.time())
        assert path == "/hook?a=b" and headers[EVENT] == made.event and headers[DELIVERY] == made.id
        assert json.loads(body) == {
            "event": made.event,
            "run_id": "run-1",
            "name": "quickstart",
            "state": made.state,
            "queued": 1.0,
            "started": None,
            "ended": 2.5,
            "error": None,
            "id": made.id,
        }


def test_a_receiver_that_is_busy_is_asked_again() -> None:
    with receiver(Received(503, 429, 500, 204)) as got:
        send(got.url, event("a"), event("b"))
    assert [each["run_id"] for each in got.events()] == ["a", "a", "a", "a", "b"]
    assert len({headers[DELIVERY] for _, headers, _ in got.requests[:4]}) == 1


def test_it_is_given_up_after_some_tries_and_the_next_one_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    with receiver(Received(500, 500, 500, 200)) as got:
        send(got.url, event("a"), event("b"), tries=3)
    assert [each["run_id"] for each in got.events()] == ["a", "a", "a", "b"]
    assert "given up after 3 tries" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_a_refusal_is_final(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with receiver(Received(status)) as got:
        send(got.url)
    assert len(got.requests) == 1 and f"answered {status}" in caplog.text


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with receiver(Received()) as secret_place, receiver(Received(status, location=secret_place.url)) as got:
        send(got.url)
    assert len(got.requests) == 1 and not secret_place.requests and "redirect" in caplog.text


def test_a_full_queue_drops_the_oldest_and_never_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhook, "_QUEUE", 3)
    held = threading.Event()
    real = webhook._Sender._post
    monkeypatch.setattr(webhook._Sender, "_post", lambda self, made: (held.wait(10), real(self, made))[1])
    with receiver(Received()) as got:
        hooks = webhook.Webhooks([got.url], SECRET, LOOPBACK, **QUICK)  # type: ignore[arg-type]
        for number in range(10):
            hooks.send(event(f"run-{number}"))
        held.set()
        hooks.close(10)
        hooks.send(event("late"))
    ids = [each["run_id"] for each in got.events()]
    assert ids[-3:] == ["run-7", "run-8", "run-9"] and len(ids) <= 4 and "dropped" in caplog.text


def test_a_receiver_that_drips_or_is_gone_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"

        def drip() -> None:
            accepted, _ = server.accept()
            with accepted:
                try:
                    while not over.wait(0.05):
                        accepted.sendall(b"H")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        send(url, tries=1, try_seconds=0.4)
        assert time.monotonic() - started < 5
        over.set()
        thread.join()
    assert "no answer in HTTP" in caplog.text and "HH" not in caplog.text
    started = time.monotonic()
    send(url, seconds=0.2, waits=(60.0, 60.0))
    assert time.monotonic() - started < 5 and "1 events were not sent" in caplog.text
    assert not [each for each in threading.enumerate() if each.name.startswith("webhook")]


def test_nothing_secret_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with receiver(Received(500, 404)) as got:
        send(got.url.replace("hook", "token-in-the-path"))
    assert got.requests and SECRET.decode() not in caplog.text and "token-in-the-path" not in caplog.text


# -- TLS


def certificate(host: str, folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context with a certificate of its own for `host`, and the file that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{host}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    trust = folder / f"{host}.crt"
    trust.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return context, trust


@pytest.mark.parametrize(
    ("certified", "asked", "trusted", "comes"),
    [
        ("localhost", "localhost", True, 1),
        ("localhost", "localhost", False, 0),
        ("other", "localhost", True, 0),
        ("localhost", "127.0.0.1", True, 0),
    ],
)
def test_the_receivers_certificate_is_checked(
    certified: str, asked: str, trusted: bool, comes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, trust = certificate(certified, tmp_path)
    tls = ssl.create_default_context(cafile=trust) if trusted else ssl.create_default_context()
    with receiver(Received(), context) as got:
        url = got.url.replace("localhost", asked)
        send(url, allowed=Allowed.of(["127.0.0.0/8", "::1"]), tls=tls, tries=1)
    assert len(got.requests) == comes
    assert ("certificate is not trusted" in caplog.text) == (not comes)


# -- where it may go

INSIDE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fd00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",  # NAT64 of 169.254.169.254
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
]


def answers(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Names resolve to these; returns where connections are tried, none of which is made."""
    tried: list[str] = []
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: entries)

    def connect(address: tuple[str, int], timeout: float) -> None:
        tried.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


@pytest.mark.parametrize("address", INSIDE)
def test_no_name_leads_inside(address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = answers(monkeypatch, address)
    send("https://rebound.example/", allowed=Allowed(), tries=2)
    assert not tried and "no webhook may go there" in caplog.text
    if not ipaddress.ip_address(address).is_loopback:
        send("http://rebound.example/", allowed=LOOPBACK, tries=1)
        assert not tried, "plain http is for loopback alone"


def test_the_checked_address_is_the_one_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answers(monkeypatch, "10.0.0.1", "8.8.8.8", "127.0.0.1")
    send("https://mixed.example/", allowed=Allowed(), tries=1)
    assert tried == ["8.8.8.8"]
    tried = answers(monkeypatch, "2606:4700:4700::1111")
    send("https://six.example/", allowed=Allowed(), tries=1)
    assert tried == ["2606:4700:4700::1111"]
    tried = answers(monkeypatch, "64:ff9b::808:808")  # NAT64 of 8.8.8.8, as a network without IPv4 has it
    send("https://four.example/", allowed=Allowed(), tries=1)
    assert tried == ["64:ff9b::808:808"]


def test_the_operators_list_lets_a_network_in(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = answers(monkeypatch, "10.1.2.3")
    send("https://inner.example/", allowed=Allowed.of(["10.1.0.0/16"]), tries=1)
    send("https://inner.example/", allowed=Allowed.of(["10.2.0.0/16"]), tries=1)
    assert tried == ["10.1.2.3"]
    tried = answers(monkeypatch, "::ffff:10.1.2.3")
    send("https://inner.example/", allowed=Allowed.of(["10.1.0.0/16"]), tries=1)
    assert tried == ["::ffff:a01:203"]
    with pytest.raises(WebhookError, match="10.1.0.0/16"):
        Allowed.of(["10.1.0.0.0/16"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/hook", "not encrypted"),
        ("https://user:hunter2@example.org/", "carries credentials"),
        ("ftp://example.org/", "no https URL"),
        ("file:///etc/passwd", "no https URL"),
        ("https:///path", "no https URL"),
        ("https://example.org:port/", "malformed"),
        ("https://example.org/ü", "percent-encoded"),
        ("https://example.org/a b\r\nX: y", "percent-encoded"),
    ],
)
def test_a_url_that_cannot_be_one(url: str, words: str) -> None:
    with pytest.raises(WebhookError, match=words) as raised:
        Receiver.parse(url, Allowed())
    assert "hunter2" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://example.org/", "example.org"),
        ("https://example.org:443/", "example.org"),
        ("https://example.org:80/", "example.org:80"),
        ("https://[2606:4700::1]:8443/x", "[2606:4700::1]:8443"),
    ],
)
def test_the_host_as_it_is_named_in_a_request(url: str, authority: str) -> None:
    assert Receiver.parse(url, Allowed()).authority == authority


def test_a_defect_ends_one_event_and_not_the_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[..., None] = webhook._Sender._post

    def sometimes(self: object, made: Event) -> None:
        if made.run_id == "a":
            raise RuntimeError(SECRET.decode())
        real(self, made)

    monkeypatch.setattr(webhook._Sender, "_post", sometimes)
    with receiver(Received()) as got:
        send(got.url, event("a"), event("b"))
    assert [each["run_id"] for each in got.events()] == ["b"]
    assert "RuntimeError" in caplog.text and SECRET.decode() not in caplog.text
