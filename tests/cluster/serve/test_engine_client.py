"""Retries, bookings and errors of one request, against a scripted engine deployment."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.serve.api_error import ApiError
from cluster.serve.engine_client import EngineClient
from cluster.serve.messages import GenerateRequest, ReplicaChunk, ReplicaLoad, ReplicaUpdate, WrongModel
from cluster.serve.state import RoutingState
from llama.engine import (
    BlocksStored,
    CacheSnapshot,
    Chunk,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    SamplingParams,
)

LOAD = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)


def _chunk(n: int, reason: str | None = None, event_seq: int = 0) -> Chunk:
    return Chunk("r", [n], f"t{n}", reason, 0, 40, n + 1, None, event_seq)


def _whole(replica: str) -> list:
    return [ReplicaChunk(replica, _chunk(n, "stop" if n == 2 else None)) for n in range(3)]


def _task_error(error: Exception) -> Exception:
    return RayTaskError("generate", "traceback", error).as_instanceof_cause()


@dataclass
class _Response:
    items: list
    cancelled: bool = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class _Engines:
    """Stands for the deployment handle: routes with the real state, answers what the script says."""

    state: RoutingState
    script: Callable[[str, int], list]
    responses: list[_Response] = field(default_factory=list)

    def options(self, *, method_name: str, stream: bool = False) -> "_Engines":
        return self

    def remote(self, request: GenerateRequest) -> _Response:
        chosen = self.state.select(request, self.state.replicas)[0]
        self.responses.append(_Response(self.script(chosen, len(self.responses))))
        return self.responses[-1]


def _setup(script: Callable[[str, int], list]) -> tuple[EngineClient, _Engines, RoutingState]:
    state = RoutingState()
    state.set_replicas(["a", "b", "c"])
    for replica in ("a", "b", "c"):
        state.apply_update(replica, ReplicaUpdate("e", LOAD, snapshot=CacheSnapshot("e", 0, ())))
    engines = _Engines(state, script)
    return EngineClient(engines, state), engines, state


def _request() -> GenerateRequest:
    return GenerateRequest("r", tuple(range(40)), (b"x" * 16, b"y" * 16), SamplingParams(), "w")


async def _stream(client: EngineClient) -> list:
    return [item async for item in client.stream(_request())]


def _outstanding(state: RoutingState) -> int:
    return sum(status.active_requests for status in state.status())


def test_chunks_arrive_in_order_and_nothing_is_left():
    client, engines, state = _setup(lambda replica, n: _whole(replica))
    items = asyncio.run(_stream(client))
    assert [item.chunk.text for item in items] == ["t0", "t1", "t2"]
    assert [response.cancelled for response in engines.responses] == [False]
    assert _outstanding(state) == 0


@pytest.mark.parametrize(
    "loss",
    [
        ActorDiedError(),
        _task_error(EngineFailed("step")),
        _task_error(WrongModel("another")),
        _task_error(QueueFull("full")),
        asyncio.CancelledError(),
        None,
    ],
    ids=repr,
)
def test_a_replica_lost_before_the_first_chunk_is_replaced_by_one_not_tried_yet(loss):
    chosen = []

    def script(replica: str, n: int) -> list:
        chosen.append(replica)
        return ([] if loss is None else [loss]) if n < 2 else _whole(replica)

    client, _, state = _setup(script)
    items = asyncio.run(_stream(client))
    assert len(items) == 3 and items[0].replica == chosen[-1]
    assert len(set(chosen)) == 3
    assert _outstanding(state) == 0


def test_after_the_last_attempt_the_client_is_told():
    client, engines, state = _setup(lambda replica, n: [ActorDiedError()])
    with pytest.raises(ApiError) as caught:
        asyncio.run(_stream(client))
    assert (caught.value.status, caught.value.code) == (503, "replica_lost")
    assert len(engines.responses) == 3 and _outstanding(state) == 0


def test_a_stream_lost_after_its_first_chunk_is_not_begun_again():
    client, engines, _ = _setup(lambda replica, n: [*_whole(replica)[:1], ActorDiedError()])
    with pytest.raises(ApiError) as caught:
        asyncio.run(_stream(client))
    assert caught.value.code == "replica_lost" and len(engines.responses) == 1


def test_a_completion_lost_after_its_first_chunk_is_begun_again():
    client, engines, state = _setup(
        lambda replica, n: [*_whole(replica)[:2], ActorDiedError()] if n == 0 else _whole(replica)
    )
    items = asyncio.run(client.complete(_request()))
    assert [item.chunk.text for item in items] == ["t0", "t1", "t2"]
    assert len(engines.responses) == 2 and _outstanding(state) == 0


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLong("too long"), 400, "context_length_exceeded"),
        (ValueError("logprobs=9"), 400, "invalid_value"),
        (KeyError("bug"), 500, "engine_failed"),
    ],
)
def test_errors_of_the_engine_get_their_status_and_are_not_retried(error, status, code):
    client, engines, state = _setup(lambda replica, n: [_task_error(error)])
    with pytest.raises(ApiError) as caught:
        asyncio.run(_stream(client))
    assert (caught.value.status, caught.value.code) == (status, code)
    assert len(engines.responses) == 1 and _outstanding(state) == 0


@pytest.mark.parametrize("call", ["stream", "complete"])
def test_only_when_every_queue_is_full_is_the_client_told_to_wait(call):
    chosen = []

    def script(replica: str, n: int) -> list:
        chosen.append(replica)
        return [_task_error(QueueFull("full"))]

    client, _, state = _setup(script)
    with pytest.raises(ApiError) as caught:
        asyncio.run(_stream(client) if call == "stream" else client.complete(_request()))
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert sorted(chosen) == ["a", "b", "c"] and _outstanding(state) == 0


def test_full_queues_do_not_use_up_the_attempts_that_lost_replicas_have():
    faults = [QueueFull("full"), EngineFailed("step"), EngineFailed("step")]

    client, engines, _ = _setup(lambda replica, n: [_task_error(faults[n])] if n < 3 else _whole(replica))
    assert len(asyncio.run(client.complete(_request()))) == 3
    assert len(engines.responses) == 4


def test_a_client_that_goes_away_aborts_the_request_and_frees_its_booking():
    client, engines, state = _setup(lambda replica, n: _whole(replica))

    async def leave_early() -> None:
        chunks = client.stream(_request())
        await anext(chunks)
        assert _outstanding(state) == 1
        await chunks.aclose()

    asyncio.run(leave_early())
    assert engines.responses[0].cancelled and _outstanding(state) == 0


def test_cancelling_the_task_is_not_taken_for_a_lost_replica():
    async def run() -> None:
        class _Hanging(_Response):
            async def __anext__(self):
                await asyncio.sleep(60)

        client, engines, state = _setup(lambda replica, n: [])
        hanging = _Hanging([])
        engines.remote = lambda request: (state.select(request, state.replicas), hanging)[1]  # type: ignore[assignment]
        task = asyncio.create_task(client.complete(_request()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert hanging.cancelled and _outstanding(state) == 0

    asyncio.run(run())


def test_the_last_chunk_waits_for_the_requests_own_events():
    async def run() -> None:
        def script(replica: str, n: int) -> list:
            return [ReplicaChunk(replica, _chunk(0)), ReplicaChunk(replica, _chunk(1, "stop", event_seq=1))]

        client, _, state = _setup(script)
        chunks = client.stream(_request())
        first = await anext(chunks)
        last = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0.02)
        assert not last.done()
        state.apply_update(first.replica, ReplicaUpdate("e", LOAD, (BlocksStored(1, _request().hashes),)))
        assert (await last).chunk.finish_reason == "stop"
        state.begin("r")
        ranking = state.select(_request(), state.replicas)
        assert ranking[0] == first.replica and state.placed(_request(), first.replica) == 32

    asyncio.run(run())
