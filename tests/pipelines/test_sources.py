import os
import random
import sysconfig
from dataclasses import replace

import pytest

from pipelines.recipe import SourceConfig
from pipelines.sources import (
    DOCUMENT_BYTES,
    WHOLE_FILE_BYTES,
    DataError,
    Document,
    Piece,
    Quarantined,
    find_corpus,
    read_documents,
)


def corpus_of(*uris, max_bytes=None, weights=None):
    weights = weights or [1.0] * len(uris)
    return find_corpus([SourceConfig(uri=str(u), weight=w) for u, w in zip(uris, weights, strict=True)], max_bytes)


def read_all(corpus, part_bytes=1 << 30):
    return [
        found
        for part in corpus.parts(part_bytes)
        for piece in part
        for found in read_documents(corpus.sources[piece.file.source], piece)
    ]


def paths(corpus):
    return sorted({piece.file.path for piece in corpus.pieces})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts" / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "deep/c.md", "deep/er/d"):
        (tmp_path / "texts" / name).write_text(f"this is {name}\n" * 10)
    return tmp_path / "texts"


def test_stdlib_is_the_modules_and_not_their_tests():
    corpus = corpus_of("stdlib")
    names = paths(corpus)
    assert {"json/decoder.py", "asyncio/base_events.py", "os.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any({"site-packages", "test", "tests"} & set(name.split("/")) for name in names)
    found = {document.path: document for document in read_all(corpus_of("stdlib", max_bytes=200_000))}
    root = sysconfig.get_paths()["stdlib"]
    for path, document in found.items():
        with open(os.path.join(root, path.removeprefix("stdlib/")), encoding="utf-8") as file:
            assert document.text == file.read()
    assert found and corpus.fingerprint == corpus_of("stdlib").fingerprint


def test_folder_is_read_recursively_without_hidden_files(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".hidden").write_text("hidden")
    assert paths(corpus_of(folder)) == ["a.txt", "b.txt", "deep/c.md", "deep/er/d"]
    assert {document.text for document in read_all(corpus_of(folder))} == {
        f"this is {name}\n" * 10 for name in ("a.txt", "b.txt", "deep/c.md", "deep/er/d")
    }


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_single_file(folder, form):
    corpus = corpus_of(form.format(folder / "deep" / "c.md"))
    assert paths(corpus) == ["c.md"]
    (document,) = read_all(corpus)
    assert document.text == "this is deep/c.md\n" * 10 and document.path.endswith("/texts/deep/c.md")


def test_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert paths(corpus_of("deep")) == ["c.md", "er/d"]
    assert paths(corpus_of("a.txt")) == ["a.txt"]


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.uri='/nowhere/at/all' does not exist; give"):
        corpus_of("/nowhere/at/all")
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.uri='ftp://x/y': .*unknown scheme"):
        corpus_of("ftp://x/y")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="yields no text"):
        corpus_of(tmp_path)


def test_the_cap_takes_whole_files_and_weights_divide_it(tmp_path):
    for source in ("one", "two"):
        (tmp_path / source).mkdir()
        for number in range(50):
            (tmp_path / source / f"{number}.txt").write_text(source[0] * 1000)
    corpus = corpus_of(tmp_path / "one", tmp_path / "two", max_bytes=40_500, weights=[3, 1])
    taken = [sum(piece.size for piece in corpus.pieces if piece.file.source == source) for source in (0, 1)]
    assert taken == [30_000, 10_000]
    with pytest.raises(DataError, match="within its 900 bytes of data.max_bytes=900"):
        corpus_of(tmp_path / "one", max_bytes=900)
    smaller = corpus_of(tmp_path / "one", max_bytes=5_000)
    larger = corpus_of(tmp_path / "one", max_bytes=9_000)
    assert smaller.pieces == larger.pieces[:5]
    assert smaller.fingerprint != larger.fingerprint


def test_the_fingerprint_follows_the_files(folder):
    before = corpus_of(folder).fingerprint
    assert corpus_of(folder).fingerprint == before
    stamp = (folder / "a.txt").stat().st_mtime_ns + 1_000_000
    os.utime(folder / "a.txt", ns=(stamp, stamp))
    changed = corpus_of(folder).fingerprint
    (folder / "b.txt").rename(folder / "z.txt")
    assert len({before, changed, corpus_of(folder).fingerprint}) == 3


