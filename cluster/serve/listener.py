"""Answers HTTP in an ingress process itself, on the endpoint's own address, beside Serve's proxy.

Serve runs one proxy on a node, and every connection goes through it: when that process dies nobody answers until the
controller has missed three of its heartbeats, which takes half a minute as Serve is set by default. So every ingress
process listens on the same port too (SO_REUSEPORT, as Serve's proxy does), and the kernel deals new connections out
among all who listen: a process that dies takes its own connections with it and no others. What comes this way saves the
proxy's hop; all that guards the endpoint is in the application, and is the same on both ways.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.serve.gate import DIRECT

logger = logging.getLogger("ray.serve")

KEEP_ALIVE_S = 90  # as Serve's proxy
DRAIN_S = 15.0
MAX_HEAD_BYTES = 256 << 10  # no less than asyncio reads at once: the end of a body may come with the next head


class Listener:
    """One application on one address at a time. Lives on one event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._address: tuple[str, int] | None = None
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def listen(self, address: tuple[str, int] | None) -> None:
        """Answers there from now on, and nowhere else; None: nowhere. An address that is not this machine's is only
        logged, since Serve's proxy answers on that of its own."""
        if address == self._address and self._task is not None and not self._task.done():
            return
        await self.close()
        if address is None:
            return
        try:
            listening = _bind(*address)
        except OSError as error:
            logger.warning(f"This ingress does not listen on {address[0]}:{address[1]} itself: {error}.")
            return
        config = uvicorn.Config(
            _ended_with_its_client(self._app),
            http=_BoundedHead,
            ws="none",
            lifespan="off",  # Serve runs it
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(DRAIN_S),
            server_header=False,
        )
        self._server, self._address = _Server(config), address
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listening]))

    async def close(self) -> None:
        """Takes no connection any more; returns when what is under way is over, or after DRAIN_S."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._task, DRAIN_S + 1)
        self._server = self._task = self._address = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's signals are Ray's."""
        yield


class _BoundedHead(HttpToolsProtocol):
    """uvicorn's protocol, which of itself keeps headers of any length, before anybody has asked for a key: a connection
    on which a request's first line and headers do not end within MAX_HEAD_BYTES is closed."""

    _head_bytes: int | None = 0
    """Of the request whose head is coming; None while none is."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers of the request are too long.")

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound


def _ended_with_its_client(app: ASGIApp) -> ASGIApp:
    """`app`, cancelled when its client goes away, as Serve does it."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        work = asyncio.ensure_future(app({**scope, DIRECT: True}, messages.get, send))

        async def listen() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            work.cancel()

        listening = asyncio.ensure_future(listen())
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
            listening.cancel()
        if not work.cancelled():
            work.result()

    return run
