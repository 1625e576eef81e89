import json
import os
import sysconfig

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data_config import SourceConfig
from pipelines.sources import (
    DOCUMENT_BYTES,
    FILES_IN_GROUP,
    WHOLE_FILE_BYTES,
    DataError,
    Piece,
    SourceFile,
    find_corpus,
    group_pieces,
)
from tests.pipelines.reading import corpus_of, read_all, records, texts


def paths(corpus):
    return sorted({piece.file.path for pieces in corpus.pieces for piece in pieces})


def left_out(corpus):
    return {os.path.basename(item.path): item.reason for items in corpus.left_out for item in items}


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
    root = sysconfig.get_paths()["stdlib"]
    found = records(read_all(corpus))
    for record in found[:100]:
        with open(os.path.join(root, record.path.removeprefix("stdlib/")), encoding="utf-8") as file:
            assert record.text == file.read()
    assert len(found) > 100 and corpus.fingerprint == corpus_of("stdlib").fingerprint
    assert all(group[0].unit == 0 for group in group_pieces(corpus.pieces[0], 1))
    with pytest.raises(DataError, match="it is source code, and not of format parquet; leave format out"):
        corpus_of("stdlib", format="parquet")


def test_folder_is_read_recursively_without_hidden_files(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".hidden").write_text("hidden")
    (folder / "empty.txt").touch()
    corpus = corpus_of(folder)
    assert paths(corpus) == ["a.txt", "b.txt", "deep/c.md", "deep/er/d"]
    assert set(texts(read_all(corpus))) == {
        f"this is {name}\n" * 10 for name in ("a.txt", "b.txt", "deep/c.md", "deep/er/d")
    }
    hidden = "hidden: its name begins with a dot"
    assert left_out(corpus) == {".git": hidden, ".hidden": hidden, "empty.txt": "empty"}


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_single_file(folder, form):
    corpus = corpus_of(form.format(folder / "deep" / "c.md"))
    assert paths(corpus) == ["c.md"]
    (record,) = records(read_all(corpus))
    assert record.text == "this is deep/c.md\n" * 10 and record.path == (folder / "deep" / "c.md").as_uri()


def test_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert paths(corpus_of("deep")) == ["c.md", "er/d"]
    assert paths(corpus_of("a.txt")) == ["a.txt"]


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.uri='/nowhere/at/all': it does not exist; give"):
        corpus_of("/nowhere/at/all")
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.uri='ftp://x/y': .*unknown scheme"):
        corpus_of("ftp://x/y")
    with pytest.raises(DataError, match="it is neither a file nor a folder"):
        corpus_of("/dev/null")
    with pytest.raises(DataError, match=r"data\.decontaminate\.sources\[0\]\.uri=.* has no files"):
        find_corpus([SourceConfig(uri=str(tmp_path))], field="data.decontaminate.sources")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"yields no text \(.*empty.txt: empty\); point it at files with text"):
        corpus_of(tmp_path)


def test_the_fingerprint_follows_the_files(folder):
    before = corpus_of(folder).fingerprint
    assert corpus_of(folder).fingerprint == before
    stamp = (folder / "a.txt").stat().st_mtime_ns + 1_000_000
    os.utime(folder / "a.txt", ns=(stamp, stamp))
    changed = corpus_of(folder).fingerprint
    (folder / "b.txt").rename(folder / "z.txt")
    assert len({before, changed, corpus_of(folder).fingerprint}) == 3


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["a.jsonl", "sub/b.ndjson.gz", "c.JSONL.ZST", "README.md", "LICENSE"], "jsonl"),
        (["a.csv", "b.tsv"], "csv"),
        (["a.parquet", "_SUCCESS", "_metadata"], "parquet"),
        (["data-0.arrow", "state.json", "dataset_info.json"], "arrow"),
        (["a.txt", "b", "README.md", "c.md.gz"], "text"),
        (["README.md"], "text"),
    ],
)
def test_the_format_goes_by_the_suffixes(tmp_path, names, format):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    corpus = corpus_of(tmp_path)
    assert corpus.sources[0].format == format
    beside = {"README.md", "LICENSE", "_SUCCESS", "_metadata", "state.json", "dataset_info.json"} & set(names)
    assert set(left_out(corpus)) == (set() if format == "text" else beside)
    assert set(paths(corpus)) == set(names) - set(left_out(corpus))


