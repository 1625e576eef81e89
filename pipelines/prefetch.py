"""Values made in a background thread, a few ahead of whoever takes them."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

JOIN_SECONDS = 10.0
"""To wait for a thread: one in the middle of a download cannot be stopped, and ends by itself after that."""


_running: weakref.WeakKeyDictionary[threading.Thread, Callable[[], None]] = weakref.WeakKeyDictionary()


def start_thread(
    name: str, target: Callable[..., None], arguments: tuple[Any, ...], stop: Callable[[], None]
) -> threading.Thread:
    """A daemon that `stop` ends, at the latest when the process exits: one that is still in pyarrow when the
    interpreter goes would abort it."""
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    _running[thread] = stop
    thread.start()
    return thread


@atexit.register
def _stop_all() -> None:
    running = [(thread, stop) for thread, stop in _running.items() if thread.is_alive()]
    for _, stop in running:
        stop()
    for thread, _ in running:
        thread.join(JOIN_SECONDS)


class Prefetch(Generic[T]):
    """`make(first)`, `make(first + 1)` and so on, of which up to `depth` are made in advance.

    What `make` raises, `next` raises in its turn; nothing is made after that. The thread ends with `close`, and when
    this object is collected. `next` raises RuntimeError once it is closed, for who waits in it too, and in a process
    that was forked, where there is no thread.
    """

    def __init__(self, make: Callable[[int], T], first: int, depth: int) -> None:
        self._queue: _Queue[T] = _Queue(depth)
        self._process = os.getpid()
        weakref.finalize(self, self._queue.stop)
        self._thread = start_thread("prefetch", _fill, (self._queue, make, first), self._queue.stop)

    def __next__(self) -> T:
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked from the one that prefetches; close the loader before the fork")
        return self._queue.take()

    def close(self) -> None:
        self._queue.stop()
        self._thread.join(JOIN_SECONDS)


class _Queue(Generic[T]):
    """What the thread and the taker share; the thread holds no more than this, so that the taker can be collected."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def put(self, value: T) -> bool:
        """Waits for room. False: nobody will take it."""
        with self._changed:
            self._ready.append(value)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
            return not self._stopped

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            if not self._ready:
                assert self._error is not None
                raise self._error
            self._changed.notify_all()
            return self._ready.popleft()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._error = self._error or RuntimeError("closed while a value was waited for")
            self._changed.notify_all()


def _fill(queue: _Queue[T], make: Callable[[int], T], number: int) -> None:
    try:
        while queue.put(make(number)):
            number += 1
    except BaseException as error:
        queue.fail(error)
