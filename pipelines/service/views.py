"""What the service shows of a run besides its state: artifacts, the training's curve, the files of its folder."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from cluster.artifact import Artifact, CorruptArtifact
from cluster.filesystem import BLOCK_BYTES
from cluster.storage import NotFound, Store
from pipelines.metrics import MetricsReader
from pipelines.runs import Run
from pipelines.service.errors import UnknownRun
from pipelines.service.known import KnownRun, RunRow
from pipelines.training_folder import METRICS, training_folder

_LOOKS_AT_ONCE = 16


def run_json(row: RunRow, run: KnownRun) -> dict[str, Any]:
    """A run at length: the list's row, its stages, and what was asked of the service (null if nothing was)."""
    stages = [{"stage": name, **asdict(stage)} for name, stage in run.status.stages.items()]
    asked = run.submission.to_json() if run.submission is not None else None
    return {**asdict(row), "heartbeat": run.status.heartbeat or None, "stages": stages, "submission": asked}


def artifacts(store: Store, run: KnownRun) -> list[dict[str, Any]]:
    """Of each stage that leaves one: its key, whether it is committed, bytes, and where it lies."""

    def look(name: str, key: str) -> dict[str, Any]:
        artifact = Artifact(store.child("artifacts", name, key))
        found: dict[str, Any] = {"stage": name, "key": key, "committed": False, "size": None, "created": None}
        found["uri"] = artifact.store.uri
        try:
            manifest = artifact.manifest()
        except CorruptArtifact as error:
            return {**found, "error": str(error)}
        if manifest is None:
            return found
        size = sum(file.size for file in manifest.files)
        return {**found, "committed": True, "size": size, "created": manifest.created}

    made = [(name, stage.key) for name, stage in run.status.stages.items() if stage.key]
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        return list(pool.map(lambda each: look(*each), made))


def metrics(store: Store, run_id: str, from_step: int, limit: int) -> dict[str, Any]:
    """The training's reports from a step on, at most so many; `next` is the step to ask for then, null at the end."""
    folder = training_folder(Run.open(store, run_id))
    rows: list[dict[str, Any]] = []
    if folder is not None:
        reader = MetricsReader(folder.child(METRICS))
        reader.poll()
        rows = [row for row in reader.steps() if row["step"] >= from_step]
    return {"rows": rows[:limit], "next": rows[limit]["step"] if len(rows) > limit else None}


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
