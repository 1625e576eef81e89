"""The stage graph: what has to run, and what is done already.

A stage's key is the hash of its name, version, resolved configuration and its upstream stages' keys. Its output is the
artifact `{store}/artifacts/{stage}/{key}/`; a committed artifact is never made again. A changed setting changes the
key of its stage and of all that follow, and of nothing else.

Keys are pure functions of the graph: they are known before anything runs. Rival runs of one stage write separate
attempts of the same artifact, and whichever commits first is what both go on with.
"""

import dataclasses
import enum
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel

from cluster.artifact import Artifact, Attempt
from cluster.parts import clear_parts, discard
from cluster.storage import JSON, FileEntry, StorageError, Store
from llama.retry import retried
from pipelines.runs import Run, StageStatus, one_line

_log = logging.getLogger(__name__)


class GraphError(ValueError):
    """A graph that is none: a cycle, a name twice, an unknown upstream, a configuration that cannot be hashed."""


@dataclass(frozen=True)
class Event:
    """Something for the eyes of whoever watches: a stage changed its state, or made progress.

    `fraction` of the stage's work done (0 to 1) and `values` (step, loss, tokens/s, ...) come from the stage itself.
    `traceback` is the URI of a failed stage's, if it could be written.
    """

    stage: str
    kind: Literal["running", "progress", "done", "skipped", "failed"]
    message: str = ""
    fraction: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    traceback: str | None = None


@dataclass
class StageContext:
    """What a stage gets to work with.

    `inputs` are the committed artifacts of its upstream stages by name. `store` is the project's store, `run_dir` the
    run's folder in it (metrics, plots).
    """

    stage: str
    key: str
    inputs: Mapping[str, Artifact]
    store: Store
    run_dir: Store
    entries: list[FileEntry]
    _attempt: Attempt | None
    _on_progress: Callable[[Event], None]
    run_id: str = ""

    @property
    def attempt(self) -> Attempt:
        """Where this try writes. A stage that always runs has no artifact: GraphError."""
        if self._attempt is None:
            raise GraphError(f"stage {self.stage!r} always runs and has no artifact to write")
        return self._attempt

    @property
    def artifact_store(self) -> Store:
        """The folder of the stage's artifact, shared by all tries at this key: a place for checkpoints."""
        return self.attempt.artifact.store

    def record(self, *entries: FileEntry) -> None:
        """Name files that make up the output, as `open_output` returned them. Without any, all that lies in the
        attempt counts, and is read once more for its checksum."""
        self.entries.extend(entries)

    def forget(self, paths: Collection[str]) -> None:
        """Files that were recorded and turn out not to be part of the output; they are deleted."""
        self.entries[:] = [entry for entry in self.entries if entry.path not in paths]
        for path in sorted(paths):
            self.attempt.store.delete(path)

    def emit(self, message: str, *, fraction: float | None = None, values: Mapping[str, float] | None = None) -> None:
        """Tell whoever watches how far the stage is."""
        self._on_progress(Event(self.stage, "progress", message, fraction, values or {}))


@dataclass(frozen=True)
class Stage:
    """One step of the graph.

    `config` holds all that its output depends on besides its inputs: a dataclass, a pydantic model or JSON-able.
    `run` returns the artifact's metadata. `version` is raised when the code's output changes. A stage with `always`
    set leaves no artifact and runs every time; nothing can be downstream of it.
    """

    name: str
    version: int
    config: object
    run: Callable[[StageContext], dict[str, JSON]]
    upstream: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True)
class StageResult:
    """`metadata` is what the stage returned, or what the artifact says that it found committed."""

    state: Literal["done", "skipped"]
    key: str
    artifact: Artifact | None
    metadata: dict[str, JSON]
    seconds: float


