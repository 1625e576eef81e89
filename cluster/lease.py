"""Claims on an artifact, so that of several runs that need the same stage one computes it while the others wait.

    {artifact}/claims/{id}.json    one claimant's: who it is, its number in the queue, a counter that it keeps raising

A lease saves work and nothing more. That files never mix rests on the attempts alone (cluster/artifact.py): if ever two
claimants are in turn at once, both compute, and one of the two commits counts.

The queue is Lamport's bakery ("A New Solution of Dijkstra's Concurrent Programming Problem", 1974), which needs no
conditional write: every claimant writes its own file only. It writes that it is choosing, lists the others, and writes
a number above all of theirs. It is in turn when no other claim is choosing or has a smaller (number, id).

Liveness is told by each waiter's own monotonic clock. A claim's holder raises its counter every RENEW_S; a claim that
a waiter has seen unchanged for STALE_S is dead to it, and it removes the file. So is one whose process ran on the
waiter's own machine and has ended, at once.

What is promised, in a store that lists and reads what was written before (file systems, S3, Google Cloud Storage):

    one in turn   No two claimants are in turn at once, unless one was stopped, or cut off from the store, for longer
                  than STALE_S while it was in turn. It then goes on (with the work that others now repeat), and
                  nobody tells it. One that was stopped before its turn notices, and queues again under another name.
    no deadlock   If the first in the queue dies, the others go on after STALE_S. One that lives but has not looked for
                  STALE_S is not renewed, so that a claimant that forgot its claim holds up nobody.
    in order      Whoever has its number before another begins to choose is served before it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from cluster.liveness import Process, Silence
from cluster.storage import FileStat, NotFound, StorageError, Store
from llama.retry import retried

RENEW_S = 5.0
STALE_S = 60.0
_LAPSE_S = STALE_S / 2
"""After so long without a renewal a holder no longer relies on its claim: half of what others wait, since their clocks
may run faster, and since a file can be seen before the write that made it has returned."""

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Between tries at a store that fails for a moment: to go on without a claim costs somebody's work."""

FOLDER = "claims"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """Another's claim as it was read. `number` is None while it is choosing."""

    stat: FileStat
    content: bytes
    holder: str
    number: int | None
    process: Process | None

    @classmethod
    def of(cls, stat: FileStat, content: bytes) -> _Seen:
        """What is no claim is as one that never stops choosing, until it is stale."""
        try:
            value: dict[str, Any] = json.loads(content)
            number = None if value["number"] is None else int(value["number"])
            return cls(stat, content, str(value["holder"]), number, Process(**value["process"]))
        except (ValueError, TypeError, KeyError):
            return cls(stat, content, "an unreadable claim", None, None)


