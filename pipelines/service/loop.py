"""The orchestrator: reads what was asked and what has become of it, decides, acts, and begins again.

All state is in the store, so that a service that is killed at any point loses nothing: the next one reads the
submissions that have no outcome, finds the jobs that they name and goes on. What it does to the world it writes down
first:

    a run is to start      the submission gets a job's id; then the job of that id is submitted, again and again until
                           the cluster has one. Ray takes an id once, so there are never two.
    a run is to stop       the submission says so; then the job is asked to stop until it is over.
    a run is over          the submission gets its outcome, and nothing is done for it any more.

A run whose driver died is `lost`, and waits for somebody to resume it. Runs without a submission are listed and never
touched. One thread acts (`tick`), another lists the store; callers' threads only write submissions. A store or a Jobs
API that fails stops what needs it and is tried again at the next tick; `health` says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, cast

from cluster.head import ClusterError
from cluster.jobs import Job, JobExists, JobsApi
from cluster.storage import StorageError, Store
from pipelines.generations import make_anew
from pipelines.runs import new_run_id
from pipelines.service.entry import Entry
from pipelines.service.errors import Busy, UnknownRun, WrongState
from pipelines.service.events import Change, event_of
from pipelines.service.index import RunIndex, delete_run, find_run, read_run, write_submission
from pipelines.service.intake import Accepted, RunRequest, accept, create_run
from pipelines.service.known import KnownRun, RunRow
from pipelines.service.policy import RecipePolicy
from pipelines.service.problems import Problems
from pipelines.service.queue import QueuePolicy, Running, Waiting, decide
from pipelines.service.resources import Resources, Room
from pipelines.service.submission import OVER, Outcome, RunState, outcome_error
from pipelines.webhook import Event

_STATUS_SECONDS = 2.0
"""A driver's status is read again after so long, or when its job changes."""
_STOP_AGAIN_SECONDS = 15.0
_SUBMIT_TRIES = 30
"""After so many refusals in a row, by an API that answers otherwise, a run has failed."""
_LOCK_SECONDS = 15.0

_log = logging.getLogger(__name__)


