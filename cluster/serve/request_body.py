"""The body of an HTTP request: its media type, how long it may be, and how long it may take to come."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from cluster.serve.api_error import ApiError

MAX_BODY_BYTES = 4 << 20

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


@dataclass(frozen=True)
class BodyLimits:
    """A body may be `max_bytes` long and take `total_s` to come. After `grace_s` it must have come at
    `bytes_per_s` on average, so that connections that hardly say anything do not pile up."""

    max_bytes: int = MAX_BODY_BYTES
    total_s: float = 120.0
    grace_s: float = 10.0
    bytes_per_s: float = 1000.0

    def deadline_s(self, received: int) -> float:
        """Seconds from the start by which more than the `received` bytes must have come."""
        return min(self.total_s, self.grace_s + received / self.bytes_per_s)


async def read_body(headers: list[tuple[bytes, bytes]], receive: Receive, limits: BodyLimits) -> bytes | None:
    """The whole body; None when the client has gone.

    Raises ApiError: 413 when it is too long, at once where its length is announced, and 408 when it is too slow.
    """
    announced = [value for name, value in headers if name == b"content-length"]
    if not announced and not any(name == b"transfer-encoding" for name, _ in headers):
        return b""
    for value in announced:
        if not value.isdigit():
            raise ApiError(400, "Content-Length is no number; send the body's length in bytes.")
        if len(value) > 15 or int(value) > limits.max_bytes:
            raise _too_long(limits)
    clock = asyncio.get_running_loop().time
    body, started = bytearray(), clock()
    while True:
        try:
            async with asyncio.timeout_at(started + limits.deadline_s(len(body))):
                message = await receive()
        except TimeoutError:
            slow = f"{len(body)} bytes of the body came in {clock() - started:.0f} s, and not all; send it faster."
            raise ApiError(408, slow, code="request_timeout") from None
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limits.max_bytes:
            raise _too_long(limits)
        if not message.get("more_body", False):
            return bytes(body)


def _too_long(limits: BodyLimits) -> ApiError:
    message = f"The body of the request is longer than {limits.max_bytes} bytes; shorten it."
    return ApiError(413, message, code="request_too_large")


def require_json(http: Request) -> None:
    """Raises ApiError (415) unless the request says that it carries JSON.

    A web page of another origin can make a browser send plain forms and text to a server on this machine, but not
    this media type: for that the browser first asks the server, which agrees for no origin that it was not told of.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"Content-Type is {media_type or 'missing'!r}; send application/json."
        raise ApiError(415, message, code="unsupported_media_type")


async def read_json_body(http: Request) -> bytes:
    """The bytes of a request that carries JSON; raises ApiError (415). The gate has read them, within its limits."""
    require_json(http)
    return b"".join([part async for part in http.stream()])
