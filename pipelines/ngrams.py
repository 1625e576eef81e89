"""Word n-grams as 64-bit hashes, by which near-duplicates and contamination are found.

A word is a run of letters, digits, underscores and combining marks, lower-cased; punctuation and white space only
separate. A Chinese, Japanese or Korean character is a word by itself. Scripts that neither space their words nor are
listed here, such as Thai, have words as long as what stands between two spaces.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from pipelines.documents import Kind

_CJK = (
    "\u1100-\u11ff\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u3131-\u318e"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97c\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
    "\U00020000-\U0003ffff"
)
# re has no class for them, and without them most words of Indic scripts fall apart
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M"))
_WORD = re.compile(rf"(?:[^\W{_CJK}]++[{_MARKS}]*+)++|[{_CJK}]")
_BREAK = re.compile(rf"[^\w{_MARKS}]|[{_CJK}]")  # no word goes across it
_STRETCH = 1 << 20  # characters whose words are Python objects at once

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C13)
_MIX = ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53))  # MurmurHash3's finalizer


def words(text: str) -> Iterator[list[str]]:
    """The words of a text in order, in lists of bounded length."""
    text = text.lower()
    begin = 0
    while begin < len(text):
        end = _BREAK.search(text, begin + _STRETCH)
        stop = end.start() if end else len(text)
        yield _WORD.findall(text, begin, stop)
        begin = stop


def hash_words(text: str) -> np.ndarray:
    """xxh3_64 of each word: uint64 [words]."""
    hashes = [
        np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, found)), np.uint64, len(found))
        for found in words(text)
    ]
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)


def fold(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Hash of each row of equally long uint64 columns, which depends on their order and number: uint64 [rows]."""
    hashes = np.full(len(columns[0]), len(columns), np.uint64)
    for column in columns:
        hashes *= _MULTIPLIER
        hashes += column
    for shift, multiplier in _MIX:
        hashes ^= hashes >> np.uint64(shift)
        hashes *= np.uint64(multiplier)
    return hashes ^ (hashes >> np.uint64(33))


def hash_ngrams(hashes: np.ndarray, ngram: int) -> np.ndarray:
    """The n-gram that begins at each word: uint64 [words - ngram + 1], empty for fewer words than `ngram`.

    `hashes` are those of the words. N-grams of different length have different hashes.
    """
    count = len(hashes) - ngram + 1
    if count < 1:
        return np.empty(0, np.uint64)
    return fold([hashes[first : first + count] for first in range(ngram)])


def ngram_set(hashes: np.ndarray, ngram: int) -> np.ndarray:
    """The distinct n-grams, ascending. Fewer words than `ngram` are one n-gram as a whole; no words have none."""
    return distinct(hash_ngrams(hashes, min(ngram, len(hashes)))) if len(hashes) else np.empty(0, np.uint64)


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct ones of an array's values, ascending. np.unique hashes integers since numpy 2.3, which takes 3 times
    as long for a hundred of them and 200 times as long for a million."""
    ranked = np.sort(values)
    new = np.ones(len(ranked), bool)
    np.not_equal(ranked[1:], ranked[:-1], out=new[1:])
    return ranked[new]


def plain_text(text: str, kind: Kind) -> str:
    """What of a document counts as its text; see `said`."""
    return "\n".join(said(text, kind))


def said(text: str, kind: Kind) -> Iterator[str]:
    """A text, or of the JSON of chat and preference what each message says: its strings, without roles and keys."""
    if kind == "text":
        yield text
        return
    record = json.loads(text)
    for side in [record] if kind == "chat" else [record[name] for name in ("prompt", "chosen", "rejected")]:
        for message in [side] if isinstance(side, str) else side:
            yield "\n".join(_strings(message))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [value[key] for key in value if key != "role"] if isinstance(value, dict) else value:
            yield from _strings(item)
