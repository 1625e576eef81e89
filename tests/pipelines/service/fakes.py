"""A cluster that only keeps a list: jobs that begin and end when the test says so, and room as the test sets it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from fastapi.testclient import TestClient

from cluster.head import ClusterError
from cluster.jobs import Job, JobExists
from cluster.storage import Store
from pipelines.runs import Run
from pipelines.service.client import ServiceClient
from pipelines.service.loop import Orchestrator
from pipelines.service.resources import Room

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"sources": [{"uri": "stdlib"}], "max_bytes": 100_000},
    "tokenizer": {"vocab_size": 300},
    "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
    "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32, "workers": 2},
}


@dataclass
class FakeCluster:
    """Jobs API and resources in one. `error` makes every call fail; `before` is called before each change."""

    store: Store
    room: Room = field(default_factory=lambda: Room({"CPU": 4.0, "GPU": 0.0}, {}))
    jobs: dict[str, Job] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    error: str = ""
    before: Callable[[str], None] = lambda what: None
    stops: list[str] = field(default_factory=list)

    # -- what the orchestrator calls

    def list(self) -> list[Job]:
        self._check()
        return [*self.jobs.values()]

    def submit(
        self, entrypoint: str, run_id: str, job_id: str, modules: Sequence[str] = (), metadata: Mapping[str, str] = {}
    ) -> None:
        self._check()
        if job_id in self.jobs:
            raise JobExists(f"the cluster has a job {job_id!r} already")
        self.before(f"submit {job_id}")
        self.jobs[job_id] = Job(
            job_id, run_id, "PENDING", "", entrypoint, 1.0, None, dict(metadata), f"driver-{job_id}"
        )
        self.commands[job_id] = entrypoint
        self.before(f"submitted {job_id}")

    def ask_to_stop(self, job_id: str) -> None:
        self._check()
        self.before(f"stop {job_id}")
        self.stops.append(job_id)

    def logs(self, job_id: str, *, follow: bool = False) -> Generator[str, None, None]:
        self._check()
        yield f"log of {job_id}\n"
        if follow:
            yield "and more\n"

    def look(self, drivers) -> Room:
        self._check()
        return self.room

    def _check(self) -> None:
        if self.error:
            raise ClusterError(self.error)

    # -- what the test does

    def set(self, job_id: str, status: str, message: str = "") -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], status=status, message=message)

    def begin(self, job_id: str) -> None:
        """The driver begins."""
        self.set(job_id, "RUNNING")
        run = Run.open(self.store, self.jobs[job_id].run_id)
        run.status.state, run.status.job, run.status.error = "running", job_id, ""
        run.status.started = run.status.heartbeat = 1e12
        run.status.host = "elsewhere"
        run.save()

    def end(self, job_id: str, state: str = "done", error: str = "") -> None:
        """The driver ends by itself, as it should."""
        run = Run.open(self.store, self.jobs[job_id].run_id)
        run.status.state, run.status.error, run.status.ended = state, error, 2e12  # type: ignore[assignment]
        run.save()
        self.set(job_id, "SUCCEEDED" if state == "done" else "FAILED")

    def live(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.is_over]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def states(orchestrator: Orchestrator) -> dict[str, str]:
    return {row.id: row.state for row in orchestrator.rows()}


def client_of(application: TestClient, token: str | None = None) -> ServiceClient:
    """A client of an application, without a socket in between."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = application.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(found.status_code, content=found.content, headers=dict(found.headers))

    return ServiceClient("http://127.0.0.1:1/", token, httpx.MockTransport(answer))
