"""Whether the engine gets on with its work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StepWatch:
    """Notices a step that does not end, and work that nobody steps through.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()

    def progressed(self) -> None:
        """A step has ended, or the first work has come."""
        self._since = self._clock()

    def complaint(self, thread: threading.Thread | None, stuck_after_s: float) -> str | None:
        """What is wrong with an engine that has work; None when nothing is. `thread`: that is to step, if any."""
        if thread is not None and not thread.is_alive():
            return "the step thread is gone"
        waited = self._clock() - self._since
        return f"no step has ended for {waited:.0f} s" if waited > stuck_after_s else None
