"""Counts the requests that are answered with an error, by its code, whoever in the ingress answers so."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Refusals:
    """ASGI middleware, around all others. `refused` is told the error's code, or the status where there is none."""

    def __init__(self, app: App, refused: Callable[[str], None]) -> None:
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status >= 400:
                # Our errors are one small message each, of which this is the first.
                self._refused(_code(message.get("body", b"")) or str(status))
                status = 0
            await send(message)

        await self._app(scope, receive, watched)


def _code(body: bytes) -> str | None:
    """The code in an error's JSON, if it is one of OpenAI's shape."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
