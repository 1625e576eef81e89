"""The list of a store's runs, quickly: two listings, and what is over is read once.

    {store}/summaries/{run_id}.json               what a list shows of status.json (pipelines/runs.py)
    {store}/summaries/{run_id}.submission.json    the copy of runs/{run_id}/submission.json that a list reads

Both lie in one flat folder, so that one listing tells which of a thousand runs have changed. They are derived: a
summary counts only where it says that the run is over, and only for a run whose folder is there; of every other run the
files in its folder are read, as of those from before there were summaries. A process that begins takes what has not
changed since from one file (digest.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cluster.storage import FileStat, NotFound, StorageError, Store
from pipelines.runs import SUMMARIES, RunStatus, recipe_name, typed
from pipelines.service.digest import read_digest, write_digest
from pipelines.service.errors import UnknownRun
from pipelines.service.known import KnownRun, RunRow
from pipelines.service.submission import Submission

Sort = Literal["created", "ended", "priority", "state", "id"]
SORTS: tuple[Sort, ...] = get_args(Sort)

_READERS = 32
_DIGEST_AFTER = 50
_SUBMISSION = "submission.json"


class RunIndex:
    """All runs of a store, as of the last `refresh`. Thread-safe."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[str, KnownRun] = {}
        self._undigested: set[str] = set()
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()

    def refresh(self) -> None:
        """Looks at the store again. Raises StorageError, and then what was known stays."""
        with self._refreshing:
            ids = self._store.folders("runs")
            stats = self._store.stats(SUMMARIES)
            listed = {
                run_id: (stats.get(f"{SUMMARIES}/{run_id}.json"), stats.get(f"{SUMMARIES}/{run_id}.{_SUBMISSION}"))
                for run_id in ids
            }
            earlier = self._known or {run.id: run for run in read_digest(self._store)}
            known = {
                run_id: run
                for run_id, run in earlier.items()
                if run.is_final and listed.get(run_id) == (run.summary, run.copy)
            }
            wanted = [run_id for run_id in ids if run_id not in known]
            if wanted:
                with ThreadPoolExecutor(min(_READERS, len(wanted))) as readers:
                    read = readers.map(lambda run_id: read_run(self._store, run_id, *listed[run_id]), wanted)
                    known |= {run.id: run for run in read if run is not None}
                self._keep_digest(known, wanted)
            with self._lock:
                self._known = known

    def _keep_digest(self, known: Mapping[str, KnownRun], read: Sequence[str]) -> None:
        """Once so much was read that the next process had better not read it again."""
        self._undigested.update(run_id for run_id in read if run_id in known and known[run_id].is_final)
        if len(self._undigested) >= _DIGEST_AFTER:
            with suppress(StorageError):  # perhaps one may only read here
                write_digest(self._store, known.values())
            self._undigested.clear()

    def known(self) -> list[KnownRun]:
        with self._lock:
            return list(self._known.values())

    def get(self, run_id: str) -> KnownRun | None:
        with self._lock:
            return self._known.get(run_id)

    def put(self, run: KnownRun) -> None:
        """What the caller has just written; looked at again at the next `refresh`."""
        with self._lock:
            self._known[run.id] = run

    def forget(self, run_id: str) -> None:
        """The caller has deleted the run."""
        with self._lock:
            self._known.pop(run_id, None)

    def rows(self) -> list[RunRow]:
        now = self._clock()
        return [run.row(now) for run in self.known()]


def read_run(
    store: Store, run_id: str, summary: FileStat | None = None, copy: FileStat | None = None, submitted: bool = False
) -> KnownRun | None:
    """A run as the store has it, None if that is no whole run; `summary` and `copy` as listed in the flat folder.

    Without them all is read from the run's own folder, the submission if it is `submitted`. Raises StorageError.
    """
    folder = store.child("runs", run_id)
    status, name = _summary(store, run_id) if summary is not None else (None, "")
    try:
        if status is None:
            status = RunStatus.from_json(folder.read_json("status.json"))
        if summary is None:
            name = recipe_name(folder.read_bytes("recipe.yaml").decode())
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError) as error:
        status = RunStatus("failed", error=f"its status.json or recipe.yaml is damaged ({error}); delete it")
    asked = _submission(store, run_id, copy) if submitted or copy is not None else None
    return KnownRun(run_id, name, status, asked, summary, copy)


