"""Tokenizers side by side: how many bytes a token holds in which language, whether text survives, and what they cost.

Byte-level BPE, WordPiece and Unigram learn from the same sample; tokenizers that exist already take part as they are.
All are judged on documents that were held out: one in ten, of a small text one in three. Documents that largely repeat
an earlier one are left out, and English and code come of different files, so that nothing held out was learned from but
a line here and there. Speeds are measured in turns, on one thread.
"""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from statistics import median
from typing import Any

import xxhash

from llama.bench.harness import MIN_ROUNDS, BenchError, Ratio, interleave, ratio
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import SMALLEST_VOCABULARY, TokenizerKind, train_tokenizer
from pipelines.adopted_tokenizer import adopt_for_text
from pipelines.bench.corpus import first_bytes, read_records, read_texts, without_repeats
from pipelines.bench.turns import Say, Turns
from pipelines.data_config import STDLIB

KINDS: tuple[TokenizerKind, ...] = ("bpe", "wordpiece", "unigram")
SMALL_SAMPLE_BYTES = 100_000
"""Of less text than this, figures say little about a language."""

_HELD_OUT, _HELD_OUT_OF_SMALL = 10, 3
_DOCSTRING_CHARS = 200
_MANUAL = f"{STDLIB}/pydoc_data/"


@dataclass(frozen=True)
class TokenizerBench:
    """What is measured.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    texts: tuple[tuple[str, str], ...] = ()
    """Names and sources of texts; one of a built-in's name replaces that."""
    tokenizers: tuple[str, ...] = ()
    """Existing ones, by path or URI, as for `tokenizer.path`."""
    vocab_size: int = 8192
    megabytes: float = 4.0
    """Of each text, at most; 10⁶ bytes each."""
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise BenchError(f"vocab_size={self.vocab_size} must be at least {SMALLEST_VOCABULARY}, the bytes")
        if not self.megabytes > 0:
            raise BenchError(f"megabytes={self.megabytes} must be positive")
        if self.rounds < MIN_ROUNDS:
            raise BenchError(f"rounds={self.rounds} must be at least {MIN_ROUNDS}")
        for name in self.tokenizers:
            if name in KINDS:
                raise BenchError(f"--tokenizer {name} is the name of a kind that is learned here; write ./{name}")
        if len(set(self.tokenizers)) < len(self.tokenizers):
            raise BenchError(f"--tokenizer {', '.join(self.tokenizers)} are not distinct; give each once")
        names = [name for name, _ in self.texts]
        if len(set(names)) < len(names):
            raise BenchError(f"text names {', '.join(names)} are not distinct; give each text a name of its own")


@dataclass(frozen=True)
class Text:
    """A language's text: what is learned from, and what was held out."""

    name: str
    sample: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class OnText:
    """A tokenizer on a held-out text."""

    text: str
    bytes_per_token: float
    exact: bool
    """Whether every document came back as it was."""


@dataclass(frozen=True)
class Row:
    """One tokenizer's result."""

    name: str
    vocab_size: int
    training_seconds: float | None
    """None for one that exists already."""
    texts: list[OnText]
    megabytes_per_second: float
    """Of all held-out texts together, median over the rounds."""
    versus_bpe: Ratio | None
    """Speed over that of BPE."""


@dataclass(frozen=True)
class TextSize:
    """Bytes of a text that were learned from and held out."""

    text: str
    sample: int
    held_out: int


@dataclass(frozen=True)
class TokenizerReport:
    bench: TokenizerBench
    texts: list[TextSize]
    rows: list[Row]


def measure(bench: TokenizerBench, say: Say = lambda message: None) -> TokenizerReport:
    """Trains, encodes, compares; `say` is told what goes on.

    Raises:
        BenchError: a text is too short to hold out a part of it.
        DataError: a text cannot be read, or an existing tokenizer cannot be loaded.
    """
    existing = {path: adopt_for_text(path, "--tokenizer") for path in bench.tokenizers}
    texts = find_texts(bench)
    sample = [document for text in texts for document in text.sample]
    trained: dict[str, float | None] = {}
    tokenizers: dict[str, Tokenizer] = {}
    for kind in KINDS:
        say(f"{kind}: learning from {_size(sample) / 1e3:,.0f} kB")
        began = time.perf_counter()
        tokenizers[kind] = train_tokenizer(sample, bench.vocab_size, kind)
        trained[kind] = time.perf_counter() - began
    tokenizers |= existing
    held_out = [document for text in texts for document in text.held_out]
    turns = {
        name: Turns(name, partial(by.encode_batch, held_out), bench.rounds, say) for name, by in tokenizers.items()
    }
    with _one_thread():
        interleave(turns, bench.rounds)
    seconds = {name: of.seconds[1:] for name, of in turns.items()}
    rows = [
        Row(
            name,
            tokenizer.vocab_size,
            trained.get(name),
            [judge(tokenizer, text) for text in texts],
            _size(held_out) / 1e6 / median(seconds[name]),
            None if name == "bpe" else ratio(seconds[name], seconds["bpe"]),
        )
        for name, tokenizer in tokenizers.items()
    ]
    return TokenizerReport(
        bench, [TextSize(text.name, _size(text.sample), _size(text.held_out)) for text in texts], rows
    )


