"""What a replica tells the ingress processes: one stream to each of them, whatever the number of requests.

An item of such a stream costs Ray 0.5 to 0.8 ms, so the tokens of all requests of a step go together, with the block
events, the load and the admissions. An item goes out at once (URGENT_GAP_S after the one before, at least) when a
request gets its first token or ends. One that has arrived is told of ADMISSION_S later, or together with its first
token if that is sooner: whoever sent it knows, and the other ingresses can wait so long. Anything else waits until
COALESCE_S after the item before, so no token is held longer than that; the pieces of one request that meet there are
joined.

Each ingress process has an outbox, for as long as it follows the replica: a subscription that renews another takes the
outbox over with what is in it, so that nothing gets lost; one that breaks off closes it, and ends its requests.

The engine's thread calls `notify` and the sinks; all else lives on one event loop.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from cluster.serve.messages import (
    Admission,
    GenerateRequest,
    NotFollowed,
    ReplicaInfo,
    ReplicaLoad,
    ReplicaUpdate,
    Subscription,
)
from llama.engine import BlockEvent, CacheSnapshot, Chunk, EngineFailed

HEARTBEAT_S = 0.5
COALESCE_S = 0.02
URGENT_GAP_S = 0.002
ADMISSION_S = 0.01
MAX_QUEUED = 16_384
FIRST_SUBSCRIPTION_S = 5.0  # Serve may send a request to a new replica before its ingress follows it
MAX_REMEMBERED = 256


class EventSource(Protocol):
    """The part of the engine that is followed."""

    def drain_events(self) -> list[BlockEvent]: ...
    def snapshot(self) -> CacheSnapshot: ...


class Answer:
    """One request that a replica works on. `done`: when its last chunk is in the outbox; or why none will be."""

    def __init__(self, request: GenerateRequest, outbox: "Outbox") -> None:
        self.request_id = request.request_id
        self.call = request.call
        self.name = f"{request.source}/{request.call}"  # unique in the engine, whatever names the clients choose
        self.outbox = outbox
        self.unfinished = request.params.n
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Outbox:
    """What one ingress process has not been told yet."""

    def __init__(self) -> None:
        self.answers: set[Answer] = set()
        self.reader: object = None  # the subscription that empties it
        self.number = 0  # of the last item
        self._events: list[BlockEvent] = []
        self._made_at = 0.0  # of the first of them, Unix time
        self._seq: int | None = None  # of the last event, told or not
        self._admitted: list[Admission] = []
        self._prefilled: list[str] = []
        self._chunks: dict[tuple[int, int], Chunk] = {}  # by call and completion
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._last_item = 0.0

    def put_events(self, events: list[BlockEvent]) -> None:
        """The events that follow those put before."""
        self._bound(len(events))
        if not self._events:
            self._made_at = time.time()
        self._events += events
        self._seq = events[-1].seq
        self.wake(urgent=False)

    def put_admission(self, admission: Admission) -> None:
        self._bound(1)
        self._admitted.append(admission)
        self.wake(urgent=True, after_s=ADMISSION_S)

    def put_prefilled(self, request_id: str) -> None:
        self._bound(1)
        self._prefilled.append(request_id)
        self.wake(urgent=True)

    def put_chunk(self, call: int, chunk: Chunk) -> None:
        """A call's next chunk; joined with the one before if that is still here."""
        key = call, chunk.index
        before = self._chunks.get(key)
        self._chunks[key] = chunk if before is None else _joined(before, chunk)
        first = chunk.completion_tokens <= len(chunk.token_ids)
        self.wake(urgent=first or chunk.finish_reason is not None)

    def restart(self, seq: int, pending: list[Admission]) -> None:
        """A snapshot follows, taken now, after event `seq`; with these requests admitted and not prefilled."""
        self._seq = seq
        self._events, self._admitted, self._prefilled = [], pending, []

    def wake(self, *, urgent: bool, after_s: float = 0.0) -> None:
        """Lets the reader go on when it is time, and not before `after_s`."""
        if self._ready.is_set():
            return
        due = max(self._last_item + (URGENT_GAP_S if urgent else COALESCE_S), self._loop.time() + after_s)
        if due < self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self._loop.call_at(due, self._ready.set)  # at once when that has passed

    def release(self) -> None:
        """Lets the reader go on now."""
        self._ready.set()

    async def wait(self, timeout_s: float) -> None:
        """Until there is something to tell, or the time is up."""
        heartbeat = self._loop.call_later(timeout_s, self._ready.set)
        try:
            await self._ready.wait()
        finally:
            heartbeat.cancel()

    def take(
        self, epoch: str, load: ReplicaLoad, info: ReplicaInfo | None, snapshot: CacheSnapshot | None
    ) -> ReplicaUpdate:
        """Everything, as the next item."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = None, math.inf
        self._ready.clear()
        self._last_item = self._loop.time()
        self.number += 1
        update = ReplicaUpdate(
            epoch,
            load,
            events=tuple(self._events),
            snapshot=snapshot,
            info=info,
            admitted=tuple(self._admitted),
            prefilled=tuple(self._prefilled),
            number=self.number,
            chunks=tuple((call, chunk) for (call, _), chunk in self._chunks.items()),
            open_calls=len(self.answers),
            made_at=self._made_at if self._events else None,
            seq=self._seq,
        )
        self._events, self._admitted, self._prefilled, self._chunks = [], [], [], {}
        return update

    def _bound(self, more: int) -> None:
        """Of a reader that does not keep up, the gap up to `seq` makes it ask for a snapshot."""
        if len(self._events) + len(self._admitted) + len(self._prefilled) + more > MAX_QUEUED:
            self._events, self._admitted, self._prefilled = [], [], []


def _joined(before: Chunk, after: Chunk) -> Chunk:
    """Two chunks of one completion as one."""
    return replace(
        after,
        token_ids=before.token_ids + after.token_ids,
        text=before.text + after.text,
        logprobs=None if after.logprobs is None else (before.logprobs or []) + after.logprobs,
        prompt_logprobs=before.prompt_logprobs if after.prompt_logprobs is None else after.prompt_logprobs,
    )


class Broadcast:
    """Everything that happens in one engine, to everyone who follows it.

    Args:
        load, info: what is told of the replica, as it is at the call.
    """

    def __init__(self, source: EventSource, load: Callable[[], ReplicaLoad], info: Callable[[], ReplicaInfo]) -> None:
        self._source = source
        self._load = load
        self._info = info
        self._loop = asyncio.get_running_loop()
        self._outboxes: dict[str, Outbox] = {}
        self._left: dict[str, None] = {}  # sources that followed once, the last ones
        self._pending: dict[str, Admission] = {}
        self._delivered: deque[tuple[Answer, Chunk | EngineFailed]] = deque()
        self._dispatching = False

    # -- from the engine, on any thread --------------------------------------------------------------------

    def notify(self) -> None:
        """There are block events."""
        if not self._dispatching:
            self._dispatching = True
            with suppress(RuntimeError):  # a loop that has ended
                self._loop.call_soon_threadsafe(self._dispatch)

    def sink(self, answer: Answer) -> Callable[[Chunk | EngineFailed], None]:
        """Takes what the engine has for a request."""

        def take(item: Chunk | EngineFailed) -> None:
            self._delivered.append((answer, item))
            self.notify()

        return take

    def _dispatch(self) -> None:
        self._dispatching = False
        # A step hands out its chunks under the lock that this takes: then all of them are here, to go together.
        self.publish()
        delivered = [self._delivered.popleft() for _ in range(len(self._delivered))]
        self.publish()  # and now their events are out before them
        for answer, item in delivered:
            if isinstance(item, EngineFailed):
                answer.fail(item)
            elif not answer.done.done():
                self._end_prefill(answer.request_id)
                answer.outbox.put_chunk(answer.call, item)
                answer.unfinished -= item.finish_reason is not None
                if not answer.unfinished:
                    answer.done.set_result(None)

    def publish(self) -> None:
        """Moves the engine's block events to the outboxes."""
        events = self._source.drain_events()
        if events:
            for outbox in self._outboxes.values():
                outbox.put_events(events)

    # -- requests ------------------------------------------------------------------------------------------

    async def begin(self, request: GenerateRequest) -> Answer:
        """Opens the way back for a request; `end` must follow. Raises NotFollowed."""
        deadline = self._loop.time() + FIRST_SUBSCRIPTION_S
        while (outbox := self._outboxes.get(request.source)) is None:
            if request.source in self._left or self._loop.time() > deadline:
                raise NotFollowed(f"ingress {request.source} does not follow this replica")
            await asyncio.sleep(COALESCE_S)
        answer = Answer(request, outbox)
        outbox.answers.add(answer)
        return answer

    def admit(self, admission: Admission) -> None:
        """A request is in the engine's queue."""
        self._pending[admission.request_id] = admission
        for outbox in self._outboxes.values():
            outbox.put_admission(admission)

    def end(self, answer: Answer) -> None:
        """The request is over, however it ended."""
        self._end_prefill(answer.request_id)
        answer.outbox.answers.discard(answer)
        answer.outbox.wake(urgent=False)
        answer.done.cancel()

    def _end_prefill(self, request_id: str) -> None:
        if self._pending.pop(request_id, None) is not None:
            for outbox in self._outboxes.values():
                outbox.put_prefilled(request_id)

    # -- followers -----------------------------------------------------------------------------------------

    def touch(self) -> None:
        """What `load` or `info` say has changed: everyone is told now."""
        for outbox in self._outboxes.values():
            outbox.wake(urgent=True)

    async def follow(self, subscription: Subscription) -> AsyncGenerator[ReplicaUpdate, None]:
        """A subscription's items: a snapshot, then what happens, and the load at least every HEARTBEAT_S.

        Ends when another one renews it, and by `leave`. If its reader closes it, its requests end too.
        """
        outbox = self._take_over(subscription)
        self.publish()
        snapshot, told = self._source.snapshot(), self._info()
        outbox.restart(snapshot.seq, list(self._pending.values()))
        try:
            yield outbox.take(snapshot.epoch, self._load(), told, snapshot)
            while True:
                await outbox.wait(HEARTBEAT_S)
                if outbox.reader is not subscription:
                    return
                self.publish()
                info = self._info()
                yield outbox.take(snapshot.epoch, self._load(), info if info != told else None, None)
                told = info
        finally:
            if outbox.reader is subscription:
                self._close(subscription.source, "its subscription has ended")

    def leave(self, source: str) -> None:
        """An ingress process is gone: its subscription and its requests end."""
        self._close(source, "it is gone")

    def _take_over(self, subscription: Subscription) -> Outbox:
        """The outbox of an ingress process, which this subscription empties from now on."""
        source = subscription.source
        if not subscription.renews:
            self._close(source, "it has begun a new subscription")
        self._left.pop(source, None)
        outbox = self._outboxes.setdefault(source, Outbox())
        outbox.reader = subscription
        outbox.release()  # whoever read until now ends
        return outbox

    def _close(self, source: str, why: str) -> None:
        outbox = self._outboxes.pop(source, None)
        if outbox is None:
            return
        outbox.reader = None
        outbox.release()
        for answer in outbox.answers:
            answer.fail(NotFollowed(f"ingress {source} does not follow this replica any more: {why}"))
        self._left[source] = None
        if len(self._left) > MAX_REMEMBERED:
            del self._left[next(iter(self._left))]
