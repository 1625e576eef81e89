"""What travels between an ingress and its replicas: nothing lost, doubled or left behind, whatever breaks."""

import asyncio
from collections import defaultdict
from contextlib import aclosing
from functools import cache

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.serve import broadcast, events
from cluster.serve.api_error import ApiError
from cluster.serve.channel import Inbox, ReplicaLost
from cluster.serve.engine_client import RoutedChunk
from cluster.serve.events import Subscriptions
from cluster.serve.messages import ReplicaLoad, ReplicaUpdate
from llama import Transformer
from llama.engine import Chunk
from tests.cluster.serve.linked import BLOCK, World, make_request, until
from tests.llama.engine.models import plain_greedy, random_model

MODEL = random_model()
LOAD = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)


def _tokens(items: list[RoutedChunk]) -> list[int]:
    return [token for item in items for token in item.chunk.token_ids]


def _greedy(request, model: Transformer = MODEL) -> list[int]:
    return _plain_greedy(model, request.token_ids, request.params.max_tokens)


@cache
def _plain_greedy(model: Transformer, token_ids: tuple[int, ...], max_tokens: int) -> list[int]:
    return plain_greedy(model, token_ids, max_tokens)


def _check(request, items: list[RoutedChunk]) -> None:
    """Every completion is there once, in order, and ends once."""
    parts = defaultdict(list)
    for item in items:
        assert item.chunk.request_id == request.request_id
        parts[item.chunk.index].append(item)
    assert len(parts) == request.params.n
    for own in parts.values():
        assert _tokens(own) == _greedy(request)
        counts = [item.chunk.completion_tokens for item in own]
        assert counts == sorted(set(counts)) and counts[-1] == request.params.max_tokens
        assert [item.chunk.finish_reason for item in own] == [None] * (len(own) - 1) + ["length"]
        assert own[-1].chunk.timing is not None


def test_no_chunk_is_lost_doubled_or_moved_while_subscriptions_renew_each_other(monkeypatch):
    monkeypatch.setattr(events, "RENEW_S", 0.03)

    async def run() -> None:
        async with World("a", "b", step_s=0.002) as world:
            requests = [make_request(number, n=1 + number % 3) for number in range(20)]
            answers = await asyncio.gather(*(world.client.complete(request) for request in requests))
            for request, items in zip(requests, answers, strict=True):
                _check(request, items)
            assert len(world.link.streams) > 6 and world.at_rest()
            assert {name for name, _ in world.link.calls} == {"a", "b"}

    asyncio.run(run())


def test_the_index_knows_a_requests_blocks_when_its_last_chunk_is_here():
    async def run() -> None:
        async with World("a", "b") as world:
            for number in range(30):
                request = make_request(number)
                async with aclosing(world.client.stream(request)) as items:
                    async for item in items:
                        last = item
                assert last.predicted_cached_tokens == last.chunk.num_cached_tokens == 0
                world.state.begin("again")
                ranking = world.state.select(make_request(number), world.state.replicas)
                world.state.finish("again")
                assert ranking[0] == last.replica
                again = await world.client.complete(make_request(number))
                assert again[0].predicted_cached_tokens == again[0].chunk.num_cached_tokens == 2 * BLOCK

    asyncio.run(run())


@pytest.mark.parametrize(
    "fault", ["cut", "unavailable", "cancelled", "lost item", "silence", "kill", "call breaks", "engine fails"]
)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_whatever_breaks_a_request_is_tried_again_or_told(monkeypatch, fault, begun, streaming):
    """One of two replicas breaks in one way before or after a request's first token; nothing hangs, nothing is left."""
    if fault == "silence":
        monkeypatch.setattr(events, "SILENT_S", 0.6)
    monkeypatch.setattr(broadcast, "HEARTBEAT_S", 0.05)

    async def run() -> None:
        async with World("a", "b", step_s=0.005) as world:
            request = make_request(1, max_tokens=30)
            got: list[RoutedChunk] = []

            async def ask() -> list[RoutedChunk]:
                if not streaming:
                    return await world.client.complete(request)
                async with aclosing(world.client.stream(request)) as items:
                    async for item in items:
                        got.append(item)
                return got

            task = asyncio.create_task(ask())
            await until(lambda: bool(world.link.calls))
            victim, call = world.link.calls[0]
            if begun:
                await until(lambda: world.inbox.open_calls()[0].replica is not None)
                if streaming:
                    await until(lambda: bool(got))
            stream = world.link.stream_of(victim)
            if fault == "cut":
                stream.cut(ActorDiedError())
            elif fault == "unavailable":
                stream.cut(ActorUnavailableError("x", b"x" * 16))
            elif fault == "cancelled":
                stream.cut(asyncio.CancelledError())
            elif fault == "lost item":
                stream.drop = True
            elif fault == "silence":
                stream.flowing.clear()
            elif fault == "kill":
                world.link.kill(victim)
            elif fault == "call breaks":
                call.break_off(ActorUnavailableError("x", b"x" * 16))
            else:
                engine = world.engine(victim)
                monkeypatch.setattr(engine._runner, "run", lambda inputs: 1 / 0)
            try:
                items = await asyncio.wait_for(task, 10)
            except ApiError as error:
                assert error.code == "replica_lost" and got
            else:
                _check(request, items)
            if fault == "kill":
                world.replicas.pop(victim)
                world.state.set_replicas(list(world.replicas))
            elif fault == "engine fails":
                world.replicas.pop(victim)
                with pytest.raises(Exception, match="division"):
                    engine.check_health(60)
            # Of a call that broke on our side only, the replica works to its end.
            await until(world.at_rest)
            await until(lambda: all(status.fresh for status in world.state.status() if status.replica != victim))

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_blocks():
    async def run() -> None:
        async with World("a", step_s=0.005) as world:
            async with aclosing(world.client.stream(make_request(1, max_tokens=80, n=3))) as items:
                await anext(items)
                assert world.engine("a").stats().running == 3
            await until(world.at_rest)
            assert world.engine("a").stats().generated_tokens < 200

    asyncio.run(run())


