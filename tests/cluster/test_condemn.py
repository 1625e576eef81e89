"""Removing an artifact that others may be about to use: who waits, who goes on, and who stops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.artifact import Artifact
from cluster.condemn import PATIENCE_S, Marker, Overtaken, Settling, earlier_winners, settled
from cluster.liveness import Process
from cluster.storage import StorageError, Store


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    found = Artifact(Store(tmp_path / "artifact"))
    attempt = found.begin()
    attempt.store.write_bytes("out", b"data")
    attempt.commit({})
    return found


def winner(artifact: Artifact) -> str:
    manifest = artifact.manifest()
    assert manifest is not None
    return manifest.attempt


def test_who_needs_it_waits_until_it_is_decided(artifact):
    marker = Marker(artifact, "gc 1", winner(artifact))
    other = Marker(artifact, "gc 2", winner(artifact))
    waits: list[str] = []

    def sleep(seconds: float) -> None:
        (marker if len(waits) == 1 else other).withdraw()

    assert settled(artifact, waits.append, sleep=sleep) == artifact.manifest()
    assert len(waits) == 2 and set(waits) <= {"gc 1", "gc 2"}
    assert settled(artifact, waits.append) == artifact.manifest() and len(waits) == 2


def test_who_waited_for_its_removal_finds_nothing(artifact):
    marker = Marker(artifact, "gc", name := winner(artifact))

    def sleep(seconds: float) -> None:
        marker.delete(["manifest.json", f"attempts/{name}"])
        marker.withdraw()

    assert settled(artifact, sleep=sleep) is None and artifact.store.list() == []


def test_a_marker_that_does_not_change_is_no_longer_waited_for_and_its_writer_stops(artifact):
    waiting, working = Clock(), Clock()
    marker = Marker(artifact, "gc", name := winner(artifact), working)
    settling = Settling(artifact, waiting)
    for _ in range(3):
        assert settling.blocker() == "gc"
        waiting.now += PATIENCE_S / 2 - 1
        working.now += PATIENCE_S / 2 - 1
        marker.delete(["parts"])  # it lives, and says so
    waiting.now += PATIENCE_S
    assert settling.blocker() == "gc", "it has changed since the last look"
    waiting.now += PATIENCE_S + 1
    assert settling.blocker() is None
    # its own clock stood still, as in a machine that slept
    with pytest.raises(Overtaken, match="took too long"):
        marker.delete(["manifest.json", f"attempts/{name}"])
    assert artifact.verify().attempt == name


def test_a_remover_that_was_stopped_for_long_stops(artifact):
    clock = Clock()
    marker = Marker(artifact, "gc", winner(artifact), clock)
    clock.now += PATIENCE_S / 2 + 1
    with pytest.raises(Overtaken):
        marker.delete(["manifest.json"])
    marker.withdraw()
    assert artifact.verify() and artifact.store.list("condemned") == []


@pytest.mark.parametrize("path", ["manifest.json", "attempts/x"])
def test_what_was_committed_anew_is_not_removed(artifact, path):
    marker = Marker(artifact, "gc", "another")
    with pytest.raises(Overtaken, match="committed anew"):
        marker.delete([path])
    assert artifact.verify()


def test_a_remover_that_was_killed_on_this_machine_is_not_waited_for_and_leaves_word(artifact):
    script = (
        "import os, sys; from cluster.artifact import Artifact; from cluster.condemn import Marker\n"
        "from cluster.storage import Store; marker = Marker(Artifact(Store(sys.argv[1])), 'gc', sys.argv[2])\n"
        "marker.delete(['manifest.json']); os.kill(os.getpid(), 9)\n"
    )
    name = winner(artifact)
    assert subprocess.run([sys.executable, "-c", script, artifact.store.uri, name]).returncode == -9
    assert earlier_winners(artifact) == {name}
    assert settled(artifact, sleep=pytest.fail) is None and artifact.store.list("condemned") == []


def test_what_is_no_marker_is_waited_for_and_then_removed(artifact):
    clock = Clock()
    artifact.store.write_bytes("condemned/x.json", b"{")
    settling = Settling(artifact, clock)
    assert settling.blocker() == "an unreadable marker" and earlier_winners(artifact) == set()
    clock.now += PATIENCE_S + 1
    assert settling.blocker() is None and artifact.store.list("condemned") == []


def test_a_removal_that_the_store_cut_short_leaves_word(artifact, monkeypatch):
    marker = Marker(artifact, "gc", name := winner(artifact))
    delete = Store.delete

    def failing(self: Store, path: str) -> None:
        delete(self, path)
        if path == "manifest.json":
            raise StorageError("it failed, and took effect")

    monkeypatch.setattr(Store, "delete", failing)
    with pytest.raises(StorageError):
        marker.delete(["manifest.json", f"attempts/{name}"])
    marker.withdraw()
    assert earlier_winners(artifact) == {name}


def test_markers_of_who_is_at_work_stay(artifact, monkeypatch):
    old, living, own = (Marker(artifact, by, None) for by in ("old", "living", "own"))
    folder = artifact.store.local_path()
    assert folder is not None
    now = os.stat(folder / own.path).st_mtime_ns
    os.utime(folder / old.path, ns=(0, now - 2 * 86400 * 10**9))
    own.remove_others(now)
    assert artifact.store.list("condemned") == sorted([living.path, own.path])
    monkeypatch.setattr(Process, "has_ended", lambda self: True)
    own.remove_others(now)
    assert artifact.store.list("condemned") == [own.path]
