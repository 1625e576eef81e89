"""Calls that may hang, made in threads of their own, so that nobody waits for them for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Raises what the function raises, and Busy if it takes too long."""
        future = self._pool.submit(function, *arguments)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except TimeoutError as error:
            if future.done() and not future.cancelled():
                raise
            raise Busy(f"it did not end in {self._seconds:g} s: the store or the cluster does not answer") from error

    async def follow(self, pieces: Iterator[T]) -> AsyncIterator[T]:
        """What comes of an iterator, however long it takes; one thread as long as it runs. Raises Busy if half of the
        threads do that already."""
        if self._followed >= self._threads // 2:
            raise Busy(f"{self._followed} logs are followed already; close one, or read it without follow")
        self._followed += 1
        try:
            loop = asyncio.get_running_loop()
            while (piece := await loop.run_in_executor(self._pool, next, pieces, _END)) is not _END:
                yield piece  # type: ignore[misc]
        finally:
            self._followed -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
