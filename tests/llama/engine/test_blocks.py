import random
import struct
from dataclasses import dataclass, field

import pytest
import xxhash

from llama.engine import blocks as blocks_module
from llama.engine import events
from llama.engine import prefix as prefix_module
from llama.engine.blocks import NO_BLOCK, BlockManager, BlockTable, CacheCorrupted
from llama.engine.events import BlocksRemoved, BlocksStored, CacheCleared
from llama.engine.prefix import generation_root, hash_blocks, reusable_blocks

ROOT = generation_root("weights")


class Replica:
    """What a consumer of the events believes to be in the cache."""

    def __init__(self) -> None:
        self.seq = 0
        self.hashes: set[bytes] = set()

    def apply(self, events) -> None:
        for event in events:
            assert event.seq == self.seq + 1
            self.seq = event.seq
            match event:
                case BlocksStored():
                    assert self.hashes.isdisjoint(event.hashes)
                    self.hashes.update(event.hashes)
                case BlocksRemoved():
                    assert self.hashes.issuperset(event.hashes)
                    self.hashes.difference_update(event.hashes)
                case CacheCleared():
                    self.hashes.clear()


def test_hashes_chain_over_full_blocks():
    tokens = list(range(1000, 1011))
    first = xxhash.xxh3_128(ROOT + struct.pack("<4I", *tokens[:4])).digest()
    second = xxhash.xxh3_128(first + struct.pack("<4I", *tokens[4:8])).digest()
    assert hash_blocks(ROOT, tokens, 4) == [first, second]
    assert hash_blocks(first, tokens[4:], 4) == [second]
    assert hash_blocks(ROOT, tokens[:3], 4) == []


def test_every_field_of_the_generation_changes_the_root():
    roots = {
        generation_root("w"),
        generation_root("v"),
        generation_root("w", "a"),
        generation_root("w", "", "a"),
        generation_root("wa"),
        generation_root("", "wa"),
    }
    assert len(roots) == 6 and all(len(root) == 16 for root in roots)


def test_the_last_token_is_never_reusable():
    assert [reusable_blocks(n, 16) for n in (0, 1, 16, 17, 32, 33, 48, 49)] == [0, 0, 0, 1, 1, 2, 2, 3]


@dataclass(eq=False)
class ReferenceRequest:
    tokens: list[int]
    num_blocks: int = 0
    indexed: int = 0


