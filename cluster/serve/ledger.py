"""What this process has sent where: reservations made at selection, so that a burst does not see stale load.

A request's life in the ledger:

    reserve     ──► on its way: its missing tokens and blocks count against the replica
    acknowledge ──► there: the replica's own reports include it from now on, so `on_its_way` does not
    first_token ──► decoding: prefill is over, its context tokens count instead, growing by `progress`
    release     ──► gone: finished, aborted or failed
    (deadline)  ──► gone: whoever should have released it did not

`on_its_way` is what to add to a replica's report; `load` is all there is to go by when it sends none. Running totals
make both O(1). Not thread-safe; the owner locks. Times are seconds of any monotonic clock.
"""

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Reservation:
    """One request on one replica. `missing_tokens` and `missing_blocks`: what its prefill computes and stores."""

    request_id: str
    replica: str
    num_tokens: int
    missing_tokens: int
    missing_blocks: int
    deadline: float


@dataclass(frozen=True)
class LedgerLoad:
    """Totals of one replica over this process's unfinished requests."""

    active_requests: int = 0
    pending_prefill_tokens: int = 0
    pending_blocks: int = 0
    decode_context_tokens: int = 0


@dataclass
class _Entry:
    reservation: Reservation
    decoding: bool = False
    acknowledged: bool = False
    generated_tokens: int = 0

    def load(self) -> LedgerLoad:
        reservation = self.reservation
        if self.decoding:
            return LedgerLoad(1, decode_context_tokens=reservation.num_tokens + self.generated_tokens)
        return LedgerLoad(1, reservation.missing_tokens, reservation.missing_blocks)


class Ledger:
    """Reservations by request id, with totals by replica."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._totals: dict[str, LedgerLoad] = {}
        self._on_their_way: dict[str, LedgerLoad] = {}
        self._deadlines: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, reservation: Reservation) -> None:
        """Books a request; a second booking of the same request (a retry, another replica) replaces the first."""
        self.release(reservation.request_id)
        entry = self._entries[reservation.request_id] = _Entry(reservation)
        heapq.heappush(self._deadlines, (reservation.deadline, reservation.request_id))
        if len(self._deadlines) > _SLACK + 2 * len(self._entries):
            self._deadlines = [(entry.reservation.deadline, name) for name, entry in self._entries.items()]
            heapq.heapify(self._deadlines)
        self._add(entry, 1)

    def replica_of(self, request_id: str) -> str | None:
        """The replica a request is booked on, or None when it is unknown or already released."""
        entry = self._entries.get(request_id)
        return entry.reservation.replica if entry else None

    def is_on_its_way(self, request_id: str) -> bool:
        """Whether a request is booked here and its replica has not acknowledged it."""
        entry = self._entries.get(request_id)
        return entry is not None and not entry.acknowledged

    def acknowledge(self, request_id: str) -> None:
        """The replica's reports include the request from now on. Unknown ids, other processes', are ignored."""
        entry = self._entries.get(request_id)
        if entry is not None and not entry.acknowledged:
            self._add(entry, -1)
            entry.acknowledged = True
            self._add(entry, 1)

    def first_token(self, request_id: str) -> None:
        """The prefill of a request is over; from now on it costs decode time. Unknown ids are ignored."""
        entry = self._entries.get(request_id)
        if entry is not None and not entry.decoding:
            self._add(entry, -1)
            entry.decoding = entry.acknowledged = True
            self._add(entry, 1)

    def progress(self, request_id: str, generated_tokens: int) -> None:
        """Sets how many tokens a decoding request has generated so far."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.decoding:
            self._add(entry, -1)
            entry.generated_tokens = generated_tokens
            self._add(entry, 1)

    def release(self, request_id: str) -> None:
        """Ends a request's booking, whatever its state. Releasing twice is harmless."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._add(entry, -1)

    def drop(self, replica: str) -> None:
        """Ends every booking on a replica that has left."""
        for request_id in [key for key, entry in self._entries.items() if entry.reservation.replica == replica]:
            self.release(request_id)
        self._totals.pop(replica, None)
        self._on_their_way.pop(replica, None)

    def expire(self, now: float) -> list[str]:
        """Releases the bookings whose deadline has passed; returns their request ids."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            entry = self._entries.get(request_id)
            if entry is not None and entry.reservation.deadline == deadline:
                self.release(request_id)
                expired.append(request_id)
        return expired

    def load(self, replica: str) -> LedgerLoad:
        """What this process has outstanding on a replica."""
        return self._totals.get(replica, _NOTHING)

    def on_its_way(self, replica: str) -> LedgerLoad:
        """The part of `load` that the replica has not acknowledged."""
        return self._on_their_way.get(replica, _NOTHING)

    def _add(self, entry: _Entry, sign: int) -> None:
        _add_to(self._totals, entry, sign)
        if not entry.acknowledged:
            _add_to(self._on_their_way, entry, sign)


def _add_to(totals: dict[str, LedgerLoad], entry: _Entry, sign: int) -> None:
    replica, change = entry.reservation.replica, entry.load()
    total = totals.get(replica, _NOTHING)
    totals[replica] = LedgerLoad(
        total.active_requests + sign * change.active_requests,
        total.pending_prefill_tokens + sign * change.pending_prefill_tokens,
        total.pending_blocks + sign * change.pending_blocks,
        total.decode_context_tokens + sign * change.decode_context_tokens,
    )


_NOTHING = LedgerLoad()
_SLACK = 1024
"""Deadlines of bookings that have ended: so many, and as many as there are bookings, may wait to be forgotten."""
