"""Signed webhooks: a receiver is told when a run's state changes.

A delivery is a POST of JSON with the header `Caravan-Signature: t=<seconds>,v1=<hex>`, the HMAC-SHA256 of
"<seconds>.<body>" by a shared secret: who has it knows that we sent this, and when (`verify`). Deliveries of one
receiver keep their order; one that fails is tried again for some minutes and then given up. The queue is in memory and
bounded: a webhook is a hint, and what is true is asked of the service.

The receiver's address is what somebody wrote, so a request must not reach what only this machine may (SSRF): only
https, no redirects, no proxies, and only global addresses, or those the operator allows. The address that was checked
is the one that is connected to: the name is not resolved twice.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import os
import random
import socket
import ssl
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

SIGNATURE, EVENT, DELIVERY = "Caravan-Signature", "Caravan-Event", "Caravan-Delivery"
TOLERANCE_SECONDS = 300

_SHORTEST_SECRET = 16
_QUEUE = 1000
_TRIES = 8
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_TRY_SECONDS = 10.0
_AGAIN = (408, 425, 429)
"""Refusals that may end by themselves, beside those of 500 and more."""
_PORTS = {"https": 443, "http": 80}
_NAT64 = IPv6Network("64:ff9b::/96")

Address = IPv4Address | IPv6Address


class WebhookError(ValueError):
    """A receiver, a secret or an allow-list that cannot be used; the message is one line and holds no secret."""


class SignatureError(ValueError):
    """A delivery that was not signed with this secret, or not now."""


class _Refused(Exception):
    """Another try would be refused as well."""


class _Failed(Exception):
    """Another try may work; not before `wait` seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Event:
    """What happened to a run. Times are seconds since the epoch; `error` is one line, and nothing here is secret."""

    event: Literal["run.queued", "run.started", "run.done", "run.failed", "run.stopped", "run.lost"]
    run_id: str
    name: str
    state: str
    queued: float | None = None
    started: float | None = None
    ended: float | None = None
    error: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same for every try: a receiver that has seen it has nothing to do."""

    def body(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False).encode()


# -- signatures


def sign(secret: bytes, timestamp: int, body: bytes) -> str:
    """The header's value."""
    return f"t={timestamp},v1={_digest(secret, timestamp, body)}"


def verify(secret: bytes, header: str, body: bytes, now: float, tolerance: float = TOLERANCE_SECONDS) -> None:
    """For receivers, with the body as it came, before it is parsed. Of several `v1` one must fit, so that a secret can
    be exchanged. Raises SignatureError."""
    parts = [part.partition("=") for part in header.split(",")]
    stamps = [value for key, _, value in parts if key.strip() == "t"]
    signatures = [value.strip() for key, _, value in parts if key.strip() == "v1"]
    if len(stamps) != 1 or not (stamps[0].isascii() and stamps[0].isdigit()) or not signatures:
        raise SignatureError(f"{SIGNATURE} is not t=SECONDS,v1=HEX")
    timestamp = int(stamps[0][:20])
    wanted = _digest(secret, timestamp, body).encode()
    fits = [hmac.compare_digest(wanted, each.encode(errors="replace")) for each in signatures]
    if not any(fits):
        raise SignatureError(f"{SIGNATURE} does not fit the body and the secret")
    if abs(now - timestamp) > tolerance:
        raise SignatureError(f"signed {now - timestamp:.0f} s ago, and {tolerance:g} are allowed")


def _digest(secret: bytes, timestamp: int, body: bytes) -> str:
    return hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """The secret in a file that its owner alone may read. Raises WebhookError."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(4096).strip()
    except OSError as error:
        raise WebhookError(f"the webhook's secret {path} cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise WebhookError(f"the webhook's secret {path} may be used by others; chmod 600 {path}")
    if len(secret) < _SHORTEST_SECRET:
        raise WebhookError(
            f"the webhook's secret {path} has fewer than {_SHORTEST_SECRET} bytes; openssl rand -hex 32 makes one"
        )
    return secret


# -- where requests may go


@dataclass(frozen=True)
class Allowed:
    """What the operator lets receivers be, beside https at global addresses. `networks` may be private ones; with
    `loopback_http` plain http to this machine's loopback."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    loopback_http: bool = False

    @classmethod
    def of(cls, networks: Iterable[str], loopback_http: bool = False) -> Allowed:
        """From `10.0.0.0/8`, an address alone, ... Raises WebhookError."""
        try:
            return cls(tuple(ip_network(each) for each in networks), loopback_http)
        except ValueError as error:
            raise WebhookError(f"the webhooks' allow-list: {error}; write networks such as 10.1.0.0/16") from None

    def permits(self, address: Address, scheme: str) -> bool:
        real = _inner(address)
        if scheme == "http":
            return self.loopback_http and address.is_loopback  # itself: what 6to4 wraps would leave this machine
        return _is_public(real) or any(each in net for each in {address, real} for net in self.networks)


