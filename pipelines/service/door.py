"""Who may ask the service, and how much at a time. Pure ASGI, in front of everything.

In this order, so that a stranger costs nothing: the name that the service was called by, the token (401), the media
type (415), the body's length and pace (413, 408).

Without a token only programs of this machine are to be served, and a browser is one that web pages command: a page
cannot send `application/json` elsewhere without asking first, which is refused, and a page whose own name was turned
into 127.0.0.1 is known by that name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from cluster.serve.api_error import ApiError
from cluster.serve.request_body import BodyLimits, Message, Receive, read_body

HEALTH = "/api/health"
KNOWN = "known"
"""In the state of a request: whether whoever asks may see everything."""

MIN_TOKEN_LENGTH = 16
MAX_BODY_BYTES = 1 << 20

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class TokenError(ValueError):
    """The token's file cannot be used; its content is never shown."""


def read_token(path: str) -> str:
    """The token in a file that nobody but its owner may read. Raises TokenError."""
    file = Path(path).expanduser()
    try:
        mode = file.stat().st_mode
        token = file.read_text("ascii").strip()
    except OSError as error:
        raise TokenError(f"the token file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise TokenError(f"the token file {file} is not one line of ASCII") from None
    if stat.S_IMODE(mode) & 0o077:
        raise TokenError(f"the token file {file} is open to others; chmod 600 it")
    if len(token) < MIN_TOKEN_LENGTH or not token.isprintable() or " " in token:
        raise TokenError(f"the token file {file} must hold one word of at least {MIN_TOKEN_LENGTH} characters")
    return token


def error_body(message: str, field: str | None = None) -> dict[str, Any]:
    """The one shape of every answer that is an error."""
    return {"error": {"message": message, **({"field": field} if field is not None else {})}}


class Door:
    """`token`: what everything but the health check needs, as `Authorization: Bearer`. `local_only`: the name in the
    Host header must be one of this machine's loopback."""

    def __init__(self, app: App, token: str | None, local_only: bool, limits: BodyLimits | None = None) -> None:
        self._app = app
        # hashes are compared: of those the asker cannot choose the beginning, and both have the same length
        self._digest = None if token is None else _digest(token.encode())
        self._local_only = local_only
        self._limits = limits or BodyLimits(max_bytes=MAX_BODY_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            known = self._check(scope)
            body = await read_body(scope["headers"], receive, self._limits)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        if body is None:
            return
        # whoever has no token cannot lose it
        headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        inner = {**scope, "headers": headers, "state": {**scope.get("state", {}), KNOWN: known}}
        await self._app(inner, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> bool:
        """Whether the asker is known. Raises ApiError."""
        headers = scope["headers"]
        if self._local_only and not _is_local(_one(headers, b"host").decode("latin-1")):
            raise ApiError(403, "This service answers to 127.0.0.1 and localhost only; ask it by that name.")
        known = self._digest is None or self._has_token(headers)
        if not known and (scope["path"] != HEALTH or scope["method"] != "GET"):
            raise ApiError(401, "A token is needed: send it as Authorization: Bearer TOKEN.")
        if scope["method"] not in ("GET", "HEAD", "DELETE"):
            media_type = _one(headers, b"content-type").partition(b";")[0].strip().lower()
            if media_type != b"application/json":
                raise ApiError(415, "Content-Type must be application/json.")
        return known

    def _has_token(self, headers: list[tuple[bytes, bytes]]) -> bool:
        scheme, _, given = _one(headers, b"authorization").partition(b" ")
        assert self._digest is not None
        return hmac.compare_digest(self._digest, _digest(given.strip())) and scheme.lower() == b"bearer"

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"WWW-Authenticate": 'Bearer realm="caravan"'} if error.status == 401 else {}
        if error.status in (408, 413):
            headers["Connection"] = "close"
        response: Any = JSONResponse(error_body(error.message), error.status, headers)
        await response(scope, receive, send)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _one(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The value of a header that comes once; of one that comes more often, nothing."""
    values = [value for key, value in headers if key == name]
    return values[0] if len(values) == 1 else b""


def _is_local(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body, which was read, before it; then whatever comes: a disconnect."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
