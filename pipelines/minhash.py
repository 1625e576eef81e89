"""MinHash-LSH: which documents may be near-duplicates, without comparing all with all.

A signature is the least hash of a document's n-grams under each of several permutations; two documents agree in a
place of it with a probability that is their Jaccard similarity (Broder 1997). Its places are cut into bands, and
documents that agree in all of a band are candidates: with b bands of r places, pairs of similarity s are with
probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.ngrams import distinct, fold

RECALL = 0.95
"""Probability with which a pair exactly at the threshold is to become a candidate."""
FIRST_OF_BUCKET = 32
"""A document is compared with so many of the earlier ones in its bucket; so the work is linear in the documents."""

_SEED = 1
_SCHEME = "affine32"
_BATCH = 512  # n-grams at once: the matrix of their permutations stays in the cache, and in bounds


@dataclass(frozen=True)
class Bands:
    count: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Probability that a pair of this similarity becomes a candidate."""
        return 1 - (1 - similarity**self.rows) ** self.count


def choose_bands(threshold: float, num_perm: int) -> Bands:
    """The bands with most rows, hence fewest candidates, that reach RECALL at the threshold; one row where none does.

    datasketch's own optimum weighs false candidates against missed ones and misses a third of the pairs that are 0.05
    above a threshold of 0.8. Here candidates are verified, so a false one only costs time.
    """
    choices = (Bands(num_perm // rows, rows) for rows in range(num_perm, 1, -1))
    return next((bands for bands in choices if bands.recall(threshold) >= RECALL), Bands(num_perm, 1))


class Signer:
    """Makes signatures with a fixed set of permutations."""

    def __init__(self, bands: Bands) -> None:
        from datasketch import MinHash  # it takes SciPy with it

        self._minhash = MinHash(bands.count * bands.rows, seed=_SEED, hashfunc=int, scheme=_SCHEME)

    def __call__(self, ngrams: np.ndarray) -> np.ndarray:
        """Signature of hashed n-grams (uint64, at least one): uint32 [bands * rows]."""
        self._minhash.clear()
        for begin in range(0, len(ngrams), _BATCH):
            self._minhash.update_batch(ngrams[begin : begin + _BATCH].astype(np.uint32).tolist())
        return self._minhash.digest()


def band_hashes(signatures: np.ndarray, bands: Bands) -> Iterator[np.ndarray]:
    """Of signatures [documents, bands * rows] the hash of each band in turn: uint64 [documents]."""
    columns = signatures.T.astype(np.uint64)
    for begin in range(0, bands.count * bands.rows, bands.rows):
        yield fold(list(columns[begin : begin + bands.rows]))


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents, `first` before `second`, each pair once, ascending.

    `not_compared` counts the pairs in a bucket that are left out because it is crowded, once for each band in which
    they meet, even if another band has them as candidates.
    """

    first: np.ndarray
    second: np.ndarray
    not_compared: int


def find_candidates(bands: Iterable[np.ndarray], sizes: np.ndarray, threshold: float) -> Candidates:
    """Pairs of documents that agree in a band, of which `bands` gives the hashes: uint64 [documents] each.

    `sizes` are the documents' numbers of distinct n-grams: where one is less than the threshold of the other, the
    similarity cannot reach it, and the pair is no candidate.
    """
    documents = np.uint64(max(1, len(sizes)))
    found = np.empty(0, np.uint64)
    not_compared = 0
    signatures = np.zeros(len(sizes), np.uint64)

    def all_bands() -> Iterator[np.ndarray]:
        """And behind them all, the signatures as a whole: equal sets meet there even if their buckets are crowded."""
        nonlocal signatures
        for hashes in bands:
            signatures = fold([signatures, hashes])
            yield hashes
        yield signatures

    for hashes in all_bands():
        order, rank = _crowded(hashes)
        not_compared += int(np.maximum(rank - FIRST_OF_BUCKET, 0).sum())
        keys = [found]
        for earlier in range(min(FIRST_OF_BUCKET, int(rank.max(initial=0)))):
            later = np.flatnonzero(rank > earlier)
            first, second = order[later - rank[later] + earlier], order[later]
            low, high = np.sort(np.stack([sizes[first], sizes[second]]), axis=0)
            likely = low / high >= threshold
            keys.append(first[likely].astype(np.uint64) * documents + second[likely].astype(np.uint64))
        found = distinct(np.concatenate(keys))
    first, second = np.divmod(found, documents)
    return Candidates(first.astype(np.int64), second.astype(np.int64), not_compared)


def _crowded(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents that share their bucket, bucket by bucket in their order, and each one's rank in its bucket."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    begins = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]][: len(ranked)])
    members = np.diff(np.r_[begins, len(ranked)])
    rank = np.arange(len(ranked)) - np.repeat(begins, members)
    shared = np.repeat(members > 1, members)
    return order[shared], rank[shared]
