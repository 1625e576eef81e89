"""A stage: one step of the graph, what it needs, and one try at it.

What a try writes counts only once its attempt is committed (cluster/artifact.py), so a try may be killed at any moment,
repeated, or overtaken by a rival at the same key.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from cluster.artifact import Artifact, Attempt
from cluster.parts import clear_parts, discard
from cluster.storage import JSON, FileEntry, StorageError, Store
from llama.retry import retried


class GraphError(ValueError):
    """A graph that is none: a cycle, a name twice, an unknown stage, a configuration that cannot be hashed."""


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

    `inputs` are the committed artifacts of its upstream stages by their kind. `store` is the project's store, `run_dir`
    the run's folder in it (metrics, plots).
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
class Resources:
    """What a stage takes of the cluster while it runs; `memory` in bytes.

    `own_workers`: the stage asks Ray for them itself, for the workers that it starts, and its own process takes none.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int = 0
    accelerator_type: str | None = None
    own_workers: bool = False


@dataclass(frozen=True)
class Tries:
    """How often and how long a stage is tried.

    After an error it is tried `retries` times more, each after a wait that doubles from `wait` seconds to at most
    MAX_WAIT. `timeout`: seconds that a try may run, None for no limit; a try that runs longer is ended and counts as
    an error. Tries whose worker was lost are repeated LOST_RETRIES times whatever `retries` says.
    """

    retries: int = 0
    wait: float = 10.0
    timeout: float | None = None


MAX_WAIT = 300.0
LOST_RETRIES = 3


@dataclass(frozen=True)
class Stage:
    """One step of the graph.

    Where a graph has several stages of one kind, as a sweep has, what follows an `@` in the name tells them apart:
    `pretrain@relu.0` makes what `pretrain` makes, under the same key if its configuration is the same.
    `config` holds all that its output depends on besides its inputs: a dataclass, a pydantic model or JSON-able.
    `run` returns the artifact's metadata; it runs on a worker, so it must be picklable. `version` is raised when the
    code's output changes. A stage with `always` set leaves no artifact and runs every time; nothing can be downstream
    of it. `resources` and `tries` say how it is run, and are no part of its key.
    """

    name: str
    version: int
    config: object
    run: Callable[[StageContext], dict[str, JSON]]
    upstream: tuple[str, ...] = ()
    always: bool = False
    resources: Resources = Resources(own_workers=True)
    tries: Tries = Tries()

    @property
    def kind(self) -> str:
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """What a stage of this name makes: where its artifact lies below `artifacts/`."""
    return name.partition("@")[0]


@dataclass(frozen=True)
class StageResult:
    """`metadata` is what the stage returned, or what the artifact says that it found committed."""

    state: Literal["done", "skipped"]
    key: str
    artifact: Artifact | None
    metadata: dict[str, JSON]
    seconds: float


@dataclass(frozen=True)
class Work:
    """One stage of one run, ready to be tried; picklable. `artifact` is None for a stage that always runs."""

    stage: Stage
    key: str
    artifact: Artifact | None
    inputs: Mapping[str, Artifact]
    store: Store
    run_dir: Store
    run_id: str

    def perform(self, on_event: Callable[[Event], None]) -> dict[str, JSON]:
        """One try, from its first write to its commit. Returns the metadata of the attempt that won, which may be a
        rival's. What the stage raises goes on to the caller."""
        on_event(Event(self.stage.name, "running"))
        attempt = self.artifact.begin() if self.artifact else None
        context = StageContext(
            self.stage.name, self.key, self.inputs, self.store, self.run_dir, [], attempt, on_event, self.run_id
        )
        try:
            metadata = self.stage.run(context)
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
        winner = retried(lambda: attempt.commit(metadata, context.entries or None), f"committing {self.stage.name}")
        clear_parts(attempt)
        return winner.metadata
