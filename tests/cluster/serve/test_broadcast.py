"""Fan-out of a real block manager's events to ingress processes that come and go, and when an item goes out."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.serve import broadcast
from cluster.serve.broadcast import ADMISSION_S, COALESCE_S, MAX_QUEUED, Broadcast, Outbox
from cluster.serve.index import BlockIndex
from cluster.serve.messages import (
    Admission,
    GenerateRequest,
    NotFollowed,
    ReplicaInfo,
    ReplicaLoad,
    ReplicaUpdate,
    Subscription,
)
from cluster.serve.replay import virtual_time
from llama.engine import BlocksStored, Chunk, EngineFailed, SamplingParams, TokenLogprob, generation_root
from llama.engine.blocks import BlockManager, BlockTable

BLOCK = 16
LOAD = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)
INFO = ReplicaInfo("r", 1, "node", "w", 100, 64, BLOCK, 12)


def _use(blocks: BlockManager, first_token: int, num_tokens: int = 64) -> None:
    """One request's life in the cache: reserved, computed, released; evicts what it must."""
    token_ids = list(range(first_token, first_token + num_tokens))
    table = BlockTable(generation_root("w"))
    assert blocks.reserve(table, token_ids) is not None
    blocks.commit(table, token_ids, num_tokens)
    blocks.release(table)


def _broadcast(blocks: BlockManager) -> Broadcast:
    return Broadcast(blocks, lambda: LOAD, lambda: INFO)


def _request(call: int = 1, source: str = "me", n: int = 1) -> GenerateRequest:
    return GenerateRequest(f"r{call}", (1, 2), (), SamplingParams(n=n), "w", source=source, call=call)


def _chunk(count: int, reason: str | None = None, index: int = 0) -> Chunk:
    logprobs = [TokenLogprob(count, -1.0, {})]
    return Chunk("r", [count], f"<{count}>", reason, 0, 2, count, logprobs, count, index)


class Reader:
    """Follows a broadcast into an index of its own."""

    def __init__(self, source: Broadcast, subscription: Subscription) -> None:
        self.updates: list[ReplicaUpdate] = []
        self.index = BlockIndex()
        self.ended = False
        self.task = asyncio.create_task(self._read(source, subscription))

    async def _read(self, source: Broadcast, subscription: Subscription) -> None:
        async with aclosing(source.follow(subscription)) as updates:
            async for update in updates:
                self.updates.append(update)
                if update.snapshot is not None:
                    self.index.load_snapshot("r", update.snapshot)
                for event in update.events:
                    assert self.index.apply("r", event, epoch=update.epoch)
                assert update.seq is not None
                self.index.reach("r", update.seq, epoch=update.epoch)
                assert self.index.position("r") == (update.epoch, update.seq)
        self.ended = True

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition(self):
                await asyncio.sleep(0.001)


def test_every_follower_ends_with_the_true_cache_whenever_it_joined_or_renewed():
    async def run() -> None:
        blocks = BlockManager(12, BLOCK)
        source = _broadcast(blocks)
        readers: dict[str, list[Reader]] = {}
        for n in range(40):
            if n % 5 == 0:
                name = f"ingress {n % 3}"
                known = readers.setdefault(name, [])
                known.append(Reader(source, Subscription("r", name, renews=bool(known))))
            _use(blocks, first_token=1000 * (n % 7))
            if n == 20:
                blocks.clear([])
            if n % 3 == 0:
                source.notify()
                await asyncio.sleep(0.005)
        source.publish()
        truth = set(blocks.snapshot().hashes)
        assert truth
        for own in readers.values():
            for reader in own[:-1]:
                await reader.until(lambda reader: reader.ended)
            last = own[-1]
            await last.until(lambda reader: reader.index.position("r") == (blocks.epoch, blocks.event_seq))
            assert last.index.num_hashes == len(truth)
            assert all(last.index.match([block]) == {"r": 1} for block in truth)
            numbers = [update.number for reader in own for update in reader.updates]
            assert numbers == list(range(1, len(numbers) + 1))
            last.task.cancel()

    asyncio.run(run())


def test_tokens_go_together_and_wait_no_longer_than_they_may_while_what_matters_goes_at_once():
    async def run() -> None:
        outbox = Outbox()
        loop = asyncio.get_running_loop()

        async def item() -> tuple[ReplicaUpdate, float]:
            started = loop.time()
            await outbox.wait(10)
            return outbox.take("e", LOAD, None, None), loop.time() - started

        for call in range(32):
            outbox.put_chunk(call, _chunk(1))
        update, waited = await item()
        assert len(update.chunks) == 32 and waited < COALESCE_S
        for count in (2, 3, 4):
            outbox.put_chunk(0, _chunk(count))
            outbox.put_chunk(1, _chunk(count))
        update, waited = await item()
        assert waited > COALESCE_S / 2
        assert [call for call, _ in update.chunks] == [0, 1]
        joined = update.chunks[0][1]
        assert (joined.token_ids, joined.text, joined.completion_tokens) == ([2, 3, 4], "<2><3><4>", 4)
        assert joined.event_seq == 4 and [entry.token_id for entry in joined.logprobs or ()] == [2, 3, 4]
        outbox.put_chunk(0, _chunk(5))
        outbox.put_chunk(0, _chunk(6, "stop"))
        update, waited = await item()
        assert waited < COALESCE_S / 2
        assert update.chunks[0][1].finish_reason == "stop" and update.chunks[0][1].token_ids == [5, 6]

    asyncio.run(run())


