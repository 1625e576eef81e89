"""Driving a run: tries its stages when they are due, and keeps its status.

One thread, the caller's, decides and writes the status. Each try has a thread of its own, which looks whether the
stage is committed, waits for its turn if somebody else is at it, has it executed, and says how that ended.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.artifact import Artifact, Manifest
from cluster.condemn import settled
from cluster.storage import JSON, StorageError, Store
from pipelines.execution import Ended, Executor, Here, WorkerLost
from pipelines.generations import make_anew
from pipelines.graph import Graph
from pipelines.plan import Step, last_record, plan
from pipelines.runs import Run, StageStatus, one_line
from pipelines.schedule import Schedule
from pipelines.stage import Event, GraphError, Stage, StageResult, Work, kind_of
from pipelines.turn import await_turn, claimed

_LOOKS_AT_ONCE = 16
_LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class StageTimeout(RuntimeError):
    """A try of a stage ran longer than it may."""


def drive(
    graph: Graph,
    store: Store,
    run: Run,
    *,
    until: str | None = None,
    from_stage: str | None = None,
    executor: Executor | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    keep_going: bool = False,
) -> dict[str, StageResult]:
    """Run what is not committed yet, as far as `Graph.selected(until, from_stage)` goes, and keep the run's status.

    `executor` is `Here` by default.
    The error of the first stage that fails for good is recorded and goes on to the caller, once no stage is being tried
    any more; so does CorruptArtifact for a committed artifact whose manifest cannot be read. Raises GraphError.
    With `keep_going` the stages that do not need a failed one are run before that.
    `on_event` is called from the caller's thread.
    """
    return _Drive(
        graph, store, run, graph.selected(until, from_stage), executor or Here(), on_event, keep_going
    ).run_all()


def find_committed(
    graph: Graph, store: Store, selected: Sequence[Stage], look: Callable[[Artifact], Manifest | None] = settled
) -> dict[str, Manifest]:
    """Manifests, by stage, of what need not run: of the selected stages, and of what they need besides.

    `look` is for a run that has its keys on record; whoever only wants to know may take `Artifact.manifest`.
    """
    names = {stage.name for stage in selected if not stage.always} | {up for stage in selected for up in stage.upstream}

    def find(name: str) -> Manifest | None:
        try:
            return look(graph.artifact(store, name))
        except StorageError:  # whoever tries the stage will meet it again, and say so
            return None

    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        found = zip(names, pool.map(find, names), strict=True)
        return {name: manifest for name, manifest in found if manifest is not None}


def foresee(
    graph: Graph, store: Store, recipe_name: str, until: str | None, from_stage: str | None, force: Sequence[str]
) -> list[Step]:
    """What each stage of a run would do, and why; touches nothing. Raises GraphError and StorageError."""
    graph = make_anew(graph, force, store, run_id=None)
    selected = graph.selected(until, from_stage)
    committed = find_committed(graph, store, selected, Artifact.manifest)
    check_upstream(selected, committed)
    return plan(graph, selected, committed, force, last_record(store, recipe_name))


def check_upstream(selected: Sequence[Stage], committed: Collection[str]) -> None:
    """Raises GraphError if a stage that is to run needs one that is neither selected nor committed."""
    names = {stage.name for stage in selected}
    for stage in selected:
        for name in stage.upstream:
            if name not in names and name not in committed and stage.name not in committed:
                raise GraphError(
                    f"stage {stage.name!r} needs {name!r}, of which nothing is committed; run {name!r} first"
                )


@dataclass
class _Try:
    """One try of a stage, seen from the driver. Set `end` to end it; then `late` says whether its time was up."""

    stage: Stage
    end: threading.Event = field(default_factory=threading.Event)
    late: bool = False


@dataclass(frozen=True)
class _Finished:
    """How a try ended. `skipped`: the stage turned out to be committed."""

    attempted: _Try
    metadata: dict[str, JSON] | None = None
    skipped: bool = False
    error: BaseException | None = None


class _Drive:
    def __init__(
        self,
        graph: Graph,
        store: Store,
        run: Run,
        selected: Sequence[Stage],
        executor: Executor,
        on_event: Callable[[Event], None],
        keep_going: bool,
    ) -> None:
        self._keep_going = keep_going
        self._graph, self._store, self._run, self._selected = graph, store, run, selected
        self._executor, self._on_event = executor, on_event
        self._messages: queue.SimpleQueue[Event | _Finished] = queue.SimpleQueue()
        self._tries: dict[str, _Try] = {}
        self._results: dict[str, StageResult] = {}
        self._error: BaseException | None = None

    def run_all(self) -> dict[str, StageResult]:
        for stage in self._selected:
            self._executor.check(self._work(stage))
        self._begin_status()
        with self._run.driving():
            committed = find_committed(self._graph, self._store, self._selected)
            check_upstream(self._selected, committed)
            done = [stage.name for stage in self._selected if stage.name in committed]
            schedule = Schedule(self._selected, self._executor.capacity(), done, self._keep_going)
            for stage in self._selected:
                if manifest := committed.get(stage.name):
                    self._skip(stage, manifest.metadata)
            try:
                self._follow(schedule)
            except BaseException as error:
                self._interrupt(schedule, error)
                raise
            if self._error is not None:
                raise self._error
        return {stage.name: self._results[stage.name] for stage in self._selected}

    # -- the status

    def _begin_status(self) -> None:
        keys, status = self._graph.keys, self._run.status
        fresh = {stage.name: StageStatus(key=keys[stage.name]) for stage in self._selected}
        for stage in status.stages.values():  # of an earlier turn whose driver was killed
            stage.state = "pending" if stage.state == "running" else stage.state
        status.stages = {  # what an earlier turn of the run has to say of the other stages stays
            name: fresh.get(name) or status.stages[name]
            for name in self._graph.stages
            if name in fresh or name in status.stages
        }
        status.inputs = {name: keys[name] for stage in self._selected for name in stage.upstream if name not in fresh}

    def _skip(self, stage: Stage, metadata: dict[str, JSON]) -> None:
        status = self._run.status.stages[stage.name]
        now = time.time()
        status.state, status.started, status.ended, status.error = "skipped", status.started or now, now, ""
        self._results[stage.name] = StageResult("skipped", status.key, self._artifact(stage), metadata, 0.0)
        self._tell(Event(stage.name, "skipped", "committed already"))

    def _tell(self, event: Event) -> None:
        """A watcher that fails must not take the run with it."""
        try:
            self._on_event(event)
        except Exception:
            _log.warning("an event of stage %s could not be shown", event.stage, exc_info=True)

    # -- deciding

    def _follow(self, schedule: Schedule) -> None:
        self._run.save_or_warn()
        while not schedule.is_over:
            now = time.monotonic()
            for stage in schedule.due(now):
                self._try(stage)
            for name in schedule.overdue(now):
                self._tries[name].late = True
                self._tries[name].end.set()
            try:
                message = self._messages.get(timeout=schedule.wait(now))
            except queue.Empty:
                continue
            if isinstance(message, Event):
                self._heard(message, schedule)
            else:
                self._ended(message, schedule)

    def _heard(self, event: Event, schedule: Schedule) -> None:
        if event.stage not in self._tries:  # said before the try ended, and overtaken by that
            return
        status = self._run.status.stages[event.stage]
        if event.kind == "running":
            schedule.began(event.stage, time.monotonic())
            status.state, status.started, status.ended, status.error = "running", time.time(), None, ""
            self._run.save_or_warn()
        else:
            status.progress = event.message
        self._tell(event)

    def _ended(self, finished: _Finished, schedule: Schedule) -> None:
        stage = finished.attempted.stage
        del self._tries[stage.name]
        if finished.metadata is None:
            self._failed(finished, schedule)
            return
        schedule.succeeded(stage.name)
        self._succeeded(stage, finished.metadata, finished.skipped)

    def _succeeded(self, stage: Stage, metadata: dict[str, JSON], skipped: bool) -> None:
        if skipped:
            self._skip(stage, metadata)
            self._run.save_or_warn()
            return
        status = self._run.status.stages[stage.name]
        status.state, status.ended, status.error = "done", time.time(), ""
        self._run.save_or_warn()
        seconds = status.ended - (status.started or status.ended)
        self._results[stage.name] = StageResult("done", status.key, self._artifact(stage), metadata, seconds)
        self._tell(Event(stage.name, "done", seconds=seconds))

    def _failed(self, finished: _Finished, schedule: Schedule) -> None:
        name, error = finished.attempted.stage.name, finished.error
        if finished.attempted.late:
            limit = finished.attempted.stage.tries.timeout
            error = StageTimeout(f"stage {name!r} was ended after {limit:g} s; raise stages.{kind_of(name)}.timeout")
        assert error is not None
        if not isinstance(error, Exception):  # somebody wants this process to end
            schedule.stop()
        wait = schedule.failed(name, time.monotonic(), lost=isinstance(error, WorkerLost))
        status = self._run.status.stages[name]
        if wait is not None:
            status.state, status.progress = "pending", f"{one_line(error)}; another try in {wait:.0f} s"
            self._run.save_or_warn()
            self._tell(Event(name, "progress", status.progress))
            return
        self._record_failure(name, error)
        self._error = self._error or error

    def _record_failure(self, name: str, error: BaseException) -> None:
        status = self._run.status.stages[name]
        status.state, status.ended, status.error = "failed", time.time(), one_line(error)
        status.started = status.started or status.ended
        traceback = self._run.keep_traceback(name, error)
        seconds = status.ended - status.started
        self._tell(Event(name, "failed", status.error, seconds=seconds, traceback=traceback))

    def _interrupt(self, schedule: Schedule, error: BaseException) -> None:
        """Whoever drives was told to stop, or cannot go on: so is every try, and what it can take back, it does.

        The status says so first, for this process may be told again, or be killed, before they have all ended."""
        schedule.stop()
        for each in self._tries.values():
            each.end.set()
        for name in self._tries:
            self._record_failure(name, error)
        self._run.save_or_warn()
        deadline = time.monotonic() + self._executor.end_seconds
        with suppress(queue.Empty):
            while self._tries:
                message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
                if isinstance(message, _Finished):
                    stage = message.attempted.stage
                    del self._tries[stage.name]
                    if message.metadata is not None:  # it came to its end all the same
                        self._succeeded(stage, message.metadata, message.skipped)

    # -- trying

    def _try(self, stage: Stage) -> None:
        attempted = self._tries[stage.name] = _Try(stage)
        threading.Thread(target=self._attend, args=(attempted,), name=f"stage-{stage.name}", daemon=True).start()

    def _attend(self, attempted: _Try) -> None:
        try:
            finished = self._obtain(attempted)
        except BaseException as error:
            finished = _Finished(attempted, error=error)
        self._messages.put(finished)

    def _obtain(self, attempted: _Try) -> _Finished:
        work = self._work(attempted.stage)
        if work.artifact is None:
            return _Finished(attempted, self._execute(work, attempted))
        told = ""

        def wait(blocker: str) -> None:
            nonlocal told
            if attempted.end.wait(_LOOK_SECONDS):
                raise Ended(f"stage {work.stage.name!r} was ended")
            if blocker != told:
                told = blocker
                self._messages.put(Event(work.stage.name, "progress", f"waits for {blocker}"))

        with claimed(work.artifact, f"run {work.run_id} on {socket.gethostname()}") as claim:
            manifest = await_turn(work.artifact, claim, wait)
            if manifest is not None:
                return _Finished(attempted, manifest.metadata, skipped=True)
            return _Finished(attempted, self._execute(work, attempted))

    def _execute(self, work: Work, attempted: _Try) -> dict[str, JSON]:
        return self._executor.execute(work, self._messages.put, attempted.end)

    def _work(self, stage: Stage) -> Work:
        inputs = {kind_of(name): self._graph.artifact(self._store, name) for name in stage.upstream}
        key = self._graph.keys[stage.name]
        return Work(stage, key, self._artifact(stage), inputs, self._store, self._run.directory, self._run.id)

    def _artifact(self, stage: Stage) -> Artifact | None:
        return None if stage.always else self._graph.artifact(self._store, stage.name)
