"""All runs of a store that are over in one file, so that a list by a process that knows nothing yet reads that file and
what has changed since, not a thousand.

    {store}/runs.json    what a list shows of each run, with the sizes and times of the files that said so

It is derived, and whoever has read much writes it anew. Each entry counts as long as the listing still shows those very
files; so an old digest, or one of two that were written at once, costs reads and shows nothing wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from cluster.filesystem import FileStat
from cluster.storage import NotFound, Store
from pipelines.runs import RunStatus
from pipelines.service.known import KnownRun
from pipelines.service.submission import Submission

_FILE = "runs.json"
_VERSION = 1


def read_digest(store: Store) -> list[KnownRun]:
    """What the file says; nothing if there is none, or it is of another version, or damaged. Raises StorageError."""
    try:
        value: dict[str, Any] = store.read_json(_FILE)
        return [_from_json(entry) for entry in value["runs"]] if value["version"] == _VERSION else []
    except NotFound:
        return []
    except (ValueError, TypeError, KeyError):
        return []


def write_digest(store: Store, runs: Iterable[KnownRun]) -> None:
    """Keep what is known of runs that are over. Raises StorageError."""
    entries = [_to_json(run) for run in runs if run.is_final and run.summary is not None]
    store.write_json(_FILE, {"version": _VERSION, "runs": entries})


def _to_json(run: KnownRun) -> dict[str, Any]:
    return {
        "id": run.id,
        "name": run.name,
        "status": asdict(run.status) | {"stages": {}},  # a list does not show them
        "submission": None if run.submission is None else run.submission.to_json(),
        "files": [None if stat is None else asdict(stat) for stat in (run.summary, run.copy)],
    }


def _from_json(value: dict[str, Any]) -> KnownRun:
    summary, copy = (None if stat is None else FileStat(**stat) for stat in value["files"])
    asked = value["submission"]
    return KnownRun(
        value["id"],
        value["name"],
        RunStatus.from_json(value["status"]),
        None if asked is None else Submission.from_json(asked),
        summary,
        copy,
    )
