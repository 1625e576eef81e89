"""A TCP proxy before a store, whose weather can be changed:

fair     passes on                          slow     every piece of a request comes late
500, 503 answers so, and passes on nothing  hang     holds everything back, and passes it on when it turns fair
reset    resets connections                 flaky    resets them at random, before a request or before its answer
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, Protocol

Weather = Literal["fair", "500", "503", "reset", "slow", "hang", "flaky"]
SLOW_SECONDS = 0.7
_HANG_POLL_SECONDS = 0.05
_FLAKY_SHARE = 0.15
_ANSWERS = {
    weather: f"HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    for weather, line in (("500", "500 Internal Server Error"), ("503", "503 Slow Down"))
}


class Tap(Protocol):
    """Hears what one connection carries, in pieces as they come."""

    def asked(self, data: bytes) -> None: ...
    def answered(self, data: bytes) -> None: ...


class FaultyProxy:
    """Listens on a free port of loopback, on a thread, until closed."""

    def __init__(self, target_port: int, seed: int = 0, tap: Callable[[], Tap] | None = None) -> None:
        self.weather: Weather = "fair"
        self._target = target_port
        self._draw = random.Random(seed)
        self._tap = tap
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self._loop.run_until_complete(asyncio.start_server(self._serve, sock=listener))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def become(self, weather: Weather) -> None:
        """From now on; connections that are open break off when it turns foul."""
        self.weather = weather
        if weather in ("500", "503", "reset"):
            self._loop.call_soon_threadsafe(lambda: [_reset(writer) for writer in list(self._writers)])

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._break_off(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _break_off(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather == "reset":
            _reset(writer)
            return
        if answer := _ANSWERS.get(self.weather):
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                await writer.drain()
            writer.close()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, far_writer}
        tap = self._tap() if self._tap is not None else None
        asked, answered = (None, None) if tap is None else (tap.asked, tap.answered)
        try:
            await asyncio.gather(
                self._pass(reader, far_writer, asked, is_request=True), self._pass(far_reader, writer, answered)
            )
        finally:
            self._writers -= {writer, far_writer}

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hear: Callable[[bytes], None] | None,
        is_request: bool = False,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if hear is not None:
                    hear(data)
                if is_request and self.weather == "slow":
                    await asyncio.sleep(SLOW_SECONDS)
                while self.weather == "hang":
                    await asyncio.sleep(_HANG_POLL_SECONDS)
                if self.weather == "flaky" and self._draw.random() < _FLAKY_SHARE:
                    _reset(writer)
                    return
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):  # no linger: closing sends RST
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
