"""asyncio in virtual time: nobody waits, the clock jumps to the next timer.

An event loop asks its selector to wait for I/O until the next timer is due. Ours has no I/O to wait for: it moves the
clock by that time and returns at once. So `loop.time`, `asyncio.sleep`, timeouts and call_later all run in virtual
time, faster than the clock on the wall, and in the same order every time.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits for another, and no timer is set."""


class _ClockSelector(selectors.SelectSelector):
    """Where the loop would sleep, time passes. The loop's own wake-up socket is registered, and never ready."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("every task waits for another and no timer is set")
        self.now += max(0.0, timeout)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and stands still while code runs."""

    def __init__(self) -> None:
        self._selector_clock = _ClockSelector()
        super().__init__(self._selector_clock)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._selector_clock.now

    def block(self, seconds: float) -> None:
        """Lets time pass as code that blocks the loop would: whatever is due meanwhile comes late."""
        self._selector_clock.now += seconds


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in virtual time. Raises Deadlock when it can never end."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