def judge(tokenizer: Tokenizer, text: Text) -> OnText:
    """How a tokenizer does on what was held out of a text."""
    encoded = tokenizer.encode_batch(text.held_out)
    exact = all(tokenizer.decode(ids) == document for ids, document in zip(encoded, text.held_out, strict=True))
    return OnText(text.name, _size(text.held_out) / max(1, sum(map(len, encoded))), exact)


def find_texts(bench: TokenizerBench) -> list[Text]:
    """The built-in texts and those given, of each at most so many bytes. Raises BenchError, DataError."""
    size = int(bench.megabytes * 1e6)
    # First, for they may not be there.
    given = {name: _divided(name, read_texts(uri, f"--text {name}"), size) for name, uri in bench.texts}
    built_in: dict[str, Callable[[], Iterator[str]]] = {
        "english": _english,
        "chinese": _chinese,
        "code": _code,
    }
    texts = {name: given.get(name) or _divided(name, read(), size) for name, read in built_in.items()}
    return list((texts | given).values())


def _divided(name: str, found: Iterator[str], size: int) -> Text:
    documents = first_bytes(without_repeats(found), size)
    if len(documents) < 2:
        raise BenchError(
            f"text {name!r} has {len(documents)} different documents in {size:,} bytes; give at least 2, one to hold "
            "out, or raise --megabytes"
        )
    every = _HELD_OUT if _size(documents) >= SMALL_SAMPLE_BYTES else _HELD_OUT_OF_SMALL
    held_out = set(range(every - 1, len(documents), every)) or {len(documents) - 1}
    return Text(
        name,
        tuple(text for index, text in enumerate(documents) if index not in held_out),
        tuple(text for index, text in enumerate(documents) if index in held_out),
    )


def _english() -> Iterator[str]:
    """Python's own manual, then the docstrings of half of its standard library, a file's as one document."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for record in read_records(STDLIB):
        if _is_for_english(record.path):
            nodes = [
                node
                for node in ast.walk(ast.parse(record.text))
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            ]
            texts = [text for node in nodes if len(text := ast.get_docstring(node) or "") >= _DOCSTRING_CHARS]
            if texts:
                yield "\n\n".join(texts)


def _code() -> Iterator[str]:
    """The other half of the standard library."""
    return (record.text for record in read_records(STDLIB) if not _is_for_english(record.path))


def _is_for_english(path: str) -> bool:
    """On which side a file of the standard library is, the same on every machine. The manual lies there as a file."""
    return path.startswith(_MANUAL) or xxhash.xxh3_64_intdigest(path.encode()) % 2 == 0


def _chinese() -> Iterator[str]:
    """Some pages of prose on everyday things, a paragraph each: no Python installation has more to offer."""
    yield from resources.files("pipelines.bench").joinpath("chinese.txt").read_text("utf-8").strip().split("\n\n")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def as_text(report: TokenizerReport) -> str:
    """The table for a terminal."""
    lines = ["bytes per token on held-out text"]
    texts = "".join(f"{size.text[:11]:>12}" for size in report.texts)
    lines.append(f"{'':24}{'vocab':>9}{texts}{'train s':>9}{'MB/s':>7}   speed")
    for row in report.rows:
        cells = "".join(f"{on.bytes_per_token:10.2f}{'  ' if on.exact else ' !'}" for on in row.texts)
        seconds = "" if row.training_seconds is None else f"{row.training_seconds:.1f}"
        versus = "1" if row.versus_bpe is None else str(row.versus_bpe)
        lines.append(
            f"{row.name[-23:]:24}{row.vocab_size:9,}{cells}{seconds:>9}{row.megabytes_per_second:7.2f}   {versus}"
        )
    lossy = [f"{row.name} ({on.text})" for row in report.rows for on in row.texts if not on.exact]
    lines.append("every text came back exactly" if not lossy else f"! not every text came back: {', '.join(lossy)}")
    lines += _on_vocabularies(report)
    lines += map(_on_size, report.texts)
    return "\n".join(lines)


def _on_vocabularies(report: TokenizerReport) -> list[str]:
    """What to bear in mind where little text, or an existing tokenizer, makes the vocabularies unequal."""
    learned = [row for row in report.rows if row.training_seconds is not None]
    small = [row.name for row in learned if row.vocab_size < report.bench.vocab_size]
    lines = []
    if small:
        lines.append(
            f"the text has no {report.bench.vocab_size:,} tokens for {', '.join(small)}; give more of it, or a smaller "
            "--vocab-size"
        )
    if len({row.vocab_size for row in report.rows}) > 1:
        lines.append("the vocabularies are unequal: a larger one holds more bytes in a token whatever its kind")
    return lines


def _on_size(of: TextSize) -> str:
    line = f"{of.text}: {of.sample / 1e3:,.1f} kB learned from, {of.held_out / 1e3:,.1f} kB held out"
    small = f"; a small sample, give more with --text {of.text}=URI" if of.sample < SMALL_SAMPLE_BYTES else ""
    return line + small


def as_json(report: TokenizerReport) -> dict[str, Any]:
    """Plain data, verdicts included."""
    data: dict[str, Any] = asdict(report)
    for row, plain in zip(report.rows, data["rows"], strict=True):
        if row.versus_bpe is not None:
            plain["versus_bpe"]["verdict"] = row.versus_bpe.verdict
    return data
