"""Calls that may hang, made in threads of their own, so that nobody waits for them for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from pipelines.service.errors import Busy

T = TypeVar("T")

_END = object()


class Bounded:
    """At most `threads` calls at once; whoever waits for one longer than `seconds`, its turn included, is let go.

    The call itself goes on: a thread cannot be ended. Its result is dropped.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self._threads = threads
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bounded")
        self._followed = 0
        self._lock = threading.Lock()

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Raises what the function raises, and Busy if it takes too long."""
        future = self._pool.submit(function, *arguments)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except TimeoutError as error:
            if future.done() and not future.cancelled():
                raise
            raise Busy(f"it did not end in {self._seconds:g} s: the store or the cluster does not answer") from error

    async def follow(self, pieces: Generator[T, None, None]) -> AsyncIterator[T]:
        """What comes of a generator, however long it takes; one thread as long as it runs. Raises Busy if half of the
        threads do that already. Whoever goes away ends it at its next piece, and only then the thread is free."""
        if self._followed >= self._threads // 2:
            raise Busy(f"{self._followed} logs are followed already; close one, or read it without follow")
        with self._lock:
            self._followed += 1
        turn: Future[object] | None = None
        try:
            while True:
                turn = self._pool.submit(next, pieces, _END)
                if (piece := await asyncio.wrap_future(turn)) is _END:
                    return
                yield piece  # type: ignore[misc]
        finally:
            # whoever went away has cancelled the wait, not the thread
            if turn is None:
                self._leave(pieces)
            else:
                turn.add_done_callback(lambda _: self._leave_soon(pieces))

    def _leave_soon(self, pieces: Generator[T, None, None]) -> None:
        with suppress(RuntimeError):  # the service is being closed
            self._pool.submit(self._leave, pieces)

    def _leave(self, pieces: Generator[T, None, None]) -> None:
        try:
            pieces.close()
        finally:
            with self._lock:
                self._followed -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
