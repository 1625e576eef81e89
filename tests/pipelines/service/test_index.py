"""The list of runs against what the runs' own folders say, and that it reads only what it must."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import Store
from pipelines.runs import Run, StageStatus
from pipelines.service.index import (
    SORTS,
    RunIndex,
    Selection,
    delete_run,
    read_run,
    write_submission,
)
from pipelines.service.known import RunRow
from pipelines.service.submission import STATES, Submission

RECIPE = "name: tiny\ndata: {}\n"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Files that were read since the last call."""
    read: list[str] = []
    before = Store.read_bytes

    def noting(self: Store, path: str) -> bytes:
        read.append(f"{self.uri.rsplit('/', 1)[1]}/{path}")
        return before(self, path)

    monkeypatch.setattr(Store, "read_bytes", noting)

    def since() -> list[str]:
        found = sorted(read)
        read.clear()
        return found

    return since


def finish(run: Run, error: str = "") -> None:
    run.status.state, run.status.error = ("failed" if error else "done"), error
    run.status.started, run.status.ended = 5.0, 9.0
    run.save()


def test_a_run_that_is_over_is_read_once(store: Store, reads: Callable[[], list[str]]) -> None:
    finish(Run.create(store, RECIPE, "old"))
    live = Run.create(store, RECIPE, "live")
    index = RunIndex(store)
    index.refresh()
    assert {row.id: (row.name, row.state) for row in index.rows()} == {
        "old": ("tiny", "done"),
        "live": ("tiny", "starting"),
    }
    assert len([path for path in reads() if "old" in path]) == 1
    index.refresh()
    assert not [path for path in reads() if "old" in path]
    finish(live, "no")
    index.refresh()
    assert [(row.id, row.state, row.error) for row in index.rows()] == [("old", "done", ""), ("live", "failed", "no")]
    again = Run.open(store, "old")
    with again.driving():
        index.refresh()
        assert {row.id: row.state for row in index.rows()}["old"] == "running"
    again.delete()
    index.refresh()
    assert [row.id for row in index.rows()] == ["live"]
    assert store.list("summaries") == ["summaries/live.json"]


def test_a_summary_that_is_behind_is_not_believed(store: Store) -> None:
    """Killed between the two writes, whichever came first."""
    run = Run.create(store, RECIPE, "r")
    finish(run)
    run.directory.write_json("status.json", asdict(replace(run.status, state="failed")))
    store.write_json("summaries/r.json", {**store.read_json("summaries/r.json"), "state": "running"})
    index = RunIndex(store)
    index.refresh()
    assert [row.state for row in index.rows()] == ["failed"]
    store.write_bytes("summaries/r.json", b"{")
    index.refresh()
    assert [row.state for row in index.rows()] == ["failed"]


def test_runs_from_before_there_were_summaries_are_listed(store: Store) -> None:
    finish(Run.create(store, RECIPE, "r"))
    store.delete("summaries")
    index = RunIndex(store)
    index.refresh()
    assert [(row.id, row.name, row.state) for row in index.rows()] == [("r", "tiny", "done")]


def test_what_is_no_run_and_what_is_damaged(store: Store) -> None:
    store.write_bytes("runs/half/recipe.yaml", b"name: x\n")
    store.write_bytes("runs/torn/recipe.yaml", b"name: x\n")
    store.write_bytes("runs/torn/status.json", b"{")
    store.write_bytes("summaries/ghost.json", b"{}")
    index = RunIndex(store)
    index.refresh()
    assert [(row.id, row.state) for row in index.rows()] == [("torn", "failed")]
    assert "damaged" in index.rows()[0].error and "delete it" in index.rows()[0].error


