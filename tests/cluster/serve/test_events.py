"""Subscriptions against a scripted deployment: who is followed, and what ends or renews a subscription."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError

from cluster.serve import events
from cluster.serve.channel import Inbox, ReplicaLost
from cluster.serve.events import Subscriptions
from cluster.serve.messages import ReplicaLoad, ReplicaUpdate, Subscription
from cluster.serve.state import RoutingState
from llama.engine import BlocksStored, CacheSnapshot, Chunk

LOAD = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)


def _snapshot(seq: int = 0, number: int = 1, open_calls: int = 0) -> ReplicaUpdate:
    return ReplicaUpdate("e", LOAD, snapshot=CacheSnapshot("e", seq, ()), number=number, open_calls=open_calls)


def _stored(seq: int, number: int | None = None, open_calls: int = 0) -> ReplicaUpdate:
    """The item after the first, with an event; `number` where it is not its turn."""
    events = (BlocksStored(seq, (seq.to_bytes(16, "little"),)),)
    return ReplicaUpdate("e", LOAD, events, number=number or seq + 1, open_calls=open_calls)


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
        self.subscriptions: list[Subscription] = []

    def options(self, *, method_name: str, stream: bool) -> "_Engines":
        assert method_name == "subscribe" and stream
        return self

    def remote(self, subscription: Subscription) -> _Updates:
        assert (subscription.source, subscription.process) == ("me", "myself")
        self.subscriptions.append(subscription)
        self.calls.append((subscription.replica, _Updates()))
        return self.calls[-1][1]


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def _follow(engines: _Engines, state: RoutingState) -> tuple[Subscriptions, Inbox]:
    inbox = Inbox("me")
    subscriptions = Subscriptions(engines, state, inbox, "myself")  # type: ignore[arg-type]
    subscriptions.start()
    return subscriptions, inbox


def _fresh(state: RoutingState) -> list[str]:
    return [status.replica for status in state.status() if status.fresh]


def test_every_routed_replica_is_followed_and_a_departed_ones_call_is_cancelled():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        _follow(engines, state)
        state.set_replicas(["a", "b"])
        await _until(lambda: {replica for replica, _ in engines.calls} == {"a", "b"})
        calls = dict(engines.calls)
        for updates in calls.values():
            updates.queue.put_nowait(_snapshot())
        await _until(lambda: _fresh(state) == ["a", "b"])
        state.set_replicas(["b"])
        await asyncio.sleep(0.01)
        calls["a"].queue.put_nowait(_stored(1))
        await _until(lambda: calls["a"].cancelled)
        assert not calls["b"].cancelled and len(engines.calls) == 2

    asyncio.run(run())


def test_a_subscription_is_renewed_in_time_and_read_to_its_end(monkeypatch):
    monkeypatch.setattr(events, "RENEW_S", 0.05)

    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        _, inbox = _follow(engines, state)
        call = inbox.open("r", inbox.next_number())
        await _until(lambda: len(engines.calls) == 1)
        first = engines.calls[0][1].queue
        first.put_nowait(_snapshot())
        await asyncio.sleep(0.06)
        first.put_nowait(_stored(1))
        await _until(lambda: len(engines.calls) == 2)
        assert [subscription.renews for subscription in engines.subscriptions] == [False, True]
        # What the new one has to say comes after all of the old one.
        engines.calls[1][1].queue.put_nowait(_snapshot(2, number=4))
        first.put_nowait(replace(_stored(2), chunks=((call.number, _chunk()),)))
        await call.next()
        assert state.status()[0].cached_blocks == 2
        first.put_nowait(None)
        await _until(lambda: state.status()[0].cached_blocks == 0)
        assert _fresh(state) == ["a"] and len(engines.calls) == 2

    asyncio.run(run())


def _chunk() -> Chunk:
    return Chunk("r", [1], "t", None, 0, 1, 1, None, 0)


def test_a_gap_in_the_events_costs_the_copy_and_no_chunk():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        _, inbox = _follow(engines, state)
        call = inbox.open("r", inbox.next_number())
        await _until(lambda: len(engines.calls) == 1)
        first = engines.calls[0][1].queue
        for item in (_snapshot(), _stored(1), replace(_stored(5, number=3), chunks=((call.number, _chunk()),))):
            first.put_nowait(item)
        await call.next()
        await _until(lambda: len(engines.calls) == 2)
        assert engines.subscriptions[1].renews and _fresh(state) == []
        first.put_nowait(None)
        engines.calls[1][1].queue.put_nowait(_snapshot(5, number=4))
        await _until(lambda: _fresh(state) == ["a"])
        call.fail(KeyError("still open"))
        with pytest.raises(KeyError):
            await call.next()

    asyncio.run(run())


@pytest.mark.parametrize(
    "fault",
    [
        _stored(5, number=7),
        ActorDiedError(),
        asyncio.CancelledError(),
        RuntimeError("a bug"),
        None,
        "silence",
    ],
    ids=["lost item", "death", "cancel", "unforeseen", "end", "silence"],
)
def test_a_broken_subscription_empties_the_copy_fails_its_calls_and_begins_anew(fault, monkeypatch):
    monkeypatch.setattr(events, "RESUBSCRIBE_S", 0.01)
    if fault == "silence":
        monkeypatch.setattr(events, "SILENT_S", 0.1)

    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a", "b"])
        _, inbox = _follow(engines, state)
        here, elsewhere = inbox.open("here", inbox.next_number()), inbox.open("elsewhere", inbox.next_number())
        await _until(lambda: len(engines.calls) == 2)
        calls = dict(engines.calls)
        for number, call in enumerate((here, elsewhere)):
            first = replace(_snapshot(), chunks=((call.number, _chunk()),))
            calls["ab"[number]].queue.put_nowait(first)
            await call.next()
        for item in (_stored(1), fault):
            if item != "silence":
                calls["a"].queue.put_nowait(item)
        with pytest.raises(ReplicaLost):
            await here.next()
        assert state.status()[0].cached_blocks == 0 and "a" not in _fresh(state)
        await _until(lambda: len(engines.calls) >= 3)
        assert calls["a"].cancelled
        again = next(n for n in (2, 3) if engines.calls[n][0] == "a")
        assert not engines.subscriptions[again].renews
        engines.calls[again][1].queue.put_nowait(_snapshot(5))
        await _until(lambda: "a" in _fresh(state))
        if fault != "silence":
            elsewhere.fail(KeyError("still open"))
            with pytest.raises(KeyError):
                await elsewhere.next()

    asyncio.run(run())


def test_a_departed_replica_is_heard_until_our_requests_there_are_over():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        _, inbox = _follow(engines, state)
        call = inbox.open("r", inbox.next_number())
        await _until(lambda: len(engines.calls) == 1)
        updates = engines.calls[0][1]
        updates.queue.put_nowait(_snapshot(open_calls=1))
        await _until(lambda: _fresh(state) == ["a"])
        state.set_replicas([])
        await asyncio.sleep(0.02)
        updates.queue.put_nowait(replace(_stored(1, open_calls=1), chunks=((call.number, _chunk()),)))
        await call.next()
        await asyncio.sleep(0.02)
        assert not updates.cancelled
        updates.queue.put_nowait(_stored(2))
        await _until(lambda: updates.cancelled)
        assert len(engines.calls) == 1
        state.set_replicas(["a"])
        await _until(lambda: len(engines.calls) == 2)

    asyncio.run(run())


def test_stopping_cancels_every_call_and_follows_nobody_any_more():
    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a", "b"])
        subscriptions, _ = _follow(engines, state)
        await _until(lambda: len(engines.calls) == 2)
        await asyncio.sleep(0.01)
        await subscriptions.stop()
        assert all(updates.cancelled for _, updates in engines.calls)
        state.set_replicas(["a", "b", "c"])
        await asyncio.sleep(0.02)
        assert len(engines.calls) == 2

    asyncio.run(run())


def test_an_item_lost_between_a_subscription_and_its_renewal_is_missed(monkeypatch):
    monkeypatch.setattr(events, "RENEW_S", 0.05)

    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        _follow(engines, state)
        await _until(lambda: len(engines.calls) == 1)
        first = engines.calls[0][1].queue
        first.put_nowait(_snapshot())
        await asyncio.sleep(0.06)
        first.put_nowait(_stored(1))
        await _until(lambda: len(engines.calls) == 2)
        engines.calls[1][1].queue.put_nowait(_snapshot(3, number=4))
        first.put_nowait(None)  # and item 3, which may have had chunks, never came
        await _until(lambda: len(engines.calls) == 3)
        assert [subscription.renews for subscription in engines.subscriptions] == [False, True, False]

    asyncio.run(run())


def test_a_replica_that_stays_lost_is_in_the_log_once(monkeypatch, caplog):
    monkeypatch.setattr(events, "RESUBSCRIBE_S", 0.001)
    caplog.set_level(logging.INFO, logger="ray.serve")

    async def run() -> None:
        state, engines = RoutingState(), _Engines()
        state.set_replicas(["a"])
        _follow(engines, state)
        for number in range(4):
            await _until(lambda: len(engines.calls) > number)  # noqa: B023
            engines.calls[number][1].queue.put_nowait(ActorDiedError())
        await _until(lambda: len(engines.calls) == 5)

    asyncio.run(run())
    assert len([record for record in caplog.records if "Lost replica a" in record.message]) == 1