def test_an_ingress_that_dies_leaves_nothing_behind_and_disturbs_nobody(monkeypatch):
    monkeypatch.setattr("cluster.serve.replica.PING_S", 0.01)

    class Process:
        class __ray_ready__:  # noqa: N801
            alive = True

            @classmethod
            async def remote(cls) -> None:
                if not cls.alive:
                    raise ActorDiedError()

    async def run() -> None:
        async with World("a", step_s=0.005) as world:
            dead = World()
            dead.replicas, dead.link.replicas, dead.inbox.source = world.replicas, world.replicas, "the dead one"
            dead.subscriptions = Subscriptions(dead.link, dead.state, dead.inbox, Process)  # type: ignore[arg-type]
            async with aclosing(_entered(dead)) as entered:
                await anext(entered)
                lost = asyncio.create_task(dead.client.complete(make_request(1, max_tokens=80)))
                kept = asyncio.create_task(world.client.complete(make_request(2)))
                await until(lambda: world.engine("a").stats().running == 2)
                dead.link.stream_of("a").flowing.clear()  # it hears no more
                Process.__ray_ready__.alive = False
                _check(make_request(2), await kept)
                await until(world.at_rest)
                assert "the dead one" not in world.replicas["a"]._broadcast._outboxes
                assert world.engine("a").stats().generated_tokens < 100
                lost.cancel()

    asyncio.run(run())


async def _entered(world: World):
    world.state.set_replicas(list(world.replicas))
    world.subscriptions.start()
    await until(lambda: all(status.fresh for status in world.state.status()))
    yield
    await world.subscriptions.stop()


def test_a_replica_that_leaves_finishes_what_it_has_and_is_let_go_then():
    async def run() -> None:
        async with World("a", "b", step_s=0.005) as world:
            request = make_request(1, max_tokens=40)
            task = asyncio.create_task(world.client.complete(request))
            await until(lambda: bool(world.inbox.open_calls()) and world.inbox.open_calls()[0].replica is not None)
            leaving = world.inbox.open_calls()[0].replica
            stream = world.link.stream_of(leaving)
            world.state.set_replicas([name for name in world.replicas if name != leaving])
            _check(request, await task)
            assert len(world.link.calls) == 1
            await until(lambda: stream.cancelled)
            assert [name for name, _ in world.link.streams].count(leaving) == 1
            # A request that was on its way there is refused, and finds another.
            world.state.set_replicas(list(world.replicas))
            world.subscriptions._routed.discard(leaving)
            late = await world.client.complete(make_request(1))
            assert late[0].replica
            await until(world.at_rest)

    asyncio.run(run())


def test_a_request_that_comes_before_its_ingress_waits_for_it():
    async def run() -> None:
        world = World("a")
        world.state.set_replicas(["a"])
        task = asyncio.create_task(world.client.complete(make_request(1)))
        await asyncio.sleep(0.05)
        async with world:
            _check(make_request(1), await task)

    asyncio.run(run())