class Graph:
    """Stages in an order that respects their dependencies, and among free ones the order given.

    Raises GraphError.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = {stage.name: stage for stage in _topological(stages)}
        self.keys: dict[str, str] = {}
        for stage in self.stages.values():
            upstream = {name: self.keys[name] for name in stage.upstream}
            self.keys[stage.name] = "" if stage.always else stage_key(stage, upstream)

    def artifact(self, store: Store, name: str) -> Artifact:
        """Where a stage's output lies, committed or not."""
        return Artifact(store.child("artifacts", name, self.keys[name]))

    def selected(self, until: str | None = None) -> list[Stage]:
        """All stages, or `until` and what it needs, in order. Raises GraphError for an unknown stage."""
        if until is None:
            return list(self.stages.values())
        if until not in self.stages:
            raise GraphError(f"there is no stage {until!r}; choose one of {', '.join(self.stages)}")
        wanted = {until}
        for stage in reversed(self.stages.values()):
            if stage.name in wanted:
                wanted.update(stage.upstream)
        return [stage for stage in self.stages.values() if stage.name in wanted]

    def run(
        self,
        store: Store,
        run: Run,
        until: str | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> dict[str, StageResult]:
        """Run what is not committed yet, one stage after the other, and keep the run's status.

        A stage's exception is recorded and goes on to the caller; so does CorruptArtifact for a committed artifact
        whose manifest cannot be read. `on_event` is called from the thread of whoever emits.
        """
        selected = self.selected(until)
        on_event = _harmless(on_event)
        fresh = {stage.name: StageStatus(key=self.keys[stage.name]) for stage in selected}
        run.status.stages = {  # what an earlier turn of the run has to say of the other stages stays
            name: fresh.get(name) or run.status.stages[name]
            for name in self.stages
            if name in fresh or name in run.status.stages
        }
        results: dict[str, StageResult] = {}
        with run.driving():
            for stage in selected:
                results[stage.name] = self._advance(stage, store, run, on_event)
        return results

    def _advance(self, stage: Stage, store: Store, run: Run, on_event: Callable[[Event], None]) -> StageResult:
        status = run.status.stages[stage.name]
        started = status.started = time.time()
        status.state = "running"
        try:
            artifact = None if stage.always else self.artifact(store, stage.name)
            manifest = artifact.manifest() if artifact else None
            if manifest is not None:
                status.state, status.ended = "skipped", time.time()
                run.save()
                on_event(Event(stage.name, "skipped", "committed already"))
                return StageResult("skipped", status.key, artifact, manifest.metadata, 0.0)
            run.save()
            on_event(Event(stage.name, "running"))
            metadata = self._execute(stage, artifact, store, run, on_event)
        except BaseException as error:
            status.state, status.ended, status.error = "failed", time.time(), one_line(error)
            traceback = run.keep_traceback(stage.name, error)
            on_event(Event(stage.name, "failed", status.error, seconds=status.ended - started, traceback=traceback))
            raise
        status.state, status.ended = "done", time.time()
        retried(run.save, "writing the run's status")
        seconds = status.ended - started
        on_event(Event(stage.name, "done", seconds=seconds))
        return StageResult("done", status.key, artifact, metadata, seconds)

    def _execute(
        self, stage: Stage, artifact: Artifact | None, store: Store, run: Run, on_event: Callable[[Event], None]
    ) -> dict[str, JSON]:
        def progress(event: Event) -> None:
            run.status.stages[stage.name].progress = event.message
            on_event(event)

        attempt = artifact.begin() if artifact else None
        inputs = {name: self.artifact(store, name) for name in stage.upstream}
        context = StageContext(
            stage.name, self.keys[stage.name], inputs, store, run.directory, [], attempt, progress, run.id
        )
        try:
            metadata = stage.run(context)
        except BaseException as error:
            if attempt is not None:
                with suppress(StorageError, ValueError, TypeError, KeyError):  # the first error is the one to report
                    discard(attempt)
                with suppress(StorageError):
                    # on a disk a rival that commits removes what the others wrote, who then miss it
                    if isinstance(error, StorageError) and (winner := attempt.artifact.manifest()):
                        clear_parts(attempt)
                        return winner.metadata
            raise
        if attempt is None:
            return metadata
        # what the stage has cost must not be lost to a store that fails for a moment
        winner = retried(lambda: attempt.commit(metadata, context.entries or None), f"committing {stage.name}")
        clear_parts(attempt)
        return winner.metadata


def _harmless(on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """A watcher that fails must not take the run with it."""

    def call(event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            _log.warning("an event of stage %s could not be shown", event.stage, exc_info=True)

    return call


def stage_key(stage: Stage, upstream_keys: Mapping[str, str]) -> str:
    """20 hexadecimal digits of BLAKE2b over all that the stage's output depends on. Raises GraphError."""
    content = {
        "stage": stage.name,
        "version": stage.version,
        "config": canonical(stage.config, stage.name),
        "upstream": dict(upstream_keys),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def canonical(value: object, where: str = "config") -> JSON:
    """A configuration as JSON that is equal for equal configurations. Raises GraphError naming what does not fit."""
    if value is None or isinstance(value, bool | int | str) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise GraphError(f"{where}={value} is not a finite number")
        return value
    if isinstance(value, enum.Enum):
        return canonical(value.value, where)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return {name: canonical(getattr(value, name), f"{where}.{name}") for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        return {name: canonical(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = list(value.items())
        for key, _ in pairs:
            if not isinstance(key, str):
                raise GraphError(f"{where} has the key {key!r}; only strings are keys of a configuration")
        return {key: canonical(item, f"{where}.{key}") for key, item in pairs}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise GraphError(
        f"{where} is a {type(value).__name__}, which has no canonical form; use plain values or dataclasses"
    )


def _topological(stages: Sequence[Stage]) -> list[Stage]:
    by_name: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in by_name:
            raise GraphError(f"two stages are named {stage.name!r}; rename one")
        by_name[stage.name] = stage
    for stage in stages:
        for name in stage.upstream:
            if name not in by_name:
                raise GraphError(f"stage {stage.name!r} needs {name!r}, which is not in the graph")
            if by_name[name].always:
                raise GraphError(f"stage {stage.name!r} needs {name!r}, which always runs and leaves no artifact")
    ordered: dict[str, Stage] = {}
    while len(ordered) < len(by_name):
        ready = [s for s in stages if s.name not in ordered and all(name in ordered for name in s.upstream)]
        if not ready:
            raise GraphError(f"the stages {', '.join(n for n in by_name if n not in ordered)} wait for each other")
        ordered[ready[0].name] = ready[0]
    return list(ordered.values())
