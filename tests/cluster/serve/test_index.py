"""The block index against brute force: whatever the event stream suffers, a fresh copy is the true cache."""

import random
from dataclasses import dataclass, field

import pytest

from cluster.serve.index import BlockIndex
from llama.engine import BlockEvent, BlocksRemoved, BlocksStored, CacheCleared, CacheSnapshot


def _hash(number: int) -> bytes:
    return number.to_bytes(16, "little")


@dataclass
class _Cache:
    """A replica's cache as it really is, and its history: seq -> contents after that event."""

    epoch: str
    seq: int = 0
    hashes: set[bytes] = field(default_factory=set)
    history: dict[int, frozenset[bytes]] = field(default_factory=lambda: {0: frozenset()})

    def change(self, rng: random.Random) -> BlockEvent:
        self.seq += 1
        kind = rng.random()
        if kind < 0.6:
            stored = tuple(_hash(rng.randrange(40)) for _ in range(rng.randrange(1, 5)))
            self.hashes |= set(stored)
            event: BlockEvent = BlocksStored(self.seq, stored)
        elif kind < 0.95:
            removed = tuple(rng.sample(sorted(self.hashes), min(len(self.hashes), 2)))
            self.hashes -= set(removed)
            event = BlocksRemoved(self.seq, removed)
        else:
            self.hashes.clear()
            event = CacheCleared(self.seq)
        self.history[self.seq] = frozenset(self.hashes)
        return event

    def snapshot(self) -> CacheSnapshot:
        return CacheSnapshot(self.epoch, self.seq, tuple(self.hashes))


def _brute_force_match(hashes: list[bytes], contents: frozenset[bytes]) -> int:
    return next((depth for depth, block in enumerate(hashes) if block not in contents), len(hashes))


def _deliver(index: BlockIndex, replica: str, cache: _Cache, wire: list[BlockEvent], rng: random.Random) -> None:
    """Hands over what is on the wire: in order, or with a loss, a repeat or a swap."""
    fault = rng.random()
    if fault < 0.1 and wire:
        wire.pop(rng.randrange(len(wire)))
    elif fault < 0.2 and wire:
        wire.insert(rng.randrange(len(wire)), rng.choice(wire))
    elif fault < 0.3:
        rng.shuffle(wire)
    for event in wire:
        index.apply(replica, event, epoch=cache.epoch)
    wire.clear()
    if not index.is_fresh(replica) and rng.random() < 0.5:
        index.load_snapshot(replica, cache.snapshot())


@pytest.mark.parametrize("seed", range(20))
def test_a_fresh_copy_is_the_cache_at_its_position_and_a_stale_one_matches_nothing(seed):
    rng = random.Random(seed)
    index, lives = BlockIndex(), 0
    caches: dict[str, _Cache] = {}
    wires: dict[str, list[BlockEvent]] = {}
    staleness = freshness = 0
    for _ in range(600):
        replica = f"replica-{rng.randrange(4)}"
        action = rng.random()
        if replica not in caches or action < 0.02:  # a new process under the same name: a new epoch
            lives += 1
            caches[replica], wires[replica] = _Cache(f"epoch-{lives}"), []
            if rng.random() < 0.7:
                index.load_snapshot(replica, caches[replica].snapshot())
        elif action < 0.03:
            del caches[replica], wires[replica]
            index.drop(replica)
            assert replica not in index.replicas
        elif action < 0.7:
            wires[replica].append(caches[replica].change(rng))
        else:
            _deliver(index, replica, caches[replica], wires[replica], rng)

        index.check_integrity()
        chain = [_hash(rng.randrange(40)) for _ in range(rng.randrange(6))]
        matches = index.match(chain)
        for name in index.replicas:
            position = index.position(name)
            if position is None or position[0] != caches[name].epoch:
                if position is None:
                    staleness += 1
                    assert matches[name] == 0 and index.num_blocks(name) == 0
                continue
            freshness += 1
            truth = caches[name].history[position[1]]
            assert matches[name] == _brute_force_match(chain, truth)
            assert index.num_blocks(name) == len(truth)
    assert staleness > 20 and freshness > 200  # both sides of the claim were really met


