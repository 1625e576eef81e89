"""Cleaning: the rules of `data.clean` for one document by itself.

Two rules change the text, the others drop the document; they come in the order of CleanConfig, with
`data.min_document_chars` before `max_chars`, and the first one broken is the one that is named. The
quality rules are those of Rae et al. 2021 (Gopher), appendix A.1; the repetition rules are in repetition.py.

Words are what `str.split` finds: text without white space between words is one word. Lines end at a line feed,
paragraphs at blank lines; both are taken without the white space around them, and empty ones do not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from pipelines.data_config import CleanConfig
from pipelines.language import detect_language
from pipelines.repetition import (
    Units,
    duplicate_ngram_ratio,
    duplicate_ratios,
    repeats,
    to_units,
    top_ngram_ratio,
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # category Cc but for line feed and tab
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85]")
_LINE = re.compile(r"\S[^\n]*")
_BLANK_LINES = re.compile(r"\n\s*\n")
_SPACE = re.compile(r"\s")
_BULLET = re.compile(r"[•‣⁃◦∙▪▫■□●○]|[-*+–—](?=\s|$)")
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_STOP_WORD_FORMS = {form: word for word in _STOP_WORDS for form in (word, word.capitalize(), word.upper())}
_ELLIPSES = ("...", "…")
_TOP_NGRAMS = (2, 3, 4)
_DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)
_CHUNK_CHARS = 1 << 20  # words made into Python objects at once
_KNOWN_WORDS = 1 << 17
_KNOWN_WORD_CHARS = 64


@dataclass(frozen=True)
class Kept:
    """The text as it goes on; `changed` names the rules that changed it."""

    text: str
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """The rule that the document broke and what was measured: a number, or the language and its probability."""

    rule: str
    value: float | str


class Cleaner:
    """`cleaner(text)` by the rules of `config`. Raises DataError for `language` without its package."""

    def __init__(self, config: CleanConfig, min_chars: int) -> None:
        self._config = config
        self._min_chars = min_chars
        self._words = _WordHashes()

    def __call__(self, text: str) -> Kept | Dropped:
        changed = []
        if self._config.control_characters and _CONTROL.search(text):
            text = _CONTROL.sub("", _LINE_END.sub("\n", text))
            changed.append("control_characters")
        if self._config.unicode is not None and not unicodedata.is_normalized(self._config.unicode, text):
            text = unicodedata.normalize(self._config.unicode, text)
            changed.append("unicode")
        return next(self._broken(_Measured(text, self._words)), None) or Kept(text, tuple(changed))

    def _broken(self, text: _Measured) -> Iterator[Dropped]:
        """The rules that the text breaks, in order; nothing is measured before it is asked for."""
        config = self._config
        if text.chars < self._min_chars:
            yield Dropped("min_document_chars", text.chars)
        for rule, measure in _RULES.items():
            limit = getattr(config, rule)
            if limit is None:
                continue
            value = measure(text)
            if value < limit if rule.startswith("min_") else value > limit:
                yield Dropped(rule, value)
        yield from _broken_ngrams(config, text)
        if config.language is not None:
            language, probability = detect_language(text.text)
            if language not in config.language.allowed or probability < config.language.min_probability:
                yield Dropped("language", f"{language} {probability:.4f}")


def _broken_ngrams(config: CleanConfig, text: _Measured) -> Iterator[Dropped]:
    top = dict(zip(_TOP_NGRAMS, config.max_top_ngram_char_ratios or (), strict=False))
    duplicate = dict(zip(_DUPLICATE_NGRAMS, config.max_duplicate_ngram_char_ratios or (), strict=False))
    if not top and not duplicate:
        return
    words = text.word_units
    for found in repeats(words, [*top, *duplicate]):
        if found.n in top:
            kind, limit, value = "top", top[found.n], top_ngram_ratio(words, found)
        else:
            kind, limit, value = "duplicate", duplicate[found.n], duplicate_ngram_ratio(words, found)
        if value > limit:
            yield Dropped(f"max_{kind}_{found.n}gram_char_ratio", value)


class _Measured:
    """A text and what the rules want to know of it."""

    def __init__(self, text: str, hashes: _WordHashes) -> None:
        self.text = text
        self.chars = len(text)
        self._hashes = hashes

    @cached_property
    def word_units(self) -> Units:
        """The lowest bit of a word's hash says whether it has a letter."""
        chunks = [self._hashes.units(words) for words in self._words()]
        return Units(np.concatenate([each.hashes for each in chunks]), np.concatenate([each.chars for each in chunks]))

    @property
    def words(self) -> int:
        return len(self.word_units)

    @property
    def mean_word_chars(self) -> float:
        return int(self.word_units.chars.sum()) / self.words if self.words else 0.0

    @property
    def symbol_ratio(self) -> float:
        most = max(self.text.count("#"), sum(self.text.count(mark) for mark in _ELLIPSES))
        return most / self.words if self.words else 0.0

    @property
    def alphabetic_word_ratio(self) -> float:
        return int((self.word_units.hashes & np.uint64(1)).sum()) / self.words if self.words else 0.0

    @property
    def stop_words(self) -> int:
        """Distinct ones, written the, The or THE."""
        found: set[str] = set()
        for words in self._words():
            found.update(_STOP_WORD_FORMS[form] for form in _STOP_WORD_FORMS.keys() & set(words))
        return len(found)

    @property
    def bullet_line_ratio(self) -> float:
        return _ratio(_BULLET.match(line) is not None for line in _lines(self.text))

    @property
    def ellipsis_line_ratio(self) -> float:
        return _ratio(line.endswith(_ELLIPSES) for line in _lines(self.text))

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        return duplicate_ratios(_hashed(_lines(self.text)))

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        return duplicate_ratios(_hashed(_paragraphs(self.text)))

    def _words(self) -> Iterator[list[str]]:
        """The words, so many at once that a long text does not become as many objects."""
        begin = 0
        while begin == 0 or begin < len(self.text):
            space = _SPACE.search(self.text, begin + _CHUNK_CHARS)
            end = space.start() if space else len(self.text)
            yield self.text[begin:end].split()
            begin = end + 1