class Orchestrator:
    """`start` makes it work until `close`; without, `load` and `tick` do one step each. Thread-safe.

    `on_event` is told what happens to submitted runs (events.py), while locks are held: it returns at once, and raises
    nothing.
    """

    def __init__(
        self,
        store: Store,
        jobs: JobsApi,
        resources: Resources,
        *,
        queue: QueuePolicy | None = None,
        recipes: RecipePolicy | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        clock: Callable[[], float] = time.time,
        tick_seconds: float = 1.0,
        list_seconds: float = 2.0,
    ) -> None:
        self.store = store
        self.jobs = jobs
        self._resources = resources
        self._queue = queue or QueuePolicy()
        self._recipes = recipes or RecipePolicy(store.uri)
        self._on_event = on_event
        self._clock = clock
        self._tick_seconds, self._list_seconds = tick_seconds, list_seconds
        self._index = RunIndex(store, clock)
        self._entries: dict[str, Entry] = {}
        self._making: set[str] = set()
        self._room: Room | None = None
        self._problems = Problems()
        self._ticked = clock()
        self._loaded = False
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    # -- its own life

    def start(self) -> None:
        for name, work in (("tick", self._tick_forever), ("list", self._list_forever)):
            self._threads.append(threading.Thread(target=work, name=f"orchestrator-{name}", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Ends the threads; runs go on."""
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def _tick_forever(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            try:
                self.tick()
            except Exception:  # one defect must not end the service of all other runs
                _log.exception("a tick of the orchestrator failed")
            self._wake.wait(self._tick_seconds if self._entries or not self._loaded else 10 * self._tick_seconds)

    def _list_forever(self) -> None:
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                with suppress(StorageError):  # a tick meets it too, or has nothing to do with the store
                    self._index.refresh()
            except Exception:  # as of a tick
                _log.exception("a look at the list of runs failed")
            # a store that is slow to list is asked more rarely
            self._closed.wait(max(self._list_seconds, 10 * (time.monotonic() - began)))

    def load(self) -> None:
        """Takes over what an earlier service left. Raises StorageError."""
        self._index.refresh()
        with self._lock:
            for run in self._index.known():
                if run.submission is not None and not run.submission.outcome:
                    entry = Entry(run.id, run.name, run.submission, run.status, begun=run.status.job)
                    self._entries.setdefault(run.id, entry)
            self._loaded = True

    # -- what it does of itself

    def tick(self) -> None:
        """One look at everything that is under way, and what follows from it."""
        self._ticked = self._clock()
        with self._problems.collected():
            self._step()

    def _step(self) -> None:
        if not self._loaded:
            with self._problems.of("store"):
                self.load()
        entries = self._active()
        if not self._loaded or not entries:
            return
        jobs: dict[str, Job] | None = None
        with self._problems.of("jobs"):
            jobs = {job.id: job for job in self.jobs.list()}
        if jobs is None:
            return
        for entry in entries:
            if entry.submission.job_id:
                with self._problems.of("store", entry.id), entry.lock:
                    self._reconcile(entry, jobs.get(entry.submission.job_id))
        self._start_waiting()

    def _reconcile(self, entry: Entry, job: Job | None) -> None:
        """`job`: the cluster's of the id that the submission had when it was listed."""
        submission, now = entry.submission, self._clock()
        if submission.outcome or not submission.job_id:
            return
        if job is not None and not submission.owns(job, entry.id):
            job = None
        changed = (job and job.status) != (entry.job and entry.job.status)
        entry.job = job
        if (changed or job is None or abs(now - entry.looked) >= _STATUS_SECONDS) and not self._look(entry):
            return
        if entry.begun != submission.job_id == entry.status.job:
            entry.begun = submission.job_id
            self._tell("started", entry)
        state = entry.state(now)
        if state in OVER:
            self._conclude(entry, state)
        elif job is None and entry.status.job != submission.job_id:
            if submission.stop_asked is not None:
                self._conclude(entry, "stopped")
            else:
                self._submit(entry)
        elif job is not None and submission.stop_asked is not None:
            self._end_job(entry, job)

    def _end_job(self, entry: Entry, job: Job) -> None:
        now = self._clock()
        if abs(now - entry.asked_to_stop) >= _STOP_AGAIN_SECONDS:
            with self._problems.of("jobs"):
                self.jobs.ask_to_stop(job.id)
                entry.asked_to_stop = now

    def _look(self, entry: Entry) -> bool:
        """Reads the driver's status. False if somebody has deleted the run's folder: then its job is ended too."""
        found = read_run(self.store, entry.id)
        if found is not None:
            entry.status, entry.looked = found.status, self._clock()
            return True
        if entry.job is not None and not entry.job.is_over:
            self._end_job(entry, entry.job)
        else:
            self._leave(entry)
            self._index.forget(entry.id)
        return False

    def _conclude(self, entry: Entry, state: RunState, error: str | None = None) -> None:
        """The run is over; `error` is what its status and job say unless it is given."""
        if error is None:
            error = outcome_error(entry.submission, entry.status, entry.job, state)
        ended = entry.status.ended if entry.status.job == entry.submission.job_id else None
        ended = max(ended or self._clock(), entry.submission.submitted)
        over = replace(entry.submission, outcome=cast(Outcome, state), error=error, ended=ended)
        write_submission(self.store, entry.id, over)
        entry.submission = over
        self._index.put(entry.known())
        self._tell(over.outcome, entry)
        self._leave(entry)
        _log.info("run %s is %s %s", entry.id, state, error)

    def _submit(self, entry: Entry) -> None:
        """Has the cluster start the job that the submission names."""
        submission = entry.submission
        command = submission.driver_command(entry.id, self.store.uri)
        try:
            self.jobs.submit(command, entry.id, submission.job_id, submission.modules, submission.mark)
            entry.refusals = 0
        except JobExists:
            # ours, from before a service was killed: the next list has it. Else another run's, or of a deleted one
            if not any(submission.owns(job, entry.id) for job in self.jobs.list()):
                self._begin_try(entry)
        except (ClusterError, ValueError) as error:
            entry.refusals += 1
            self._problems.note("jobs", str(error))
            if isinstance(error, ValueError) or entry.refusals >= _SUBMIT_TRIES:
                self._conclude(entry, "failed", f"its job was refused: {error}")

    def _begin_try(self, entry: Entry) -> None:
        begun = replace(entry.submission)
        begun.begin_try(entry.id)
        write_submission(self.store, entry.id, begun)
        entry.submission, entry.job, entry.refusals, entry.waits_for = begun, None, 0, ""

    def _start_waiting(self) -> None:
        """One after the other: to start a job takes a second, in which a more urgent run may have come."""
        tried: set[str] = set()
        while (entry := self._next(tried)) is not None:
            tried.add(entry.id)
            with self._problems.of("store", entry.id), entry.lock:
                self._begin(entry)

    def _next(self, tried: set[str]) -> Entry | None:
        """The run to start now, of those that were not `tried` in this tick; and what the others wait for."""
        entries = self._active()
        waiting = {entry.id: entry for entry in entries if not entry.submission.job_id}
        started = [entry for entry in entries if entry.submission.job_id]
        room = None
        with self._problems.of("resources"):
            room = self._room = self._resources.look([entry.job.driver for entry in started if entry.job is not None])
        if room is None or not waiting:
            return None
        decision = decide(
            [Waiting(e.id, e.submission.needs, e.submission.submitted, e.submission.priority, e.submission.tags)
             for e in waiting.values()],
            [Running(e.id, e.submission.needs, e.submission.tags) for e in started],
            room.capacity,
            room.others,
            self._queue,
            self._clock(),
        )  # fmt: skip
        for run_id, why in decision.waits.items():
            waiting[run_id].waits_for = why
        return next((waiting[run_id] for run_id in decision.start if run_id not in tried), None)

    def _begin(self, entry: Entry) -> None:
        if entry.submission.job_id or entry.submission.outcome or not self._look(entry):
            return  # stopped or deleted meanwhile
        state = entry.state(self._clock())
        if state == "queued":
            self._begin_try(entry)
            self._submit(entry)
        elif state in OVER:
            self._conclude(entry, state)
        else:
            entry.waits_for = "somebody drives it without the service"

    # -- what it is asked

    def submit(self, request: RunRequest) -> RunRow:
        """Queues a run. Raises RequestRefused, WrongState if there is a run of that id, StorageError."""
        accepted = self.check(request)
        run_id = new_run_id() if request.run_id is None else request.run_id
        with self._alone(run_id):
            if run_id in self._entries:
                raise WrongState(f"run {run_id!r} exists already; resume it, or choose another id")
            asked = accepted.submission
            run = create_run(self.store, run_id, accepted)
            try:
                make_anew(accepted.graph, asked.force, self.store, run_id)
                write_submission(self.store, run_id, asked)
            except StorageError:
                with suppress(StorageError):  # the first error is the one to report
                    delete_run(self.store, run_id)
                raise
            return self._enter(Entry(run_id, run.name, asked, run.status))

    def check(self, request: RunRequest) -> Accepted:
        """What would be queued; nothing is. Raises RequestRefused and StorageError."""
        return accept(request, self.store, self._recipes, self._clock())

    def stop(self, run_id: str) -> RunRow:
        """Takes a run out of the queue, or ends its driver; `resume` goes on with it.

        Raises UnknownRun, WrongState, Busy, StorageError.
        """
        entry = self._entries.get(run_id)
        if entry is None:
            self._check_loaded()
            run = find_run(self.store, run_id)
            if run.submission is None:
                raise WrongState(f"run {run_id!r} was not submitted to this service; end the process that drives it")
            raise WrongState(f"run {run_id!r} is {run.row(self._clock()).state} already")
        with self._held(entry):
            asked, now = entry.submission, self._clock()
            if asked.outcome:
                raise WrongState(f"run {run_id!r} is {asked.outcome} already")
            if asked.job_id:
                stopping = replace(asked, stop_asked=asked.stop_asked or now)
                write_submission(self.store, run_id, stopping)
                entry.submission, entry.asked_to_stop = stopping, 0.0
            else:
                entry.submission = replace(asked, stop_asked=now)
                try:
                    self._conclude(entry, "stopped")
                except StorageError:
                    entry.submission = asked
                    raise
        self._wake.set()
        return self._row(entry)

    def resume(self, run_id: str) -> RunRow:
        """Queues a run that has stopped, failed or was lost. Raises UnknownRun, WrongState, Busy, StorageError."""
        with self._alone(run_id):
            active = self._entries.get(run_id)
            if active is not None:
                state = active.state(self._clock())
                if state in OVER:
                    raise Busy(f"run {run_id!r} is {state}, which is not on record yet; try again")
                raise WrongState(f"run {run_id!r} is {state}; it goes on by itself")
            run = find_run(self.store, run_id)
            state = run.row(self._clock()).state
            if run.submission is None:
                raise WrongState(
                    f"run {run_id!r} was not submitted to this service; go on with it: caravan resume {run_id}"
                )
            if state not in OVER - {"done"}:
                raise WrongState(f"run {run_id!r} is {state}; only what stopped, failed or was lost is resumed")
            again = replace(run.submission)
            again.queue_again(self._clock())
            write_submission(self.store, run_id, again)
            return self._enter(Entry(run_id, run.name, again, run.status))

    def delete(self, run_id: str) -> None:
        """Removes the folder of a run that is over; its artifacts stay. Raises UnknownRun, WrongState, StorageError."""
        with self._alone(run_id):
            active = self._entries.get(run_id)
            state = (
                active.state(self._clock())
                if active is not None
                else find_run(self.store, run_id).row(self._clock()).state
            )
            if active is not None or state not in OVER:
                raise WrongState(f"run {run_id!r} is {state}; stop it first")
            delete_run(self.store, run_id)
            self._index.forget(run_id)

    def rows(self) -> list[RunRow]:
        """All runs, as of the last look at the store; what is under way as it is now. Raises Busy before the first."""
        self._check_loaded()
        with self._lock:
            entries = dict(self._entries)
        listed = [row for row in self._index.rows() if row.id not in entries]
        return listed + [self._row(entry) for entry in entries.values()]

    def find(self, run_id: str) -> tuple[RunRow, KnownRun]:
        """A run as it is now, read from the store. Raises UnknownRun and StorageError."""
        run = find_run(self.store, run_id)
        entry = self._entries.get(run_id)
        return (self._row(entry) if entry is not None else run.row(self._clock())), run

    def latest_job(self, run_id: str) -> str:
        """The id of the job that the cluster has of a run. Raises UnknownRun, StorageError and ClusterError."""
        run = find_run(self.store, run_id)
        own = [job for job in self.jobs.list() if job.run_id == run_id]
        if not own:
            began = "its log went with the cluster that it ran on" if run.status.job else "it was not started as a job"
            raise UnknownRun(f"run {run_id!r} has no log here: {began}")
        return own[-1].id

    def cluster(self) -> dict[str, Any]:
        """What the cluster has, who takes it, and who waits; as of the last tick that looked."""
        entries = self._active()
        room = self._room or Room({}, {})
        return {
            "capacity": dict(room.capacity),
            "others": dict(room.others),
            "running": {entry.id: entry.submission.needs for entry in entries if entry.submission.job_id},
            "waiting": {
                entry.id: {"needs": entry.submission.needs, "waits_for": entry.waits_for}
                for entry in entries
                if not entry.submission.job_id
            },
            "policy": asdict(self._queue),
        }

    def health(self) -> dict[str, Any]:
        """`ok` is false while something that it needs does not work; `problems` says what."""
        silent = self._clock() - self._ticked
        problems = self._problems.last()
        if silent > 30 + 10 * self._tick_seconds:
            problems["tick"] = f"it has been at one step for {silent:.0f} s: the store or the cluster does not answer"
        return {
            "service": "caravan",
            "store": self.store.uri,
            "ok": self._loaded and not problems,
            "problems": problems,
            "active": len(self._entries),
        }

    # -- inside

    def _check_loaded(self) -> None:
        if not self._loaded:
            raise Busy("the service has not read the store yet; try again, and see /api/health")

    def _active(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    def _enter(self, entry: Entry) -> RunRow:
        self._tell("queued", entry)
        with self._lock:
            self._entries[entry.id] = entry
        self._wake.set()
        return self._row(entry)

    def _leave(self, entry: Entry) -> None:
        with self._lock:
            self._entries.pop(entry.id, None)

    def _tell(self, change: Change, entry: Entry) -> None:
        self._on_event(event_of(entry.known(), change))

    def _row(self, entry: Entry) -> RunRow:
        return entry.known().row(self._clock(), entry.job, entry.waits_for)

    @contextmanager
    def _alone(self, run_id: str) -> Iterator[None]:
        """One caller at a time makes, resumes or deletes a run. Raises WrongState."""
        with self._lock:
            if run_id in self._making:
                raise WrongState(
                    f"run {run_id!r} is being changed by somebody else right now; look at it, then try again"
                )
            self._making.add(run_id)
        try:
            yield
        finally:
            with self._lock:
                self._making.discard(run_id)

    @contextmanager
    def _held(self, entry: Entry) -> Iterator[None]:
        if not entry.lock.acquire(timeout=_LOCK_SECONDS):
            raise Busy(f"run {entry.id!r} is being worked on, and that does not end; see /api/health")
        try:
            yield
        finally:
            entry.lock.release()