def test_the_submission_s_copy_is_never_more_over_than_the_submission(store: Store, monkeypatch) -> None:
    Run.create(store, RECIPE, "r")
    asked = Submission(submitted=1.0, tags={"user": "ana"}, priority=3)
    write_submission(store, "r", asked)
    known = read_run(store, "r", None, store.stats("summaries")["summaries/r.submission.json"])
    assert known is not None and known.submission == asked
    assert (known.row(2.0).state, known.row(2.0).tags, known.row(2.0).priority) == ("queued", {"user": "ana"}, 3)

    order: list[tuple[str, str]] = []
    before = Store.write_json

    def noting(self: Store, path: str, value, **options):
        order.append((path.rsplit("/", 1)[-1], value["outcome"]))
        return before(self, path, value, **options)

    monkeypatch.setattr(Store, "write_json", noting)
    write_submission(store, "r", replace(asked, outcome="stopped", ended=4.0))
    write_submission(store, "r", asked)
    copy, own = "r.submission.json", "submission.json"
    assert order == [(own, "stopped"), (copy, "stopped"), (copy, ""), (own, "")]


def test_a_run_that_is_at_a_stage_says_which(store: Store) -> None:
    run = Run.create(store, RECIPE, "r")
    with run.driving():
        run.status.stages = {"ingest": StageStatus("done"), "dedup": StageStatus("running")}
        run.save()
        known = read_run(store, "r")
        assert known is not None and known.row(time.time()).stage == "dedup"


def test_a_deleted_run_leaves_nothing(store: Store) -> None:
    Run.create(store, RECIPE, "r")
    write_submission(store, "r", Submission())
    delete_run(store, "r")
    assert store.list() == []


ROWS = st.lists(
    st.builds(
        RunRow,
        id=st.text("abc", min_size=1, max_size=3),
        name=st.sampled_from(["tiny", "sft"]),
        state=st.sampled_from(STATES),
        created=st.floats(0, 100),
        ended=st.none() | st.floats(0, 100),
        priority=st.integers(-2, 2),
        tags=st.sampled_from([{}, {"user": "ana"}, {"user": "bo", "team": "x"}]),
    ),
    max_size=8,
    unique_by=lambda row: row.id,
)


@given(ROWS, st.sampled_from(SORTS), st.booleans(), st.integers(0, 4), st.none() | st.integers(1, 4))
def test_a_list_is_sorted_and_cut(rows, sort, ascending, offset, limit) -> None:
    selection = Selection(sort=sort, ascending=ascending, offset=offset, limit=limit)
    whole, total = Selection(sort=sort, ascending=ascending).of(rows)
    assert total == len(rows) and sorted(row.id for row in whole) == sorted(row.id for row in rows)
    part, same = selection.of(rows)
    assert same == total and part == whole[offset:][:limit]
    keys = [getattr(row, sort) for row in whole if getattr(row, sort) is not None]
    assert keys == sorted(keys, reverse=not ascending)


@given(ROWS)
def test_a_list_is_filtered(rows) -> None:
    selection = Selection(states=("done", "lost"), tags={"user": "ana"}, name="ti", since=50.0)
    expected = {
        row.id
        for row in rows
        if row.state in ("done", "lost") and row.tags == {"user": "ana"} and row.created >= 50.0
        if row.name == "tiny"
    }
    assert {row.id for row in selection.of(rows)[0]} == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"stages": null}',
        '{"stages": {"pretrain": {"started": []}}}',
        '{"stages": {}, "created": null}',
        '{"stages": {}, "state": "running", "heartbeat": "x"}',
        '{"stages": {}, "state": "of tomorrow"}',
    ],
)
def test_a_status_whose_parts_are_not_what_they_should_be_is_damaged(store: Store, text: str) -> None:
    finish(Run.create(store, RECIPE, "whole"))
    store.write_bytes("runs/torn/recipe.yaml", b"name: x\n")
    store.write_bytes("runs/torn/status.json", text.encode())
    index = RunIndex(store)
    index.refresh()
    assert {row.id: row.state for row in index.rows()} == {"whole": "done", "torn": "failed"}


@pytest.mark.parametrize("text", ['{"tags": [1]}', '{"submitted": "x"}', '{"needs": {"CPU": null}}', '{"outcome": 7}'])
def test_a_submission_whose_parts_are_not_what_they_should_be_is_damaged(store: Store, text: str) -> None:
    Run.create(store, RECIPE, "r")
    for path in ("runs/r/submission.json", "summaries/r.submission.json"):
        store.write_bytes(path, text.encode())
    index = RunIndex(store)
    index.refresh()
    assert [row.state for row in index.rows()] == ["failed"] and "damaged" in index.rows()[0].error
