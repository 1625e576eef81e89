"""Real text with planted near-duplicates, and what brute force has to say of it. For the tests and the evidence."""

import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from cluster.storage import JSON
from pipelines.documents import PARTS, Document, Kind, Split, document_id, write_part
from pipelines.stage import Stage, StageContext

_WORD = re.compile("[a-z0-9_]+")  # what a word is in ASCII text
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def word_ngrams(text: str, ngram: int) -> set[tuple[str, ...]]:
    """The distinct n-grams of an ASCII text as tuples of words; of a shorter one all of its words."""
    words = _WORD.findall(text.lower())
    size = min(ngram, len(words))
    return {tuple(words[begin : begin + size]) for begin in range(len(words) - size + 1)} if words else set()


def similar_pairs(texts: Sequence[str], ngram: int, threshold: float) -> dict[tuple[int, int], float]:
    """Every pair (earlier, later) of at least that Jaccard similarity."""
    sets = [word_ngrams(text, ngram) for text in texts]
    found = {}
    for (first, left), (second, right) in combinations(enumerate(sets), 2):
        if min(len(left), len(right)) >= threshold * max(len(left), len(right)) > 0:
            common = len(left & right)
            similarity = common / (len(left) + len(right) - common)
            if similarity >= threshold:
                found[first, second] = similarity
    return found


def real_texts(words: int) -> Iterator[str]:
    """Different stretches of about so many words of ASCII text: Python's manual in turn with the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.parts)]
    prose = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    streams = [_stretches(iter(prose), words), _stretches((path.read_text("utf-8", "ignore") for path in code), words)]
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)


def _stretches(texts: Iterator[str], words: int) -> Iterator[str]:
    for text in texts:
        pieces = re.findall(r"\S+\s*", text)
        for begin in range(0, len(pieces) - words + 1, words):
            stretch = "".join(pieces[begin : begin + words])
            if stretch.isascii():
                yield stretch


def edited(text: str, rate: float, generator: random.Random) -> str:
    """A copy in which so many of the words are other words of the text, or gone, or twice."""
    pieces = re.findall(r"\S+\s*", text)
    return "".join(
        generator.choice([generator.choice(pieces), "", piece * 2]) if generator.random() < rate else piece
        for piece in pieces
    )


def planted(count: int, seed: int, words: int = 200) -> list[str]:
    """So many texts in random order: half of them different stretches, the others copies of these with between none
    and a twelfth of their words edited, and copies of copies."""
    generator = random.Random(seed)
    texts = [text for _, text in zip(range(count // 2), real_texts(words), strict=False)]
    if len(texts) < count // 2:
        raise ValueError(f"the standard library has no {count // 2} stretches of {words} words; ask for fewer")
    while len(texts) < count:
        texts.append(edited(generator.choice(texts), generator.uniform(0, 1 / 12), generator))
    generator.shuffle(texts)
    return texts


def documents_stage(texts: Sequence[str], part_documents: int = 50, kind: Kind = "text", validation: int = 7) -> Stage:
    """In place of `ingest`: the texts in part files, every so manyth of these in the validation split."""
    config = {"texts": list(texts), "part_documents": part_documents, "kind": kind, "validation": validation}
    return Stage("ingest", 1, config, partial(_write_documents, texts, part_documents, kind, validation))


def _write_documents(
    texts: Sequence[str], part_documents: int, kind: Kind, validation: int, context: StageContext
) -> dict[str, JSON]:
    parts: list[Any] = []
    for begin in range(0, len(texts), part_documents):
        documents = [
            Document(document_id(text), text, "corpus.txt", begin + row)
            for row, text in enumerate(texts[begin : begin + part_documents])
        ]
        split: Split = "validation" if len(parts) % validation == validation - 1 else "train"
        path = f"{split}/00-{len(parts):05d}-000.parquet"
        entry, part = write_part(context.attempt.store, path, 0, split, kind, documents)
        context.record(entry)
        parts.append(asdict(part))
    return {PARTS: parts}
