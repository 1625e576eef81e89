"""What happens to the set of reusable blocks, told in order, so that a router can follow it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import uuid4

MAX_PENDING_EVENTS = 8192
"""Events kept for a consumer that does not drain them. Beyond it the oldest go; the gap in `seq` shows it."""


@dataclass(frozen=True)
class BlocksStored:
    """These blocks can be reused from now on; parents come before their children."""

    seq: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class BlocksRemoved:
    """These blocks were evicted; children come before their parents."""

    seq: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class CacheCleared:
    """No block can be reused any more."""

    seq: int


BlockEvent = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True)
class CacheSnapshot:
    """All reusable blocks at one moment; the next event has `seq + 1`.

    `epoch` is unique to one cache instance: sequence numbers of different epochs are not comparable.
    """

    epoch: str
    seq: int
    hashes: tuple[bytes, ...]


class EventLog:
    """Numbers events and keeps those not drained yet, the last `MAX_PENDING_EVENTS` of them."""

    def __init__(self) -> None:
        self.epoch = uuid4().hex
        self.seq = 0
        self._pending: deque[BlockEvent] = deque(maxlen=MAX_PENDING_EVENTS)

    def stored(self, hashes: Iterable[bytes]) -> None:
        self.seq += 1
        self._pending.append(BlocksStored(self.seq, tuple(hashes)))

    def removed(self, hashes: Iterable[bytes]) -> None:
        self.seq += 1
        self._pending.append(BlocksRemoved(self.seq, tuple(hashes)))

    def cleared(self) -> None:
        self.seq += 1
        self._pending.append(CacheCleared(self.seq))

    def drain(self) -> list[BlockEvent]:
        """The events since the last call, in order of `seq`."""
        events = list(self._pending)
        self._pending.clear()
        return events
