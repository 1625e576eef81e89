"""The training order: which row of which shard a sample is, as a pure function of the seed and the sample's number.

No list of samples and no buffer: a keyed permutation sends an index to an index. Sample p of a run is number i of epoch
e, with `e, i = divmod(p, samples)`. Without a window, it is row π(i) of all rows, π keyed by (seed, e). With one, each
epoch takes the shards in an order of its own, so many at a time, and π permutes the rows of a window, keyed by (seed,
e, window). What is kept are sums over shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_ROUNDS = 6


class SampleOrder:
    """Samples in training order.

    Args:
        samples: of each shard, how many rows training draws: the first so many.
        seed: the key.
        window: shards whose rows are mixed with one another; None mixes the rows of all.

    Raises:
        ValueError: there is no sample, or the window is below 1.
    """

    def __init__(self, samples: Sequence[int], seed: int, window: int | None = None) -> None:
        counts = np.asarray(samples, np.int64)
        if window is not None and window < 1:
            raise ValueError(f"shuffle_shards={window} must be at least 1; leave it out to mix all shards")
        if not counts.sum():
            raise ValueError("there are no samples to put in an order")
        self.size = int(counts.sum())
        self._seed = seed
        self._shards = np.flatnonzero(counts)
        self._counts = counts[self._shards]
        self._window = window
        self._epoch = lru_cache(maxsize=4)(self._lay_out)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the shard, and of the row in it, of each sample of the run: two int64 arrays of one shape."""
        epochs, places = np.divmod(samples, self.size)
        shards = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            shards[chosen], places[chosen] = self._epoch(epoch).locate(places[chosen])
        return shards, places

    def ahead(self, sample: int) -> tuple[list[int], int]:
        """The shards that a sample's window and the one after it draw from, and the sample with which that begins."""
        epoch, place = divmod(sample, self.size)
        here = self._epoch(epoch)
        window = here.window_of(place)
        last = window + 2 == len(here.bounds)
        after = self._epoch(epoch + 1).shards_of(0) if last else here.shards_of(window + 1)
        return list(dict.fromkeys([*here.shards_of(window), *after])), sample - place + int(here.bounds[window + 1])

    def _lay_out(self, epoch: int) -> _Epoch:
        shards, window = np.arange(len(self._shards)), self._window or len(self._shards)
        if self._window is not None:
            shards = permute(shards, len(shards), self._seed, epoch, 0, 1)
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        edges = np.append(np.arange(0, len(shards), window), len(shards))
        return _Epoch((self._seed, epoch), self._shards[shards], starts, edges, starts[edges])


@dataclass(frozen=True)
class _Epoch:
    """Shard order[k] holds the places starts[k] to starts[k + 1] of the epoch, before its windows are permuted."""

    key: tuple[int, int]
    order: np.ndarray
    starts: np.ndarray
    edges: np.ndarray
    """Window w is made of the shards order[edges[w]:edges[w + 1]] ..."""
    bounds: np.ndarray
    """... and of the places bounds[w] to bounds[w + 1]."""

    def window_of(self, place: int) -> int:
        return int(np.searchsorted(self.bounds, place, side="right")) - 1

    def shards_of(self, window: int) -> list[int]:
        return self.order[self.edges[window] : self.edges[window + 1]].tolist()

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows = np.searchsorted(self.bounds, places, side="right") - 1
        permuted = np.empty_like(places)
        for window in np.unique(windows).tolist():
            inside, begin = windows == window, self.bounds[window]
            permuted[inside] = begin + permute(
                places[inside] - begin, self.bounds[window + 1] - begin, *self.key, window
            )
        numbers = np.searchsorted(self.starts, permuted, side="right") - 1
        return self.order[numbers], permuted - self.starts[numbers]


def permute(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a pseudo-random bijection of 0..size-1, keyed by a few numbers, sends `indices` (int64).

    A Feistel network over the smallest even number of bits that holds `size` (Luby & Rackoff 1988), with cycle walking
    (Black & Rogaway 2002, §4): what falls outside is sent through again. At most four times the work on average, no
    memory.
    """
    half = max(1, (max(int(size) - 1, 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    out = indices.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> bits, out[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[todo] = (left << bits) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
