"""What the service tells of a run (pipelines/webhook.py), and when it is told.

    run.queued     it was submitted, or resumed
    run.started    its driver has begun; a job that the cluster has and has not begun is not there yet
    run.done, run.failed, run.stopped, run.lost    its submission has got that outcome

Each is told after the store has it, and once in a try. The record of what was told is the process: what a service that
is killed had written and not told is never told, and the next one does not say again that a driver began which it
finds at work. It tells of every end that it is the one to write.
"""

from __future__ import annotations

from typing import Literal

from pipelines.service.known import KnownRun
from pipelines.service.submission import Outcome
from pipelines.webhook import Event

Change = Literal["queued", "started"] | Outcome
"""Of the outcomes those that are one: never the empty one."""


def event_of(run: KnownRun, change: Change) -> Event:
    """`run` as it is after the change; it was submitted."""
    asked, status = run.submission, run.status
    assert asked is not None and change, "only what was submitted and has changed is told of"
    is_this_try = bool(asked.job_id) and status.job == asked.job_id
    return Event(
        f"run.{change}",  # type: ignore[arg-type]
        run.id,
        run.name,
        "running" if change == "started" else change,
        queued=asked.submitted,
        started=status.started if is_this_try else None,
        ended=asked.ended,
        error=asked.error or None,
    )
