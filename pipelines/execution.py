"""Where a stage's try runs, and how it is ended early. The executor that uses Ray is pipelines/ray_execution.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from cluster.storage import JSON
from pipelines.stage import Event, GraphError, Resources, Work


class WorkerLost(RuntimeError):
    """The process that tried a stage is gone, and said nothing: killed, out of memory, or its node went."""


class Ended(RuntimeError):
    """A try was ended before its time, as it was asked to."""


class Executor(Protocol):
    """Runs tries, several at once, each in the thread that asks for it.

    `end_seconds`: how long after being asked to it has certainly ended a try; 0 if it cannot.
    """

    end_seconds: float

    def capacity(self) -> Resources | None:
        """What the stages that are tried at the same time may take together; None for no limit."""
        ...

    def check(self, work: Work) -> None:
        """Raises GraphError if it cannot do what the stage asks for."""
        ...

    def execute(self, work: Work, on_event: Callable[[Event], None], end: threading.Event) -> dict[str, JSON]:
        """`work.perform(on_event)`: returns what that does, and raises what that does.

        Once `end` is set the try is asked to clear up, and after a while killed. Raises Ended then, and WorkerLost.
        `on_event` is called from whatever thread.
        """
        ...


class Here:
    """In a thread of this process, for small work: it takes no account of resources, and cannot be ended early."""

    end_seconds = 0.0

    def capacity(self) -> None:
        return None

    def check(self, work: Work) -> None:
        if work.stage.tries.timeout is not None:
            raise GraphError(
                f"stage {work.stage.name!r} has a time-out, which needs a process of its own: run it on Ray"
            )

    def execute(self, work: Work, on_event: Callable[[Event], None], end: threading.Event) -> dict[str, JSON]:
        return work.perform(on_event)
