"""What one process knows for routing: one `RoutingState` per Serve application, shared by its threads.

Serve ships the router's own module by value, so its globals are not shared; and it runs the router on a thread
of its own, beside the ingress's event loop. Hence this module, found by import, and one lock around the pure parts:
the index, the ledger, the promises and the calibration. Every method holds the lock for microseconds and never waits
inside it.

    router thread:  set_replicas, select, placed            ingress loop:  apply_update, first_token, finish, ...

A replica's load is what its last report says, plus this process's requests that the report does not include yet. So
several processes agree as soon as the reports are in, and a burst sees its own bookings at once.
"""

import asyncio
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.serve.calibration import Calibration
from cluster.serve.cost import Candidate, CostCoefficients, Score, choose
from cluster.serve.index import BlockIndex
from cluster.serve.ledger import Ledger, Reservation
from cluster.serve.messages import GenerateRequest, ReplicaInfo, ReplicaLoad, ReplicaUpdate
from cluster.serve.promises import Promises
from llama.engine import CacheSnapshot

logger = logging.getLogger("ray.serve")

RESERVATION_TIMEOUT_S = 600.0
SILENCE_S = 3.0  # updates come every half second; a replica that sends none for so long is frozen or cut off
_UNKNOWN_FREE_BLOCKS = 1 << 30
_DEFAULT_BLOCK_SIZE = 16


