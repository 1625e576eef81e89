"""Settings of the whole process that several blocks may want at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ProcessSetting:
    """On while at least one block wants it, whichever enters first and leaves last, in whatever threads.

    Args:
        turn_on: returns whether the setting is on now; when it is not, or raises, it has changed nothing.
        turn_off: called when the last block that has it on leaves.
    """

    def __init__(self, turn_on: Callable[[], bool], turn_off: Callable[[], None]) -> None:
        self._turn_on = turn_on
        self._turn_off = turn_off
        self._lock = threading.Lock()
        self._blocks = 0

    @contextmanager
    def on(self) -> Iterator[bool]:
        """Yields whether the setting is on."""
        with self._lock:
            held = self._blocks > 0 or self._turn_on()
            self._blocks += held
        try:
            yield held
        finally:
            with self._lock:
                self._blocks -= held
                if held and self._blocks == 0:
                    self._turn_off()