_NOTHING_ELSE = Allowed()


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)


def _is_public(address: Address) -> bool:
    others = (address.is_private, address.is_loopback, address.is_link_local, address.is_multicast)
    return address.is_global and not (any(others) or address.is_reserved or address.is_unspecified)


@dataclass(frozen=True)
class Receiver:
    """A checked URL. Its path may be a secret in itself: `str` shows scheme and host."""

    scheme: str
    host: str
    port: int
    target: str = field(repr=False)

    @classmethod
    def parse(cls, url: str, allowed: Allowed) -> Receiver:
        """Raises WebhookError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise WebhookError("a webhook's URL is malformed; write https://host/path") from None
        shown = f"{parts.scheme}://{host}"
        if "@" in parts.netloc:
            raise WebhookError(f"the webhook {shown} carries credentials; leave them out, deliveries are signed")
        if not host or parts.scheme not in ("https", "http"):
            raise WebhookError(f"the webhook {shown} is no https URL; write https://host/path")
        if parts.scheme == "http" and not allowed.loopback_http:
            raise WebhookError(f"the webhook {shown} is not encrypted; use https")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(character <= " " for character in target):
            raise WebhookError(f"the webhook {shown} has a path that is not percent-encoded; encode it")
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], target)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    def resolve(self, allowed: Allowed) -> str:
        """An address of it that may be connected to. Raises _Refused, _Failed."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _Failed(f"{self.host} is not found ({error})") from error
        addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        permitted = [address for address in addresses if allowed.permits(address, self.scheme)]
        if not permitted:
            raise _Refused(
                f"{self.host} is at {addresses[0]}, and no webhook may go there; name its network in the allow-list"
            )
        return str(permitted[0])


# -- sending


