"""Contamination: which documents share word n-grams with evaluation sets (Brown et al. 2020, appendix C).

An evaluation text of fewer words than `ngram`, but at least LEAST_WORDS, counts as one n-gram of its own length.
Shorter ones are ignored and counted: an answer of one word would condemn every document that has it. With an `ngram`
below LEAST_WORDS they are those shorter than that. Of conversations and preferences each message is a text: a question
is found wherever it is asked, and whatever is answered.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np

from pipelines.formats import Limits, read_piece
from pipelines.ngrams import distinct, hash_ngrams, hash_words, ngram_set, said, words
from pipelines.sources import Corpus, DataError, Quarantined

LEAST_WORDS = 8
"""Of an n-gram by which a document goes: Brown et al.'s lower bound of N."""

_SLOTS_PER_NGRAM = 8  # of the filter: one n-gram of eight that are in no evaluation set gets through to the search


@dataclass(frozen=True)
class EvaluationNgrams:
    """Hashes of the n-grams, ascending (uint64), the lengths in words that occur among them, and how many texts were
    too short to have one."""

    hashes: np.ndarray
    lengths: tuple[int, ...]
    too_short: int

    @classmethod
    def of(cls, texts: Iterable[str], ngram: int) -> EvaluationNgrams:
        found = [np.empty(0, np.uint64)]
        lengths = set()
        too_short = 0
        for text in texts:
            hashes = hash_words(text)
            if len(hashes) < min(ngram, LEAST_WORDS):
                too_short += 1
                continue
            found.append(ngram_set(hashes, ngram))
            lengths.add(min(ngram, len(hashes)))
        return cls(distinct(np.concatenate(found)), tuple(sorted(lengths)), too_short)

    def match(self, text: str, hashes: np.ndarray) -> tuple[int, str]:
        """How many distinct n-grams of the evaluation sets a text has, and the first of them, or an empty string.

        First is the one that ends first, and of those the longest. `hashes` are those of the text's words.
        """
        matched = [np.empty(0, np.uint64)]
        places = []
        for length in self.lengths:
            ngrams = hash_ngrams(hashes, length)
            at = np.flatnonzero(self._filter[ngrams & self._mask])
            at = at[self._contains(ngrams[at])]
            if len(at):
                matched.append(ngrams[at])
                places.append((int(at[0]) + length, -length))
        if not places:
            return 0, ""
        end, length = min(places)
        ngram = " ".join(islice(chain.from_iterable(words(text)), end + length, end))
        return len(distinct(np.concatenate(matched))), ngram

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, hashes=self.hashes, lengths=np.array(self.lengths, np.int64), too_short=self.too_short)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> EvaluationNgrams:
        arrays = np.load(io.BytesIO(data), allow_pickle=False)
        return cls(arrays["hashes"], tuple(arrays["lengths"].tolist()), int(arrays["too_short"]))

    @cached_property
    def _mask(self) -> np.uint64:
        return np.uint64((1 << (_SLOTS_PER_NGRAM * len(self.hashes)).bit_length()) - 1)

    @cached_property
    def _filter(self) -> np.ndarray:
        """Whether any n-gram ends in these bits: a look-up is ten times faster than a search."""
        slots = np.zeros(int(self._mask) + 1, bool)
        slots[self.hashes & self._mask] = True
        return slots

    def _contains(self, ngrams: np.ndarray) -> np.ndarray:
        if not len(self.hashes):
            return np.zeros(len(ngrams), bool)
        at = np.minimum(np.searchsorted(self.hashes, ngrams), len(self.hashes) - 1)
        return self.hashes[at] == ngrams


def read_evaluation(corpus: Corpus, ngram: int, limits: Limits) -> EvaluationNgrams:
    """The n-grams of evaluation sets. Raises DataError for what cannot be read, and if there are none at all: what is
    left out here would stay in the training data."""
    found = EvaluationNgrams.of(_texts(corpus, limits), ngram)
    if not found.lengths:
        raise DataError(
            f"data.decontaminate.sources hold no text of at least {min(ngram, LEAST_WORDS)} words; point them at the "
            "texts of the evaluation sets, questions and all"
        )
    return found


def _texts(corpus: Corpus, limits: Limits) -> Iterator[str]:
    for failure in corpus.quarantined:
        raise _unreadable(failure)
    for source, pieces in zip(corpus.sources, corpus.pieces, strict=True):
        for piece in pieces:
            for record in read_piece(source, piece, limits):
                if isinstance(record, Quarantined):
                    raise _unreadable(record)
                yield from said(record.text, source.kind)


def _unreadable(failure: Quarantined) -> DataError:
    return DataError(
        f"data.decontaminate.sources: {failure.path} at {failure.offset}: {failure.reason}; repair it or leave it out, "
        "evaluation sets are read whole"
    )
