"""One request's way to a replica and back: routing, retries, bookings, and reading one's own writes."""

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import cast

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.serve.api_error import ApiError
from cluster.serve.channel import Call, Inbox, ReplicaLost
from cluster.serve.messages import GenerateRequest, NotFollowed, ReplicaTarget, WrongModel
from cluster.serve.observer import Observer
from cluster.serve.record import Recording
from cluster.serve.state import RoutingState
from llama.engine import (
    CacheSnapshot,
    Chunk,
    EngineClosed,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    generation_root,
    hash_blocks,
)

logger = logging.getLogger("ray.serve")

MAX_ATTEMPTS = 3
FULL_AGAIN_S = 1.0  # until a place in a queue may be free
MAX_WAITS = 100
WAIT_S = 0.1  # until replicas that have just come, or come back, are known and followed
LATE_S = 10.0  # for chunks that are on their way when their call is over


class ReplicaFull(Exception):
    """A replica has as many waiting requests as it may have."""

    code = "replica_full"


@dataclass(frozen=True)
class RoutedChunk:
    """An engine chunk, where it comes from, and the cached tokens that were foreseen there at selection."""

    replica: str
    predicted_cached_tokens: int
    chunk: Chunk


class WeightsChanged(Exception):
    """A replica has other weights than the request was prepared for."""

    code = "weights_changed"


class Unfollowed(ReplicaLost):
    """A replica has no way back to this process: it has been listed before our subscription came there."""


