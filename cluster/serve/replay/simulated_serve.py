"""Serve in virtual time: replicas around modelled engines, and what happens around a router's pick.

The routers are the real classes. What Serve's `AsyncioRouter` (ray/serve/_private/router.py) does with them is done
here at the same moments: the queue-length cache is raised when a call is sent, set when the replica answers that it
took the call, lowered when the call ends; `on_request_routed` comes with that answer, one round trip after the pick and
not before, so a burst is routed on what was known before it. A call that the replica refuses is routed again.

    pick ── RPC ──► replica takes it ── RPC ──► on_request_routed          every message takes RPC_S
                    engine's steps   ── RPC ──► tokens, cache events, load
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from cluster.serve.messages import GenerateRequest
from cluster.serve.replay.feed import Feed
from cluster.serve.replay.modelled_engine import ModelledEngine
from llama.engine import Chunk, EngineFailed, QueueFull

RPC_S = 0.001
"""One way, between two processes of one machine."""
CALL_S = 0.0005
"""Of a caller's processor, to make a call: those of a burst leave one after the other, and each is counted by then."""


class Refused(Exception):
    """The engine's queue is full."""


@dataclass(eq=False)
class SimulatedCall:
    """One call on its way. `ended` gets the exception it ended with, or None."""

    request: GenerateRequest
    on_chunk: Callable[[str, Chunk], None]
    taken: asyncio.Future[tuple[bool, int]]
    ended: asyncio.Future[Exception | None]


class SimulatedReplica:
    """What a router sees of a replica, and the replica itself.

    `feed`, if there is one, is told what happens, and says what the ingress is to learn of it with the chunks.
    """

    node_id = "node"
    availability_zone = None
    multiplexed_model_ids: frozenset[str] = frozenset()
    is_cross_language = False

    def __init__(self, name: str, deployment: DeploymentID, engine: ModelledEngine, max_ongoing: int) -> None:
        self.name = name
        self.replica_id = ReplicaID(name, deployment)
        self.max_ongoing_requests = max_ongoing
        self.engine = engine
        self.ongoing = 0
        self.feed: Feed | None = None
        self._loop = asyncio.get_running_loop()
        self._chunks: list[tuple[SimulatedCall, Chunk]] = []
        self._reporting = False
        engine.on_events = self.report

    async def get_queue_len(self, *, deadline_s: float) -> int:
        """Serve's probe."""
        await asyncio.sleep(RPC_S)
        ongoing = self.ongoing
        await asyncio.sleep(RPC_S)
        return ongoing

    def send(self, call: SimulatedCall) -> None:
        """A call leaves for the replica."""
        self._loop.call_later(RPC_S, self._arrive, call)

    def _arrive(self, call: SimulatedCall) -> None:
        taken = self.ongoing < self.max_ongoing_requests
        if taken:
            self.ongoing += 1
            self._start(call)
        self._loop.call_later(RPC_S, call.taken.set_result, (taken, self.ongoing))

    def _start(self, call: SimulatedCall) -> None:
        def sink(item: Chunk | EngineFailed) -> None:
            assert isinstance(item, Chunk)
            self.ongoing -= item.finish_reason is not None
            if self.feed is not None and item.completion_tokens <= 1:
                self.feed.prefilled(item.request_id)
            self._chunks.append((call, item))
            self.report()

        request = call.request
        try:
            self.engine.add_request(
                request.token_ids,
                request.params,
                sink=sink,
                request_id=request.request_id,
                salt=request.salt,
                priority=request.priority,
            )
        except QueueFull as error:
            self.ongoing -= 1
            self._loop.call_later(RPC_S, call.ended.set_result, Refused(str(error)))
        else:
            if self.feed is not None:
                self.feed.arrived(request)
            self.report()

    def report(self) -> None:
        """Sends off, once what happens now is over, what the ingress is to know."""
        if not self._reporting:
            self._reporting = True
            self._loop.call_soon(self._send_report)

    def _send_report(self) -> None:
        self._reporting = False
        chunks, self._chunks = self._chunks, []
        inform = self.feed.next() if self.feed is not None else None
        if chunks or inform is not None:
            self._loop.call_later(RPC_S, _deliver, self.name, inform, chunks)


def _deliver(name: str, inform: Callable[[], None] | None, chunks: list[tuple[SimulatedCall, Chunk]]) -> None:
    if inform is not None:
        inform()
    for call, chunk in chunks:
        call.on_chunk(name, chunk)
        if chunk.finish_reason is not None:
            call.ended.set_result(None)


def make_router(cls: type[RequestRouter], kwargs: dict[str, Any], deployment: DeploymentID) -> RequestRouter:
    """A router as Serve makes it, but for the clock: the loop's."""
    router = cls(
        deployment_id=deployment,
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="ingress",
        self_actor_id="ingress",
        use_replica_queue_len_cache=True,
        get_curr_time_s=asyncio.get_running_loop().time,
    )
    router.initialize_state(**kwargs)
    return router


class SimulatedHandle:
    """A deployment handle: routes calls to replicas, as Serve's does."""

    def __init__(self, router: RequestRouter, replicas: Sequence[SimulatedReplica]) -> None:
        self._router = router
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._loop = asyncio.get_running_loop()
        self._caller_free_at = 0.0
        router.update_replicas(list(replicas))  # type: ignore[arg-type]  # they have what a router uses

    async def call(self, request: GenerateRequest, session_id: str, on_chunk: Callable[[str, Chunk], None]) -> None:
        """Makes a call and waits for its end; `on_chunk` takes the replica and each chunk. Raises Refused."""
        self._caller_free_at = max(self._caller_free_at, self._loop.time()) + CALL_S
        await asyncio.sleep(self._caller_free_at - self._loop.time())
        pending = PendingRequest(
            args=[request],
            kwargs={},
            metadata=RequestMetadata(
                request_id=request.request_id,
                internal_request_id=request.request_id,
                call_method="generate",
                session_id=session_id,
                is_streaming=True,
            ),
            created_at=self._loop.time(),
        )
        error = await (await self._send(pending, on_chunk)).ended
        if error is not None:
            raise error

    async def _send(self, pending: PendingRequest, on_chunk: Callable[[str, Chunk], None]) -> SimulatedCall:
        router, is_retry = self._router, False
        while True:
            chosen = await router._choose_replica_for_request(pending, is_retry=is_retry)
            replica_id = chosen.replica_id
            call = SimulatedCall(pending.args[0], on_chunk, self._loop.create_future(), self._loop.create_future())
            self._replicas[replica_id].send(call)
            router.on_send_request(replica_id)
            call.ended.add_done_callback(partial(self._completed, replica_id, pending.metadata.internal_request_id))
            taken, ongoing = await call.taken
            router.on_new_queue_len_info(replica_id, ongoing)
            if taken:
                router.on_request_routed(pending, replica_id, SimpleNamespace())  # type: ignore[arg-type]
                call.ended.add_done_callback(partial(self._decrement, replica_id))
                return call
            call.ended.set_result(None)
            is_retry = True

    def _completed(self, replica_id: ReplicaID, internal_id: str, _: object) -> None:
        self._router.on_request_completed(replica_id, internal_id)

    def _decrement(self, replica_id: ReplicaID, _: object) -> None:
        self._router.decrement_queue_len_cache(replica_id)


def seed_routers(seed: int) -> None:
    """Ray's routers draw from the process's random numbers."""
    random.seed(f"routers {seed}")