def big_text(kind, size):
    generator = random.Random(kind)
    if kind == "one line":
        return "模🙂é" * (size // 9)
    ends = {
        "paragraphs": ["\n", "\n", "\n\n"],
        "lines": ["\n"],
        "windows": ["\r\n", "\r\n\r\n"],
        "rare": [" "] * 999 + ["\n"],
    }
    words = []
    length = 0
    while length < size:
        word = generator.choice(["word", "naïve", "模型"]) * generator.randint(1, 5) + generator.choice(ends[kind])
        words.append(word)
        length += len(word.encode())
    return "".join(words)


@pytest.mark.parametrize("kind", ["paragraphs", "lines", "windows", "one line", "rare"])
def test_a_big_file_is_cut_alike_however_it_is_divided(tmp_path, kind):
    text = big_text(kind, WHOLE_FILE_BYTES + 3 * DOCUMENT_BYTES + 123)
    (tmp_path / "big.txt").write_bytes(text.encode())
    corpus = corpus_of(tmp_path)
    whole = read_all(corpus)
    assert "".join(document.text for document in whole) == text.replace("\r\n", "\n")
    assert all(isinstance(document, Document) for document in whole)
    assert len(whole) >= 19 and max(len(document.text.encode()) for document in whole) <= 2 * DOCUMENT_BYTES
    for part_bytes in (1, DOCUMENT_BYTES, 3 * DOCUMENT_BYTES + 5, 100_000):
        assert read_all(corpus, part_bytes) == whole
    assert len(corpus.parts(1)) == len(corpus.parts(DOCUMENT_BYTES)) > len(corpus.parts(100_000)) > 1
    if kind == "paragraphs":
        raw = text.encode()
        assert all(raw[document.offset - 2 : document.offset] == b"\n\n" for document in whole[1:])


def test_the_cap_cuts_a_big_file(tmp_path):
    (tmp_path / "big.txt").write_bytes(big_text("lines", WHOLE_FILE_BYTES * 2).encode())
    corpus = corpus_of(tmp_path, max_bytes=5 * DOCUMENT_BYTES + 17)
    assert [(piece.begin, piece.end) for piece in corpus.pieces] == [(0, 5 * DOCUMENT_BYTES)]
    assert read_all(corpus) == read_all(corpus_of(tmp_path))[:5]


def test_newlines_and_byte_order_mark_are_normalised(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (document,) = read_all(corpus_of(tmp_path))
    assert document.text == "one\ntwo\nthree\n"


def test_what_is_no_text_is_quarantined_with_its_place(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine so far \xff\xfe and on")
    (tmp_path / "nul.txt").write_bytes(b"abc\0def")
    (tmp_path / "good.txt").write_bytes(b"good")
    found = {os.path.basename(item.path): item for item in read_all(corpus_of(tmp_path))}
    assert isinstance(found["good.txt"], Document)
    bad, nul = found["bad.txt"], found["nul.txt"]
    assert isinstance(bad, Quarantined) and bad.offset == 12 and bad.reason.startswith("not UTF-8")
    assert isinstance(nul, Quarantined) and nul.offset == 3 and "NUL" in nul.reason


def test_one_bad_byte_costs_one_document_of_a_big_file(tmp_path):
    text = bytearray(big_text("lines", WHOLE_FILE_BYTES * 2).encode())
    (tmp_path / "big.txt").write_bytes(text)
    before = read_all(corpus_of(tmp_path))
    text[100_000] = 0xFF
    (tmp_path / "big.txt").write_bytes(text)
    after = read_all(corpus_of(tmp_path))
    assert sum(isinstance(found, Quarantined) for found in after) == 1
    assert len(after) == len(before) and sum(a != b for a, b in zip(after, before, strict=True)) == 1


def test_a_file_that_changed_since_it_was_listed_stops_the_reading(folder):
    corpus = corpus_of(folder)
    piece = corpus.pieces[0]
    other = Piece(replace(piece.file, size=piece.file.size + 1), 0, piece.size + 1, True)
    with pytest.raises(DataError, match="put the source on storage that every machine sees"):
        list(read_documents(corpus.sources[0], other))