class Claim:
    """A place in the queue for an artifact; `with Claim.enter(...) as claim` gives it up at the end.

    The caller asks for its `blocker` every second or so, and between looks whether the artifact is committed. Methods
    raise StorageError; a renewal that fails is logged and tried again.

    Args:
        store: the artifact's folder.
        holder: who this is, for those who wait: "run 20260131-235959-1f4a9c on host-7".
    """

    def __init__(self, store: Store, holder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = store.child(FOLDER)
        self._holder = holder
        self._process = Process.current()
        self._clock = clock
        self._silence = Silence(clock)
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="claim", daemon=True)
        self._name = ""
        self._number: int | None = None
        self._beat = 0
        self._written = self._looked = clock()
        self._lapsed = False
        self.in_turn = False

    @classmethod
    def enter(cls, store: Store, holder: str, pauses: Sequence[float] = PAUSES_S) -> Claim:
        """A claim that is in the queue, and renewed by a thread."""
        claim = cls(store, holder)
        try:
            retried(claim.join, f"a claim on {store.uri}", on=(StorageError,), pauses=pauses)
        except BaseException:
            claim.close()
            raise
        claim._thread.start()
        return claim

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def join(self) -> None:
        """Through the bakery's door, under a new name: a file of the old one may be removed by others at any time."""
        with self._lock:
            if self._name:
                self._folder.delete(self._name)
            self._name, self._number = f"{uuid.uuid4().hex}.json", None
            self._written, self._lapsed = self._clock(), False
            self._write()
        others = self._look()
        with self._lock:
            self._number = 1 + max((other.number or 0 for other in others.values()), default=0)
            self._write()

    def blocker(self) -> str | None:
        """Who is before us, or None: it is our turn, and stays ours. One look: a listing, and a read of each claim that
        is new or was renewed."""
        if self.in_turn:
            return None
        self._looked = self._clock()
        others = self._look()
        if self.lapsed or self._number is None:
            self.join()
            others = self._look()
            if self.lapsed:
                return f"the store, which takes more than {_LAPSE_S:g} s for a look"
        assert self._number is not None
        ours = self._number, self._name
        before = [
            (other.number is not None, other.number or 0, name, other.holder)
            for name, other in others.items()
            if other.number is None or (other.number, name) < ours
        ]
        if before:
            return min(before)[-1]
        self.in_turn = True
        return None

    @property
    def lapsed(self) -> bool:
        """Whether others may have taken this claim for dead."""
        return self._lapsed or self._clock() - self._written > _LAPSE_S

    def renew(self) -> None:
        """Show that the holder lives."""
        with self._lock:
            if not self._stop.is_set():
                self._beat += 1
                self._write()

    def close(self) -> None:
        """Leave the queue. A store that fails now makes the others wait until the claim is stale, and is logged."""
        self._stop.set()
        self.in_turn = False
        with self._lock:  # no renewal is under way that would write the file again
            try:
                if self._name:
                    self._folder.delete(self._name)
            except StorageError as error:
                _log.warning("a claim was not taken back, and holds up others for %g s: %s", STALE_S, error)

    def _renew_for_ever(self) -> None:
        warned = False
        while not self._stop.wait(RENEW_S):
            if not self.in_turn and self._clock() - self._looked > STALE_S:
                continue
            try:
                self.renew()
                warned = False
            except StorageError as error:
                if not warned:
                    _log.warning("a claim was not renewed; if this lasts, others repeat its work: %s", error)
                warned = True

    def _write(self) -> None:
        before, begun = self._written, self._clock()
        value = {"holder": self._holder, "number": self._number, "beat": self._beat, "process": asdict(self._process)}
        self._folder.write_json(self._name, value)
        # until now others may have seen what was written before
        self._lapsed = self._lapsed or self._clock() - before > _LAPSE_S
        self._written = begun

    def _look(self) -> dict[str, _Seen]:
        """The other claims that live."""
        asked = self._clock()
        stats = self._folder.stats()
        if self._name not in stats:
            self._lapsed = True
        living: dict[str, _Seen] = {}
        for name, stat in stats.items():
            if name == self._name:
                continue
            with suppress(NotFound):  # its holder has left
                seen = self._read(name, stat, asked)
                if seen is not None:
                    living[name] = seen
        self._seen = living
        self._silence.forget_all_but(living)
        return living

    def _read(self, name: str, stat: FileStat, asked: float) -> _Seen | None:
        """None if it is dead, and removed."""
        seen = self._seen.get(name)
        if seen is None or seen.stat != stat or seen.number is None or self._is_silent(name, seen, asked):
            # A store's times may be so coarse, or be none, that a renewal does not show in them.
            asked = self._clock()
            seen = _Seen.of(stat, self._folder.read_bytes(name))
        if self._is_silent(name, seen, asked) or (seen.process is not None and seen.process.has_ended()):
            self._folder.delete(name)
            return None
        return seen

    def _is_silent(self, name: str, seen: _Seen, asked: float) -> bool:
        return self._silence.seconds(name, seen.content, asked) > STALE_S
