"""When which stage of a run is tried: no I/O, no clock of its own, no threads.

    waiting ──upstream done, room──▶ trying ──▶ done
       ▲                               │
       └──after a wait, if tries left──┴──▶ failed

Stages that do not depend on each other are tried at the same time, as far as the cluster has room for what they say
they take; one that takes more than the whole cluster is tried alone. Once a stage has failed for good no other is
begun, and those that are being tried go on to their end: what they commit is not lost. With `keep_going` all that does
not need the failed one is begun still.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.stage import LOST_RETRIES, MAX_WAIT, Resources, Stage


@dataclass
class _Entry:
    stage: Stage
    upstream: tuple[str, ...]
    state: Literal["waiting", "trying", "done", "failed"] = "waiting"
    errors: int = 0
    losses: int = 0
    not_before: float = float("-inf")
    deadline: float = float("inf")


@dataclass
class Schedule:
    """Times are seconds of one monotonic clock, the caller's.

    `stages` in an order that respects their dependencies; those of their upstream that are not among them are done.
    `capacity`: what the cluster has, None for no limit.
    """

    stages: Sequence[Stage]
    capacity: Resources | None = None
    done: Collection[str] = ()
    keep_going: bool = False
    _entries: dict[str, _Entry] = field(init=False)
    _stopped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        names = {stage.name for stage in self.stages}
        self._entries = {
            stage.name: _Entry(stage, tuple(name for name in stage.upstream if name in names)) for stage in self.stages
        }
        for name in self.done:
            self._entries[name].state = "done"

    def due(self, now: float) -> list[Stage]:
        """The stages to try now; they count as being tried from here on."""
        begun = []
        for entry in self._entries.values():
            if entry.state == "waiting" and self._is_ready(entry, now) and self._has_room(entry.stage.resources):
                entry.state = "trying"
                entry.deadline = float("inf")
                begun.append(entry.stage)
        return begun

    def began(self, name: str, now: float) -> None:
        """The try's worker is at it: its time counts from now."""
        entry = self._entries[name]
        if entry.stage.tries.timeout is not None:
            entry.deadline = now + entry.stage.tries.timeout

    def overdue(self, now: float) -> list[str]:
        """The stages whose time is up; each is named once per try."""
        over = [name for name, entry in self._entries.items() if entry.state == "trying" and entry.deadline <= now]
        for name in over:
            self._entries[name].deadline = float("inf")
        return over

    def succeeded(self, name: str) -> None:
        self._entries[name].state = "done"

    def failed(self, name: str, now: float, lost: bool = False) -> float | None:
        """A try failed. Returns the seconds until the next one, or None: the stage has failed for good.

        `lost`: its worker was lost, which is no fault of the stage.
        """
        entry = self._entries[name]
        tries = entry.stage.tries
        if lost:
            entry.losses += 1
        else:
            entry.errors += 1
        left = entry.losses <= LOST_RETRIES if lost else entry.errors <= tries.retries
        if self._stopped or not left:
            entry.state = "failed"
            self._stopped = self._stopped or not self.keep_going
            return None
        wait = min(tries.wait * 2 ** (entry.errors + entry.losses - 1), MAX_WAIT)
        entry.state, entry.not_before = "waiting", now + wait
        return wait

    def stop(self) -> None:
        """Nothing more begins."""
        self._stopped = True

    @property
    def is_over(self) -> bool:
        """Nothing is being tried, and nothing will be."""
        states = {entry.state for entry in self._entries.values()}
        if "trying" in states or self._stopped:
            return "trying" not in states
        failed: set[str] = set()  # and what needs one that has
        for name, entry in self._entries.items():
            if entry.state == "failed" or not failed.isdisjoint(entry.upstream):
                failed.add(name)
        return all(entry.state == "done" or name in failed for name, entry in self._entries.items())

    def wait(self, now: float) -> float | None:
        """Seconds until `due` or `overdue` may have something new without anything being told; None for never."""
        times = [entry.deadline for entry in self._entries.values() if entry.state == "trying"]
        if not self._stopped:
            times += [entry.not_before for entry in self._entries.values() if self._is_ready(entry, float("inf"))]
        soonest = min((time for time in times if now < time < float("inf")), default=None)
        return None if soonest is None else soonest - now

    def _is_ready(self, entry: _Entry, now: float) -> bool:
        if self._stopped or entry.state != "waiting" or entry.not_before > now:
            return False
        return all(self._entries[name].state == "done" for name in entry.upstream)

    def _has_room(self, wanted: Resources) -> bool:
        taken = [entry.stage.resources for entry in self._entries.values() if entry.state == "trying"]
        if self.capacity is None or not taken:
            return True
        cpus = sum(each.num_cpus for each in taken) + wanted.num_cpus
        gpus = sum(each.num_gpus for each in taken) + wanted.num_gpus
        memory = sum(each.memory for each in taken) + wanted.memory
        return cpus <= self.capacity.num_cpus and gpus <= self.capacity.num_gpus and memory <= self.capacity.memory
