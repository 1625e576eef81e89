import ast
import json
import keyword
import re
import zlib
from itertools import islice
from pathlib import Path

import pytest

from llama.bench.harness import BenchError
from pipelines.bench.corpus import first_bytes, varied, without_repeats, write_stdlib_corpus

KEYWORD = re.compile(rf"\b(?:{'|'.join(keyword.kwlist)})\b")
SOURCE = [Path(ast.__file__).read_text("utf-8"), Path(json.__file__).read_text("utf-8")]


def keywords(text: str) -> list[str]:
    return KEYWORD.findall(text)


def test_the_corpus_repeats_without_repeating_itself() -> None:
    texts = list(islice(varied(SOURCE), 20))
    assert texts[:2] == SOURCE
    assert len(set(texts)) == 20
    assert all(keywords(text) == keywords(SOURCE[number % 2]) for number, text in enumerate(texts))
    first, last = (len(zlib.compress("".join(pair).encode())) for pair in (texts[:2], texts[-2:]))
    assert last == pytest.approx(first, rel=0.1)  # as easy to compress as the original
    assert list(islice(varied(SOURCE), 20)) == texts


def test_text_without_identifiers_cannot_be_varied() -> None:
    with pytest.raises(BenchError, match="no identifiers"):
        next(varied(["1 + 1", "!"]))


def test_the_corpus_has_the_size_asked_for(tmp_path: Path) -> None:
    written = write_stdlib_corpus(tmp_path / "corpus", 300_000)
    files = sorted((tmp_path / "corpus").iterdir())
    texts = [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").splitlines()]
    assert sum(len(text.encode()) for text in texts) == written
    assert written - len(texts[-1].encode()) < 300_000 <= written


def test_what_repeats_an_earlier_text_goes() -> None:
    first, second, third = (
        "\n".join(f"line {number} of a text that is called {name}" for number in range(10)) for name in "abc"
    )
    mostly_second = "\n".join([*second.splitlines()[:3], *third.splitlines()[:7]])
    partly_second = "\n".join(
        [*second.splitlines()[:1], *third.splitlines()[7:], "a line that stands nowhere else: x" * 4]
    )
    texts = ["short", first, second, first, f"  {first}\n", "short", mostly_second, partly_second, "shorter"]
    assert list(without_repeats(texts)) == ["short", first, second, partly_second, "shorter"]


def test_the_first_texts_that_fit() -> None:
    assert first_bytes(iter(["abc", "é", "x"]), 5) == ["abc", "é"]
    assert first_bytes(iter(["abc", "é"]), 2) == ["abc"]
    assert first_bytes(iter([]), 2) == []
