"""The paged key/value cache's bookkeeping: reference counts, prefix reuse, copy on write, eviction, windows.

A block holds the keys and values of `block_size` consecutive tokens. A full, computed block is indexed under the hash
of everything from the start of its sequence to its own end (llama/engine/prefix.py), so equal prefixes share blocks.
Pure Python: no tensors, no clock, no locks (the engine's lock guards it).

Every block is in exactly one place:

    free         no references, not indexed        taken first when a block is needed
    reusable     no references, indexed            evicted when `free` is empty, least recently used first
    referenced   in the block table of ≥ 1 request

Three rules keep what is cached trustworthy:
- a child is indexed only under an indexed parent, and a parent outlives its children in the index: tables release
  their blocks last to first, and a request that computed a copy of an indexed block switches to that block;
- a match compares the tokens too, block after block from the root. A hash collision costs a miss, never a wrong hit;
- nobody writes to a block that another table holds or that is indexed: `make_room` replaces it by a copy first.

With a `window`, where no layer sees further back, a table gives its oldest blocks up while its request still runs. So
there a parent may go before its child, which is unreachable until the parent is computed again, and no less true.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from xxhash import xxh3_128_digest

from llama.engine.events import BlockEvent, CacheSnapshot, EventLog
from llama.engine.prefix import hash_blocks, pack_tokens, reusable_blocks

NO_BLOCK = -1
"""Stands in a table for a block that no token of its request will read again."""


class CacheCorrupted(RuntimeError):
    """The cache's bookkeeping contradicts itself: a defect of the engine."""