_RULES: dict[str, Callable[[_Measured], float]] = {
    "max_chars": lambda text: text.chars,
    "min_words": lambda text: text.words,
    "max_words": lambda text: text.words,
    "min_mean_word_chars": lambda text: text.mean_word_chars,
    "max_mean_word_chars": lambda text: text.mean_word_chars,
    "max_symbol_ratio": lambda text: text.symbol_ratio,
    "max_bullet_line_ratio": lambda text: text.bullet_line_ratio,
    "max_ellipsis_line_ratio": lambda text: text.ellipsis_line_ratio,
    "min_alphabetic_word_ratio": lambda text: text.alphabetic_word_ratio,
    "min_stop_words": lambda text: text.stop_words,
    "max_duplicate_line_ratio": lambda text: text.duplicate_lines[0],
    "max_duplicate_line_char_ratio": lambda text: text.duplicate_lines[1],
    "max_duplicate_paragraph_ratio": lambda text: text.duplicate_paragraphs[0],
    "max_duplicate_paragraph_char_ratio": lambda text: text.duplicate_paragraphs[1],
}


RULES = (
    "control_characters",
    "unicode",
    "min_document_chars",
    *_RULES,
    *(f"max_top_{n}gram_char_ratio" for n in _TOP_NGRAMS),
    *(f"max_duplicate_{n}gram_char_ratio" for n in _DUPLICATE_NGRAMS),
    "language",
)
"""What a document may be changed or dropped by, in the order in which it is tried."""


class _WordHashes(dict[str, int]):
    """Hashes of words, 63 bits and one that says whether a letter is in it; frequent words are hashed once."""

    def __missing__(self, word: str) -> int:
        digest = xxhash.xxh3_64_intdigest(word.encode()) & ~1 | any(map(str.isalpha, word))
        if len(word) <= _KNOWN_WORD_CHARS:
            self[word] = digest
        return digest

    def units(self, words: list[str]) -> Units:
        if len(self) > _KNOWN_WORDS:
            self.clear()
        hashes = np.fromiter(map(self.__getitem__, words), np.uint64, len(words))
        return Units(hashes, np.fromiter(map(len, words), np.int64, len(words)))


def _lines(text: str) -> Iterator[str]:
    return (line.group().rstrip() for line in _LINE.finditer(text))


def _paragraphs(text: str) -> Iterator[str]:
    begin = 0
    for gap in _BLANK_LINES.finditer(text):
        yield text[begin : gap.start()].strip()
        begin = gap.end()
    yield text[begin:].strip()


def _hashed(texts: Iterable[str]) -> Units:
    return to_units((xxhash.xxh3_64_intdigest(text.encode()), len(text)) for text in texts if text)


def _ratio(truths: Iterable[bool]) -> float:
    count = true = 0
    for truth in truths:
        count += 1
        true += truth
    return true / count if count else 0.0
