"""What one process knows for routing: one `RoutingState` per Serve application, shared by its threads.

Serve ships the router's own module by value, so its globals are not shared; and it runs the router on a thread
of its own, beside the ingress's event loop. Hence this module, found by import, and one lock around the index
and the ledger. Every method holds the lock for microseconds and never waits inside it.

    router thread:  set_replicas, select, placed            ingress loop:  apply_update, first_token, finish, ...
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.serve.cost import Candidate, CostCoefficients, Score, choose
from cluster.serve.index import BlockIndex
from cluster.serve.ledger import Ledger, LedgerLoad, Reservation
from cluster.serve.messages import GenerateRequest, ReplicaInfo, ReplicaLoad, ReplicaUpdate

RESERVATION_TIMEOUT_S = 600.0
SILENCE_S = 3.0  # updates come every half second; a replica that sends none for so long is frozen or cut off
_UNKNOWN_FREE_BLOCKS = 1 << 30
_DEFAULT_BLOCK_SIZE = 16


@dataclass
class _Replica:
    info: ReplicaInfo | None = None
    load: ReplicaLoad | None = None
    booked: LedgerLoad = field(default_factory=LedgerLoad)  # this process's own bookings when `load` arrived
    updated_at: float = 0.0


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica as this process sees it.

    `fresh`: its cache is known here and its updates keep coming. `age_s`: seconds since the last one (None: never
    heard).
    """

    replica: str
    info: ReplicaInfo | None
    load: ReplicaLoad | None
    fresh: bool
    cached_blocks: int
    active_requests: int
    age_s: float | None


@dataclass(frozen=True)
class _Waiter:
    replica: str
    seq: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