def test_all_delivered_in_order_the_index_is_the_union_of_the_caches():
    rng = random.Random(7)
    index = BlockIndex()
    caches = {f"replica-{n}": _Cache(f"epoch-{n}") for n in range(5)}
    for replica, cache in caches.items():
        index.load_snapshot(replica, cache.snapshot())
    for _ in range(2000):
        replica = rng.choice(sorted(caches))
        assert index.apply(replica, caches[replica].change(rng), epoch=caches[replica].epoch)
    union = set().union(*(cache.hashes for cache in caches.values()))
    assert index.num_hashes == len(union)
    for block in (_hash(n) for n in range(40)):
        expected = {replica: int(block in cache.hashes) for replica, cache in caches.items()}
        assert index.match([block]) == expected


def test_a_gap_makes_a_replica_stale_until_a_snapshot():
    index = BlockIndex()
    index.load_snapshot("a", CacheSnapshot("e", 3, (_hash(1), _hash(2))))
    assert index.match([_hash(1), _hash(2), _hash(3)]) == {"a": 2}
    assert not index.apply("a", BlocksStored(5, (_hash(3),)), epoch="e")
    assert not index.is_fresh("a") and index.position("a") is None
    assert index.match([_hash(1)]) == {"a": 0}
    assert not index.apply("a", BlocksStored(4, (_hash(3),)), epoch="e")  # too late: the copy is empty
    index.load_snapshot("a", CacheSnapshot("e", 5, (_hash(1), _hash(3))))
    assert index.position("a") == ("e", 5)
    assert index.apply("a", BlocksStored(5, (_hash(9),)), epoch="e")  # a repeat changes nothing
    assert index.match([_hash(9)]) == {"a": 0}


def test_events_that_did_not_come_are_missed_without_others_after_them():
    index = BlockIndex()
    index.reach("a", 1, epoch="e")  # nobody knows it
    index.load_snapshot("a", CacheSnapshot("e", 3, (_hash(1),)))
    for seq, epoch in ((2, "e"), (3, "e"), (9, "another")):
        index.reach("a", seq, epoch=epoch)
        assert index.match([_hash(1)]) == {"a": 1}
    index.reach("a", 4, epoch="e")
    assert not index.is_fresh("a") and index.match([_hash(1)]) == {"a": 0}


def test_an_event_of_another_epoch_makes_a_replica_stale():
    index = BlockIndex()
    index.load_snapshot("a", CacheSnapshot("first", 0, ()))
    assert not index.apply("a", BlocksStored(1, (_hash(1),)), epoch="second")
    assert index.match([_hash(1)]) == {"a": 0}


def test_an_unknown_replica_is_not_followed():
    index = BlockIndex()
    assert not index.apply("a", BlocksStored(1, (_hash(1),)), epoch="e")
    assert index.match([_hash(1)]) == {}
    index.drop("a")
    index.mark_stale("a")


def test_bits_of_departed_replicas_are_reused():
    index = BlockIndex()
    for generation in range(50):
        for n in range(3):
            index.load_snapshot(f"{generation}-{n}", CacheSnapshot("e", 0, (_hash(n), _hash(generation))))
        for n in range(3):
            index.drop(f"{generation}-{n}")
        index.check_integrity()
    index.load_snapshot("last", CacheSnapshot("e", 0, (_hash(0),)))
    assert index.num_hashes == 1
    assert index.match([_hash(0)]) == {"last": 1}


def test_a_copy_of_more_blocks_than_the_replica_has_is_not_trusted():
    index = BlockIndex()
    index.load_snapshot("a", CacheSnapshot("e", 0, (b"1", b"2")), capacity=3)
    assert index.apply("a", BlocksStored(1, (b"3",)), epoch="e") and index.holds("a", b"3")
    assert not index.apply("a", BlocksStored(2, (b"4",)), epoch="e")
    assert not index.is_fresh("a") and not index.holds("a", b"1") and index.num_hashes == 0
    assert not index.holds("nobody", b"1")


def test_a_copy_is_compared_with_a_snapshot_of_the_same_moment_only():
    index = BlockIndex()
    index.load_snapshot("a", CacheSnapshot("e", 5, (b"1", b"2", b"3")))
    assert index.difference("a", CacheSnapshot("e", 5, (b"1", b"2", b"3"))) == (0, 0)
    assert index.difference("a", CacheSnapshot("e", 5, (b"3", b"4", b"5"))) == (2, 2)
    assert index.difference("a", CacheSnapshot("e", 6, (b"1",))) is None
    assert index.difference("a", CacheSnapshot("f", 5, (b"1",))) is None
    assert index.difference("b", CacheSnapshot("e", 5, ())) is None
    index.mark_stale("a")
    assert index.difference("a", CacheSnapshot("e", 5, ())) is None
