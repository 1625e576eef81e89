"""A rank that hangs says where, and ends.

A collective that one rank never joins holds all the others, for ever or for a time-out of half an hour, and nothing
tells why. So each rank has a thread that is told of every step; when none has ended for too long, it writes down what
every thread of the process is doing and ends the process, and whoever started it starts anew.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

EXIT_CODE = 75
"""Of a process that the watchdog ended (EX_TEMPFAIL: another try may succeed)."""

_REPORT_SECONDS = 20.0
_GRACE_SECONDS = 5.0
_LOOKS = 20
_SUSPENDED_SECONDS = 2.0


class Watchdog:
    """Guards the block that it is entered for.

    Who holds the interpreter's lock for as long keeps this thread from running too: then Python's own fault handler,
    which needs no lock, writes the stacks to stderr and ends the process. Time during which the process was suspended
    does not count, up to `seconds` and 25 more: the fault handler cannot tell that from a lock that is held.

    Args:
        seconds: the longest time between two beats; 0 guards nothing.
        report: is given the stacks, which stderr has by then; gets 20 s, after which the process ends without it.
        leave: ends the process; other ranks have 5 s before it to report too, since the first that ends takes all.
    """

    def __init__(
        self,
        seconds: float,
        report: Callable[[str], None] = lambda stacks: None,
        leave: Callable[[], None] = lambda: os._exit(EXIT_CODE),
    ) -> None:
        self._seconds = seconds
        self._report = report
        self._leave = leave
        self._last_beat = time.monotonic()
        self._paused = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Something has moved."""
        self._last_beat = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """`time.sleep`, for one who waits on purpose."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.beat()
            time.sleep(min(left, self._seconds / 4 or left))
        self.beat()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what may take as long as it needs and has time limits of its own, such as a download."""
        self._paused = True
        try:
            yield
        finally:
            self.beat()
            self._paused = False

    def __enter__(self) -> Self:
        if self._seconds > 0:
            self.beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        interval = min(1.0, self._seconds / _LOOKS)
        looked = time.monotonic()
        while True:
            faulthandler.dump_traceback_later(self._seconds + _REPORT_SECONDS + _GRACE_SECONDS, exit=True)
            if self._stop.wait(interval):
                return
            now = time.monotonic()
            if now - looked > interval + _SUSPENDED_SECONDS:
                self._last_beat += now - looked
            looked = now
            if now - self._last_beat > self._seconds and not self._paused:
                self._end()
                return

    def _end(self) -> None:
        stacks = f"no step ended for {self._seconds:g} s; process {os.getpid()} is doing this:\n\n{all_stacks()}"
        print(stacks, file=sys.stderr, flush=True)
        reporter = threading.Thread(target=self._report, args=(stacks,), name="watchdog-report", daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)
        time.sleep(_GRACE_SECONDS)
        self._leave()


def all_stacks() -> str:
    """The stack of every Python thread of this process, the main thread first."""
    main = threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: (item[0] != main, names.get(item[0]) or ""))
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
    )