def test_an_arrival_is_told_with_the_first_token_or_a_little_later():
    async def run() -> None:
        outbox = Outbox()
        loop = asyncio.get_running_loop()

        async def item() -> tuple[ReplicaUpdate, float]:
            await asyncio.sleep(1)
            outbox.put_admission(Admission("r", 3, ()))
            started = loop.time()
            await outbox.wait(10)
            return outbox.take("e", LOAD, None, None), loop.time() - started

        update, waited = await item()
        assert waited == pytest.approx(ADMISSION_S) and not update.chunks
        assert [admission.request_id for admission in update.admitted] == ["r"]
        loop.call_later(1 + ADMISSION_S / 2, outbox.put_chunk, 0, _chunk(1))
        update, waited = await item()
        assert waited == pytest.approx(ADMISSION_S / 2) and update.admitted and update.chunks

    virtual_time.run(run())


def test_completions_of_one_request_are_not_joined_with_each_other():
    async def run() -> None:
        outbox = Outbox()
        for count in (1, 2):
            for index in (0, 1):
                outbox.put_chunk(7, replace(_chunk(count), index=index))
        chunks = outbox.take("e", LOAD, None, None).chunks
        assert [(call, chunk.index, chunk.token_ids) for call, chunk in chunks] == [(7, 0, [1, 2]), (7, 1, [1, 2])]

    asyncio.run(run())


def test_a_reader_that_does_not_keep_up_finds_a_gap():
    async def run() -> None:
        blocks = BlockManager(12, BLOCK)
        index = BlockIndex()
        index.load_snapshot("r", blocks.snapshot())
        outbox = Outbox()
        outbox.put_events([BlocksStored(n, ()) for n in range(1, MAX_QUEUED + 1)])
        outbox.put_events([BlocksStored(MAX_QUEUED + 1, ())])
        events = outbox.take("e", LOAD, None, None).events
        assert len(events) == 1 and not index.apply("r", events[0], epoch=blocks.epoch)

        # And nothing need happen after those that were dropped.
        index.load_snapshot("r", blocks.snapshot())
        outbox.put_events([BlocksStored(MAX_QUEUED + n, ()) for n in range(2, 4)])
        for _ in range(MAX_QUEUED - 1):
            outbox.put_prefilled("r")
        told = outbox.take(blocks.epoch, LOAD, None, None)
        assert told.events == () and told.seq == MAX_QUEUED + 3
        index.reach("r", told.seq, epoch=told.epoch)
        assert not index.is_fresh("r")

    asyncio.run(run())


def test_an_idle_follower_hears_the_load_all_the_same(monkeypatch):
    monkeypatch.setattr(broadcast, "HEARTBEAT_S", 0.01)

    async def run() -> None:
        reader = Reader(_broadcast(BlockManager(12, BLOCK)), Subscription("r", "me"))
        await reader.until(lambda reader: len(reader.updates) == 4)
        assert [update.info for update in reader.updates] == [INFO, None, None, None]
        assert {update.load for update in reader.updates} == {LOAD}
        reader.task.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["reader leaves", "another one begins", "it is gone"])
def test_a_follower_that_is_gone_ends_its_requests_and_takes_no_more(how):
    async def run() -> None:
        source = _broadcast(BlockManager(12, BLOCK))
        mine, other = (Reader(source, Subscription("r", name)) for name in ("me", "other"))
        await mine.until(lambda reader: reader.updates)
        await other.until(lambda reader: reader.updates)
        answer, kept = await source.begin(_request()), await source.begin(_request(source="other"))
        if how == "reader leaves":
            mine.task.cancel()
        elif how == "it is gone":
            source.leave("me")
        else:
            again = Reader(source, Subscription("r", "me"))
        with pytest.raises(NotFollowed):
            await asyncio.wait_for(answer.done, 10)
        source.end(answer)
        source.sink(answer)(_chunk(1))  # too late
        assert not kept.done.done()
        if how == "another one begins":
            await again.until(lambda reader: reader.updates)
            assert again.updates[0].number == 1
            source.end(await source.begin(_request(2)))
            again.task.cancel()
        else:
            with pytest.raises(NotFollowed):
                await source.begin(_request(2))
        if how != "reader leaves":
            await mine.until(lambda reader: reader.ended)
        source.end(kept)
        other.task.cancel()

    asyncio.run(run())


def test_an_answer_is_done_with_the_last_chunk_of_its_last_completion_or_with_the_engines_failure():
    async def run() -> None:
        source = _broadcast(BlockManager(12, BLOCK))
        reader = Reader(source, Subscription("r", "me"))
        await reader.until(lambda reader: reader.updates)
        answer = await source.begin(_request(n=2))
        sink = source.sink(answer)
        sink(_chunk(1, "stop"))
        await asyncio.sleep(0.01)
        assert not answer.done.done()
        sink(_chunk(1, "stop", index=1))
        await asyncio.wait_for(answer.done, 10)
        failed = await source.begin(_request(2))
        source.sink(failed)(EngineFailed("step"))
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(failed.done, 10)
        reader.task.cancel()

    asyncio.run(run())