def test_every_ingress_hears_of_every_admission_and_gets_its_own_chunks_only():
    async def run() -> None:
        async with World("a", step_s=0.005) as one:
            other = World()
            other.replicas, other.link.replicas, other.inbox.source = one.replicas, one.replicas, "other"
            heard: list = []
            take = other.inbox.take
            other.inbox.take = lambda replica, update: (heard.append(update), take(replica, update))  # type: ignore[assignment,method-assign,func-returns-value]
            async with aclosing(_entered(other)) as entered:
                await anext(entered)
                mine, theirs = make_request(1, n=2), make_request(2)
                answers = await asyncio.gather(one.client.complete(mine), other.client.complete(theirs))
                _check(mine, answers[0])
                _check(theirs, answers[1])
                await until(lambda: sum(len(update.prefilled) for update in heard) == 2)
                admitted = {entry.request_id: entry for update in heard for entry in update.admitted}
                assert {name: entry.missing_tokens for name, entry in admitted.items()} == {"r1": 10, "r2": 10}
                assert admitted["r1"].hashes == mine.hashes
                assert {call for update in heard for call, _ in update.chunks} == {1}
                assert [update.number for update in heard] == list(range(1, len(heard) + 1))

    asyncio.run(run())


def test_a_subscription_begins_with_what_is_being_computed():
    async def run() -> None:
        async with World("a", step_s=0.2) as world:
            task = asyncio.create_task(world.client.complete(make_request(1, max_tokens=2)))
            await until(lambda: world.engine("a").stats().running == 1)
            other = World()
            other.replicas, other.link.replicas, other.inbox.source = world.replicas, world.replicas, "other"
            heard: list = []
            other.inbox.take = lambda replica, update: heard.append(update)  # type: ignore[method-assign]
            async with aclosing(_entered(other)) as entered:
                await anext(entered)
                assert [entry.request_id for entry in heard[0].admitted] == ["r1"]
            await task

    asyncio.run(run())


def test_time_that_is_up_ends_a_request_with_its_reason():
    async def run() -> None:
        async with World("a", step_s=0.01) as world:
            items = await world.client.complete(make_request(1, max_tokens=80, timeout_s=0.1))
            assert items[-1].chunk.finish_reason == "timeout" and 0 < len(_tokens(items)) < 40
            await until(world.at_rest)

    asyncio.run(run())


def test_new_weights_in_place_never_mix_with_the_old_and_lose_no_request():
    other = random_model(seed=1)

    async def run() -> None:
        async with World("a", "b", step_s=0.002) as world:
            texts: dict[int, set[tuple[int, ...]]] = defaultdict(set)
            stop = False

            async def ask(number: int) -> None:
                while not stop:
                    info = world.state.model("family")
                    request = make_request(number, weights_id=info.weights_id)
                    texts[number].add(tuple(_tokens(await world.client.complete(request))))

            asking = [asyncio.create_task(ask(number)) for number in range(6)]
            await asyncio.sleep(0.2)
            for name in ("a", "b"):
                replica = world.replicas[name]
                await replica._swap(other.state_dict(), "v")
                await asyncio.sleep(0.1)
            stop = True
            await asyncio.gather(*asking)
            for number, seen in texts.items():
                request = make_request(number)
                old, new = (tuple(_greedy(request, model)) for model in (MODEL, other))
                assert seen == {old, new}, number
            assert {status.info.weights_id for status in world.state.status()} == {"v"}
            assert not any(status.load.draining for status in world.state.status())
            await until(world.at_rest)

    asyncio.run(run())


def test_a_loss_that_is_noticed_twice_costs_one_attempt():
    """The call fails first; its subscription breaks while the next attempt waits to be routed."""

    async def run() -> None:
        async with World("a", "b", step_s=0.005) as world:
            request = make_request(1)
            task = asyncio.create_task(world.client.complete(request))
            await until(lambda: bool(world.link.calls))
            victim, call = world.link.calls[0]
            world.link.routing.clear()
            call.break_off(ActorDiedError())
            await until(lambda: [each.number for each in world.inbox.open_calls()] == [2])
            stream = world.link.stream_of(victim)
            stream.cut(ActorDiedError())
            await until(lambda: stream.cancelled)
            world.link.routing.set()
            _check(request, await task)
            assert world.inbox.next_number() == 3

    asyncio.run(run())


def test_of_two_replicas_that_work_on_one_call_only_one_answers():
    async def run() -> None:
        inbox = Inbox("me")
        call = inbox.open("r", inbox.next_number())
        for replica, token in (("a", 1), ("b", 7), ("a", 2)):
            chunk = Chunk("x", [token], "", None, 0, 1, token, None, 0)
            inbox.take(replica, ReplicaUpdate("e", LOAD, chunks=((call.number, chunk),)))
        assert [(await call.next()).token_ids for _ in range(2)] == [[1], [2]] and call.replica == "a"
        call.fail(ReplicaLost("gone"))
        with pytest.raises(ReplicaLost):  # and nothing of b's before it
            await call.next()

    asyncio.run(run())