class Webhooks:
    """Tells every receiver of every event. `send` returns at once and never raises; `close` ends the threads.

    `waits`: seconds after the first failure, doubled after each, and their limit; the half of each is random.
    """

    def __init__(
        self,
        urls: Sequence[str],
        secret: bytes,
        allowed: Allowed = _NOTHING_ELSE,
        *,
        tries: int = _TRIES,
        waits: tuple[float, float] = (_FIRST_WAIT, _LONGEST_WAIT),
        try_seconds: float = _TRY_SECONDS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: None for the system's authorities. Raises WebhookError."""
        tls = tls or ssl.create_default_context()
        receivers = [Receiver.parse(url, allowed) for url in urls]
        self._senders = [_Sender(each, secret, allowed, tries, waits, try_seconds, tls) for each in receivers]

    def send(self, event: Event) -> None:
        for sender in self._senders:
            sender.add(event)

    def close(self, seconds: float = 5.0) -> None:
        """Waits so long for what is queued; what is not sent then is dropped, and the log says how much."""
        deadline = time.monotonic() + seconds
        for sender in self._senders:
            sender.finish()
        for sender in self._senders:
            sender.end(deadline)


class _Sender:
    """One receiver's queue and thread."""

    def __init__(
        self,
        receiver: Receiver,
        secret: bytes,
        allowed: Allowed,
        tries: int,
        waits: tuple[float, float],
        try_seconds: float,
        tls: ssl.SSLContext,
    ) -> None:
        self._receiver, self._secret, self._allowed, self._tls = receiver, secret, allowed, tls
        self._tries, self._waits, self._try_seconds = tries, waits, try_seconds
        self._queue: deque[Event] = deque()
        self._changed = threading.Condition()
        self._finishing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"webhook {receiver}", daemon=True)
        self._thread.start()

    def add(self, event: Event) -> None:
        with self._changed:
            if self._finishing:
                return
            if len(self._queue) == _QUEUE:
                lost = self._queue.popleft()  # the newer one says more of how things are
                logger.warning("webhook %s: queue full, %s of run %s dropped", self._receiver, lost.event, lost.run_id)
            self._queue.append(event)
            self._changed.notify()

    def finish(self) -> None:
        with self._changed:
            self._finishing = True
            self._changed.notify()

    def end(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._ended.set()
        self._thread.join(self._try_seconds + 1)
        if self._queue:
            logger.warning("webhook %s: %d events were not sent", self._receiver, len(self._queue))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._finishing)
                if not self._queue or self._ended.is_set():
                    return
                event = self._queue[0]
            try:
                self._deliver(event)
            except Exception as error:  # the thread must outlive a defect; its text might show what is secret
                logger.error("webhook %s: %s given up: %s", self._receiver, event.event, type(error).__name__)
            with self._changed:
                if self._ended.is_set():
                    return
                if self._queue and self._queue[0] is event:
                    self._queue.popleft()

    def _deliver(self, event: Event) -> None:
        for number in range(1, self._tries + 1):
            try:
                self._post(event)
                return
            except _Refused as error:
                logger.warning("webhook %s: %s given up: %s", self._receiver, event.event, error)
                return
            except _Failed as error:
                if number == self._tries:
                    logger.warning(
                        "webhook %s: %s given up after %d tries: %s", self._receiver, event.event, number, error
                    )
                    return
                longest = min(self._waits[1], self._waits[0] * 2 ** (number - 1))
                wait = max(longest * random.uniform(0.5, 1.0), min(error.wait, self._waits[1]))
                logger.info("webhook %s: %s again in %.1f s: %s", self._receiver, event.event, wait, error)
                if self._ended.wait(wait):
                    return

    def _post(self, event: Event) -> None:
        """One try. Raises _Refused, _Failed."""
        receiver, body = self._receiver, event.body()
        address = receiver.resolve(self._allowed)
        headers = {
            "Host": receiver.authority,
            "Content-Type": "application/json",
            "User-Agent": "caravan-webhook",
            EVENT: event.event,
            DELIVERY: event.id,
            SIGNATURE: sign(self._secret, int(time.time()), body),  # anew for each try, or the last would be too old
        }
        try:
            status, after = self._exchange(address, body, headers)
        except ssl.SSLCertVerificationError as error:
            raise _Failed(f"its certificate is not trusted: {error.verify_message}") from error
        except OSError as error:
            raise _Failed(f"no answer ({error})") from error
        except http.client.HTTPException as error:  # its text is the receiver's
            raise _Failed(f"no answer in HTTP ({type(error).__name__})") from error
        if 200 <= status < 300:
            return
        if status >= 500 or status in _AGAIN:
            raise _Failed(f"it answered {status}", float(after) if after.isascii() and after.isdigit() else 0.0)
        told = ", a redirect, which is not followed" if 300 <= status < 400 else ""
        raise _Refused(f"it answered {status}{told}")

    def _exchange(self, address: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """Status and Retry-After of one request to that very address, in `try_seconds` in all."""
        receiver = self._receiver
        started = time.monotonic()
        connected = socket.create_connection((address, receiver.port), timeout=self._try_seconds)
        with connected as plain, plain.dup() as same:  # wrapping takes the first one's descriptor away
            # A receiver that sends a byte now and then would outlive any time-out of a single read.
            watchdog = threading.Timer(max(0.0, started + self._try_seconds - time.monotonic()), _hang_up, (same,))
            watchdog.daemon = True
            watchdog.start()
            try:
                if receiver.scheme == "https":
                    with self._tls.wrap_socket(plain, server_hostname=receiver.host) as secured:
                        return _request(secured, receiver, body, headers)
                return _request(plain, receiver, body, headers)
            finally:
                watchdog.cancel()


def _request(connected: socket.socket, receiver: Receiver, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(receiver.host, receiver.port)
    connection.sock = connected
    connection.request("POST", receiver.target, body, headers)
    with connection.getresponse() as response:  # what it says is not read: nobody here would use it
        return response.status, response.headers.get("Retry-After", "")


def _hang_up(connected: socket.socket) -> None:
    with suppress(OSError):  # the other side may have done so
        connected.shutdown(socket.SHUT_RDWR)


def of_files(urls: Sequence[str], secret_file: str | Path, allow: Sequence[str], loopback_http: bool) -> Webhooks:
    """As the service's options name them. Raises WebhookError."""
    return Webhooks(urls, read_secret(secret_file), Allowed.of(allow, loopback_http))