class RoutingState:
    """Index, ledger, loads and predictions of one application in this process. Thread-safe."""

    def __init__(self, coefficients: CostCoefficients | None = None, clock: Callable[[], float] = time.monotonic):
        self._lock = threading.Lock()
        self._clock = clock
        self.coefficients = coefficients or CostCoefficients()
        self._index = BlockIndex()
        self._ledger = Ledger()
        self._replicas: dict[str, _Replica] = {}
        self._scores: dict[str, dict[str, Score]] = {}  # of begun requests: what `select` said of each replica
        self._waiters: list[_Waiter] = []
        self._on_replicas: Callable[[], None] | None = None

    # -- the set of replicas -------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[str]:
        """The replicas Serve routes to at present."""
        with self._lock:
            return list(self._replicas)

    def on_replicas_changed(self, callback: Callable[[], None]) -> None:
        """Registers the (single) listener of `set_replicas`; it is called from whichever thread changed the set."""
        self._on_replicas = callback
        callback()

    def set_replicas(self, replicas: Sequence[str]) -> None:
        """Serve's new set of running replicas; whoever left is forgotten."""
        with self._lock:
            for replica in set(self._replicas) - set(replicas):
                del self._replicas[replica]
                self._index.drop(replica)
                self._ledger.drop(replica)
            for replica in replicas:
                self._replicas.setdefault(replica, _Replica())
        if self._on_replicas is not None:
            self._on_replicas()

    def info(self, weights_id: str) -> ReplicaInfo | None:
        """What the replicas of a model say of it; None until the first of them has been heard."""
        with self._lock:
            return self._info(weights_id)

    def status(self) -> list[ReplicaStatus]:
        """Every replica, in the order Serve lists them."""
        with self._lock:
            now = self._clock()
            return [
                ReplicaStatus(
                    replica,
                    known.info,
                    known.load,
                    self._is_fresh(replica),
                    self._index.num_blocks(replica),
                    self._ledger.load(replica).active_requests,
                    now - known.updated_at if known.load else None,
                )
                for replica, known in self._replicas.items()
            ]

    # -- cache events --------------------------------------------------------------------------------------

    def apply_update(self, replica: str, update: ReplicaUpdate) -> bool:
        """Takes one subscription item in; False means a gap: resubscribe for a snapshot."""
        with self._lock:
            known = self._replicas.get(replica)
            if known is None:
                return False
            if update.info is not None:
                known.info = update.info
            if update.snapshot is not None:
                self._index.load_snapshot(replica, update.snapshot)
            for event in update.events:
                self._index.apply(replica, event, epoch=update.epoch)
            known.load, known.booked = update.load, self._ledger.load(replica)
            known.updated_at = self._clock()
            fresh = self._index.is_fresh(replica)
            ready = self._take_ready_waiters()
        for waiter in ready:
            waiter.loop.call_soon_threadsafe(_resolve, waiter.done)
        return fresh

    def lost_subscription(self, replica: str) -> None:
        """The event stream of a replica broke: nothing is predicted there until the next snapshot."""
        with self._lock:
            self._index.mark_stale(replica)

    async def wait_applied(self, replica: str, seq: int, timeout_s: float) -> bool:
        """Waits until the index has applied a replica's events up to `seq`.

        False when the time is up, and at once when nothing is known of the replica's cache.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(replica, seq, loop, loop.create_future())
        with self._lock:
            if not self._is_fresh(replica) or self._has_applied(waiter):
                return self._has_applied(waiter)
            self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter.done, timeout_s)
            return True
        except TimeoutError:
            return False
        finally:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    # -- requests ------------------------------------------------------------------------------------------

    def begin(self, request_id: str) -> None:
        """Announces a request of this process; only what was begun is booked, until `finish`."""
        with self._lock:
            self._scores[request_id] = {}

    def select(self, request: GenerateRequest, candidates: Sequence[str]) -> list[str]:
        """Ranks the candidates for a request, best first, and books it on the first of them.

        Replicas known to have another model are left out, unless there is no other: then they are to refuse it.
        Serve may still ask about a request that its client has just left, and other handles about requests whose end
        we would never hear of: neither is booked.
        """
        with self._lock:
            for request_id in self._ledger.expire(self._clock()):
                self._scores.pop(request_id, None)
            self._ledger.release(request.request_id)
            matches = self._index.match(request.hashes)
            info = self._info(request.weights_id)
            suitable = [name for name in candidates if self._may_have(name, request.weights_id)] or candidates
            scores = choose(
                request.hashes,
                len(request.token_ids),
                info.block_size if info else _DEFAULT_BLOCK_SIZE,
                [self._candidate(name, matches.get(name, 0) if self._is_fresh(name) else 0) for name in suitable],
                self.coefficients,
            )
            scores.sort(key=lambda score: score.replica in request.avoid)
            if scores and request.request_id in self._scores:
                self._scores[request.request_id] = {score.replica: score for score in scores}
                self._book(request.request_id, len(request.token_ids), scores[0])
            return [score.replica for score in scores]

    def placed(self, request: GenerateRequest, replica: str) -> int:
        """The request was accepted by `replica`, which need not be the first choice: moves the booking there.

        Returns the cached tokens that `select` foresaw there.
        """
        with self._lock:
            booked_on = self._ledger.replica_of(request.request_id)
            score = self._scores.get(request.request_id, {}).get(replica)
            if score is None:
                return 0
            if booked_on is not None and booked_on != replica:
                self._book(request.request_id, len(request.token_ids), score)
            return score.predicted_cached_tokens

    def booked_on(self, request_id: str) -> str | None:
        """The replica a request is booked on at present."""
        with self._lock:
            return self._ledger.replica_of(request_id)

    def first_token(self, request_id: str) -> None:
        """The request's prefill is over."""
        with self._lock:
            self._ledger.first_token(request_id)

    def progress(self, request_id: str, generated_tokens: int) -> None:
        """The request has generated this many tokens so far."""
        with self._lock:
            self._ledger.progress(request_id, generated_tokens)

    def finish(self, request_id: str) -> None:
        """The request is over, however it ended."""
        with self._lock:
            self._ledger.release(request_id)
            self._scores.pop(request_id, None)

    # -- with the lock held --------------------------------------------------------------------------------

    def _info(self, weights_id: str) -> ReplicaInfo | None:
        infos = (known.info for known in self._replicas.values())
        return next((info for info in infos if info and info.weights_id == weights_id), None)

    def _may_have(self, replica: str, weights_id: str) -> bool:
        known = self._replicas.get(replica)
        return known is None or known.info is None or known.info.weights_id == weights_id

    def _is_fresh(self, replica: str) -> bool:
        known = self._replicas.get(replica)
        heard = known is not None and self._clock() - known.updated_at <= SILENCE_S
        return heard and self._index.is_fresh(replica)

    def _book(self, request_id: str, num_tokens: int, score: Score) -> None:
        deadline = self._clock() + RESERVATION_TIMEOUT_S
        self._ledger.reserve(
            Reservation(request_id, score.replica, num_tokens, score.missing_tokens, score.missing_blocks, deadline)
        )

    def _candidate(self, replica: str, matched_blocks: int) -> Candidate:
        """Own bookings as of now, plus what the replica reported beyond our bookings at the time: others' work."""
        own = self._ledger.load(replica)
        known = self._replicas.get(replica)
        if known is None or known.load is None:
            return Candidate(
                replica,
                matched_blocks,
                own.pending_prefill_tokens,
                own.decode_context_tokens,
                own.active_requests,
                _UNKNOWN_FREE_BLOCKS,
            )
        load, booked = known.load, known.booked
        return Candidate(
            replica,
            matched_blocks,
            own.pending_prefill_tokens + max(0, load.pending_prefill_tokens - booked.pending_prefill_tokens),
            own.decode_context_tokens + max(0, load.decode_context_tokens - booked.decode_context_tokens),
            own.active_requests + max(0, load.running + load.waiting - booked.active_requests),
            load.free_blocks - max(0, own.pending_blocks - booked.pending_blocks),
        )

    def _has_applied(self, waiter: _Waiter) -> bool:
        position = self._index.position(waiter.replica)
        return position is not None and position[1] >= waiter.seq

    def _take_ready_waiters(self) -> list[_Waiter]:
        ready = [waiter for waiter in self._waiters if self._has_applied(waiter)]
        self._waiters = [waiter for waiter in self._waiters if waiter not in ready]
        return ready


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


_states: dict[str, RoutingState] = {}
_states_lock = threading.Lock()


def routing_state(app_name: str) -> RoutingState:
    """This process's state for a Serve application; made at the first call."""
    with _states_lock:
        return _states.setdefault(app_name, RoutingState())
