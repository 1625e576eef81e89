"""Tokenizers side by side: how many bytes a token holds in which language, whether text survives, and what they cost.

Byte-level BPE, WordPiece and Unigram learn from the same sample; tokenizers that exist already take part as they are.
All are judged on text that was held out: one document in ten. Speeds are measured in turns, on one thread.
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

from llama.bench.harness import MIN_ROUNDS, BenchError, Ratio, interleave, ratio
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import SMALLEST_VOCABULARY, TokenizerKind, train_tokenizer
from pipelines.adopted_tokenizer import adopt_for_text
from pipelines.bench.corpus import first_bytes, read_texts
from pipelines.data_config import STDLIB

KINDS: tuple[TokenizerKind, ...] = ("bpe", "wordpiece", "unigram")
SMALL_SAMPLE_BYTES = 100_000
"""Of less text than this, figures say little about a language."""

_HELD_OUT = 10
_DOCSTRING_CHARS = 200


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


def measure(bench: TokenizerBench) -> TokenizerReport:
    """Trains, encodes, compares.

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
        began = time.perf_counter()
        tokenizers[kind] = train_tokenizer(sample, bench.vocab_size, kind)
        trained[kind] = time.perf_counter() - began
    tokenizers |= existing
    held_out = [document for text in texts for document in text.held_out]
    with _one_thread():
        seconds = interleave(
            {name: partial(by.encode_batch, held_out) for name, by in tokenizers.items()}, bench.rounds
        )
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
    given = {name: _divided(name, first_bytes(read_texts(uri, f"--text {name}"), size)) for name, uri in bench.texts}
    built_in: dict[str, Callable[[], Iterator[str]]] = {
        "english": _english,
        "chinese": _chinese,
        "code": partial(read_texts, STDLIB),
    }
    texts = {name: given.get(name) or _divided(name, first_bytes(read(), size)) for name, read in built_in.items()}
    return list((texts | given).values())


def _divided(name: str, documents: Sequence[str]) -> Text:
    if len(documents) < 2:
        raise BenchError(f"text {name!r} has {len(documents)} documents; give at least 2, one to hold out")
    held_out = set(range(_HELD_OUT - 1, len(documents), _HELD_OUT)) or {len(documents) - 1}
    return Text(
        name,
        tuple(text for index, text in enumerate(documents) if index not in held_out),
        tuple(text for index, text in enumerate(documents) if index in held_out),
    )


def _english() -> Iterator[str]:
    """Python's own manual, then the docstrings of its standard library."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for source in read_texts(STDLIB):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= _DOCSTRING_CHARS:
                    yield text


def _chinese() -> Iterator[str]:
    """A few pages of prose on everyday things, a paragraph each: no Python installation has more to offer."""
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
    lines = [f"bytes per token on held-out text, vocabulary of {report.bench.vocab_size:,} where learned here"]
    lines.append(
        f"{'':24}" + "".join(f"{size.text[:11]:>12}" for size in report.texts) + f"{'train s':>9}{'MB/s':>7}   speed"
    )
    for row in report.rows:
        cells = "".join(f"{on.bytes_per_token:10.2f}{'  ' if on.exact else ' !'}" for on in row.texts)
        seconds = "" if row.training_seconds is None else f"{row.training_seconds:.1f}"
        versus = "1" if row.versus_bpe is None else str(row.versus_bpe)
        lines.append(f"{row.name[-23:]:24}{cells}{seconds:>9}{row.megabytes_per_second:7.2f}   {versus}")
    lossy = [f"{row.name} ({on.text})" for row in report.rows for on in row.texts if not on.exact]
    lines.append("every text came back exactly" if not lossy else f"! not every text came back: {', '.join(lossy)}")
    lines += map(_on_size, report.texts)
    return "\n".join(lines)


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
