"""A submitted run that is under way, as the orchestrator keeps it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cluster.jobs import Job
from pipelines.runs import RunStatus
from pipelines.service.known import KnownRun
from pipelines.service.submission import RunState, Submission, state_of


@dataclass
class Entry:
    """A submitted run without an outcome. `lock` is held by whoever changes it. `begun`: the job whose driver was
    seen."""

    id: str
    name: str
    submission: Submission
    status: RunStatus
    job: Job | None = None
    looked: float = 0.0
    asked_to_stop: float = 0.0
    refusals: int = 0
    waits_for: str = ""
    begun: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def known(self) -> KnownRun:
        return KnownRun(self.id, self.name, self.status, self.submission)

    def state(self, now: float) -> RunState:
        return state_of(self.submission, self.status, self.job, lost=self.status.is_lost(now), now=now)