class EngineClient:
    """The engine deployment, as seen from one ingress process.

    However a request is left, its booking ends, and if it was unfinished its replica aborts it. Its last chunk comes
    after this process's index has applied the request's cache events, which travel on the same stream before it.

    Args:
        inbox: where `Subscriptions` puts the chunks.
        family: of the replicas that may answer; their weights change.
        observer: sees every request and its attempts.
    """

    def __init__(
        self,
        engines: DeploymentHandle,
        state: RoutingState,
        inbox: Inbox,
        family: str,
        observer: Observer | None = None,
    ) -> None:
        self._generate = engines.options(method_name="generate")
        self._flush = engines.options(method_name="flush_cache")
        self._cache = engines.options(method_name="cache")
        self._state = state
        self._inbox = inbox
        self._family = family
        self._observer = observer or Observer(state)
        self._watching: set[asyncio.Task[None]] = set()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[RoutedChunk, None]:
        """A request's chunks as they come; a replica that dies before the first of them is replaced by another.

        Raises:
            ApiError: 400 when the engine refuses the request, 429 when every replica's queue is full or the first token
                is farther away than `max_wait_s`, 503 when the replica went away, 504 when no replica took the request
                within its time, 500 when its engine failed.
        """
        tries = _Tries(self._state, request, self._family)
        with self._followed(request) as recording:
            while True:
                started = False
                try:
                    async with aclosing(self._attempt(tries.request(), recording)) as items:
                        async for item in items:
                            started = True
                            yield item
                    return
                except (ReplicaFull, ReplicaLost, WeightsChanged) as error:
                    await tries.after(error, final=started)

    async def complete(self, request: GenerateRequest) -> list[RoutedChunk]:
        """All of a request's chunks; a replica that dies at any time is replaced by another. Raises as `stream`."""
        tries = _Tries(self._state, request, self._family)
        with self._followed(request) as recording:
            while True:
                try:
                    async with aclosing(self._attempt(tries.request(), recording)) as items:
                        return [item async for item in items]
                except (ReplicaFull, ReplicaLost, WeightsChanged) as error:
                    await tries.after(error)

    async def cache(self, replica: str) -> CacheSnapshot:
        """What one replica has cached. Raises ReplicaLost."""
        try:
            return await self._cache.remote(ReplicaTarget(replica))
        except (RayActorError, RayTaskError) as error:
            raise ReplicaLost(type(error).__name__) from error

    async def flush(self, replica: str) -> int:
        """Empties one replica's prefix cache; returns the sequence number of the event. Raises ReplicaLost."""
        try:
            return await self._flush.remote(ReplicaTarget(replica))
        except (RayActorError, RayTaskError) as error:
            raise ReplicaLost(type(error).__name__) from error

    @contextmanager
    def _followed(self, request: GenerateRequest) -> Iterator[Recording]:
        with self._observer.following(request) as recording:
            self._check_wait(request)
            try:
                yield recording
            finally:
                self._state.finish(request.request_id)

    def _check_wait(self, request: GenerateRequest) -> None:
        """Raises ApiError (429) when the request would have to wait for too long."""
        if request.max_wait_s is not None:
            wait_s = self._state.predicted_wait_s(request)
            if wait_s > request.max_wait_s:
                message = (
                    f"The first token would take about {wait_s:.1f} s, and max_wait_s={request.max_wait_s:g}; "
                    "try again later."
                )
                raise ApiError(
                    429,
                    message,
                    code="rate_limit_exceeded",
                    kind="rate_limit_error",
                    retry_after_s=wait_s - request.max_wait_s,
                )

    async def _attempt(self, request: GenerateRequest, recording: Recording) -> AsyncGenerator[RoutedChunk, None]:
        # Else a subscription that breaks where an earlier attempt was booked would end this one.
        self._state.begin(request.request_id)
        number = self._inbox.next_number()
        request = replace(request, source=self._inbox.source, call=number)
        # A context of its own: Serve tells calls apart by the HTTP request they are made in, and siblings would hang.
        response = cast(DeploymentResponse, contextvars.Context().run(self._generate.remote, request))
        call = self._inbox.open(request.request_id, number)
        watch = asyncio.create_task(_watch(response, call, request.timeout_s))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)
        unfinished, predicted, generated = request.params.n, None, 0
        try:
            with recording.attempt(lambda: self._state.routed(request.request_id)):
                while unfinished:
                    chunk = await call.next()
                    if chunk.finish_reason == "abort":
                        raise ReplicaLost("its engine aborted the request")
                    assert call.replica is not None
                    if predicted is None:
                        predicted = self._state.placed(request, call.replica)
                        missing = chunk.prompt_tokens - chunk.num_cached_tokens
                        self._state.first_token(request.request_id, missing)
                    generated += len(chunk.token_ids)
                    self._state.progress(request.request_id, generated)
                    self._observer.chunk(recording, call.replica, predicted, chunk)
                    unfinished -= chunk.finish_reason is not None
                    yield RoutedChunk(call.replica, predicted, chunk)
        finally:
            self._inbox.close(call)
            if unfinished:
                response.cancel()


async def _watch(response: DeploymentResponse, call: Call, timeout_s: float | None) -> None:
    """Waits for the end of a call, and tells those who wait for its chunks when there will be no more."""
    loop = asyncio.get_running_loop()
    late = None
    if timeout_s is not None:
        message = f"No replica has taken the request within timeout_s={timeout_s:g}; try again later."
        error = ApiError(504, message, code="timeout", kind="server_error")
        late = loop.call_later(timeout_s + LATE_S, call.fail, error)
    try:
        await response
    except RayTaskError as error:
        call.fail(_engine_error(error))
    except (RayError, RayServeException, asyncio.CancelledError) as error:
        # CancelledError is also how Serve reports a call that the replica's side cancelled; nobody cancels this task.
        call.fail(ReplicaLost(type(error).__name__))
    except Exception as error:
        call.fail(error)
    else:
        loop.call_later(LATE_S, call.fail, ReplicaLost("its last chunks did not come"))
    finally:
        if late is not None:
            late.cancel()


