import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.artifact import Artifact, CorruptArtifact, Manifest
from cluster.storage import FileEntry, NotFound, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_artifact_counts_only_once_committed(store: Store) -> None:
    artifact = Artifact(store.child("stage", "key"))
    attempt = artifact.begin()
    attempt.store.write_bytes("a.bin", b"aaa")
    assert not artifact.committed and artifact.manifest() is None
    for call in (artifact.verify, lambda: artifact.files, lambda: artifact.fetch("cache")):
        with pytest.raises(NotFound, match="nothing is committed"):
            call()
    manifest = attempt.commit({"tokens": 7})
    assert artifact.manifest() == manifest == artifact.verify()
    assert manifest.metadata == {"tokens": 7} and [file.path for file in manifest.files] == ["a.bin"]
    assert artifact.files.read_bytes("a.bin") == b"aaa"
    assert artifact.fetch("never-made") == artifact.files.local_path() and not Path("never-made").exists()


def test_first_committed_attempt_wins_and_files_never_mix(store: Store) -> None:
    artifact = Artifact(store)
    zombie, winner = artifact.begin(), artifact.begin()
    entry = winner.store.write_bytes("x", b"winner")
    zombie.store.write_bytes("x", b"zombie!")
    zombie.store.write_bytes("y", b"zombie!")
    won = winner.commit({"by": "winner"}, [entry])
    assert zombie.commit({"by": "zombie"}) == won
    assert artifact.files.list() == ["x"] and artifact.files.read_bytes("x") == b"winner"


def test_rivals_at_the_same_moment_all_end_with_a_whole_artifact(store: Store) -> None:
    artifact, start = Artifact(store), threading.Barrier(8)
    answers = []

    def write(number: int) -> None:
        attempt = artifact.begin()
        attempt.store.write_bytes("x", str(number).encode() * 1000)
        start.wait()
        answers.append(attempt.commit({"number": number}))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = artifact.verify()
    assert len(answers) == 8
    assert answers == [final] * 8, "all are told the same winner"
    assert artifact.files.read_bytes("x") == str(final.metadata["number"]).encode() * 1000


def test_rival_that_commits_between_look_and_write_wins(store: Store) -> None:
    artifact = Artifact(store)
    winner, late = artifact.begin(), artifact.begin()
    for attempt in (winner, late):
        attempt.store.write_bytes("x", attempt.name.encode())
    won: list[Manifest] = []

    def entries_while_the_rival_commits() -> Iterator[FileEntry]:
        won.append(winner.commit({"by": "winner"}))
        yield late.store.entry("x")

    assert late.commit({"by": "late"}, entries_while_the_rival_commits()) == won[0] == artifact.verify()
    assert store.list() == [f"attempts/{name}/x" for name in sorted((winner.name, late.name))] + ["manifest.json"]


def test_commit_refuses_entries_that_are_not_stored(store: Store) -> None:
    artifact = Artifact(store)
    attempt = artifact.begin()
    entry = attempt.store.write_bytes("x", b"123")
    elsewhere = attempt.store.child("rank0").write_bytes("part", b"456")
    for entries, message in (
        ([FileEntry("x", 4, entry.checksum)], "entry x of 4 bytes is not stored"),
        ([entry, elsewhere], "entry part of 3 bytes is not stored"),
        ([entry, entry], "x is entered twice"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt.commit({}, entries)
    assert not artifact.committed


def test_damage_is_found_and_named(store: Store) -> None:
    artifact = Artifact(store)
    attempt = artifact.begin()
    for name in ("a", "b"):
        attempt.store.write_bytes(name, b"0123456789")
    attempt.commit({})
    files = artifact.files
    files.write_bytes("b", b"0123456780")
    with pytest.raises(CorruptArtifact, match=r"b is 10 bytes, xxh3_128:\w+, the manifest says .*run its stage again"):
        artifact.verify()
    files.write_bytes("b", b"012345")
    for call in (artifact.verify, lambda: artifact.fetch("cache")):
        with pytest.raises(CorruptArtifact, match="b has 6 bytes, the manifest says 10"):
            call()
    files.delete("b")
    with pytest.raises(CorruptArtifact, match="b is missing"):
        artifact.verify()


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        json.dumps({"attempt": "../../x", "files": [], "metadata": {}, "created": ""}),
        json.dumps({"attempt": "a/b", "files": [], "metadata": {}, "created": ""}),
        json.dumps({"attempt": "a", "files": [], "metadata": [], "created": ""}),
        json.dumps(
            {"attempt": "a", "files": [{"path": "../x", "size": 1, "checksum": ""}], "metadata": {}, "created": ""}
        ),
    ],
)
def test_what_is_no_manifest_is_refused(store: Store, manifest: str) -> None:
    store.write_bytes("manifest.json", manifest.encode())
    with pytest.raises(CorruptArtifact, match="manifest.json is no manifest"):
        Artifact(store).manifest()


def test_delete_takes_the_manifest_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact(store)
    attempt = artifact.begin()
    attempt.store.write_bytes("x", b"1")
    attempt.commit({})
    deleted = []
    delete = Store.delete

    def recording_delete(self: Store, path: str) -> None:
        deleted.append(path)
        delete(self, path)

    monkeypatch.setattr(Store, "delete", recording_delete)
    artifact.delete()
    assert deleted == ["manifest.json", "parts", "attempts"] and store.list() == []


def test_a_listing_that_lags_is_not_believed(tmp_path, monkeypatch):
    artifact = Artifact(Store(tmp_path))
    attempt = artifact.begin()
    entry = attempt.store.write_bytes("part", b"content")
    stats = Store.stats
    monkeypatch.setattr(Store, "stats", lambda store, prefix="": {})
    attempt.commit({}, [entry])
    assert artifact.check_sizes().files == (entry,)
    attempt.store.delete("part")
    with pytest.raises(CorruptArtifact, match="part is missing"):
        artifact.check_sizes()
    monkeypatch.setattr(Store, "stats", stats)
    with pytest.raises(CorruptArtifact, match="part is missing"):
        artifact.check_sizes()
