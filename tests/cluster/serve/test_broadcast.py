"""Fan-out of a real block manager's events to subscribers that come and go."""

import asyncio

from cluster.serve.broadcast import MAX_QUEUED_EVENTS, Broadcast
from cluster.serve.index import BlockIndex
from llama.engine import BlocksStored, generation_root
from llama.engine.blocks import BlockManager, BlockTable

BLOCK = 16


def _use(blocks: BlockManager, first_token: int, num_tokens: int = 64) -> None:
    """One request's life in the cache: reserved, computed, released; evicts what it must."""
    token_ids = list(range(first_token, first_token + num_tokens))
    table = BlockTable(generation_root("w"))
    assert blocks.reserve(table, token_ids) is not None
    blocks.commit(table, token_ids, num_tokens)
    blocks.release(table)


def test_every_subscriber_ends_with_the_true_cache_whenever_it_joined():
    async def run() -> None:
        blocks = BlockManager(12, BLOCK)
        broadcast = Broadcast(blocks)
        followers = []
        for n in range(40):
            if n % 10 == 0:
                subscriber, snapshot = broadcast.subscribe()
                index = BlockIndex()
                index.load_snapshot("r", snapshot)
                followers.append((subscriber, index))
            _use(blocks, first_token=1000 * (n % 7))
            if n == 20:
                blocks.clear([])
            if n % 3 == 0:
                broadcast.notify()
                await asyncio.sleep(0)
        broadcast.publish()
        truth = set(blocks.snapshot().hashes)
        assert truth
        for subscriber, index in followers:
            for event in await subscriber.take(1.0):
                assert index.apply("r", event, epoch=blocks.epoch)
            assert index.num_hashes == len(truth) and all(index.match([block]) == {"r": 1} for block in truth)

    asyncio.run(run())


def test_a_subscriber_that_left_gets_nothing_and_an_idle_one_waits_no_longer_than_it_said():
    async def run() -> None:
        blocks = BlockManager(12, BLOCK)
        broadcast = Broadcast(blocks)
        subscriber, _ = broadcast.subscribe()
        assert await subscriber.take(0.01) == []
        broadcast.unsubscribe(subscriber)
        broadcast.unsubscribe(subscriber)
        _use(blocks, 0)
        broadcast.publish()
        assert await subscriber.take(0.01) == []

    asyncio.run(run())


def test_a_subscriber_that_does_not_keep_up_finds_a_gap():
    async def run() -> None:
        blocks = BlockManager(12, BLOCK)
        broadcast = Broadcast(blocks)
        subscriber, snapshot = broadcast.subscribe()
        index = BlockIndex()
        index.load_snapshot("r", snapshot)
        subscriber.put([BlocksStored(n, ()) for n in range(1, MAX_QUEUED_EVENTS + 1)])
        subscriber.put([BlocksStored(MAX_QUEUED_EVENTS + 1, ())])
        events = await subscriber.take(1.0)
        assert len(events) == 1
        assert not index.apply("r", events[0], epoch=snapshot.epoch)

    asyncio.run(run())