def find_run(store: Store, run_id: str) -> KnownRun:
    """A run by an id from outside, as the store has it. Raises UnknownRun and StorageError."""
    try:
        folder = store.child("runs", run_id)
    except ValueError as error:
        raise UnknownRun(f"there is no run {run_id[:100]!r}") from error
    has_submission = folder.exists("submission.json")
    found = read_run(store, run_id, submitted=has_submission) if "/" not in run_id else None
    if found is None:
        raise UnknownRun(f"there is no run {run_id[:100]!r} in {store.uri}")
    return found


def _summary(store: Store, run_id: str) -> tuple[RunStatus | None, str]:
    """The status if the run is over, else None; and its name."""
    try:
        value: dict[str, Any] = store.read_json(f"{SUMMARIES}/{run_id}.json")
        name = value.pop("name")
        return (typed(RunStatus, value) if value["state"] in ("done", "failed") else None), name
    except NotFound:
        return None, ""
    except (ValueError, TypeError, KeyError, AttributeError):  # derived: the status itself is there
        return None, ""


def _submission(store: Store, run_id: str, copy: FileStat | None) -> Submission | None:
    if copy is not None:
        with suppress(NotFound, ValueError, TypeError):
            found = Submission.from_json(store.read_json(f"{SUMMARIES}/{run_id}.{_SUBMISSION}"))
            if found.outcome:
                return found
    try:
        return Submission.from_json(store.child("runs", run_id).read_json(_SUBMISSION))
    except NotFound:
        return None
    except (ValueError, TypeError) as error:
        return Submission(outcome="failed", ended=0.0, error=f"its submission.json is damaged ({error}); delete it")


def write_submission(store: Store, run_id: str, submission: Submission) -> None:
    """Both files, in the order in which the copy is never more over than the submission. Raises StorageError."""
    folder, copy, value = store.child("runs", run_id), f"{SUMMARIES}/{run_id}.{_SUBMISSION}", submission.to_json()
    if not submission.outcome:
        store.write_json(copy, value)
    folder.write_json(_SUBMISSION, value)
    if submission.outcome:
        store.write_json(copy, value)


def delete_run(store: Store, run_id: str) -> None:
    """The run's folder and what is derived of it; its artifacts stay. Raises StorageError."""
    for path in (f"runs/{run_id}", f"{SUMMARIES}/{run_id}.json", f"{SUMMARIES}/{run_id}.{_SUBMISSION}"):
        store.delete(path)


@dataclass(frozen=True)
class Selection:
    """Which runs of a list, in which order. All that is given must hold; `name` is a part of the name or of the id,
    `since` the earliest creation in seconds since the epoch. Descending unless `ascending`; ties go by id."""

    states: Collection[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    since: float | None = None
    sort: Sort = "created"
    ascending: bool = False
    limit: int | None = None
    offset: int = 0

    def of(self, rows: Sequence[RunRow]) -> tuple[list[RunRow], int]:
        """The wanted part, and how many there are in all parts."""
        found = sorted((row for row in rows if self._takes(row)), key=self._key, reverse=not self.ascending)
        end = None if self.limit is None else self.offset + self.limit
        return found[self.offset : end], len(found)

    def _takes(self, row: RunRow) -> bool:
        return (
            (not self.states or row.state in self.states)
            and all(row.tags.get(name) == value for name, value in self.tags.items())
            and (not self.name or self.name in row.name or self.name in row.id)
            and (self.since is None or row.created >= self.since)
        )

    def _key(self, row: RunRow) -> tuple[Any, ...]:
        value = getattr(row, self.sort)
        return (value is not None, value if value is not None else 0, row.created, row.id)
