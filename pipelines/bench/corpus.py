"""Text to measure with: sources as they are, and the standard library's own, made as large as wanted."""

from __future__ import annotations

import json
import keyword
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path

from llama.bench.harness import BenchError
from pipelines.data_config import STDLIB, DataConfig, SourceConfig
from pipelines.formats import Limits, Record, read_piece
from pipelines.sources import DataError, find_corpus
from pipelines.tally import describe

_FILE_BYTES = 32 << 20
_LONG_LINE_CHARS = 30
_MOST_REPEATED = 0.2  # a licence is less of a file
_IDENTIFIER = re.compile(r"([A-Za-z_]\w{2,})")


def read_records(uri: str, field: str = "data.sources") -> Iterator[Record]:
    """The documents of a source, in the order in which it would be trained on. `field` is where a user gave it.

    Raises DataError or StorageError if there is nothing, or nothing of it can be read."""
    config = DataConfig(sources=(SourceConfig(uri=uri),))
    limits = Limits(config.max_document_bytes, config.max_decompressed_bytes)
    corpus = find_corpus(config.sources, field)
    found, unreadable = 0, None
    for source, pieces in zip(corpus.sources, corpus.pieces, strict=True):
        for piece in pieces:
            for read in read_piece(source, piece, limits):
                if isinstance(read, Record):
                    found += 1
                    yield read
                else:
                    unreadable = unreadable or read
    if not found and unreadable:
        raise DataError(
            f"{field}={uri}: nothing of it can be read ({describe(unreadable)}); give text, or records "
            "with the key 'text'"
        )


def read_texts(uri: str, field: str = "data.sources") -> Iterator[str]:
    """The texts of `read_records`."""
    return (record.text for record in read_records(uri, field))


def varied(texts: Sequence[str]) -> Iterator[str]:
    """The texts as they are, then again and again without end, each time with other identifiers.

    A word takes the place of one about as frequent, so that the text stays as easy or hard to compress, and a
    repetition is no duplicate. Keywords stay.
    """
    pieces = [[sys.intern(piece) for piece in _IDENTIFIER.split(text)] for text in texts]
    counts = Counter(chain.from_iterable(words[1::2] for words in pieces))
    ranked = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if not keyword.iskeyword(word)]
    if not ranked:
        raise BenchError("the texts have no identifiers to vary; give source code")
    for turn in count():
        other = dict(zip(ranked, _turned(ranked, turn), strict=True))
        for words in pieces:
            changed = words.copy()
            changed[1::2] = [other.get(word, word) for word in words[1::2]]
            yield "".join(changed)


def _turned(ranked: Sequence[str], turn: int) -> Iterator[str]:
    """The words, each turned by `turn` places within a block of neighbours that is just large enough for that."""
    size = 2 * turn + 1
    for begin in range(0, len(ranked), size):
        block = list(ranked[begin : begin + size])
        yield from block[turn % len(block) :] + block[: turn % len(block)]


def write_stdlib_corpus(folder: Path, size: int) -> int:
    """Fill `folder` with JSON lines (`text`) of at least `size` bytes of source code; returns the bytes of text.

    Deterministic for one version of Python."""
    folder.mkdir(parents=True)
    texts = varied(first_bytes(read_texts(STDLIB), size))
    written = 0
    for number in count():
        room = min(_FILE_BYTES, size - written)
        if room <= 0:
            break
        with open(folder / f"{number:05d}.jsonl", "w", encoding="utf-8") as file:
            while room > 0:
                text = next(texts)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                room -= len(text.encode())
                written += len(text.encode())
    return written


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """The texts but those that say again what one before them says: more than a fifth of the characters in their long
    lines stand in one. Where no line is long, the whole text counts as one."""
    seen: set[str] = set()
    for text in texts:
        lines = long_lines(text) or [text]
        repeated = sum(len(line) for line in lines if line in seen)
        seen.update(lines)
        if repeated <= _MOST_REPEATED * sum(map(len, lines)):
            yield text


def long_lines(text: str) -> list[str]:
    """The lines that hardly two texts have by chance, without the white space around them."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) > _LONG_LINE_CHARS]


def first_bytes(texts: Iterator[str], size: int) -> list[str]:
    """The first texts that come to at most `size` bytes, and at least one."""
    taken = list(islice(texts, 1))
    total = sum(len(text.encode()) for text in taken)
    for text in texts:
        total += len(text.encode())
        if total > size:
            break
        taken.append(text)
    return taken