@dataclass
class BlockTable:
    """The blocks of one request, in order of position. Only `BlockManager` changes it."""

    root: bytes
    block_ids: list[int] = field(default_factory=list)
    """`NO_BLOCK` for those before the window."""
    hashes: list[bytes] = field(default_factory=list)
    """Chain over the full blocks of the request's tokens seen so far; survives a release."""
    num_trimmed: int = 0
    """Leading blocks that are `NO_BLOCK`."""
    num_indexed: int = 0
    """Leading blocks of `block_ids` that are in the index, or were when they were given up."""
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
    """Hands out the blocks of a cache of `num_blocks` blocks of `block_size` tokens.

    Args:
        window: how many tokens back, itself included, a token sees at most; None when a layer sees everything.
        max_chunk: tokens of one request that a step computes at most; counts only with a window.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, window: int | None = None, max_chunk: int | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self.max_chunk = max_chunk if max_chunk is not None else num_blocks * block_size
        self._log = EventLog()
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        self._copies: dict[int, int] = {}
        """Source by destination of the copies still to be made."""
        self.num_copies = 0

    @property
    def epoch(self) -> str:
        return self._log.epoch

    @property
    def event_seq(self) -> int:
        """Sequence number of the last event."""
        return self._log.seq

    @property
    def num_free(self) -> int:
        """Blocks that a request could be given now, evicting reusable ones."""
        return len(self._free) + len(self._reusable)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def peak_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` tokens in all holds at most at a time."""
        if self.window is None:
            return self.blocks_for(num_tokens)
        return min(self.blocks_for(num_tokens), self.blocks_for(self.window + self.max_chunk) + 1)

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest request that the cache can hold by itself; None when there is no limit."""
        if self.window is not None and self.blocks_for(self.window + self.max_chunk) < self.num_blocks:
            return None
        return self.num_blocks * self.block_size

    def extend_hashes(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Brings `table.hashes` up to the full blocks of `token_ids`."""
        done = len(table.hashes)
        if len(token_ids) >= (done + 1) * self.block_size:
            parent = table.hashes[-1] if done else table.root
            table.hashes += hash_blocks(parent, token_ids[done * self.block_size :], self.block_size)

    def match(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        """The cached blocks that `token_ids` begin with; their last token is never among them."""
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

    def num_cached(self, hashes: Iterable[bytes]) -> int:
        """How many of the leading blocks of a chain are indexed. By hash only, so a collision counts as a block."""
        return sum(1 for _ in takewhile(self._index.__contains__, hashes))

    def reserve(
        self,
        table: BlockTable,
        token_ids: Sequence[int],
        *,
        matched: Sequence[int] | None = None,
        headroom: int = 0,
    ) -> int | None:
        """Gives an empty table the blocks for all of `token_ids`, or with a window those for the first chunk.

        Args:
            matched: what `match` says now, or less; None asks it.
            headroom: free blocks that must remain afterwards.

        Returns:
            The number of tokens whose keys and values are there already, or None (and nothing changes) when there
            are not enough free blocks.
        """
        if matched is None:
            matched = self.match(table, token_ids)
        if not self.fits(len(token_ids), matched, headroom=headroom):
            return None
        start = len(matched) * self.block_size
        first = self._first_visible(start)
        held = matched[first:]
        for block_id in held:
            self._reference(block_id)
        table.block_ids = [NO_BLOCK] * first + [*held, *self._take(self._taken(len(token_ids), len(matched)))]
        table.num_trimmed = first
        table.num_indexed = len(matched)
        # A table whose prefix is unindexed starts anew: what it computes from here has an indexed parent.
        table.indexable = True
        return start

    def fits(
        self, num_tokens: int, matched: Sequence[int], *, headroom: int = 0, without: Iterable[BlockTable] = ()
    ) -> bool:
        """Whether `reserve` finds enough free blocks for a request that begins with the cached blocks `matched`.

        Args:
            without: as if these tables were released before.
        """
        first = self._first_visible(len(matched) * self.block_size)
        held = matched[first:]
        needed = self.peak_blocks(num_tokens - first * self.block_size) - len(held)
        released = Counter(block_id for table in without for block_id in table.block_ids[table.num_trimmed :])
        freed = {block_id for block_id, count in released.items() if count == self._blocks[block_id].references}
        # Nobody's until it is held: no longer free then.
        idle_held = sum(self._blocks[block_id].references == 0 or block_id in freed for block_id in held)
        free = self.num_free + len(freed) - idle_held
        return max(self._taken(num_tokens, len(matched)), needed) + headroom <= free

    def _taken(self, num_tokens: int, num_matched: int) -> int:
        """Blocks that `reserve` takes at once."""
        taken = self.blocks_for(num_tokens) - num_matched
        return taken if self.window is None else min(taken, self.blocks_for(self.max_chunk))

    def fork(self, source: BlockTable, table: BlockTable, num_tokens: int) -> bool:
        """Gives an empty table the blocks of the first `num_tokens` tokens of `source`, which has computed them.

        Returns:
            False, and no change, when `source` has given up some that the last of these tokens sees.
        """
        first = self._first_visible(num_tokens - 1)
        shared = source.block_ids[first : self.blocks_for(num_tokens)]
        if NO_BLOCK in shared:
            return False
        for block_id in shared:
            self._reference(block_id)
        table.block_ids = [NO_BLOCK] * first + shared
        table.num_trimmed = first
        table.num_indexed = min(source.num_indexed, num_tokens // self.block_size)
        table.indexable = source.indexable
        return True

    def make_room(self, table: BlockTable, start: int, end: int) -> bool:
        """Makes the places of tokens `[start, end)` the table's own: adds blocks, and replaces a shared one by a copy.

        Returns:
            False, and no change, when too few blocks are free.
        """
        missing = max(0, self.blocks_for(end) - len(table.block_ids))
        position = start // self.block_size
        # Of a table's blocks only the last can hold tokens and be written to again.
        shared = position < len(table.block_ids) and self._shared(table.block_ids[position])
        if missing + shared > self.num_free:
            return False
        if shared:
            source = table.block_ids[position]
            (copy,) = self._take(1)
            self._copies[copy] = source
            self.num_copies += 1
            table.block_ids[position] = copy
            table.num_indexed = min(table.num_indexed, position)
            self._dereference(source)
        if missing:
            table.block_ids += self._take(missing)
        return True

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, destination) of the blocks to copy before anything else is written to the cache; once."""
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """The first `num_computed` tokens are in the cache: indexes their full blocks, gives up those out of sight."""
        self._index_full(table, token_ids, num_computed)
        while table.num_trimmed < self._first_visible(num_computed):
            self._dereference(table.block_ids[table.num_trimmed])
            table.block_ids[table.num_trimmed] = NO_BLOCK
            table.num_trimmed += 1

    def _index_full(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
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
            self._log.stored(stored)

    def release(self, table: BlockTable) -> None:
        """Takes the table's blocks back; the indexed ones stay reusable."""
        # Last to first: the LRU order then evicts a child before its parent.
        for block_id in reversed(table.block_ids[table.num_trimmed :]):
            self._dereference(block_id)
        table.block_ids = []
        table.num_indexed = table.num_trimmed = 0

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
        self._log.cleared()

    def drain_events(self) -> list[BlockEvent]:
        """The events since the last call, in order of `seq`."""
        return self._log.drain()

    def snapshot(self) -> CacheSnapshot:
        """The index as of `event_seq`, events not yet drained included."""
        return CacheSnapshot(self.epoch, self.event_seq, tuple(self._index))

    def _tokens(self, token_ids: Sequence[int], position: int) -> bytes:
        return pack_tokens(token_ids[position * self.block_size : (position + 1) * self.block_size])

    def _is(self, block_id: int, parent: bytes, tokens: bytes) -> bool:
        block = self._blocks[block_id]
        return block.parent == parent and block.tokens == tokens

    def _first_visible(self, position: int) -> int:
        """The first block of which the token at `position` sees something."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def _shared(self, block_id: int) -> bool:
        block = self._blocks[block_id]
        return block.references > 1 or block.hash is not None

    def _reference(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.references == 0:
            del self._reusable[block_id]
        block.references += 1

    def _dereference(self, block_id: int) -> None:
        block = self._blocks[block_id]
        block.references -= 1
        if block.references == 0:
            self._copies.pop(block_id, None)
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
            self._log.removed(removed)
        return taken

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Verifies the module's invariants against `tables`, all that hold blocks.

        Raises:
            CacheCorrupted: names the first contradiction.
        """
        tables = list(tables)
        references = Counter(block_id for table in tables for block_id in table.block_ids[table.num_trimmed :])
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
        if any(block_id not in references for block_id in self._copies):
            raise CacheCorrupted("a block that nobody holds is to be copied to")
        if len(self._index) != sum(block.hash is not None for block in self._blocks):
            raise CacheCorrupted("the index names a block that does not carry its hash")
        self._check_tree()
        for table in tables:
            if any(block_id != NO_BLOCK for block_id in table.block_ids[: table.num_trimmed]):
                raise CacheCorrupted("a table holds blocks that it gave up")
            for position, block_id in enumerate(table.block_ids):
                if position < table.num_trimmed:
                    continue
                expected = table.hashes[position] if position < table.num_indexed else None
                if self._blocks[block_id].hash != expected:
                    raise CacheCorrupted(f"block {block_id} at position {position} is not indexed as its table says")

    def _check_tree(self) -> None:
        age = {block_id: order for order, block_id in enumerate(self._reusable)}
        for block_hash, block_id in self._index.items():
            block = self._blocks[block_id]
            if xxh3_128_digest(block.parent + block.tokens) != block_hash:
                raise CacheCorrupted(f"block {block_id} does not hash to its index key")
            if block.position == 0 or self.window is not None:
                continue
            parent_id = self._index.get(block.parent)
            if parent_id is None:
                raise CacheCorrupted(f"block {block_id} is indexed and its parent is not")
            parent = self._blocks[parent_id]
            if parent.references < block.references:
                raise CacheCorrupted(f"block {block_id} is referenced more often than its parent {parent_id}")
            if parent.references == 0 and age[parent_id] < age[block_id]:
                raise CacheCorrupted(f"block {parent_id} would be evicted before its child {block_id}")