@dataclass
class _Replica:
    info: ReplicaInfo | None = None
    load: ReplicaLoad | None = None
    generation: int = 0  # of `info`: the n-th change of weights that this process heard of
    updated_at: float = -math.inf
    in_step: bool = False  # no gap in its events since the last snapshot
    alarmed: bool = False
    lag_s: float | None = None

    def is_fresh(self, now: float) -> bool:
        return self.in_step and now - self.updated_at <= SILENCE_S


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica as this process sees it.

    `fresh`: its cache is known here and its updates keep coming. `age_s`: seconds since the last one (None: never
    heard). `prefill_s_per_token`: as learnt from its first tokens. `lag_s`: from the making of the last cache events
    heard to their being applied here; between two machines as true as their clocks.
    """

    replica: str
    info: ReplicaInfo | None
    load: ReplicaLoad | None
    fresh: bool
    cached_blocks: int
    active_requests: int
    age_s: float | None
    prefill_s_per_token: float
    lag_s: float | None


@dataclass(frozen=True)
class Selection:
    """One routing decision: when, how long it took, and what it said of every replica, best first."""

    at: float
    seconds: float
    scores: tuple[Score, ...]

    def score(self, replica: str) -> Score | None:
        """What it said of one replica."""
        return next((score for score in self.scores if score.replica == replica), None)


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
        self._index = BlockIndex()
        self._ledger = Ledger()
        self._promises = Promises()
        self._replicas: dict[str, _Replica] = {}
        self._generations = 0
        self._selections: dict[str, Selection | None] = {}  # of begun requests
        self._waiters: list[_Waiter] = []
        self._on_replicas: Callable[[], None] | None = None
        self.set_coefficients(coefficients or CostCoefficients())

    def set_coefficients(self, coefficients: CostCoefficients) -> None:
        """Takes other coefficients, and forgets what was learnt under the ones before."""
        with self._lock:
            self._coefficients = coefficients
            self._calibration = Calibration(coefficients.prefill_s_per_token)

    @property
    def coefficients(self) -> CostCoefficients:
        return self._coefficients

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
                self._calibration.drop(replica)
                for request_id in self._promises.requests_on(replica):
                    self._promises.remove(request_id)
            for replica in replicas:
                self._replicas.setdefault(replica, _Replica())
        if self._on_replicas is not None:
            self._on_replicas()

    def info(self, weights_id: str) -> ReplicaInfo | None:
        """What the replicas with these weights say of their model; None until the first of them has been heard."""
        with self._lock:
            return self._info(weights_id)

    def model(self, family: str) -> ReplicaInfo | None:
        """What new requests are made for: the weights of most replicas of this family, then the newest."""
        with self._lock:
            known = [known for known in self._replicas.values() if known.info and known.info.family == family]
            votes = Counter(entry.info.weights_id for entry in known if entry.info)
            best = max(known, key=lambda entry: (votes[entry.info.weights_id], entry.generation), default=None)  # type: ignore[union-attr]
            return best.info if best else None

    def status(self) -> list[ReplicaStatus]:
        """Every replica, in the order Serve lists them."""
        with self._lock:
            now = self._clock()
            return [
                ReplicaStatus(
                    replica,
                    known.info,
                    known.load,
                    known.is_fresh(now),
                    self._index.num_blocks(replica),
                    self._ledger.load(replica).active_requests,
                    now - known.updated_at if known.load else None,
                    self._calibration.speed(replica).s_per_token,
                    known.lag_s,
                )
                for replica, known in self._replicas.items()
            ]

    def difference(self, replica: str, snapshot: CacheSnapshot) -> tuple[int, int] | None:
        """Of what is cached there and what the index holds: see `BlockIndex.difference`."""
        with self._lock:
            return self._index.difference(replica, snapshot)

    # -- what replicas report ------------------------------------------------------------------------------

    def apply_update(self, replica: str, update: ReplicaUpdate) -> bool:
        """Takes one subscription item in; False means a gap: resubscribe for a snapshot."""
        with self._lock:
            known = self._replicas.get(replica)
            if known is None:
                return False
            if update.info is not None:
                self._set_info(known, update.info)
            if update.snapshot is not None:
                capacity = known.info.num_blocks if known.info else float("inf")
                self._index.load_snapshot(replica, update.snapshot, capacity=capacity)
                self._forget_promises(replica)  # those that still hold come with it
            for event in update.events:
                self._index.apply(replica, event, epoch=update.epoch)
            if update.seq is not None:
                self._index.reach(replica, update.seq, epoch=update.epoch)
            for admission in update.admitted:
                self._acknowledge(admission.request_id, replica)
                self._promises.add(admission.request_id, replica, admission.hashes)
            for request_id in update.prefilled:
                self._promises.remove(request_id)
            known.load, known.updated_at = update.load, self._clock()
            if update.made_at is not None:
                known.lag_s = max(0.0, time.time() - update.made_at)
            known.in_step = self._index.is_fresh(replica)
            known.alarmed = known.alarmed and not known.in_step
            ready = self._take_ready_waiters()
        for waiter in ready:
            waiter.loop.call_soon_threadsafe(_resolve, waiter.done)
        return known.in_step

    def lost_subscription(self, replica: str) -> None:
        """The event stream of a replica broke: nothing is predicted there until the next snapshot."""
        with self._lock:
            self._index.mark_stale(replica)
            self._forget_promises(replica)
            if replica in self._replicas:
                self._replicas[replica].in_step = False

    async def wait_applied(self, replica: str, seq: int, timeout_s: float) -> bool:
        """Waits until the index has applied a replica's events up to `seq`.

        False when the time is up, and at once when nothing is known of the replica's cache.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(replica, seq, loop, loop.create_future())
        with self._lock:
            known = self._replicas.get(replica)
            if known is None or not known.is_fresh(self._clock()) or self._has_applied(waiter):
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
        """Announces a request of this process, or another attempt at it, which is booked nowhere yet; only what was
        begun is booked, until `finish`."""
        with self._lock:
            self._release(request_id)
            self._selections[request_id] = None

    def predicted_wait_s(self, request: GenerateRequest) -> float:
        """Seconds until the request's first token if it were routed now; 0 where nothing is known."""
        with self._lock:
            scores = self._rank(request, list(self._replicas))
            return scores[0].wait_s if scores else 0.0

    def select(self, request: GenerateRequest, candidates: Sequence[str]) -> list[str]:
        """Ranks the candidates for a request, best first, and books it on the first of them.

        Replicas known to have other weights are left out, unless there is no other: then they are to refuse it.
        Serve may still ask about a request that its client has just left, and other handles about requests whose end
        we would never hear of: neither is booked.
        """
        started = time.perf_counter()
        with self._lock:
            now = self._clock()
            for request_id in self._ledger.expire(now):
                self._promises.remove(request_id)
                self._selections.pop(request_id, None)
            self._release(request.request_id)
            scores = self._rank(request, candidates)
            if scores and request.request_id in self._selections:
                seconds = time.perf_counter() - started
                self._selections[request.request_id] = Selection(now, seconds, tuple(scores))
                self._book(request, scores[0])
            return [score.replica for score in scores]

    def placed(self, request: GenerateRequest, replica: str) -> int:
        """The request was accepted by `replica`, which need not be the first choice: moves the booking there.

        Returns the cached tokens that `select` foresaw there.
        """
        with self._lock:
            booked_on = self._ledger.replica_of(request.request_id)
            selection = self._selections.get(request.request_id)
            score = selection.score(replica) if selection else None
            if score is None:
                return 0
            if booked_on is not None and booked_on != replica:
                self._book(request, score)
            return score.predicted_cached_tokens

    def selection(self, request_id: str) -> Selection | None:
        """The last routing decision about an unfinished request of this process."""
        with self._lock:
            return self._selections.get(request_id)

    def routed(self, request_id: str) -> tuple[str | None, Selection | None]:
        """The replica that an unfinished request is booked on, and the last decision about it."""
        with self._lock:
            return self._ledger.replica_of(request_id), self._selections.get(request_id)

    def booked_on(self, request_id: str) -> str | None:
        """The replica a request is booked on at present."""
        with self._lock:
            return self._ledger.replica_of(request_id)

    def first_token(self, request_id: str, missing_tokens: int) -> None:
        """The request's prefill is over; its replica had to compute so many tokens of the prompt."""
        with self._lock:
            self._promises.remove(request_id)
            replica, selection = self._ledger.replica_of(request_id), self._selections.get(request_id)
            score = selection.score(replica) if selection and replica else None
            if selection and replica and score:
                ahead = score.candidate.pending_prefill_tokens + missing_tokens
                self._calibration.observe(replica, ahead, self._clock() - selection.at)
            self._ledger.first_token(request_id)

    def progress(self, request_id: str, generated_tokens: int) -> None:
        """The request has generated this many tokens so far."""
        with self._lock:
            self._ledger.progress(request_id, generated_tokens)

    def finish(self, request_id: str) -> None:
        """The request is over, however it ended."""
        with self._lock:
            self._release(request_id)
            self._selections.pop(request_id, None)

    # -- with the lock held --------------------------------------------------------------------------------

    def _set_info(self, known: _Replica, info: ReplicaInfo) -> None:
        if known.info is None or known.info.weights_id != info.weights_id:
            self._generations += 1
            known.generation = self._generations
        known.info = info

    def _info(self, weights_id: str) -> ReplicaInfo | None:
        infos = (known.info for known in self._replicas.values())
        return next((info for info in infos if info and info.weights_id == weights_id), None)

    def _forget_promises(self, replica: str) -> None:
        """Those of requests that the replica has reported; it reports them again with its next snapshot."""
        for request_id in self._promises.requests_on(replica):
            if not self._ledger.is_on_its_way(request_id):
                self._promises.remove(request_id)

    def _acknowledge(self, request_id: str, replica: str) -> None:
        """A replica has a request, be it the first choice or not: whoever passed that over tells us later."""
        if self._ledger.is_on_its_way(request_id) and self._ledger.replica_of(request_id) != replica:
            selection = self._selections.get(request_id)
            score = selection.score(replica) if selection else None
            if score is None:
                return
            self._reserve(request_id, score)
        self._ledger.acknowledge(request_id)

    def _release(self, request_id: str) -> None:
        self._ledger.release(request_id)
        self._promises.remove(request_id)

    def _book(self, request: GenerateRequest, score: Score) -> None:
        self._promises.add(request.request_id, score.replica, request.hashes[score.candidate.matched_blocks :])
        self._reserve(request.request_id, score)

    def _reserve(self, request_id: str, score: Score) -> None:
        num_tokens = score.predicted_cached_tokens + score.missing_tokens
        deadline = self._clock() + RESERVATION_TIMEOUT_S
        self._ledger.reserve(
            Reservation(request_id, score.replica, num_tokens, score.missing_tokens, score.missing_blocks, deadline)
        )

    def _rank(self, request: GenerateRequest, names: Sequence[str]) -> list[Score]:
        info = self._info(request.weights_id)
        suitable = self._suitable(names, request.weights_id)
        # To score a prompt the engine computes all of it, whatever is cached.
        usable = request.hashes if request.params.prompt_logprobs is None else ()
        matches, now = self._index.match(usable), self._clock()
        return choose(
            request.hashes,
            len(request.token_ids),
            info.block_size if info else _DEFAULT_BLOCK_SIZE,
            [self._candidate(name, usable, matches.get(name, 0), now) for name in suitable],
            self._coefficients,
            request.avoid,
        )

    def _suitable(self, names: Sequence[str], weights_id: str) -> Sequence[str]:
        """Those that have, or for all we know may have, these weights; all of them if there are none."""
        others = {name for name, known in self._replicas.items() if known.info and known.info.weights_id != weights_id}
        return [name for name in names if name not in others] or names if others else names

    def _candidate(self, replica: str, hashes: Sequence[bytes], cached_blocks: int, now: float) -> Candidate:
        known = self._replicas.get(replica)
        load = known.load if known else None
        if known is None or load is None or not known.is_fresh(now):
            return self._silent_candidate(replica, known)
        coming = self._ledger.on_its_way(replica)
        promised = self._promises.of(replica)
        return Candidate(
            replica,
            self._matched(replica, hashes, cached_blocks, promised) if promised else cached_blocks,
            load.pending_prefill_tokens + coming.pending_prefill_tokens,
            load.decode_context_tokens,
            load.running + load.waiting + coming.active_requests,
            load.free_blocks - coming.pending_blocks,
            load.draining,
            *self._calibration.of(replica),
        )

    def _silent_candidate(self, replica: str, known: _Replica | None) -> Candidate:
        """A replica that reports nothing: as booked here, nothing cached, draining if that was its last word."""
        if known is not None and known.load is not None and not known.alarmed:
            known.alarmed = True
            logger.warning(f"Replica {replica} sends no fresh events; nothing is predicted there until it does.")
        own = self._ledger.load(replica)
        return Candidate(
            replica,
            0,
            own.pending_prefill_tokens,
            own.decode_context_tokens,
            own.active_requests,
            _UNKNOWN_FREE_BLOCKS,
            draining=known is not None and known.load is not None and known.load.draining,
            speed=self._calibration.speed(replica),
        )

    def _matched(self, replica: str, hashes: Sequence[bytes], depth: int, promised: Counter[bytes]) -> int:
        """How many leading blocks the replica has or is computing, given how many it has."""
        while depth < len(hashes):
            if hashes[depth] not in promised and not self._index.holds(replica, hashes[depth]):
                break
            depth += 1
        return depth

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
