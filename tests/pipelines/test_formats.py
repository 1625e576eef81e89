import gzip
import os
import random
from dataclasses import replace

import pytest
import zstandard

from pipelines.formats import Limits, Record, first_cut, read_piece
from pipelines.sources import DOCUMENT_BYTES, WHOLE_FILE_BYTES, DataError, Quarantined, group_pieces
from tests.pipelines.reading import LIMITS, corpus_of, failures, read_all, records, texts


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
    assert "".join(texts(whole)) == text.replace("\r\n", "\n")
    assert all(isinstance(found, Record) for found in whole)
    assert len(whole) >= 19 and max(len(found.text.encode()) for found in whole) <= 2 * DOCUMENT_BYTES
    for part_bytes in (1, DOCUMENT_BYTES, 3 * DOCUMENT_BYTES + 5, 100_000):
        assert read_all(corpus, part_bytes) == whole
    (pieces,) = corpus.pieces
    groups = [len(group_pieces(pieces, part_bytes)) for part_bytes in (1, DOCUMENT_BYTES, 100_000)]
    assert groups[0] == groups[1] > groups[2] > 1
    if kind == "paragraphs":
        raw = text.encode()
        assert all(raw[record.offset - 2 : record.offset] == b"\n\n" for record in records(whole)[1:])


@pytest.mark.parametrize("codec", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["paragraphs", "one line"])
def test_a_compressed_text_is_the_documents_of_the_text(tmp_path, kind, codec):
    compress = gzip.compress if codec == ".gz" else zstandard.ZstdCompressor().compress
    for name, size in (("big", WHOLE_FILE_BYTES + 5 * DOCUMENT_BYTES), ("small", 1000)):
        data = big_text(kind, size).encode()
        (tmp_path / f"{name}.txt").write_bytes(data)
        (tmp_path / f"{name}.txt{codec}").write_bytes(compress(data))
        plain = read_all(corpus_of(tmp_path / f"{name}.txt"))
        packed = read_all(corpus_of(tmp_path / f"{name}.txt{codec}"))
        assert [(record.text, record.offset) for record in packed] == [(record.text, record.offset) for record in plain]


@pytest.mark.parametrize("size", [DOCUMENT_BYTES * 20 + extra for extra in range(-3, 5)])
def test_no_cut_lies_inside_a_character(tmp_path, size):
    for character in ("é", "模", "🙂"):
        text = "x" * (size % len(character.encode())) + character * (size // len(character.encode()))
        (tmp_path / "a.txt").write_bytes(text.encode())
        found = read_all(corpus_of(tmp_path))
        assert not failures(found) and "".join(texts(found)) == text


def test_first_cut():
    assert first_cut(b"a\nb\n \t\r\nc\n\n") == 8
    assert first_cut(b"a\nb") == 2
    assert first_cut("🙂".encode()[1:] + b"abc") == 3
    assert first_cut(b"abc") == first_cut(b"\x80" * 100) == 0


def test_newlines_and_byte_order_mark_are_normalised(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert texts(read_all(corpus_of(tmp_path))) == ["one\ntwo\nthree\n"]


def test_what_is_no_text_is_quarantined_with_its_place(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine so far \xff\xfe and on")
    (tmp_path / "nul.txt").write_bytes(b"abc\0def")
    (tmp_path / "good.txt").write_bytes(b"good")
    found = {os.path.basename(item.path): item for item in read_all(corpus_of(tmp_path))}
    assert isinstance(found["good.txt"], Record)
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


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_of_a_damaged_text_the_whole_documents_count(tmp_path, codec):
    text = "".join(f"{n * 7919}\n\n" for n in range(200_000)).encode()
    compress = gzip.compress if codec == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.txt{codec}"
    path.write_bytes(compress(text))
    whole = read_all(corpus_of(tmp_path))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    found = read_all(corpus_of(tmp_path))
    kept = len(found) - 1
    assert kept > 10 and found[:kept] == whole[:kept]
    assert found[-1].offset == whole[kept].offset and "too early" in found[-1].reason
    (tmp_path / "b.txt.gz").write_text("this is no gzip data")
    assert [item.reason for item in read_all(corpus_of(tmp_path / "b.txt.gz"))] == ["no gzip data"]


def test_a_file_of_code_is_one_document_or_too_long(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\r\n" * 100_000)
    (tmp_path / "b.py").write_text("y" * (LIMITS.max_document_bytes + 1))
    (tmp_path / "c.py.gz").write_bytes(gzip.compress(bytes(50 << 20)))
    found = {os.path.basename(item.path): item for item in read_all(corpus_of(tmp_path, format="code"), 1)}
    assert found["a.py"].text == "x = 1\n" * 100_000
    reason = "a file of more than data.max_document_bytes=1048576"
    assert found["b.py"].reason == found["c.py.gz"].reason == reason and len(found) == 3
    (found,) = read_all(corpus_of(tmp_path / "c.py.gz", format="code"), limits=Limits(1 << 20, 1000))
    assert found.reason == "more text than data.max_decompressed_bytes=1000"


def test_a_binary_file_is_counted_and_not_listed_document_by_document(tmp_path):
    (tmp_path / "zeros.txt.gz").write_bytes(gzip.compress(bytes(20 << 20)))
    found = read_all(corpus_of(tmp_path))
    assert len(found) == 101 and found[100].offset == 100 * DOCUMENT_BYTES
    assert (found[100].reason, found[100].records) == (
        "binary: it has a NUL byte",
        (20 << 20) // DOCUMENT_BYTES - 100,
    )


def test_a_file_that_changed_since_it_was_listed_stops_the_reading(tmp_path):
    (tmp_path / "a.txt").write_text("something")
    corpus = corpus_of(tmp_path)
    ((piece,),) = corpus.pieces
    other = replace(piece, file=replace(piece.file, size=piece.file.size + 1))
    with pytest.raises(DataError, match="put the source on storage that every machine sees"):
        list(read_piece(corpus.sources[0], other, LIMITS))
