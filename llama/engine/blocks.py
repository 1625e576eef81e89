"""The paged key/value cache's bookkeeping: block hashes, reference counts, prefix reuse, eviction, events.

A block holds the keys and values of `block_size` consecutive tokens. A full, computed block is indexed under the hash
of everything from the start of its sequence to its own end, so equal prefixes share blocks. Pure Python: no tensors,
no clock, no locks (the engine's lock guards it).

Every block is in exactly one place:

    free         no references, not indexed        taken first when a block is needed
    reusable     no references, indexed            evicted when `free` is empty, least recently used first
    referenced   in the block table of ≥ 1 request

Two rules keep the index a tree that can be trusted:
- a child is indexed only under an indexed parent, and a parent outlives its children in the index: tables release
  their blocks last to first, and a request that computed a copy of an indexed block switches to that block;
- a match compares the tokens too, block after block from the root. A hash collision costs a miss, never a wrong hit.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from xxhash import xxh3_128_digest

MAX_PENDING_EVENTS = 8192
"""Events kept for a consumer that does not drain them. Beyond it the oldest go; the gap in `seq` shows it."""


def generation_root(weights_id: str, adapter: str = "", salt: str = "") -> bytes:
    """The 16-byte root of every hash chain of one model generation: blocks of different roots never match.

    Args:
        weights_id: names the weights; it changes with every swap.
        adapter: names the adapter applied to them.
        salt: separates tenants.
    """
    # Length prefixes, or ("ab", "c") and ("a", "bc") would share a root.
    fields = (text.encode() for text in (weights_id, adapter, salt))
    return xxh3_128_digest(b"".join(struct.pack("<Q", len(data)) + data for data in fields))


def _pack(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def hash_blocks(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of `token_ids`, each over its parent's hash and its own tokens.

    Args:
        root: `generation_root`, or the hash of the block before `token_ids` to continue a chain.
        token_ids: tokens, each in [0, 2³²).
        block_size: tokens a block.

    Returns:
        `len(token_ids) // block_size` hashes of 16 bytes; the unfinished block at the end has none.
    """
    packed = _pack(token_ids[: len(token_ids) // block_size * block_size])
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(packed), 4 * block_size):
        parent = xxh3_128_digest(parent + packed[start : start + 4 * block_size])
        hashes.append(parent)
    return hashes


def reusable_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks of a prompt of `num_tokens` may come from the cache.

    The last token is always computed, because its logits are needed.
    """
    return max(0, num_tokens - 1) // block_size


@dataclass(frozen=True)
class BlocksStored:
    """These blocks can be reused from now on; parents come before their children."""

    seq: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class BlocksRemoved:
    """These blocks were evicted; children come before their parents."""

    seq: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class CacheCleared:
    """No block can be reused any more."""

    seq: int


BlockEvent = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(frozen=True)
class CacheSnapshot:
    """All reusable blocks at one moment; the next event has `seq + 1`.

    `epoch` is unique to one cache instance: sequence numbers of different epochs are not comparable.
    """

    epoch: str
    seq: int
    hashes: tuple[bytes, ...]


class CacheCorrupted(RuntimeError):
    """The cache's bookkeeping contradicts itself: a defect of the engine."""


@dataclass
class BlockTable:
    """The blocks of one request, in order of position. Only `BlockManager` changes it."""

    root: bytes
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Chain over the full blocks of the request's tokens seen so far; survives a release."""
    num_indexed: int = 0
    """Leading blocks of `block_ids` that are in the index."""
    indexable: bool = True
    """False once a block could not be indexed: its children then cannot be either."""


@dataclass
class _Block:
    references: int = 0
    hash: bytes | None = None
    """None when the block is not indexed; then the rest is void."""
    parent: bytes = b""
    tokens: bytes = b""
    """Its token ids, packed."""
    position: int = 0
    """Index of the block in its sequence."""


class BlockManager:
    """Hands out the blocks of a cache of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.epoch = uuid4().hex
        self.event_seq = 0
        self._events: deque[BlockEvent] = deque(maxlen=MAX_PENDING_EVENTS)
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that a request could be given now, evicting reusable ones."""
        return len(self._free) + len(self._reusable)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def extend_hashes(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Brings `table.hashes` up to the full blocks of `token_ids`."""
        done = len(table.hashes)
        if len(token_ids) >= (done + 1) * self.block_size:
            parent = table.hashes[-1] if done else table.root
            table.hashes += hash_blocks(parent, token_ids[done * self.block_size :], self.block_size)

    def reserve(self, table: BlockTable, token_ids: Sequence[int], *, headroom: int = 0) -> int | None:
        """Gives an empty table the blocks for all of `token_ids`, cached ones where the prefix matches.

        Args:
            headroom: free blocks that must remain afterwards.

        Returns:
            The number of tokens whose keys and values are there already, or None (and nothing changes) when there
            are not enough free blocks.
        """
        matched = self._match(table, token_ids)
        missing = self.blocks_for(len(token_ids)) - len(matched)
        idle_matched = sum(1 for block_id in matched if self._blocks[block_id].references == 0)
        if missing > self.num_free - idle_matched - headroom:
            return None
        for block_id in matched:
            self._reference(block_id)
        table.block_ids = matched + self._take(missing)
        table.num_indexed = len(matched)
        # A table whose prefix is unindexed starts anew: what it computes from here has an indexed parent.
        table.indexable = True
        return len(matched) * self.block_size

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Adds blocks until the table holds `num_tokens` tokens; False, and no change, when too few are free."""
        missing = self.blocks_for(num_tokens) - len(table.block_ids)
        if missing > self.num_free:
            return False
        if missing > 0:
            table.block_ids += self._take(missing)
        return True

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Indexes the table's full blocks among the first `num_computed` tokens, which are in the cache now."""
        full = num_computed // self.block_size
        if not table.indexable or full <= table.num_indexed:
            return
        self.extend_hashes(table, token_ids[: full * self.block_size])
        stored: list[bytes] = []
        for position in range(table.num_indexed, full):
            block_hash = table.hashes[position]
            tokens = self._tokens(token_ids, position)
            parent = table.hashes[position - 1] if position else table.root
            block_id = table.block_ids[position]
            twin_id = self._index.get(block_hash)
            if twin_id is None:
                self._blocks[block_id] = _Block(self._blocks[block_id].references, block_hash, parent, tokens, position)
                self._index[block_hash] = block_id
                stored.append(block_hash)
            elif self._is(twin_id, parent, tokens):
                self._reference(twin_id)
                table.block_ids[position] = twin_id
                self._dereference(block_id)
            else:
                table.indexable = False
                break
            table.num_indexed += 1
        if stored:
            self.event_seq += 1
            self._events.append(BlocksStored(self.event_seq, tuple(stored)))

    def release(self, table: BlockTable) -> None:
        """Takes the table's blocks back; the indexed ones stay reusable."""
        # Last to first: the LRU order then evicts a child before its parent.
        for block_id in reversed(table.block_ids):
            self._dereference(block_id)
        table.block_ids = []
        table.num_indexed = 0

    def clear(self, tables: Iterable[BlockTable]) -> None:
        """Empties the index. `tables`, all that hold blocks, keep them, but what they compute is not indexed."""
        for table in tables:
            table.num_indexed = 0
            table.indexable = False
        for block_id in self._index.values():
            self._blocks[block_id] = _Block(self._blocks[block_id].references)
        self._index.clear()
        self._free.extend(self._reusable)
        self._reusable.clear()
        self.event_seq += 1
        self._events.append(CacheCleared(self.event_seq))

    def drain_events(self) -> list[BlockEvent]:
        """The events since the last call, in order of `seq`."""
        events = list(self._events)
        self._events.clear()
        return events

    def snapshot(self) -> CacheSnapshot:
        """The index as of `event_seq`, events not yet drained included."""
        return CacheSnapshot(self.epoch, self.event_seq, tuple(self._index))

    def _tokens(self, token_ids: Sequence[int], position: int) -> bytes:
        return _pack(token_ids[position * self.block_size : (position + 1) * self.block_size])

    def _is(self, block_id: int, parent: bytes, tokens: bytes) -> bool:
        block = self._blocks[block_id]
        return block.parent == parent and block.tokens == tokens

    def _match(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        self.extend_hashes(table, token_ids)
        matched: list[int] = []
        parent = table.root
        for position in range(reusable_blocks(len(token_ids), self.block_size)):
            block_id = self._index.get(table.hashes[position])
            if block_id is None or not self._is(block_id, parent, self._tokens(token_ids, position)):
                break
            matched.append(block_id)
            parent = table.hashes[position]
        return matched

    def _reference(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.references == 0:
            del self._reusable[block_id]
        block.references += 1

    def _dereference(self, block_id: int) -> None:
        block = self._blocks[block_id]
        block.references -= 1
        if block.references == 0:
            if block.hash is None:
                self._free.append(block_id)
            else:
                self._reusable[block_id] = None

    def _take(self, count: int) -> list[int]:
        """`count` unindexed blocks with one reference each; the caller has checked `num_free`."""
        removed: list[bytes] = []
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, _ = self._reusable.popitem(last=False)
                block_hash = self._blocks[block_id].hash
                assert block_hash is not None
                del self._index[block_hash]
                removed.append(block_hash)
            self._blocks[block_id] = _Block(references=1)
            taken.append(block_id)
        if removed:
            self.event_seq += 1
            self._events.append(BlocksRemoved(self.event_seq, tuple(removed)))
        return taken

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Verifies the module's invariants against `tables`, all that hold blocks.

        Raises:
            CacheCorrupted: names the first contradiction.
        """
        tables = list(tables)
        references = Counter(block_id for table in tables for block_id in table.block_ids)
        free, reusable = set(self._free), set(self._reusable)
        if len(free) != len(self._free) or free & reusable:
            raise CacheCorrupted("a block is free twice")
        for block_id, block in enumerate(self._blocks):
            if block.references != references[block_id]:
                raise CacheCorrupted(
                    f"block {block_id} counts {block.references} references, {references[block_id]} exist"
                )
            if (block.references == 0) != (block_id in free or block_id in reusable):
                raise CacheCorrupted(f"block {block_id} with {block.references} references is in the wrong list")
            if block.references == 0 and (block.hash is not None) != (block_id in reusable):
                raise CacheCorrupted(f"block {block_id} without references is free and indexed, or neither")
            if block.hash is not None and self._index.get(block.hash) != block_id:
                raise CacheCorrupted(f"block {block_id} is not in the index under its hash")
        if len(self._index) != sum(block.hash is not None for block in self._blocks):
            raise CacheCorrupted("the index names a block that does not carry its hash")
        self._check_tree()
        for table in tables:
            for position, block_id in enumerate(table.block_ids):
                expected = table.hashes[position] if position < table.num_indexed else None
                if self._blocks[block_id].hash != expected:
                    raise CacheCorrupted(f"block {block_id} at position {position} is not indexed as its table says")

    def _check_tree(self) -> None:
        age = {block_id: order for order, block_id in enumerate(self._reusable)}
        for block_hash, block_id in self._index.items():
            block = self._blocks[block_id]
            if xxh3_128_digest(block.parent + block.tokens) != block_hash:
                raise CacheCorrupted(f"block {block_id} does not hash to its index key")
            if block.position == 0:
                continue
            parent_id = self._index.get(block.parent)
            if parent_id is None:
                raise CacheCorrupted(f"block {block_id} is indexed and its parent is not")
            parent = self._blocks[parent_id]
            if parent.references < block.references:
                raise CacheCorrupted(f"block {block_id} is referenced more often than its parent {parent_id}")
            if parent.references == 0 and age[parent_id] < age[block_id]:
                raise CacheCorrupted(f"block {parent_id} would be evicted before its child {block_id}")
