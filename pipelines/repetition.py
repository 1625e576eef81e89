"""How much of a document says again what it said before: duplicate lines, paragraphs and word n-grams.

After Rae et al. 2021 (Gopher), appendix A.1, "repetition removal". What the paper leaves open is decided so: what is
duplicate is each occurrence after the first; an n-gram that comes once is no repetition; characters are those of the
words, lines or paragraphs, not the white space between them, and none counts twice where occurrences overlap.

A word, a line and a paragraph are each a unit with a hash of 64 bits and a length, so a document of a million words is
two arrays, and an n-gram is one number. Time is that of sorting the hashes. An n-gram can only repeat where its first
n-1 words do, so few are left to sort once n is 4 or 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd: no word of an n-gram loses bits


@dataclass(frozen=True)
class Units:
    """Words, lines or paragraphs of a document, in order: `hashes` `[n]` uint64, `chars` `[n]` int64."""

    hashes: np.ndarray
    chars: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass(frozen=True)
class Repeats:
    """The n-grams of units that come more than once, and where: occurrences of one n-gram stand together.

    `positions` of occurrences (first unit); `starts` of each n-gram's in `positions`; `counts` of them.
    """

    n: int
    positions: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def later(self) -> np.ndarray:
        """Positions of the occurrences that are not their n-gram's first."""
        if not len(self.positions):
            return self.positions
        first = np.minimum.reduceat(self.positions, self.starts)
        return self.positions[self.positions != np.repeat(first, self.counts)]


def repeats(units: Units, sizes: Sequence[int]) -> Iterator[Repeats]:
    """What repeats among the n-grams of units, for each n of the ascending `sizes`; computed as it is asked for."""
    positions = np.arange(len(units))
    grams = units.hashes.copy()
    n = 1
    for size in sizes:
        while n < size:
            inside = positions + n < len(units)
            positions, grams = positions[inside], grams[inside]
            grams += units.hashes[positions + n] * np.uint64(pow(_MULTIPLIER, n, 1 << 64))
            n += 1
        order = np.argsort(grams)
        grams = grams[order]
        positions = positions[order]
        ends = np.concatenate((np.flatnonzero(grams[1:] != grams[:-1]) + 1, (len(grams),)))
        counts = ends.copy()
        counts[1:] -= ends[:-1]
        repeated = counts > 1
        stays = np.repeat(repeated, counts)
        grams, positions, counts = grams[stays], positions[stays], counts[repeated]
        yield Repeats(n, positions, np.cumsum(counts) - counts, counts)


def duplicate_ratios(units: Units) -> tuple[float, float]:
    """Units that were there before: their share of the units, and of the characters."""
    if not len(units):
        return 0.0, 0.0
    later = next(repeats(units, (1,))).later()
    return len(later) / len(units), _share(int(units.chars[later].sum()), units)


def top_ngram_ratio(units: Units, found: Repeats) -> float:
    """Share of the characters in the most frequent n-gram; of equally frequent ones, in that which covers most."""
    if not len(found.counts):
        return 0.0
    top = np.flatnonzero(found.counts == found.counts.max())
    count = int(found.counts[top[0]])
    positions = np.sort(found.positions[found.starts[top][:, None] + np.arange(count)], axis=1)
    ends = positions + found.n
    begins = positions.copy()  # where an occurrence begins to be new
    begins[:, 1:] = np.maximum(positions[:, 1:], ends[:, :-1])
    before = np.concatenate(([0], np.cumsum(units.chars)))
    return _share(int((before[ends] - before[begins]).sum(axis=1).max()), units)


def duplicate_ngram_ratio(units: Units, found: Repeats) -> float:
    """Share of the characters in n-grams that were there before."""
    later = found.later()
    if not len(later):
        return 0.0
    depth = np.bincount(later, minlength=len(units)) - np.bincount(later + found.n, minlength=len(units))[: len(units)]
    return _share(int(units.chars[np.cumsum(depth) > 0].sum()), units)


def _share(chars: int, units: Units) -> float:
    total = int(units.chars.sum())
    return chars / total if total else 0.0


def to_units(pairs: Iterable[tuple[int, int]]) -> Units:
    """Units from pairs of hash and length."""
    table = np.fromiter(pairs, np.dtype([("hash", np.uint64), ("chars", np.int64)]))
    return Units(np.ascontiguousarray(table["hash"]), np.ascontiguousarray(table["chars"]))
