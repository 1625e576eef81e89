"""One request's way to a replica and back: routing, retries, bookings, and reading one's own writes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.serve.api_error import ApiError
from cluster.serve.messages import GenerateRequest, ReplicaChunk, ReplicaTarget, WrongModel
from cluster.serve.state import RoutingState
from llama.engine import Chunk, EngineFailed, PromptTooLong, QueueFull

logger = logging.getLogger("ray.serve")

# Events take a few milliseconds; the bound is for a machine that is far behind.
READ_YOUR_WRITES_S = 0.5
MAX_ATTEMPTS = 3


class ReplicaLost(Exception):
    """A replica went away while it served a request."""


class ReplicaFull(Exception):
    """A replica has as many waiting requests as it may have."""


@dataclass(frozen=True)
class RoutedChunk:
    """An engine chunk, where it comes from, and the cached tokens that were foreseen there at selection."""

    replica: str
    predicted_cached_tokens: int
    chunk: Chunk


class EngineClient:
    """The engine deployment, as seen from one ingress process.

    However a request is left, its booking ends, and if it was unfinished its replica aborts it. The last chunk is held
    until this process's index has applied the request's cache events, or READ_YOUR_WRITES_S have passed.
    """

    def __init__(self, engines: DeploymentHandle, state: RoutingState) -> None:
        self._generate = engines.options(method_name="generate", stream=True)
        self._flush = engines.options(method_name="flush_cache")
        self._state = state

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[RoutedChunk, None]:
        """A request's chunks as they come; a replica that dies before the first of them is replaced by another.

        Raises:
            ApiError: 400 when the engine refuses the request, 429 when every replica's queue is full, 503 when the
                replica went away, 500 when its engine failed.
        """
        losses = 0
        self._state.begin(request.request_id)
        try:
            while True:
                started = False
                try:
                    async with aclosing(self._attempt(request)) as items:
                        async for item in items:
                            started = True
                            yield item
                    return
                except ReplicaFull as error:
                    request = self._elsewhere(request, error)
                except ReplicaLost as error:
                    losses += 1
                    request = self._next_try(request, losses if not started else MAX_ATTEMPTS, error)
        finally:
            self._state.finish(request.request_id)

    async def complete(self, request: GenerateRequest) -> list[RoutedChunk]:
        """All of a request's chunks; a replica that dies at any time is replaced by another. Raises as `stream`."""
        losses = 0
        self._state.begin(request.request_id)
        try:
            while True:
                try:
                    async with aclosing(self._attempt(request)) as items:
                        return [item async for item in items]
                except ReplicaFull as error:
                    request = self._elsewhere(request, error)
                except ReplicaLost as error:
                    losses += 1
                    request = self._next_try(request, losses, error)
        finally:
            self._state.finish(request.request_id)

    async def flush(self, replica: str) -> int:
        """Empties one replica's prefix cache; returns the sequence number of the event. Raises ReplicaLost."""
        try:
            return await self._flush.remote(ReplicaTarget(replica))
        except (RayActorError, RayTaskError) as error:
            raise ReplicaLost(type(error).__name__) from error

    def _elsewhere(self, request: GenerateRequest, error: ReplicaFull) -> GenerateRequest:
        """The request again, for replicas that have not refused it; raises ApiError when there is none."""
        full = self._state.booked_on(request.request_id)
        avoid = request.avoid | {full} if full else request.avoid
        # One that is avoided already is chosen again only when nobody else can serve this model.
        if full is None or full in request.avoid or avoid.issuperset(self._state.replicas):
            message = "The server is at its limit of waiting requests; try again later."
            raise ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error") from error
        return replace(request, avoid=avoid)

    def _next_try(self, request: GenerateRequest, attempt: int, error: ReplicaLost) -> GenerateRequest:
        """The request again, for other replicas; raises ApiError after the last attempt."""
        lost = self._state.booked_on(request.request_id)
        logger.warning(f"Request {request.request_id} lost replica {lost}, attempt {attempt}: {error}")
        if attempt >= MAX_ATTEMPTS:
            message = "The replica went away while it answered; try again."
            raise ApiError(503, message, code="replica_lost", kind="server_error") from error
        return replace(request, avoid=request.avoid | {lost} if lost else request.avoid)

    async def _attempt(self, request: GenerateRequest) -> AsyncGenerator[RoutedChunk, None]:
        responses = cast(DeploymentResponseGenerator, self._generate.remote(request))
        finished = started = False
        predicted = 0
        try:
            async for item in _replica_errors(responses):
                if not started:
                    started = True
                    predicted = self._state.placed(request, item.replica)
                    self._state.first_token(request.request_id, item.chunk.prompt_tokens - item.chunk.num_cached_tokens)
                self._state.progress(request.request_id, item.chunk.completion_tokens)
                if item.chunk.finish_reason == "abort":
                    raise ReplicaLost("its engine aborted the request")
                finished = item.chunk.finish_reason is not None
                if finished:
                    await self._state.wait_applied(item.replica, item.chunk.event_seq, READ_YOUR_WRITES_S)
                yield RoutedChunk(item.replica, predicted, item.chunk)
            if not finished:
                raise ReplicaLost("the stream ended before the answer did")
        finally:
            if not finished:
                responses.cancel()


async def _replica_errors(responses: DeploymentResponseGenerator) -> AsyncIterator[ReplicaChunk]:
    """The responses, with what Ray raises turned into ReplicaLost, ReplicaFull or ApiError."""
    while True:
        try:
            item = await anext(responses)
        except StopAsyncIteration:
            return
        except RayActorError as error:
            raise ReplicaLost(type(error).__name__) from error
        except RayTaskError as error:
            raise _engine_error(error) from error
        except asyncio.CancelledError as error:
            # Serve also reports a call that was cancelled on the replica's side this way.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ReplicaLost("the replica cancelled the call") from error
        yield item


def _engine_error(error: RayTaskError) -> ApiError | ReplicaLost | ReplicaFull:
    # Ray raises an exception that is an instance of the original's class as well.
    if isinstance(error, QueueFull):
        return ReplicaFull(str(error.cause))
    if isinstance(error, WrongModel):
        return ReplicaLost("it has another model")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error.cause), param="prompt", code="context_length_exceeded")
    if isinstance(error, ValueError):
        return ApiError(400, str(error.cause), code="invalid_value")
    if isinstance(error, EngineFailed):
        return ReplicaLost(type(error.cause).__name__)
    return ApiError(500, "The engine failed on this request.", code="engine_failed", kind="server_error")
