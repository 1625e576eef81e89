"""What is known of a run, and how a list shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from cluster.jobs import Job
from cluster.storage import FileStat
from pipelines.runs import RunStatus
from pipelines.service.submission import RunState, Submission, state_of


@dataclass(frozen=True)
class RunRow:
    """A run in a list. Times are seconds since the epoch; `stage` is what it is at."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(json_schema_serialization_defaults_required=True)

    id: str
    name: str
    state: RunState
    created: float
    started: float | None = None
    ended: float | None = None
    stage: str = ""
    error: str = ""
    until: str | None = None
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    waits_for: str = ""


@dataclass(frozen=True)
class KnownRun:
    """What the store has of a run. `summary` and `copy` are what was listed in the flat folder when it was read."""

    id: str
    name: str
    status: RunStatus
    submission: Submission | None
    summary: FileStat | None = None
    copy: FileStat | None = None

    @property
    def is_final(self) -> bool:
        """Nobody changes it any more, without changing a file of the flat folder."""
        return self.status.state in ("done", "failed") and (self.submission is None or bool(self.submission.outcome))

    def row(self, now: float, job: Job | None = None, waits_for: str = "") -> RunRow:
        """`job` is the submission's, if it is known, and `waits_for` why it is queued."""
        status, asked = self.status, self.submission
        state = state_of(asked, status, job, lost=status.is_lost(now), now=now)
        stage = next((name for name, each in status.stages.items() if each.state == "running"), "")
        return RunRow(
            self.id,
            self.name,
            state,
            status.created,
            status.started,
            status.ended if asked is None or asked.ended is None else asked.ended,
            stage if state in ("running", "stopping") else "",
            (asked.error if asked is not None else "") or (status.error if state != "running" else ""),
            status.until,
            asked.priority if asked is not None else 0,
            dict(asked.tags) if asked is not None else {},
            waits_for if state == "queued" else "",
        )
