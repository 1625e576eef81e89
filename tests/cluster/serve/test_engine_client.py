"""Retries, bookings and errors of one request, against a scripted engine deployment."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.serve import engine_client
from cluster.serve.api_error import ApiError
from cluster.serve.channel import Inbox
from cluster.serve.engine_client import EngineClient
from cluster.serve.messages import (
    GenerateRequest,
    NotFollowed,
    ReplicaInfo,
    ReplicaLoad,
    ReplicaUpdate,
    WrongModel,
)
from cluster.serve.observer import Observer
from cluster.serve.record import RequestRecord
from cluster.serve.state import RoutingState
from llama.engine import (
    CacheSnapshot,
    Chunk,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    generation_root,
    hash_blocks,
)

LOAD = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)


def _chunk(n: int, reason: str | None = None, event_seq: int = 0) -> Chunk:
    return Chunk("r", [n], f"t{n}", reason, 0, 40, n + 1, None, event_seq)


def _whole(replica: str) -> list:
    return [_chunk(n, "stop" if n == 2 else None) for n in range(3)]


def _task_error(error: Exception) -> Exception:
    return RayTaskError("generate", "traceback", error).as_instanceof_cause()


@dataclass
class _Response:
    """A generate call: its chunks go to the inbox first, then it returns, or raises the exception among them."""

    items: list
    deliver: Callable[[Chunk], None]
    cancelled: bool = False
    hangs: bool = False

    def __await__(self):
        for item in self.items:
            yield from asyncio.sleep(0).__await__()
            if isinstance(item, BaseException):
                raise item
            self.deliver(item)
        while self.hangs and not self.cancelled:
            yield from asyncio.sleep(0.001).__await__()

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class _Engines:
    """Stands for the deployment handle: routes with the real state, answers what the script says."""

    state: RoutingState
    inbox: Inbox
    script: Callable[[str, int], list]
    hangs: bool = False
    requests: list[GenerateRequest] = field(default_factory=list)
    responses: list[_Response] = field(default_factory=list)

    def options(self, *, method_name: str) -> "_Engines":
        return self

    def remote(self, request: GenerateRequest) -> _Response:
        chosen = self.state.select(request, self.state.replicas)[0]
        self.requests.append(request)
        items = self.script(chosen, len(self.responses))

        def deliver(chunk: Chunk) -> None:
            self.inbox.take(chosen, ReplicaUpdate("e", LOAD, chunks=((request.call, chunk),)))

        self.responses.append(_Response(items, deliver, hangs=self.hangs))
        return self.responses[-1]


def _setup(script: Callable[[str, int], list], *, hangs: bool = False) -> tuple[EngineClient, _Engines, RoutingState]:
    state = RoutingState()
    state.set_replicas(["a", "b", "c"])
    for replica in ("a", "b", "c"):
        state.apply_update(replica, ReplicaUpdate("e", LOAD, snapshot=CacheSnapshot("e", 0, ()), info=_info(replica)))
    inbox = Inbox("me")
    engines = _Engines(state, inbox, script, hangs)
    return EngineClient(engines, state, inbox, "family"), engines, state  # type: ignore[arg-type]


def _info(replica: str, weights_id: str = "w") -> ReplicaInfo:
    return ReplicaInfo(replica, 1, "node", weights_id, 100, 64, 16, 100, "family")


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
        _task_error(NotFollowed("gone")),
        _task_error(QueueFull("full")),
        asyncio.CancelledError(),
    ],
    ids=repr,
)
def test_a_replica_lost_before_the_first_chunk_is_replaced_by_one_not_tried_yet(loss):
    chosen = []

    def script(replica: str, n: int) -> list:
        chosen.append(replica)
        return [loss] if n < 2 else _whole(replica)

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
    client, engines, state = _setup(lambda replica, n: _whole(replica)[:2], hangs=True)

    async def leave_early() -> None:
        chunks = client.stream(_request())
        await anext(chunks)
        assert _outstanding(state) == 1
        await chunks.aclose()

    asyncio.run(leave_early())
    assert engines.responses[0].cancelled and _outstanding(state) == 0


def test_cancelling_the_task_is_not_taken_for_a_lost_replica():
    async def run() -> None:
        client, engines, state = _setup(lambda replica, n: [], hangs=True)
        task = asyncio.create_task(client.complete(_request()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engines.responses) == 1 and engines.responses[0].cancelled and _outstanding(state) == 0

    asyncio.run(run())


def test_every_completion_of_a_request_is_waited_for_and_each_ends_once():
    def script(replica: str, n: int) -> list:
        return [replace(_chunk(k, "stop" if k > 1 else None), index=k % 2) for k in range(4)]

    client, _, _ = _setup(script)
    request = replace(_request(), params=SamplingParams(n=2))
    items = asyncio.run(client.complete(request))
    assert [(item.chunk.index, item.chunk.finish_reason) for item in items] == [
        (0, None),
        (1, None),
        (0, "stop"),
        (1, "stop"),
    ]


def test_a_call_that_returns_without_its_last_chunk_counts_as_lost(monkeypatch):
    monkeypatch.setattr(engine_client, "LATE_S", 0.02)
    client, engines, _ = _setup(lambda replica, n: _whole(replica)[: 2 if n == 0 else 3])
    assert len(asyncio.run(client.complete(_request()))) == 3
    assert len(engines.responses) == 2


def test_chunks_of_an_attempt_given_up_do_not_reach_the_next():
    client, engines, _ = _setup(lambda replica, n: [_chunk(7), ActorDiedError()] if n == 0 else [])

    async def run() -> list:
        task = asyncio.create_task(client.complete(_request()))
        while len(engines.responses) < 2:
            await asyncio.sleep(0.001)
        engines.responses[0].deliver(_chunk(8))
        for chunk in _whole("?"):
            engines.responses[1].deliver(chunk)
        return await task

    assert [item.chunk.text for item in asyncio.run(run())] == ["t0", "t1", "t2"]
    assert [request.call for request in engines.requests] == [1, 2]
    assert {request.source for request in engines.requests} == {"me"}


def test_a_request_for_weights_that_are_gone_is_made_anew_for_those_that_are_there():
    def script(replica: str, n: int) -> list:
        if n == 2:  # its replica's own news come a little later
            for name in ("a", "b", "c"):
                update = ReplicaUpdate("e", LOAD, info=_info(name, "new"))
                engines.state.apply_update(name, update)
        return _whole(replica) if n == 4 else [_task_error(WrongModel("new"))]

    client, engines, state = _setup(script)
    request = replace(_request(), salt="tenant")
    assert len(asyncio.run(client.complete(request))) == 3
    assert [request.weights_id for request in engines.requests] == ["w", "w", "w", "new", "new"]
    hashes = tuple(hash_blocks(generation_root("new", "", "tenant"), range(40), 16))
    assert engines.requests[-1].hashes == hashes != engines.requests[0].hashes
    assert _outstanding(state) == 0


def test_while_nobody_has_said_what_it_has_the_request_waits():
    """As when Serve lists the replica again that it has just had load its weights, and no other."""

    def script(replica: str, n: int) -> list:
        if n == 0:
            state.set_replicas(["d"])
            asyncio.get_running_loop().call_later(0.2, told)
        return _whole(replica) if engines.requests[-1].weights_id == "new" else [_task_error(WrongModel("new"))]

    def told() -> None:
        state.apply_update("d", ReplicaUpdate("e", LOAD, snapshot=CacheSnapshot("e", 0, ()), info=_info("d", "new")))

    client, engines, state = _setup(script)
    assert len(asyncio.run(client.complete(_request()))) == 3
    asked = [request.weights_id for request in engines.requests]
    assert asked == ["w"] * (len(asked) - 1) + ["new"] and 2 <= len(asked) < 10
    assert _outstanding(state) == 0


def test_a_replica_that_does_not_know_this_process_yet_is_asked_again(monkeypatch):
    monkeypatch.setattr(engine_client, "WAIT_S", 0.001)

    def script(replica: str, n: int) -> list:
        state.set_replicas(["a"])  # nobody else is listed
        return [_task_error(NotFollowed("not yet"))] if n < 7 else _whole(replica)

    client, engines, state = _setup(script)
    assert len(asyncio.run(client.complete(_request()))) == 3
    assert len(engines.requests) == 8 and _outstanding(state) == 0

    client, engines, state = _setup(lambda replica, n: [_task_error(NotFollowed("never"))])
    with pytest.raises(ApiError) as caught:
        asyncio.run(client.complete(_request()))
    assert caught.value.code == "replica_lost" and len(engines.requests) == engine_client.MAX_WAITS + 1
    assert engines.requests[-1].avoid == {"a", "b", "c"}


def test_a_request_is_not_made_anew_for_the_weights_of_another_family(monkeypatch):
    monkeypatch.setattr(engine_client, "WAIT_S", 0.001)
    client, engines, state = _setup(lambda replica, n: [_task_error(WrongModel("new"))])
    for name in ("a", "b", "c"):
        state.apply_update(name, ReplicaUpdate("e", LOAD, info=replace(_info(name, "new"), family="another")))
    with pytest.raises(ApiError) as caught:
        asyncio.run(client.complete(_request()))
    assert caught.value.code == "replica_lost" and {request.weights_id for request in engines.requests} == {"w"}
    assert len(engines.requests) == engine_client.MAX_WAITS + 1


def test_who_would_wait_too_long_is_told_at_once_when_to_come_again(monkeypatch):
    client, engines, state = _setup(lambda replica, n: _whole(replica))
    monkeypatch.setattr(state, "predicted_wait_s", lambda request: 3.0)
    with pytest.raises(ApiError) as caught:
        asyncio.run(client.complete(replace(_request(), max_wait_s=2.0)))
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
    assert engines.requests == [] and _outstanding(state) == 0
    assert len(asyncio.run(client.complete(replace(_request(), max_wait_s=3.0)))) == 3


def test_another_attempt_has_only_the_time_that_is_left():
    def script(replica: str, n: int) -> list:
        return _whole(replica) if n == 1 else [_task_error(EngineFailed("step"))]

    client, engines, _ = _setup(script)
    asyncio.run(client.complete(replace(_request(), timeout_s=5.0)))
    first, second = (request.timeout_s for request in engines.requests)
    assert 4 < second < first <= 5


def test_a_request_that_no_replica_takes_ends_in_its_time(monkeypatch):
    monkeypatch.setattr(engine_client, "LATE_S", 0.01)
    client, engines, state = _setup(lambda replica, n: [], hangs=True)
    with pytest.raises(ApiError) as caught:
        asyncio.run(client.complete(replace(_request(), timeout_s=0.02)))
    assert caught.value.status == 504 and engines.responses[0].cancelled and _outstanding(state) == 0


def test_each_call_is_made_in_a_context_of_its_own():
    outer: ContextVar[str] = ContextVar("outer", default="none")
    seen = []

    def script(replica: str, n: int) -> list:
        seen.append(outer.get())
        return _whole(replica)

    client, _, _ = _setup(script)

    async def run() -> None:
        outer.set("the HTTP request")
        await asyncio.gather(client.complete(_request()), client.complete(replace(_request(), request_id="s")))

    asyncio.run(run())
    assert seen == ["none", "none"]


def _record(script: Callable[[str, int], list], call) -> RequestRecord:
    client, _, state = _setup(script)
    observer = client._observer = Observer(state)
    with suppress(ApiError):
        asyncio.run(call(client))
    (record,) = observer.records.newest(2)
    return record


def test_a_record_tells_of_every_attempt_and_of_what_the_router_said_at_each():
    record = _record(
        lambda replica, n: (
            [_task_error(QueueFull("full"))] if not n else [_chunk(0), ActorDiedError()] if n == 1 else _whole(replica)
        ),
        lambda client: client.complete(_request()),
    )
    assert [attempt.outcome for attempt in record.attempts] == ["replica_full", "replica_lost", "answered"]
    assert len({attempt.replica for attempt in record.attempts}) == 3
    for attempt in record.attempts:
        assert {score.replica for score in attempt.scores} == {"a", "b", "c"}
    assert (record.status, record.outcome, record.replica) == (200, "stop", record.attempts[-1].replica)
    assert (record.prompt_tokens, record.generated_tokens) == (40, 3)


def test_a_record_tells_how_a_request_failed():
    broken = _record(lambda replica, n: [_chunk(0), ActorDiedError()], _stream)
    assert (broken.status, broken.outcome, broken.generated_tokens) == (503, "replica_lost", 1)
    refused = _record(lambda replica, n: [_task_error(PromptTooLong("long"))], _stream)
    assert (refused.status, refused.outcome) == (400, "context_length_exceeded")
    assert [attempt.outcome for attempt in refused.attempts] == ["context_length_exceeded"]
