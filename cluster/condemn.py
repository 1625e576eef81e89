"""Removing an artifact that nobody needs any more, while others may be about to need it.

    {artifact}/condemned/{id}.json    a marker: its writer may be removing this artifact

    who removes                                        who uses
    g1  writes a marker of its own                     r1  puts on record that it needs the artifact: a root
    g2  reads the roots, anew                          r2  waits until it sees no marker
    g3  nobody needs it: deletes, the manifest first   r3  reads the manifest
    g4  takes its own marker away

What r3 finds stays. If r2 sees no marker, then of each remover either the marker was gone already, so all that it
deletes was deleted before r3, and r3 finds what is left; or its g1 comes after r2, so g2 comes after r1, finds the
root, and g3 deletes nothing. (This needs a store that reads and lists what was written before. The look for markers
must come before the look at the manifest: a remover may end between the two.)

Nothing is deleted but what g1 had found, by its name: a new try at the artifact is a new name. A remover that is killed
leaves its marker; the next one finishes its work (the marker says which attempt had won), and whoever waits takes the
marker away once it has not changed for PATIENCE_S by the waiter's own clock, or at once if the remover ran on the same
machine and has ended. A remover goes on only while its marker is there and was renewed within PATIENCE_S / 2, and looks
before each deletion. What remains is a remover that is stopped for longer than PATIENCE_S in the middle of one
deletion: a run that has gone on meanwhile may find a manifest gone, and says so; to resume it makes the stage again.
And what remains is a try of a forgotten run that has written nothing for a day, and commits in the very moment in which
its files are removed: its manifest may name what is gone (`fetch` and `verify` say so), or only what was left.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from cluster.artifact import Artifact, Manifest
from cluster.liveness import Process, Silence
from cluster.storage import NotFound, StorageError

PATIENCE_S = 300.0
"""How long a marker must not change before its writer is taken for dead."""
_RENEW_S = 20.0
_REQUEST_S = 60.0
"""How long what a process asked of a remote store may take effect after the process has ended."""

_FORGOTTEN_S = 86400.0

FOLDER = "condemned"


class Overtaken(StorageError):
    """A remover has to stop: others may have gone on without it, or the artifact is not what it was."""


class Marker:
    """The remover's side. Methods raise StorageError.

    Args:
        artifact: what may be removed.
        by: who does, for those who wait.
        winner: the attempt that counts now, if any.
    """

    def __init__(
        self, artifact: Artifact, by: str, winner: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._artifact = artifact
        self._folder = artifact.store.child(FOLDER)
        self._name = f"{uuid.uuid4().hex}.json"
        self._winner = winner
        self._clock = clock
        self._beat = 0
        self._unfinished = False
        self._record: dict[str, Any] = {"by": by, "winner": winner, "process": asdict(Process.current())}
        self._write()

    @property
    def path(self) -> str:
        """In the artifact's folder."""
        return f"{FOLDER}/{self._name}"

    def delete(self, paths: Iterable[str]) -> None:
        """Delete what lies at these paths of the artifact, in this order. Raises Overtaken, and then no more is.

        A marker of a removal that was cut short otherwise stays, for the next remover to go on from.
        """
        try:
            for path in paths:
                if path == "manifest.json" or path.startswith("attempts/"):
                    self._check_manifest()
                self._hold()
                self._unfinished = True
                self._artifact.store.delete(path)
        except Overtaken:
            self._unfinished = False
            raise
        self._unfinished = False

    def remove_others(self, now_ns: int) -> None:
        """The markers of removers that have ended, or were silent for a day; `now_ns` is by the store's clock."""
        remote = self._artifact.store.local_path() is None
        for name, stat in self._folder.stats().items():
            age = (now_ns - stat.mtime_ns) / 1e9
            with suppress(NotFound):
                process = _read(self._folder.read_bytes(name))[1]
                ended = process is not None and process.has_ended() and (not remote or age > _REQUEST_S)
                if name != self._name and (ended or age > _FORGOTTEN_S):
                    self._folder.delete(name)

    def withdraw(self) -> None:
        """The removal is over, or not to be."""
        if not self._unfinished:
            self._folder.delete(self._name)

    def _hold(self) -> None:
        present = self._folder.exists(self._name)
        if not present or self._clock() - self._written > PATIENCE_S / 2:
            raise Overtaken(f"{self._artifact.store.uri}: removing it took too long; remove the rest another time")
        if self._clock() - self._written > _RENEW_S:
            self._write()

    def _check_manifest(self) -> None:
        manifest = self._artifact.manifest()
        if manifest is not None and manifest.attempt != self._winner:
            raise Overtaken(f"{self._artifact.store.uri}: it was committed anew meanwhile, and is kept")

    def _write(self) -> None:
        begun = self._clock()
        self._beat += 1
        self._folder.write_json(self._name, {**self._record, "beat": self._beat})
        self._written = begun


class Settling:
    """The user's side: waits, look by look, until nobody may be removing an artifact. Methods raise StorageError.

    Call it once the need for the artifact is on record (r1), and read the manifest after it (r3).
    """

    def __init__(self, artifact: Artifact, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = artifact.store.child(FOLDER)
        self._silence = Silence(clock)

    def blocker(self) -> str | None:
        """Who may be removing it, None: nobody. One look: a listing, and a read of each marker."""
        blockers = []
        for name in self._folder.list():
            asked = self._silence.clock()
            with suppress(NotFound):
                content = self._folder.read_bytes(name)
                by, process = _read(content)
                if self._silence.seconds(name, content, asked) > self._patience(process):
                    self._folder.delete(name)
                else:
                    blockers.append(by)
        return blockers[0] if blockers else None

    def _patience(self, process: Process | None) -> float:
        if process is None or not process.has_ended():
            return PATIENCE_S
        return -1.0 if self._folder.local_path() is not None else _REQUEST_S


def settled(
    artifact: Artifact,
    on_wait: Callable[[str], None] = lambda blocker: None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Manifest | None:
    """What is committed and stays, None: nothing. For whoever has put on record that it needs the artifact.

    Waits while somebody may be removing it, and calls `on_wait` with who that is at each look. Errors as for
    `Artifact.manifest`.
    """
    settling = Settling(artifact, clock)
    while (blocker := settling.blocker()) is not None:
        on_wait(blocker)
        sleep(1.0)
    return artifact.manifest()


def earlier_winners(artifact: Artifact) -> set[str]:
    """Attempts that counted when a marker that is still there was written."""
    winners = set()
    for name in artifact.store.list(FOLDER):
        with suppress(NotFound, ValueError, TypeError, KeyError):
            winners.add(artifact.store.read_json(name)["winner"])
    return winners - {None}


def _read(content: bytes) -> tuple[str, Process | None]:
    try:
        value = json.loads(content)
        return str(value["by"]), Process(**value["process"])
    except (ValueError, TypeError, KeyError):
        return "an unreadable marker", None