def test_suffixes_that_disagree_or_say_nothing_need_a_format(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "notes.txt"):
        (tmp_path / name).write_text('{"text": "hello"}\n')
    with pytest.raises(DataError, match=r"\(jsonl: 2, such as 'a.jsonl', text: 1, such as 'notes.txt'\); set format"):
        corpus_of(tmp_path)
    assert texts(read_all(corpus_of(tmp_path, format="jsonl"))) == ["hello"] * 3
    assert paths(corpus_of(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "x.json").write_text('{"text": "hello"}\n')
    with pytest.raises(DataError, match=r"\(json: 1, such as 'x.json'\); set format, such as jsonl if each line is an"):
        corpus_of(tmp_path / "x.json")
    assert texts(read_all(corpus_of(tmp_path / "x.json", format="jsonl"))) == ["hello"]


def test_a_source_tree_is_its_source_code(tmp_path):
    code = ["a.py", "sub/b.cpp", "Makefile", "sub/c.py.gz"]
    for name in [*code, "logo.png", "data.csv", "node_modules/x/index.js", "README.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    corpus = corpus_of(tmp_path, format="code")
    assert paths(corpus) == sorted(code)
    assert left_out(corpus)["logo.png"] == "no source code, by its name"
    assert left_out(corpus)["index.js"] == "in node_modules, which holds no source code of its own"


def test_columns_that_nothing_is_read_from_are_refused(folder):
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.metadata_columns=\['id'\]: format text has no columns"):
        corpus_of(folder, metadata_columns=("id",))
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.text_column='body': format code has no such column"):
        corpus_of(folder, format="code", text_column="body")


def test_of_a_saved_data_set_only_its_own_files_count(tmp_path):
    names = ["data-0.arrow", "data-1.arrow"]
    for name in ("train/data-0.arrow", "train/cache-123.arrow", "train/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("content")
    (tmp_path / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    corpus = corpus_of(tmp_path)
    assert paths(corpus) == ["train/data-0.arrow"]
    assert left_out(corpus)["cache-123.arrow"] == "train/state.json does not name it"
    (missing,) = corpus.quarantined
    assert missing.path.endswith("train/data-1.arrow") and missing.reason.endswith("names it, and it is not there")


@given(st.lists(st.integers(1, 3 * WHOLE_FILE_BYTES), max_size=30), st.integers(1, WHOLE_FILE_BYTES * 2))
def test_groups_hold_every_byte_once_in_order(sizes, part_bytes):
    pieces = [
        Piece(SourceFile(0, str(index), size), 0, size, DOCUMENT_BYTES if size > WHOLE_FILE_BYTES else 0)
        for index, size in enumerate(sizes)
    ]
    groups = group_pieces(pieces, part_bytes)
    flat = [piece for group in groups for piece in group]
    joined = []
    for piece in flat:
        if joined and joined[-1].file == piece.file:
            assert piece.begin == joined[-1].end and piece.begin % DOCUMENT_BYTES == 0
            joined[-1] = Piece(piece.file, joined[-1].begin, piece.end, piece.unit)
        else:
            joined.append(piece)
    assert joined == pieces
    for group in groups[:-1]:
        assert sum(piece.size for piece in group) >= part_bytes > sum(piece.size for piece in group[:-1])


def test_a_group_of_tiny_files_is_bounded_by_their_number():
    pieces = [Piece(SourceFile(0, str(index), 1), 0, 1) for index in range(2 * FILES_IN_GROUP + 1)]
    assert [len(group) for group in group_pieces(pieces, 1 << 20)] == [FILES_IN_GROUP, FILES_IN_GROUP, 1]


@pytest.mark.parametrize("format", ["auto", "text", "jsonl"])
def test_archives_are_no_text(tmp_path, format):
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    for name in ("a.tar.gz", "b.ZIP", "c.jsonl.xz"):
        (tmp_path / name).write_bytes(b"letters that look like text\n" * 20_000)
    corpus = corpus_of(tmp_path, format=format)
    assert [piece.file.path for piece in corpus.pieces[0]] == ["good.jsonl"]
    assert [item.reason for item in corpus.quarantined] == [
        "an archive (.tar); unpack it first",
        "an archive (.zip); unpack it first",
        "compressed with xz, and only gzip and zstd are read; decompress it first",
    ]
    (tmp_path / "good.jsonl").unlink()
    with pytest.raises(DataError, match=r"yields no text .*a\.tar\.gz: an archive \(\.tar\); unpack it first"):
        corpus_of(tmp_path, format=format)
