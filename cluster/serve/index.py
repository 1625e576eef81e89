"""Which replica holds which KV-cache blocks: the router's exact copy of every replica's prefix cache.

A replica's engine numbers its cache events 1, 2, 3, ...; a snapshot says "these hashes, up to event N". The
index applies events strictly in order. An event that does not follow the last one means a batch was lost: the
copy can no longer be trusted, so the replica matches nothing until a new snapshot arrives.

    _holders:  block hash -> bitmask of replicas      one dictionary look-up per block answers for all replicas
    _copies:   replica    -> epoch, seq, its hashes   so that clearing one replica costs its own size only

Costs: apply O(blocks in the event), match O(matched depth + replicas), drop and load O(blocks of the replica).
Not thread-safe; the owner locks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llama.engine import BlockEvent, BlocksRemoved, BlocksStored, CacheSnapshot


@dataclass
class _Copy:
    bit: int
    epoch: str = ""
    seq: int = 0
    fresh: bool = False
    capacity: float = math.inf
    hashes: set[bytes] = field(default_factory=set)


class BlockIndex:
    """Block hashes of every replica, fed by snapshots and sequenced events."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._copies: dict[str, _Copy] = {}
        self._free_bits: list[int] = []

    @property
    def replicas(self) -> list[str]:
        """Every replica the index has a copy for, stale ones included."""
        return list(self._copies)

    @property
    def num_hashes(self) -> int:
        """Distinct block hashes held by at least one replica."""
        return len(self._holders)

    def num_blocks(self, replica: str) -> int:
        """Blocks known to be cached by one replica; 0 for an unknown or stale one."""
        copy = self._copies.get(replica)
        return len(copy.hashes) if copy else 0

    def is_fresh(self, replica: str) -> bool:
        """Whether the replica's copy is complete up to its last event (no gap since the last snapshot)."""
        copy = self._copies.get(replica)
        return copy is not None and copy.fresh

    def position(self, replica: str) -> tuple[str, int] | None:
        """(epoch, sequence number of the last event applied), or None when the copy is missing or stale."""
        copy = self._copies.get(replica)
        return (copy.epoch, copy.seq) if copy is not None and copy.fresh else None

    def holds(self, replica: str, block_hash: bytes) -> bool:
        """Whether a replica is known to have a block."""
        copy = self._copies.get(replica)
        return copy is not None and block_hash in copy.hashes

    def difference(self, replica: str, snapshot: CacheSnapshot) -> tuple[int, int] | None:
        """How many of the snapshot's hashes the replica's copy lacks, and how many it has beyond them; None when they
        are not of the same moment."""
        copy = self._copies.get(replica)
        if copy is None or not copy.fresh or (copy.epoch, copy.seq) != (snapshot.epoch, snapshot.seq):
            return None
        true = set(snapshot.hashes)
        return len(true - copy.hashes), len(copy.hashes - true)

    def load_snapshot(self, replica: str, snapshot: CacheSnapshot, *, capacity: float = math.inf) -> None:
        """Replaces whatever was known about a replica of `capacity` blocks; events after `snapshot.seq` follow on."""
        copy = self._copies.get(replica)
        if copy is None:
            bit = self._free_bits.pop() if self._free_bits else len(self._copies)
            copy = self._copies[replica] = _Copy(bit)
        # Only the difference is touched: most snapshots confirm what is known.
        hashes = set(snapshot.hashes)
        self._remove(copy, copy.hashes - hashes)
        self._store(copy, hashes - copy.hashes)
        copy.epoch, copy.seq, copy.fresh, copy.capacity = snapshot.epoch, snapshot.seq, True, capacity

    def apply(self, replica: str, event: BlockEvent, *, epoch: str) -> bool:
        """Applies one event; returns whether the replica's copy is fresh afterwards.

        An event at or before the last one applied is a repeat and changes nothing. A gap, another cache's epoch, or
        more blocks than there are makes the copy stale: it is emptied and stays so until `load_snapshot`.
        """
        copy = self._copies.get(replica)
        if copy is None or not copy.fresh:
            return False
        if epoch != copy.epoch or event.seq > copy.seq + 1:
            self._mark_stale(copy)
            return False
        if event.seq <= copy.seq:
            return True
        if isinstance(event, BlocksStored):
            self._store(copy, event.hashes)
        elif isinstance(event, BlocksRemoved):
            self._remove(copy, event.hashes)
        else:
            self._forget_blocks(copy)
        copy.seq = event.seq
        if len(copy.hashes) > copy.capacity:
            self._mark_stale(copy)
        return copy.fresh

    def reach(self, replica: str, seq: int, *, epoch: str) -> None:
        """All events up to `seq` have been told: where some did not come, the copy is stale."""
        copy = self._copies.get(replica)
        if copy is not None and copy.fresh and copy.epoch == epoch and copy.seq < seq:
            self._mark_stale(copy)

    def mark_stale(self, replica: str) -> None:
        """Stops trusting a replica's copy until its next snapshot (its event stream broke)."""
        copy = self._copies.get(replica)
        if copy is not None:
            self._mark_stale(copy)

    def drop(self, replica: str) -> None:
        """Forgets a replica that has left."""
        copy = self._copies.pop(replica, None)
        if copy is not None:
            self._forget_blocks(copy)
            self._free_bits.append(copy.bit)

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """For every replica, how many leading blocks of the chain `hashes` it holds (0 when stale)."""
        depths = dict.fromkeys(self._copies, 0)
        by_bit = {copy.bit: replica for replica, copy in self._copies.items() if copy.hashes}
        alive = sum(1 << bit for bit in by_bit)
        for depth, block_hash in enumerate(hashes):
            holding = alive & self._holders.get(block_hash, 0)
            for bit in _bits(alive & ~holding):
                depths[by_bit[bit]] = depth
            alive = holding
            if not alive:
                return depths
        for bit in _bits(alive):
            depths[by_bit[bit]] = len(hashes)
        return depths

    def check_integrity(self) -> None:
        """Raises RuntimeError when the two directions of the index disagree (a bug, never an input)."""
        expected: dict[bytes, int] = {}
        for copy in self._copies.values():
            for block_hash in copy.hashes:
                expected[block_hash] = expected.get(block_hash, 0) | 1 << copy.bit
        if expected != self._holders:
            raise RuntimeError("block index: the holders of a hash differ from the replicas' own sets")

    def _store(self, copy: _Copy, hashes: Iterable[bytes]) -> None:
        mask = 1 << copy.bit
        for block_hash in hashes:
            copy.hashes.add(block_hash)
            self._holders[block_hash] = self._holders.get(block_hash, 0) | mask

    def _remove(self, copy: _Copy, hashes: Iterable[bytes]) -> None:
        mask = 1 << copy.bit
        for block_hash in hashes:
            if block_hash not in copy.hashes:
                continue
            copy.hashes.discard(block_hash)
            holders = self._holders[block_hash] & ~mask
            if holders:
                self._holders[block_hash] = holders
            else:
                del self._holders[block_hash]

    def _forget_blocks(self, copy: _Copy) -> None:
        self._remove(copy, tuple(copy.hashes))

    def _mark_stale(self, copy: _Copy) -> None:
        self._forget_blocks(copy)
        copy.fresh = False


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
