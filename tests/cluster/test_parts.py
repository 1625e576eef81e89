"""Parts of an artifact: what a try had finished is taken over whole, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from cluster.artifact import Artifact, Attempt
from cluster.parts import adopt_part, clear_parts, discard, finished_parts, keep_part
from cluster.storage import FileEntry, Store


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact(Store(tmp_path / "artifact"))


def write(attempt: Attempt, path: str, data: bytes) -> FileEntry:
    return attempt.store.write_bytes(path, data)


def finish(attempt: Attempt, name: str = "train/00000", data: bytes = b"tokens" * 1000) -> FileEntry:
    entry = write(attempt, f"{name}.arrow", data)
    keep_part(attempt, name, [entry], {"rows": 7})
    return entry


def test_a_part_goes_over_to_the_next_try_with_its_result(artifact):
    entry = finish(artifact.begin())
    successor = artifact.begin()
    assert finished_parts(artifact) == {"train/00000"}
    assert adopt_part(successor, "train/00000") == ((entry,), {"rows": 7})
    assert successor.store.entry(entry.path) == entry
    assert successor.commit({"done": True}, [entry]).attempt == successor.name


def test_a_part_of_the_try_itself_is_checked_and_not_copied(artifact):
    attempt = artifact.begin()
    entry = finish(attempt)
    assert adopt_part(attempt, "train/00000") == ((entry,), {"rows": 7})
    attempt.store.write_bytes(entry.path, b"tokenz" * 1000)
    assert adopt_part(attempt, "train/00000") is None


def test_what_is_not_what_it_was_is_not_taken_over(artifact):
    first = artifact.begin()
    entry = finish(first)
    for damage in (b"tokenz" * 1000, b"tokens" * 999, b""):
        first.store.write_bytes(entry.path, damage)
        assert adopt_part(artifact.begin(), "train/00000") is None
    first.store.delete(entry.path)
    assert adopt_part(artifact.begin(), "train/00000") is None
    assert adopt_part(artifact.begin(), "train/00001") is None


@pytest.mark.parametrize(
    "record", [b"", b"{", b"[]", b'{"attempt": "../..", "files": [], "result": 1}', b'{"files": 1}']
)
def test_a_record_that_is_none_is_as_if_there_were_none(artifact, record):
    artifact.store.write_bytes("parts/x.json", record)
    assert adopt_part(artifact.begin(), "x") is None


def test_a_record_names_no_file_outside_its_try(artifact):
    artifact.store.write_bytes("secret", b"s")
    entry = artifact.store.entry("secret")
    keep_part(artifact.begin(), "x", [FileEntry("../../secret", entry.size, entry.checksum)], None)
    assert adopt_part(artifact.begin(), "x") is None


def test_a_failed_try_is_removed_unless_a_part_of_it_is_finished(artifact):
    useless, useful = artifact.begin(), artifact.begin()
    write(useless, "train/00000.arrow", b"half")
    finish(useful)
    discard(useless)
    discard(useful)
    assert [path.split("/")[1] for path in artifact.store.list("attempts")] == [useful.name]


def tries(artifact: Artifact) -> set[str]:
    return {path.split("/")[1] for path in artifact.store.list("attempts")}


def test_after_the_commit_no_records_and_no_losers_stay(artifact):
    killed, winner, bystander = artifact.begin(), artifact.begin(), artifact.begin()
    entry = finish(killed)
    write(bystander, "train/00001.arrow", b"a rival that has finished nothing yet")
    clear_parts(winner)
    assert finished_parts(artifact) == {"train/00000"}  # nothing is committed
    adopt_part(winner, "train/00000")  # now all records are the winner's
    winner.commit({}, [entry])
    clear_parts(winner)
    assert not finished_parts(artifact)
    assert tries(artifact) == {winner.name}
    assert artifact.verify().attempt == winner.name
    finish(bystander, "train/00002")
    clear_parts(bystander)
    assert not finished_parts(artifact)
    assert tries(artifact) == {winner.name}


def test_tries_at_work_that_is_not_in_parts_are_left_alone(artifact):
    rival, loser, winner = artifact.begin(), artifact.begin(), artifact.begin()
    for attempt in (rival, loser, winner):
        write(attempt, "weights", b"1")
    winner.commit({})
    clear_parts(loser)
    assert tries(artifact) == {rival.name, winner.name}


def test_where_two_may_win_no_losers_files_are_removed(artifact, monkeypatch):
    """On a disk without hard links, as on an object store, a manifest may be replaced by a rival's."""

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    rival, winner = artifact.begin(), artifact.begin()
    finish(rival)
    winner.commit({}, [finish(winner)])
    clear_parts(winner)
    assert tries(artifact) == {rival.name, winner.name}
    assert not finished_parts(artifact)


def test_two_tries_at_one_part_do_not_meet(artifact):
    zombie, successor = artifact.begin(), artifact.begin()
    entry = finish(zombie)
    assert adopt_part(successor, "train/00000")
    zombie.store.write_bytes(entry.path, b"other" * 1000)  # a zombie that goes on writing spoils its own files only
    successor.commit({}, [entry])
    artifact.verify()


def test_deleting_the_artifact_deletes_its_parts(artifact):
    finish(artifact.begin())
    artifact.delete()
    assert artifact.store.list() == []
