"""Subscriptions against a scripted deployment: who is followed, and what ends or renews a subscription."""

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError

from cluster.serve import events
from cluster.serve.events import Subscriptions
from cluster.serve.messages import ReplicaLoad, ReplicaTarget, ReplicaUpdate
from cluster.serve.state import RoutingState
from llama.engine import BlocksStored, CacheSnapshot

LOAD = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)


def _snapshot(seq: int = 0) -> ReplicaUpdate:
    return ReplicaUpdate("e", LOAD, snapshot=CacheSnapshot("e", seq, ()))


def _stored(seq: int) -> ReplicaUpdate:
    return ReplicaUpdate("e", LOAD, (BlocksStored(seq, (seq.to_bytes(16, "little"),)),))


class _Updates:
    """One subscription: items come from a queue; an exception is raised, None ends it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue = asyncio.Queue()
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await self.queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class _Engines:
    def __init__(self) -> None:
        self.calls: list[tuple[str, _Updates]] = []

    def options(self, *, method_name: str, stream: bool) -> "_Engines":
        assert method_name == "subscribe" and stream
        return self

    def remote(self, target: ReplicaTarget) -> _Updates:
        self.calls.append((target.replica, _Updates()))
        return self.calls[-1][1]


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def _fresh(state: RoutingState) -> list[str]:
    return [status.replica for status in state.status() if status.fresh]


def test_every_routed_replica_is_followed_and_a_departed_ones_call_is_cancelled():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        Subscriptions(engines, state).start()
        state.set_replicas(["a", "b"])
        await _until(lambda: {replica for replica, _ in engines.calls} == {"a", "b"})
        calls = dict(engines.calls)
        for updates in calls.values():
            updates.queue.put_nowait(_snapshot())
        await _until(lambda: _fresh(state) == ["a", "b"])
        state.set_replicas(["b"])
        await _until(lambda: calls["a"].cancelled)
        assert not calls["b"].cancelled and len(engines.calls) == 2

    asyncio.run(run())


def test_a_subscription_that_ends_in_order_is_renewed_without_losing_what_is_known():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        Subscriptions(engines, state).start()
        await _until(lambda: len(engines.calls) == 1)
        for item in (_snapshot(), _stored(1), None):
            engines.calls[0][1].queue.put_nowait(item)
        await _until(lambda: len(engines.calls) == 2)
        assert _fresh(state) == ["a"] and state.status()[0].cached_blocks == 1
        assert not engines.calls[0][1].cancelled

    asyncio.run(run())


@pytest.mark.parametrize(
    "fault",
    [_stored(5), ActorDiedError(), asyncio.CancelledError(), RuntimeError("a bug")],
    ids=["gap", "death", "cancel", "unforeseen"],
)
def test_a_broken_subscription_empties_the_copy_and_asks_again(fault, monkeypatch):
    monkeypatch.setattr(events, "RESUBSCRIBE_S", 0.01)

    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        Subscriptions(engines, state).start()
        await _until(lambda: len(engines.calls) == 1)
        for item in (_snapshot(), _stored(1), fault):
            engines.calls[0][1].queue.put_nowait(item)
        await _until(lambda: len(engines.calls) == 2)
        assert _fresh(state) == [] and state.status()[0].cached_blocks == 0
        assert engines.calls[0][1].cancelled
        engines.calls[1][1].queue.put_nowait(_snapshot(5))
        await _until(lambda: _fresh(state) == ["a"])

    asyncio.run(run())


def test_stopping_cancels_every_call_and_follows_nobody_any_more():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a", "b"])
        subscriptions = Subscriptions(engines, state)
        subscriptions.start()
        await _until(lambda: len(engines.calls) == 2)
        await asyncio.sleep(0.01)
        await subscriptions.stop()
        assert all(updates.cancelled for _, updates in engines.calls)
        state.set_replicas(["a", "b", "c"])
        await asyncio.sleep(0.02)
        assert len(engines.calls) == 2

    asyncio.run(run())
