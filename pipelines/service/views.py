"""What the service shows of a run besides its state: artifacts, the training's curve, the files of its folder."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cluster.artifact import Artifact, CorruptArtifact
from cluster.filesystem import BLOCK_BYTES
from cluster.storage import NotFound, Store
from pipelines.metrics import MetricsReader
from pipelines.runs import Run
from pipelines.service.answers import ArtifactRow, Metrics, RunDetails, StageRow
from pipelines.service.errors import UnknownRun
from pipelines.service.known import KnownRun, RunRow
from pipelines.stage import kind_of
from pipelines.training_folder import METRICS, training_folder

_LOOKS_AT_ONCE = 16


def run_details(row: RunRow, run: KnownRun) -> RunDetails:
    """A run at length."""
    stages = [StageRow(stage=name, **vars(stage)) for name, stage in run.status.stages.items()]
    return RunDetails(**vars(row), heartbeat=run.status.heartbeat or None, stages=stages, submission=run.submission)


def artifacts(store: Store, run: KnownRun) -> list[ArtifactRow]:
    """Of each stage that leaves one."""

    def look(name: str, key: str) -> ArtifactRow:
        artifact = Artifact(store.child("artifacts", kind_of(name), key))
        found = ArtifactRow(name, key, artifact.store.uri)
        try:
            manifest = artifact.manifest()
        except CorruptArtifact as error:
            return replace(found, error=str(error))
        if manifest is None:
            return found
        size = sum(file.size for file in manifest.files)
        return replace(found, committed=True, size=size, created=manifest.created)

    made = [(name, stage.key) for name, stage in run.status.stages.items() if stage.key]
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        return list(pool.map(lambda each: look(*each), made))


def metrics(store: Store, run_id: str, from_step: int, limit: int) -> Metrics:
    """The training's reports from a step on, at most so many."""
    folder = training_folder(Run.open(store, run_id))
    rows: list[dict[str, Any]] = []
    if folder is not None:
        reader = MetricsReader(folder.child(METRICS))
        reader.poll()
        rows = [row for row in reader.steps() if row["step"] >= from_step]
    return Metrics(rows[:limit], rows[limit]["step"] if len(rows) > limit else None)


def files(store: Store, run_id: str) -> dict[str, int]:
    """What lies in a run's folder: bytes by name."""
    return store.child("runs", run_id).sizes()


def open_file(store: Store, run_id: str, name: str) -> tuple[int, Generator[bytes, None, None]]:
    """Bytes and content of a file of a run's folder. Raises UnknownRun: only a name that is listed is opened, and no
    path is made of one that is not."""
    size = files(store, run_id).get(name)
    if size is None:
        raise UnknownRun(f"run {run_id!r} has no file {name[:200]!r}; see its list of files")
    try:
        source = store.child("runs", run_id).open_input(name)
    except NotFound as error:
        raise UnknownRun(f"run {run_id!r} has no file {name[:200]!r} any more") from error

    def blocks() -> Generator[bytes, None, None]:
        with source:
            left = size
            while left > 0 and (block := source.read(min(left, BLOCK_BYTES))):
                left -= len(block)
                yield block

    return size, blocks()
