"""The gate before the HTTP face: who asks, how much, how slowly. Pure ASGI, so that streams and disconnects pass.

In this order, so that a stranger costs nothing: the key (401; 403 for an operator's route), the key's limits (429), the
body's length and pace (413, 408), then the application, for REQUEST_S at most (504).

Every response has an `X-Request-Id`. Serve's proxy puts it on: it takes the client's or makes one, and hands it to us
in the request's headers; where a request came to us directly, or without one, the gate does. Neither the key nor
anything of a body is ever logged: of an exception that nobody expected, the log has the type and the lines of code,
and not the message.
"""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from cluster.serve.access import Access, Headers
from cluster.serve.api_error import ApiError, internal_error, log_defect
from cluster.serve.callers import ARRIVED, CALLER, METER, REQUEST_ID, Meter
from cluster.serve.limits import Allowance
from cluster.serve.request_body import BodyLimits, Message, Receive, read_body

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_S = 1800.0
DIRECT = "caravan.direct"
"""In the scope of a request that no proxy of Serve's has handed on."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_EXPOSED = ("x-request-id", "retry-after", "x-caravan-replica") + tuple(
    f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
)


class ResponseBroken(RuntimeError):
    """A response that had begun cannot go on: the server must break the connection, lest it be taken for whole."""


class Gate:
    """ASGI middleware. Its settings are the `access`'s, which may change while it works."""

    def __init__(
        self, app: App, access: Access, *, body_limits: BodyLimits | None = None, request_s: float = REQUEST_S
    ) -> None:
        self._app = app
        self._access = access
        self._body_limits = body_limits or BodyLimits()
        self._request_s = request_s
        self._origins: tuple[str, ...] = ()
        self._with_cors: App = self._handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            # A browser asks first without the key, so this comes before the check.
            await self._cors()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # there are none; no way around the check either

    def _cors(self) -> App:
        """What lets web pages of the origins ask. Without credentials: a key is a header that the page must know."""
        if self._origins != self._access.origins:
            self._origins = self._access.origins
            with_cors = CORSMiddleware(
                self._handle,  # type: ignore[arg-type]
                allow_origins=self._origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # clients add their own, as x-stainless-lang
                expose_headers=_EXPOSED,
            )
            self._with_cors = with_cors if self._origins else self._handle  # type: ignore[assignment]
        return self._with_cors

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, extra = _request_id(scope["headers"], DIRECT in scope)
        response = _Response(send, extra)
        try:
            caller, allowance = self._access.admit(_path(scope), scope["headers"])
            with _entered(allowance, response):
                body = await read_body(scope["headers"], receive, self._body_limits)
                if body is None:
                    return
                meter = Meter(allowance)
                state = {CALLER: caller, METER: meter, REQUEST_ID: request_id, ARRIVED: time.monotonic()}
                inner = {
                    **scope,
                    "state": {**scope.get("state", {}), **state},
                    # Who has no key cannot lose it.
                    "headers": [(name, value) for name, value in scope["headers"] if name != b"authorization"],
                }
                await self._run(inner, _replayed(body, receive), response, request_id)
                if response.status is not None and response.status >= 500:
                    meter.refund()
        except ApiError as error:
            await response.fail(error)

    async def _run(self, scope: Scope, receive: Receive, response: "_Response", request_id: str) -> None:
        """The application, which is ended when it takes too long; its failures in the log, without what they say."""
        limit = asyncio.timeout(self._request_s)
        try:
            async with limit:
                await self._app(scope, receive, response.send)
        except Exception as error:
            if limit.expired():
                what, kind = f"The request took longer than {self._request_s:.0f} s.", "request_timeout"
                await response.fail(ApiError(504, what, code=kind, kind="server_error"))
                return
            if isinstance(error, ApiError):
                raise
            log_defect(request_id, error)
            await response.fail(internal_error())


class _Response:
    """A response on its way out: what has been said of it, and the headers that the gate adds."""

    def __init__(self, send: Send, extra: Headers) -> None:
        self._send = send
        self._extra = extra
        self._is_event_stream = False
        self._ended = False
        self.allowance: Allowance | None = None
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            self._is_event_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
            limits = self.allowance.headers() if self.allowance is not None else {}
            headers += self._extra + [(name.encode(), value.encode()) for name, value in limits.items()]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answers with OpenAI's error object. After 408 and 413 the rest of the body is not waited for."""
        headers = error.headers()
        if error.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="caravan"'
        if error.status in (408, 413):
            headers["Connection"] = "close"
        await JSONResponse(error.body(), error.status, headers)({"type": "http"}, _never, self.send)

    async def fail(self, error: ApiError) -> None:
        """Ends a response that may have begun. Raises ResponseBroken when the client could not tell otherwise."""
        if self.status is None:
            await self.refuse(error)
        elif self._is_event_stream and not self._ended:
            event = f"data: {json.dumps(error.body())}\n\n".encode()
            await self.send({"type": "http.response.body", "body": event, "more_body": False})
        elif not self._ended:
            raise ResponseBroken(error.message) from None


@contextmanager
def _entered(allowance: Allowance | None, response: _Response) -> Iterator[None]:
    """However the request ends, the client's leaving included, its place is free again."""
    if allowance is None:
        yield
        return
    response.allowance = allowance
    allowance.enter()
    try:
        yield
    finally:
        allowance.leave()


def _path(scope: Scope) -> str:
    """The path as the application's router matches it."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _request_id(headers: Headers, direct: bool) -> tuple[str, Headers]:
    """The request's id, and the header that the response still needs."""
    came = next((value for name, value in headers if name == b"x-request-id"), None)
    plain = came is not None and _REQUEST_ID.fullmatch(came)
    request_id = came.decode() if came is not None and plain else uuid.uuid4().hex
    return request_id, [(b"x-request-id", request_id.encode())] if direct or came is None else []


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body, which was read, before it; then whatever comes: a disconnect."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


async def _never() -> Message:
    raise AssertionError("a plain response reads nothing")
