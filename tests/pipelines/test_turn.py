"""Whose turn it is: with one who waits, one who removes, and a store that takes no claims."""

import pytest

from cluster.artifact import Artifact
from cluster.condemn import FOLDER as MARKERS
from cluster.lease import Claim
from cluster.storage import StorageError, Store
from pipelines.turn import await_turn, claimed


@pytest.fixture
def artifact(tmp_path):
    return Artifact(Store(tmp_path / "store").child("artifacts", "a", "key"))


def commit(artifact):
    attempt = artifact.begin()
    attempt.store.write_bytes("out", b"whole")
    return attempt.commit({})


def never(blocker):
    raise AssertionError(f"waited for {blocker}")


def test_alone_it_is_our_turn_until_something_is_committed(artifact):
    with claimed(artifact, "one") as claim:
        assert await_turn(artifact, claim, never) is None
        manifest = commit(artifact)
        assert await_turn(artifact, claim, never) == manifest


def test_the_second_waits_for_the_first_and_takes_what_that_has_made(artifact):
    waited = []

    def wait(blocker):
        waited.append(blocker)
        if len(waited) == 3:
            made.append(commit(artifact))

    made = []
    with claimed(artifact, "one") as first, claimed(artifact, "two") as second:
        assert await_turn(artifact, first, never) is None
        assert await_turn(artifact, second, wait) == made[0]
    assert waited == ["one"] * 3


def test_the_second_comes_in_turn_when_the_first_gives_up(artifact):
    with claimed(artifact, "one") as first, claimed(artifact, "two") as second:
        assert await_turn(artifact, first, never) is None
        assert await_turn(artifact, second, lambda blocker: first.close()) is None


def test_what_may_be_about_to_be_removed_is_not_taken(artifact):
    commit(artifact)
    marker = artifact.store.child(MARKERS)
    marker.write_json("gc.json", {"by": "caravan gc", "process": None})

    def wait(blocker):
        artifact.delete()
        marker.delete("gc.json")

    with claimed(artifact, "one") as claim:
        assert await_turn(artifact, claim, wait) is None


def test_without_a_lease_the_work_is_done_all_the_same(artifact, monkeypatch, caplog):
    def refuse(store, holder):
        raise StorageError("the bucket is read-only")

    monkeypatch.setattr(Claim, "enter", refuse)
    with claimed(artifact, "one") as claim:
        assert claim is None
        assert await_turn(artifact, claim, never) is None
    assert "is made without a lease: the bucket is read-only" in caplog.text


def test_a_look_that_fails_does_not_fail_the_stage(artifact, monkeypatch, caplog):
    def fail(claim):
        raise StorageError("the store is slow")

    with claimed(artifact, "one"), claimed(artifact, "two") as second:
        monkeypatch.setattr(Claim, "blocker", fail)
        monkeypatch.setattr("pipelines.turn.PAUSES_S", ())
        assert await_turn(artifact, second, never) is None
    assert "is made without waiting for others: the store is slow" in caplog.text


def test_a_store_that_fails_for_a_moment_lets_nobody_go_past_the_queue(artifact, monkeypatch):
    look, failures = Claim._look, [StorageError("the store's service failed")] * 2

    def fail_twice(claim):
        if failures:
            raise failures.pop()
        return look(claim)

    monkeypatch.setattr("pipelines.turn.PAUSES_S", (0.0,))
    with claimed(artifact, "one") as first:
        assert await_turn(artifact, first, never) is None
        monkeypatch.setattr(Claim, "_look", fail_twice)
        with Claim.enter(artifact.store, "two", pauses=(0.0, 0.0)) as second:
            failures.append(StorageError("and once more"))
            waited = []

            def wait(blocker):
                waited.append(blocker)
                first.close()

            assert await_turn(artifact, second, wait) is None
    assert waited == ["one"] and not failures