def _engine_error(error: RayTaskError) -> Exception:
    # Ray raises an exception that is an instance of the original's class as well.
    if isinstance(error, QueueFull):
        return ReplicaFull(str(error.cause))
    if isinstance(error, WrongModel):
        return WeightsChanged(str(error.cause))
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error.cause), param="prompt", code="context_length_exceeded")
    if isinstance(error, ValueError):
        return ApiError(400, str(error.cause), code="invalid_value")
    if isinstance(error, NotFollowed):
        return Unfollowed(str(error.cause))
    if isinstance(error, EngineFailed | EngineClosed):
        return ReplicaLost(type(error.cause).__name__)
    return ApiError(500, "The engine failed on this request.", code="engine_failed", kind="server_error")


class _Tries:
    """What is done after an attempt at a request has failed."""

    def __init__(self, state: RoutingState, request: GenerateRequest, family: str) -> None:
        self._state = state
        self._request = request
        self._family = family
        self._deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self._losses = 0
        self._waits = 0

    def request(self) -> GenerateRequest:
        """The request, as the next attempt makes it."""
        if self._deadline is None:
            return self._request
        # When the time is up the engine says so, as for any other request.
        return replace(self._request, timeout_s=max(0.001, self._deadline - time.monotonic()))

    async def after(self, error: Exception, *, final: bool = False) -> None:
        """Prepares the next attempt, or raises ApiError. `final`: there is none, for the answer has begun."""
        if isinstance(error, ReplicaFull):
            self._elsewhere(error)
        elif isinstance(error, WeightsChanged):
            await self._reroot(error)
        elif isinstance(error, Unfollowed) and not final:
            await self._wait(error)
            self._avoid_booked()
        else:
            self._losses += 1
            self._next_try(error, last=final or self._losses >= MAX_ATTEMPTS)

    def _elsewhere(self, error: Exception) -> None:
        """For replicas that have not refused it."""
        request = self._request
        full = self._state.booked_on(request.request_id)
        avoid = request.avoid | {full} if full else request.avoid
        # One that is avoided already is chosen again only when nobody else can serve this model.
        if full is None or full in request.avoid or avoid.issuperset(self._state.replicas):
            message = "The server is at its limit of waiting requests; try again later."
            raise ApiError(
                429, message, code="rate_limit_exceeded", kind="rate_limit_error", retry_after_s=FULL_AGAIN_S
            ) from error
        self._request = replace(request, avoid=avoid)

    async def _reroot(self, error: Exception) -> None:
        """For the weights that the replicas have now; whoever was before us at the replica must have heard of them."""
        request, info = self._request, self._state.model(self._family)
        # None: while weights are exchanged Serve leaves out one replica after the other, and one that is back is listed
        # before it has said what it has.
        if info is None or info.weights_id == request.weights_id:
            await self._wait(error)
            return
        self._count_wait(error)
        root = generation_root(info.weights_id, "", request.salt)
        hashes = tuple(hash_blocks(root, request.token_ids, info.block_size))
        self._request = replace(request, weights_id=info.weights_id, hashes=hashes)

    async def _wait(self, error: Exception) -> None:
        """For more to be known of the replicas. Raises ApiError (503)."""
        self._count_wait(error)
        await asyncio.sleep(WAIT_S)

    def _count_wait(self, error: Exception) -> None:
        """Raises ApiError (503) when it has been often enough."""
        self._waits += 1
        if self._waits > MAX_WAITS:
            raise _gone(error)

    def _next_try(self, error: Exception, *, last: bool) -> None:
        """For other replicas."""
        request_id, lost = self._request.request_id, self._state.booked_on(self._request.request_id)
        logger.warning(f"Request {request_id} lost replica {lost}, attempt {self._losses}: {error}")
        if last:
            raise _gone(error)
        self._avoid_booked()

    def _avoid_booked(self) -> None:
        if (lost := self._state.booked_on(self._request.request_id)) is not None:
            self._request = replace(self._request, avoid=self._request.avoid | {lost})


def _gone(error: Exception) -> ApiError:
    gone = ApiError(
        503, "The replica went away while it answered; try again.", code="replica_lost", kind="server_error"
    )
    gone.__cause__ = error
    return gone