@dataclass
class ReferenceCache:
    """The cache as a set of prefixes with the time of their last release: no lists, no hashes, no block ids."""

    num_blocks: int
    block_size: int
    released: dict[tuple, int] = field(default_factory=dict)
    clock: int = 0
    requests: list[ReferenceRequest] = field(default_factory=list)

    def prefix(self, request, count):
        return tuple(request.tokens[: count * self.block_size])

    def users(self, prefix):
        held = (self.prefix(request, n) for request in self.requests for n in range(1, request.indexed + 1))
        return sum(other == prefix for other in held)

    @property
    def idle(self):
        return sorted((prefix for prefix in self.released if not self.users(prefix)), key=self.released.__getitem__)

    @property
    def num_free(self):
        private = sum(request.num_blocks - request.indexed for request in self.requests)
        return self.num_blocks - private - (len(self.released) - len(self.idle))

    def take(self, count):
        empty = self.num_free - len(self.idle)
        for prefix in self.idle[: max(0, count - empty)]:
            del self.released[prefix]

    def reserve(self, request, headroom):
        matched = 0
        while matched < (len(request.tokens) - 1) // self.block_size and (
            self.prefix(request, matched + 1) in self.released
        ):
            matched += 1
        needed = -(-len(request.tokens) // self.block_size) - matched
        idle_matched = sum(not self.users(self.prefix(request, count)) for count in range(1, matched + 1))
        if needed + headroom > self.num_free - idle_matched:
            return None
        request.indexed = request.num_blocks = matched
        self.requests.append(request)
        self.take(needed)
        request.num_blocks += needed
        return matched * self.block_size

    def commit(self, request, computed):
        for count in range(request.indexed + 1, computed // self.block_size + 1):
            self.released.setdefault(self.prefix(request, count), -1)
            request.indexed = count

    def grow(self, request):
        missing = -(-len(request.tokens) // self.block_size) - request.num_blocks
        if missing > self.num_free:
            return False
        self.take(missing)
        request.num_blocks += missing
        return True

    def release(self, request):
        self.requests.remove(request)
        for count in range(request.indexed, 0, -1):
            prefix = self.prefix(request, count)
            if not self.users(prefix):
                self.clock += 1
                self.released[prefix] = self.clock


def run_against_reference(seed: int) -> tuple[int, int, int]:
    """Returns how many evictions, hits and refusals there were."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    num_blocks = rng.randrange(4, 14)
    manager, reference = BlockManager(num_blocks, block_size), ReferenceCache(num_blocks, block_size)
    replica = Replica()
    live: list[tuple[ReferenceRequest, BlockTable]] = []
    evictions = hits = refusals = 0
    for _ in range(250):
        action = rng.random()
        if action < 0.4:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 5 * block_size))]
            request, table = ReferenceRequest(tokens), BlockTable(ROOT)
            headroom = rng.randrange(3)
            expected = reference.reserve(request, headroom)
            assert manager.reserve(table, tokens, headroom=headroom) == expected
            if expected is None:
                refusals += 1
            else:
                hits += expected > 0
                live.append((request, table))
        elif live:
            request, table = rng.choice(live)
            if action < 0.65:
                computed = rng.randrange(request.indexed * block_size, len(request.tokens) + 1)
                reference.commit(request, computed)
                manager.commit(table, request.tokens, computed)
            elif action < 0.85:
                request.tokens.append(rng.randrange(2))
                grown = reference.grow(request)
                assert manager.make_room(table, len(request.tokens) - 1, len(request.tokens)) == grown
                if not grown:
                    request.tokens.pop()
            else:
                reference.release(request)
                manager.release(table)
                live.remove((request, table))
        events = manager.drain_events()
        evictions += sum(isinstance(event, BlocksRemoved) for event in events)
        replica.apply(events)
        manager.check_integrity(table for _, table in live)
        assert manager.num_free == reference.num_free
        expected_hashes = {hash_blocks(ROOT, prefix, block_size)[-1] for prefix in reference.released}
        assert replica.hashes == set(manager.snapshot().hashes) == expected_hashes
        assert manager.snapshot().seq == replica.seq == manager.event_seq
    for _, table in live:
        manager.release(table)
    assert manager.num_free == num_blocks
    return evictions, hits, refusals


def test_random_operations_agree_with_a_brute_force_cache():
    counts = [run_against_reference(seed) for seed in range(12)]
    assert all(sum(column) > 50 for column in zip(*counts, strict=True)), counts


def test_colliding_hashes_never_give_wrong_contents(monkeypatch):
    """With a hash of 3 bits almost everything collides; each block's contents are then checked against the tokens."""
    digest = xxhash.xxh3_128_digest
    for module in (blocks_module, prefix_module):
        monkeypatch.setattr(module, "xxh3_128_digest", lambda data: bytes([digest(data)[0] % 8]))
    rng = random.Random(3)
    manager = BlockManager(12, 2)
    contents: dict[int, tuple[int, ...]] = {}
    live: list[tuple[list[int], BlockTable]] = []
    hits = collisions = 0
    for _ in range(3000):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        table = BlockTable(ROOT)
        cached = manager.reserve(table, tokens)
        if cached is None:
            manager.release(live.pop(rng.randrange(len(live)))[1])
            continue
        hits += cached > 0
        for position, block_id in enumerate(table.block_ids):
            prefix = tuple(tokens[: 2 * position + 2])
            if 2 * position < cached:
                assert contents[block_id] == prefix
            else:
                contents[block_id] = prefix
        manager.commit(table, tokens, len(tokens))
        collisions += not table.indexable
        assert all(contents[block_id] == tuple(tokens[: 2 * i + 2]) for i, block_id in enumerate(table.block_ids))
        live.append((tokens, table))
        manager.check_integrity(table for _, table in live)
    assert hits and collisions


def test_a_computed_copy_is_exchanged_for_the_indexed_block():
    manager = BlockManager(8, 4)
    tokens = list(range(9))
    tables = [BlockTable(ROOT), BlockTable(ROOT)]
    for table in tables:
        assert manager.reserve(table, tokens) == 0
    assert manager.num_free == 2
    for table in tables:
        manager.commit(table, tokens, 9)
    assert tables[0].block_ids[:2] == tables[1].block_ids[:2]
    assert manager.num_free == 4
    assert [event.hashes for event in manager.drain_events()] == [tuple(hash_blocks(ROOT, tokens, 4))]


def test_clear_unindexes_what_running_requests_hold_and_compute():
    manager = BlockManager(8, 4)
    tokens = list(range(13))
    running, gone = BlockTable(ROOT), BlockTable(ROOT)
    manager.reserve(gone, [50, 51, 52, 53, 54])
    manager.commit(gone, [50, 51, 52, 53, 54], 5)
    manager.release(gone)
    manager.reserve(running, tokens)
    manager.commit(running, tokens, 5)
    manager.drain_events()
    manager.clear([running])
    assert manager.snapshot().hashes == ()
    manager.commit(running, tokens, 13)
    assert manager.snapshot().hashes == ()
    assert [type(event) for event in manager.drain_events()] == [CacheCleared]
    manager.check_integrity([running])
    manager.release(running)
    assert manager.num_free == 8
    # Preempted and admitted again, the same request computes blocks that count.
    assert manager.reserve(running, tokens) == 0
    manager.commit(running, tokens, 13)
    assert list(manager.snapshot().hashes) == hash_blocks(ROOT, tokens, 4)


def test_roots_do_not_share_blocks():
    manager = BlockManager(8, 4)
    tokens = list(range(9))
    mine, other = BlockTable(ROOT), BlockTable(generation_root("weights", "", "tenant"))
    manager.reserve(mine, tokens)
    manager.commit(mine, tokens, 9)
    assert manager.reserve(other, tokens) == 0


def test_undrained_events_are_bounded_and_leave_a_gap(monkeypatch):
    monkeypatch.setattr(events, "MAX_PENDING_EVENTS", 3)
    manager = BlockManager(8, 1)
    for token in range(5):
        table = BlockTable(ROOT)
        manager.reserve(table, [token])
        manager.commit(table, [token], 1)
        manager.release(table)
    assert [event.seq for event in manager.drain_events()] == [3, 4, 5]


def test_epochs_are_unique():
    assert BlockManager(1, 1).epoch != BlockManager(1, 1).epoch


@pytest.mark.parametrize(
    "damage",
    [
        lambda manager, table: table.block_ids.append(table.block_ids[0]),
        lambda manager, table: manager._free.append(table.block_ids[0]),
        lambda manager, table: manager._free.append(manager._free[0]),
        lambda manager, table: manager._index.pop(table.hashes[0]),
        lambda manager, table: manager._index.update({b"other": table.block_ids[0]}),
        lambda manager, table: setattr(table, "num_indexed", 1),
        lambda manager, table: table.hashes.__setitem__(0, b"other"),
        lambda manager, table: manager._reusable.move_to_end(next(iter(manager._reusable))),
    ],
)
def test_check_integrity_sees_damage(damage):
    manager = BlockManager(12, 2)
    idle, table = BlockTable(ROOT), BlockTable(ROOT)
    manager.reserve(idle, [7, 7, 7, 7, 7])
    manager.commit(idle, [7, 7, 7, 7, 7], 5)
    manager.release(idle)
    manager.reserve(table, [1, 2, 3, 4, 5])
    manager.commit(table, [1, 2, 3, 4, 5], 5)
    manager.check_integrity([table])
    damage(manager, table)
    with pytest.raises(CacheCorrupted):
        manager.check_integrity([table])


def computed(manager: BlockManager, tokens: list[int]) -> BlockTable:
    table = BlockTable(ROOT)
    assert manager.reserve(table, tokens) is not None
    manager.commit(table, tokens, len(tokens))
    return table


def test_a_fork_shares_until_one_of_them_writes():
    manager = BlockManager(8, 4)
    tokens = list(range(10))
    first = computed(manager, tokens)
    forks = [BlockTable(ROOT, hashes=list(first.hashes)) for _ in range(2)]
    for table in forks:
        assert manager.fork(first, table, 10)
        assert table.block_ids == first.block_ids
    assert manager.num_free == 5
    # The fork writes the last token of the prompt again: a copy, in the third block only.
    assert manager.make_room(forks[0], 9, 10)
    assert forks[0].block_ids[:2] == first.block_ids[:2] and forks[0].block_ids[2] != first.block_ids[2]
    assert manager.take_copies() == [(first.block_ids[2], forks[0].block_ids[2])] and manager.take_copies() == []
    # Whoever writes first copies; the last one left writes in place.
    assert manager.make_room(first, 10, 11) and len(manager.take_copies()) == 1
    assert manager.make_room(forks[1], 9, 10) and manager.take_copies() == []
    manager.check_integrity([first, *forks])
    for table in (first, *forks):
        manager.release(table)
    assert manager.num_free == 8


def test_a_fork_at_the_end_of_a_block_leaves_the_indexed_block_alone():
    manager = BlockManager(8, 4)
    tokens = list(range(8))
    first, fork = computed(manager, tokens), BlockTable(ROOT)
    manager.extend_hashes(fork, tokens)
    assert manager.fork(first, fork, 8) and fork.num_indexed == 2
    assert manager.make_room(fork, 7, 8) and fork.num_indexed == 1
    assert fork.block_ids[1] != first.block_ids[1]
    manager.commit(fork, tokens, 8)
    assert fork.block_ids == first.block_ids, "the copy turned out to be the same: back to the indexed one"
    manager.check_integrity([first, fork])


def test_no_room_for_a_copy_changes_nothing():
    manager = BlockManager(3, 4)
    first, fork = computed(manager, list(range(10))), BlockTable(ROOT)
    assert manager.fork(first, fork, 10)
    before = list(fork.block_ids)
    assert not manager.make_room(fork, 9, 10)
    assert fork.block_ids == before and manager.take_copies() == []
    manager.release(fork)
    assert manager.make_room(first, 10, 11)


def test_a_copy_is_not_made_for_a_table_that_went():
    manager = BlockManager(4, 4)
    first, fork = computed(manager, list(range(10))), BlockTable(ROOT)
    manager.fork(first, fork, 10)
    manager.make_room(fork, 9, 10)
    manager.release(fork)
    assert manager.take_copies() == []


def test_a_window_gives_up_what_no_later_token_sees():
    manager = BlockManager(8, 4, window=6, max_chunk=8)
    tokens = list(range(30))
    table = BlockTable(ROOT)
    assert manager.reserve(table, tokens) == 0
    assert len(table.block_ids) == 2, "the first chunk's"
    for start in range(0, 24, 8):
        assert manager.make_room(table, start, start + 8)
        manager.commit(table, tokens, start + 8)
        # The token at start + 8 sees 6 positions, its own among them: from start + 3 on.
        assert table.num_trimmed == (start + 3) // 4
        assert table.block_ids[: table.num_trimmed] == [NO_BLOCK] * table.num_trimmed
        manager.check_integrity([table])
    assert manager.num_free == 8 - (6 - table.num_trimmed)
    # What was given up can be found again: only the blocks in sight are taken.
    again = BlockTable(ROOT)
    assert manager.reserve(again, tokens[:25]) == 24
    assert again.num_trimmed == 4 and again.block_ids[4:6] == table.block_ids[4:6]
    manager.check_integrity([table, again])
    # A fork needs what its last token sees.
    assert not manager.fork(table, BlockTable(ROOT), 12)
    for held in (table, again):
        manager.release(held)
    assert manager.num_free == 8 and manager.max_tokens is None
    assert BlockManager(3, 4, window=6, max_chunk=8).max_tokens == 12
