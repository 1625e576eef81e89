"""The one file of all runs: it saves reads, and is believed for nothing that has changed since."""

import os
from dataclasses import replace

import pytest

from cluster.storage import StorageError, Store
from pipelines.runs import Run
from pipelines.service import index
from pipelines.service.digest import read_digest, write_digest
from pipelines.service.index import RunIndex, delete_run, write_submission
from pipelines.service.submission import Submission

RECIPE = "name: tiny\ndata: {}\n"


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """Runs that are over, some of them submitted, and one that is not."""
    monkeypatch.setattr(index, "_DIGEST_AFTER", 3)
    made = Store(tmp_path)
    for number in range(4):
        run = Run.create(made, RECIPE, f"r{number}")
        run.status.state, run.status.error = ("failed", "no room") if number == 3 else ("done", "")
        run.status.started, run.status.ended = 5.0, 9.0 + number
        run.save()
        if number % 2:
            asked = Submission(submitted=3.0, job_id=run.id, tries=1, tags={"user": "ana"}, priority=number)
            write_submission(made, run.id, replace(asked, outcome="done", ended=9.5))
    Run.create(made, RECIPE, "pending")
    return made


def listed(store: Store):
    """As a new process lists them; and how many files of runs it read."""
    read = []
    before = Store.read_bytes

    def noting(self: Store, path: str) -> bytes:
        read.append(path)
        return before(self, path)

    fresh = RunIndex(store, clock=lambda: 100.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Store, "read_bytes", noting)
        fresh.refresh()
    return sorted(fresh.rows(), key=lambda row: row.id), len([path for path in read if path != "runs.json"])


def test_a_new_process_reads_only_what_is_not_over(store):
    first, many = listed(store)
    again, few = listed(store)
    assert again == first and len(first) == 5
    assert many > 6 and few == 2, "the summary and the status of the run that is pending"


def test_what_has_changed_since_is_read(store):
    listed(store)
    delete_run(store, "r0")
    resumed = Run.open(store, "r2")
    resumed.status.state, resumed.status.error = "running", ""
    resumed.status.host, resumed.status.heartbeat = "elsewhere", 99.0
    resumed.save()
    write_submission(store, "r1", Submission(submitted=50.0, tags={"user": "bo"}))
    rows, _ = listed(store)
    assert {row.id: row.state for row in rows} == {"pending": "starting", "r1": "queued", "r2": "running", "r3": "done"}
    assert {row.id: row.tags for row in rows}["r1"] == {"user": "bo"}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1, "runs": [{}]}', b'{"version": 2, "runs": [7]}', b"{"])
def test_a_digest_that_is_none_costs_reads_and_no_more(store, content):
    expected, _ = listed(store)
    store.write_bytes("runs.json", content)
    assert read_digest(store) == []
    assert listed(store)[0] == expected


def test_one_who_may_only_read_lists_all_the_same(store, monkeypatch):
    def refuse(*_: object) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(index, "write_digest", refuse)
    assert len(listed(store)[0]) == 5
    assert not os.path.exists(store.local_path("runs.json"))


def test_what_is_kept_is_what_was_known(store):
    fresh = RunIndex(store)
    fresh.refresh()
    write_digest(store, fresh.known())
    kept = {run.id: run for run in read_digest(store)}
    assert set(kept) == {"r0", "r1", "r2", "r3"}
    for run in fresh.known():
        if run.id in kept:
            assert replace(run, status=replace(run.status, stages={})) == kept[run.id]
