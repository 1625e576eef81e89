"""Who may ask the service, and how much at a time. Pure ASGI, in front of everything.

In this order, so that a stranger costs nothing: the name that the service was called by, the token (401), the body's
length and pace (413, 408).

Without a token only programs of this machine are to be served, and a browser is one that web pages command: a page
cannot send `application/json`, which is all that the API takes (415), elsewhere without asking first, which is refused,
and a page whose own name was turned into 127.0.0.1 is known by that name.

The console is for browsers, and a browser has a pass (passes.py) in place of the token, which opens nothing but the
console. Everything that a page does goes over one WebSocket, for which the rule of browsers against other sites' pages
does not hold: so what comes from a page must come from a page of this very service. Whoever has no pass sees the page
that asks for the token, and no other.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import stat
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse

from cluster.serve.api_error import ApiError
from cluster.serve.request_body import BodyLimits, Message, Receive, read_body
from pipelines.service.passes import COOKIE, Passes

HEALTH = "/api/health"
CONSOLE = "/console"
LOGIN = "/console/login"
KNOWN = "known"
"""In the state of a request: whether whoever asks may see everything."""

_CLOSE: Message = {"type": "websocket.close", "code": 1008}

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
        self._passes = None if token is None else Passes(token)
        self._local_only = local_only
        self._limits = limits or BodyLimits(max_bytes=MAX_BODY_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            if not self._may_connect(scope):
                await send(_CLOSE)
                return
            await self._app(scope, *_closing(receive, send, self._pass_left(scope["headers"])))
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
        await self._app(inner, _replayed(body, receive), _unframed(send) if _is_console(scope) else send)

    def _check(self, scope: Scope) -> bool:
        """Whether the asker is known. Raises ApiError."""
        headers = scope["headers"]
        if not self._is_called_rightly(headers):
            raise ApiError(403, "This service answers to 127.0.0.1 and localhost only; ask it by that name.")
        if _is_console(scope):
            return self._check_console(scope)
        known = self._digest is None or self._has_token(headers)
        if not known and (scope["path"] != HEALTH or scope["method"] != "GET"):
            raise ApiError(401, "A token is needed: send it as Authorization: Bearer TOKEN.")
        return known

    def _check_console(self, scope: Scope) -> bool:
        """Raises ApiError. The page that asks for the token does without; pages only get, but for that one's form."""
        if not _is_own_page(scope["headers"], needed=False) or _is_embedded(scope["headers"]):
            raise ApiError(403, "That page is not of this service.")
        asks_token = scope["path"] == LOGIN
        if scope["method"] not in ("GET", "HEAD") and not (asks_token and scope["method"] == "POST"):
            raise ApiError(405, "The console's pages take GET only; programs use /api.")
        if not asks_token and not self._pass_left(scope["headers"]):
            raise ApiError(401, "The console is for whoever has the token.")
        return True

    def _may_connect(self, scope: Scope) -> bool:
        """Whether a WebSocket is one of the console's own pages."""
        headers = scope["headers"]
        own = self._is_called_rightly(headers) and _is_own_page(headers, needed=True)
        return scope["type"] == "websocket" and _is_console(scope) and own and self._pass_left(headers) > 0

    def _is_called_rightly(self, headers: list[tuple[bytes, bytes]]) -> bool:
        return not self._local_only or _is_local(_one(headers, b"host").decode("latin-1"))

    def _pass_left(self, headers: list[tuple[bytes, bytes]]) -> float:
        """For how many seconds more a browser may see the console."""
        return math.inf if self._passes is None else self._passes.left(_cookie(headers), time.time())

    def _has_token(self, headers: list[tuple[bytes, bytes]]) -> bool:
        scheme, _, given = _one(headers, b"authorization").partition(b" ")
        assert self._digest is not None
        return hmac.compare_digest(self._digest, _digest(given.strip())) and scheme.lower() == b"bearer"

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if error.status == 401 and _is_console(scope) and scope["method"] == "GET":
            # the browser sends its pass to the console alone
            onwards: Any = RedirectResponse(f"{CONSOLE}/" if scope["path"] == "/" else LOGIN, 303)
            await onwards(scope, receive, send)
            return
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


def _is_console(scope: Scope) -> bool:
    return scope["path"] in ("/", CONSOLE) or scope["path"].startswith(f"{CONSOLE}/")


def _is_own_page(headers: list[tuple[bytes, bytes]], *, needed: bool) -> bool:
    """Whether the page that asks is of the host that it asks; `needed`: and says so."""
    origin = [value for key, value in headers if key == b"origin"]
    if not origin:
        return not needed
    try:
        named = urlsplit(origin[0].decode("latin-1")).netloc
    except ValueError:
        return False
    return len(origin) == 1 and bool(named) and named.encode("latin-1").lower() == _one(headers, b"host").lower()


def _is_embedded(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a page of elsewhere asks for a part of itself, a picture or a frame, and not for the next page. It would
    not see the answer, but each page of the console that is asked for costs memory for a while."""
    is_foreign = _one(headers, b"sec-fetch-site") in (b"cross-site", b"same-site")
    return is_foreign and _one(headers, b"sec-fetch-dest") != b"document"


def _cookie(headers: list[tuple[bytes, bytes]]) -> str:
    """The pass that was sent, or nothing. Other services of this host have cookies too, of any shape."""
    for key, value in headers:
        if key == b"cookie" and (found := cookie_parser(value.decode("latin-1")).get(COOKIE)):
            return found
    return ""


def _closing(receive: Receive, send: Send, seconds: float) -> tuple[Receive, Send]:
    """A WebSocket's two ways, which end after so many seconds."""
    is_over = False
    ends = None if math.isinf(seconds) else asyncio.get_running_loop().time() + seconds

    async def receiving() -> Message:
        nonlocal is_over
        try:
            async with asyncio.timeout_at(ends):
                return await receive()
        except TimeoutError:
            is_over = True
            await send(_CLOSE)
            return {"type": "websocket.disconnect", "code": _CLOSE["code"]}

    async def sending(message: Message) -> None:
        if not is_over:
            await send(message)

    return receiving, sending


def _unframed(send: Send) -> Send:
    """`send` that tells browsers to show the answer in no other site's frame."""
    added = [(b"content-security-policy", b"frame-ancestors 'none'"), (b"referrer-policy", b"same-origin")]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


def _is_local(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body, which was read, in place of it; then the disconnect."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if first:
            return first.pop()
        while (message := await receive())["type"] == "http.request":
            pass  # where no body was announced, none was waited for: this is its empty one
        return message

    return replay
