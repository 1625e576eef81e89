"""Whether somebody who left a file in a store is still at it, told without comparing two machines' clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, for others on its machine: they need not wait to see that it has ended.

    `machine` is one boot of one kernel and the namespace that the number `pid` counts in, so that containers do not
    take each other's processes for theirs; it is empty where the system does not tell (no /proc), and then nothing is
    ever known. `started`, in ticks since that boot, tells the process from a later one of its number.
    """

    machine: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> Process:
        return cls(_machine(), os.getpid(), _started(os.getpid()) or 0)

    def has_ended(self) -> bool:
        """True only if that is certain."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started


class Silence:
    """How long files have not changed, by this process's own monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._first: dict[str, tuple[bytes, float]] = {}

    def seconds(self, name: str, content: bytes, asked: float) -> float:
        """Since when, at the latest, the file `name` has had this content: 0.0 if it is new.

        Args:
            asked: the time before the content was read. This process may have been stopped since, and the file changed.
        """
        known = self._first.get(name)
        if known is None or known[0] != content:
            self._first[name] = content, self.clock()
            return 0.0
        return asked - known[1]

    def forget_all_but(self, names: Collection[str]) -> None:
        self._first = {name: seen for name, seen in self._first.items() if name in names}


@cache
def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """None if there is no such process, or only its remains, which its parent has not waited for yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
