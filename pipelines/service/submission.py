"""What was asked of the service: a run's `submission.json`, and the state that follows from it.

The service alone writes `submission.json`, the driver alone `status.json` (pipelines/runs.py). A submission holds its
job's id before that job is submitted: a service that was killed in between submits the same id again, which Ray takes
once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from pydantic import ConfigDict

from cluster.jobs import Job
from pipelines.runs import INTERRUPTED, LOST_AFTER_SECONDS, RunStatus, typed

LEAST_PRIORITY, MOST_PRIORITY = -100, 100
MAX_TAGS, MAX_TAG_LENGTH = 20, 64

RunState = Literal["queued", "starting", "running", "stopping", "stopped", "done", "failed", "lost"]
Outcome = Literal["", "stopped", "done", "failed", "lost"]
STATES: tuple[RunState, ...] = get_args(RunState)
OVER: frozenset[RunState] = frozenset(("stopped", "done", "failed", "lost"))
"""States in which nothing of the run is under way. All but `done` can be resumed."""


@dataclass
class Submission:
    """Times are seconds since the epoch.

    `until`, `from_stage`, `force` and `keep` are what `caravan run` calls so. Of the waiting runs the one with the
    highest `priority` is first. `needs` are amounts by resource (pipelines/service/needs.py), `modules` what workers
    must get to import besides our packages. `job_id` is that of the latest of `tries`, empty while the run waits.
    `outcome` is how the latest try ended, empty before it has.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(json_schema_serialization_defaults_required=True)

    until: str | None = None
    from_stage: str | None = None
    force: tuple[str, ...] = ()
    keep: bool = False
    priority: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    needs: dict[str, float] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    submitted: float = 0.0
    tries: int = 0
    job_id: str = ""
    stop_asked: float | None = None
    outcome: Outcome = ""
    error: str = ""
    ended: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        if not LEAST_PRIORITY <= self.priority <= MOST_PRIORITY:
            raise ValueError(f"priority={self.priority} is not from {LEAST_PRIORITY} to {MOST_PRIORITY}")
        if len(self.tags) > MAX_TAGS:
            raise ValueError(f"tags: {len(self.tags)} of them; use at most {MAX_TAGS}")
        for part in (part for tag in self.tags.items() for part in tag):
            if not 0 < len(part) <= MAX_TAG_LENGTH or not part.isprintable() or "=" in part:
                raise ValueError(
                    f"tags: {part[:80]!r} is no tag; use 1 to {MAX_TAG_LENGTH} printable characters, no '='"
                )

    @classmethod
    def from_json(cls, value: Any) -> Submission:
        """Raises TypeError or ValueError for anything but a submission."""
        if not isinstance(value, Mapping):
            raise TypeError(f"{type(value).__name__} is no submission")
        known = {item.name for item in fields(cls)}
        if unknown := value.keys() - known:
            raise TypeError(f"unknown keys {', '.join(sorted(unknown))}")
        return typed(cls, dict(value))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "force": list(self.force), "modules": list(self.modules)}

    def begin_try(self, run_id: str) -> None:
        """Gives the run a new job's id, to be written before the job is submitted."""
        self.tries += 1
        self.job_id = run_id if self.tries == 1 else f"{run_id}-{self.tries}"

    def queue_again(self, now: float) -> None:
        """The run waits for its next try."""
        self.submitted, self.job_id, self.stop_asked = now, "", None
        self.outcome, self.error, self.ended = "", "", None

    @property
    def mark(self) -> dict[str, str]:
        """What the job is given, by which it is known as this submission's: a run that was deleted may have had the
        same ids."""
        return {"caravan_submitted": repr(self.submitted)}

    def owns(self, job: Job, run_id: str) -> bool:
        """Whether that is the job of the latest try of this submission, which is the run's of that id."""
        return (job.id, job.run_id) == (self.job_id, run_id) and self.mark.items() <= job.metadata.items()

    def driver_command(self, run_id: str, store_uri: str) -> str:
        """The shell command of the run's driver. Where it begins and ends is in the run's own status, and what was to
        be made anew is of a new generation already (pipelines/generations.py)."""
        keep = ["--keep"] if self.keep else []
        return shlex.join(["python", "-m", "pipelines.cli", "resume", run_id, "--store", store_uri, *keep])


def state_of(submission: Submission | None, status: RunStatus, job: Job | None, *, lost: bool, now: float) -> RunState:
    """The state of a run.

    Args:
        submission: None for a run that was started without the service.
        job: the submission's job; None if the cluster has none of that id, or was not asked.
        lost: `status.is_lost(now)`, which looks at this machine's processes.
    """
    if submission is None or _driven_by_hand(submission, status):
        return _state_of_driver(status, lost, now)
    if submission.outcome:
        return submission.outcome
    if not submission.job_id:
        return "stopped" if submission.stop_asked is not None else "queued"
    begun = status.job == submission.job_id
    if job is not None and job.is_over:
        return _state_at_end(submission, status if begun else None, job)
    if begun and (job is None or status.state != "running"):
        return _state_without_job(submission, status, lost)
    if submission.stop_asked is not None:
        return "stopping"
    return "running" if begun else "starting"


def outcome_error(submission: Submission, status: RunStatus, job: Job | None, state: RunState) -> str:
    """One line on why a run that is over failed or was lost; empty for the others."""
    if state not in ("failed", "lost"):
        return ""
    if status.job == submission.job_id and status.state == "failed":
        return status.error
    said = _in_one_line(job.message) if job is not None else ""
    if status.job == submission.job_id:
        return f"its driver ended without a word{f': {said}' if said else ''}; resume it"
    return f"its driver did not begin{f': {said}' if said else ''}"


def _in_one_line(message: str) -> str:
    """Ray's word on a job: what happened, and of the log that may follow it the last line."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines() if line.strip()]
    if len(lines) < 2:
        return "".join(lines)
    return f"{lines[0].partition(', last available logs')[0].rstrip(':')}: {lines[-1]}"


def _driven_by_hand(submission: Submission, status: RunStatus) -> bool:
    """Somebody resumed the run without the service, while it waited or after its latest try was over."""
    if status.started is None or status.job:
        return False
    if submission.outcome:
        return submission.ended is not None and status.started > submission.ended
    return not submission.job_id and status.started > submission.submitted


def _state_of_driver(status: RunStatus, lost: bool, now: float) -> RunState:
    if status.state == "running":
        return "lost" if lost else "running"
    if status.state in ("done", "skipped"):
        return "done"
    if status.state == "failed":
        return "stopped" if status.error == INTERRUPTED else "failed"
    return "lost" if now - status.created > LOST_AFTER_SECONDS else "starting"


def _state_without_job(submission: Submission, status: RunStatus, lost: bool) -> RunState:
    """What the driver's own record says, of a job that is not known or about to end."""
    if status.state == "running":
        if lost:
            return "stopped" if submission.stop_asked is not None else "lost"
        return "stopping" if submission.stop_asked is not None else "running"
    return _ended_as(submission, status)


def _state_at_end(submission: Submission, status: RunStatus | None, job: Job) -> RunState:
    """`status` is None if the driver of this try never began."""
    if status is not None and status.state in ("done", "failed"):
        return _ended_as(submission, status)
    if submission.stop_asked is not None or job.status == "STOPPED":
        return "stopped"
    if job.status == "SUCCEEDED":
        return "done"
    return "failed" if status is None else "lost"


def _ended_as(submission: Submission, status: RunStatus) -> RunState:
    if status.state == "failed":
        return "stopped" if submission.stop_asked is not None or status.error == INTERRUPTED else "failed"
    return "done"
