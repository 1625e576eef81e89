"""JSONL and CSV against the standard library's own readers."""

import csv
import gzip
import io
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import lines
from pipelines.formats import Limits
from pipelines.lines import read_jsonl, segments
from pipelines.records import RecordMaker
from pipelines.sources import DOCUMENT_BYTES
from tests.pipelines.reading import LIMITS, corpus_of, failures, read_all, records, texts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.jsonl").write_text("{}")
    return corpus_of(folder).sources[0]


def write(path, data, codec=None):
    if codec == ".gz":
        data = gzip.compress(data)
    elif codec == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.with_name(path.name + (codec or "")).write_bytes(data)


@given(st.binary(max_size=2000).map(lambda data: data.replace(b"a", b"\n")), st.integers(1, 50), st.integers(0, 30))
def test_segments_are_lines(data, max_bytes, begin):
    lines, parts = [], []
    for at, part, ends in segments(io.BytesIO(data).read, begin, max_bytes):
        assert at == begin + sum(map(len, lines)) + len(lines) + sum(map(len, parts))
        parts.append(part)
        if ends:
            lines.append(b"".join(parts))
            parts = []
    if parts:
        lines.append(b"".join(parts))
    assert lines == [line.removesuffix(b"\n") for line in io.BytesIO(data)]


LINES = st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace")),
    st.sampled_from(
        [b"", b"  ", b"[1]", b"{", b'{"text": null}', b'{"other": ""}', b"\xff\xfe", b'{"text":"\\ud800"}', b"7"]
    ),
    st.integers(60, 200).map(lambda size: json.dumps({"text": "x" * size}).encode()),
)


@settings(max_examples=300)
@given(st.lists(LINES, max_size=30), st.lists(st.integers(1, 1500), max_size=8), st.booleans())
def test_the_records_are_the_same_however_a_file_is_divided(source, lines, cuts, ends):
    data = b"\n".join(lines) + b"\n" * (ends and bool(lines))
    limits = Limits(100, 1 << 30)

    def read(begin, end):
        stream = io.BytesIO(data)
        stream.seek(max(0, begin - 1))
        return list(read_jsonl(stream.read, begin, end, RecordMaker(source, "name", limits)))

    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    divided = [found for begin, end in zip(bounds, bounds[1:], strict=False) for found in read(begin, end)]
    assert divided == read(0, None)
    expected, at = [], 0
    for line in data.split(b"\n"):
        try:
            text = json.loads(line)["text"]
            text.encode()
            if len(line) <= 100 and "\0" not in text:
                expected.append((at, text))
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        at += len(line) + 1
    assert [(record.offset, record.text) for record in records(divided)] == expected
    filled = sum(1 for line in data.split(b"\n") if line.strip())
    assert len(divided) == filled


@pytest.mark.parametrize("codec", [None, ".gz", ".zst"])
def test_jsonl_with_metadata(tmp_path, codec):
    rows = [
        {"text": f"text {n} naïve 模型\r\n", "id": n, "tags": ["a", {"b": None}], "score": 0.5} for n in range(5000)
    ]
    del rows[1]["score"]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode(), codec)
    found = read_all(corpus_of(tmp_path, metadata_columns=("tags", "id", "score")), DOCUMENT_BYTES)
    assert texts(found) == [row["text"] for row in rows] and not failures(found)
    assert [json.loads(record.metadata) for record in records(found)] == [
        {key: row[key] for key in row if key != "text"} for row in rows
    ]
    assert records(found)[0].metadata == '{"id": 0, "score": 0.5, "tags": ["a", {"b": null}]}'


def test_what_is_no_record_is_quarantined_with_its_place(tmp_path):
    lines = {
        b'\xef\xbb\xbf{"text": "first"}': None,
        b'{"text": "good"}': None,
        b'{"text": "half': "no JSON: Invalid control character at character 14",
        b'{"text": 7}': "'text' is a number, and no text",
        b'{"text": null}': "'text' is null, and no text",
        b'{"body": "x", "id": 1}': "no key 'text'; it has 'body', 'id'",
        b"{}": "no key 'text'; it has none",
        b'{"messages": []}': "no key 'text'; it has 'messages'; for conversations set format: chat",
        b'{"conversations": []}': "no key 'text'; it has 'conversations'; for conversations set format: chat and text_",
        b'{"' + b"k" * 300 + b'": 1}': f"no key 'text'; it has '{'k' * 199}...",
        b'["text"]': "a list, and no object with keys",
        b'{"text": "\\ud800"}': "half of a surrogate pair, which stands for no character",
        b'{"text": "a\\u0000b"}': "binary: it has a NUL byte",
        b"[" * 100_000: "no JSON that can be read",
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "no JSON that can be read",
        b'{"text": "\xff"}': "not UTF-8: invalid start byte",
        b'{"text": "last"}': None,
    }
    (tmp_path / "a.jsonl").write_bytes(b"\r\n\n".join(lines))
    found = read_all(corpus_of(tmp_path))
    assert texts(found) == ["first", "good", "last"]
    at = 0
    expected = []
    for line, reason in lines.items():
        if reason:
            expected.append((at + (10 if b"\xff" in line else 0), reason))
        at += len(line) + 3
    for item, (offset, reason) in zip(failures(found), expected, strict=True):
        assert item.offset == offset and item.reason.startswith(reason)


def test_a_line_without_end_costs_itself_alone(tmp_path):
    long = b'{"text": "' + b"x" * (3 << 20) + b'"}'
    data = b'{"text": "before"}\n' + long + b'\n{"text": "after"}\n' + long
    (tmp_path / "a.jsonl").write_bytes(data)
    for part_bytes in (1 << 30, 1 << 19):
        found = read_all(corpus_of(tmp_path), part_bytes)
        assert texts(found) == ["before", "after"]
        assert [item.offset for item in failures(found)] == [19, len(data) - len(long)]
        assert failures(found)[0].reason == f"{len(long)} bytes, more than data.max_document_bytes=1048576"


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_of_a_truncated_file_the_whole_lines_count(tmp_path, codec):
    rows = [json.dumps({"text": f"{n} {n * 7919 % 10007}"}) for n in range(20_000)]
    write(tmp_path / "a.jsonl", "\n".join(rows).encode(), codec)
    path = tmp_path / f"a.jsonl{codec}"
    path.write_bytes(path.read_bytes()[:-1000])
    found = read_all(corpus_of(tmp_path))
    (failure,) = failures(found)
    kept = len(records(found))
    assert found[-1] == failure and 10_000 < kept < 20_000
    assert texts(found) == [json.loads(row)["text"] for row in rows[:kept]]
    assert failure.offset == sum(len(row) + 1 for row in rows[:kept]) and "too early" in failure.reason
    bounded = read_all(corpus_of(tmp_path), limits=Limits(1 << 20, 10_000))
    assert "data.max_decompressed_bytes=10000" in failures(bounded)[0].reason
    assert sum(len(row) + 1 for row in rows[: len(records(bounded)) + 1]) > 10_000


def test_garbage_is_counted_and_not_listed_line_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"x\n" * 5000 + b'{"text": "good"}\n' + b"y\n" * 101)
    found = read_all(corpus_of(tmp_path))
    assert texts(found) == ["good"] and len(failures(found)) == 101 + 101
    assert (found[100].offset, found[100].records) == (200, 4900)


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=200)
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=20), st.sampled_from(["\n", "\r\n"]))
def test_csv_is_what_pythons_reader_reads(tmp_path_factory, rows, newline):
    folder = tmp_path_factory.getbasetemp() / "csv"
    folder.mkdir(exist_ok=True)
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            # a lone carriage return is a line end to the reader, and the writer would not quote it
            writer = csv.writer(file, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
            writer.writerows([("id", "text", "more"), *rows])
        found = read_all(corpus_of(folder / name, metadata_columns=("id",)))
        with open(folder / name, newline="", encoding="utf-8") as file:
            expected = list(csv.DictReader(file, delimiter=delimiter))
        assert texts(found) == [row["text"] for row in expected] == [row[1] for row in rows]
        assert [json.loads(record.metadata)["id"] for record in records(found)] == [row[0] for row in rows]
        assert [record.offset for record in records(found)] == list(range(len(rows)))


def test_broken_rows_of_csv_cost_themselves(tmp_path):
    rows = [
        b"id,text",
        b'1,"good, and ""quoted"""',
        b'2,"closed" too early',
        b"3,one,too many",
        b"",
        b"4",
        b"5,\xff\xfe",
        b'6,a 5" disk',
        b"7,nul\0",
        b"8," + b"x" * (2 << 20),
        b'9,"' + b'y"",\n' * (1 << 18) + b'"',
        b"10,last",
        b'11,"never closed',
        b"12,swallowed",
    ]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows))
    found = read_all(corpus_of(tmp_path))
    assert [(record.offset, record.text) for record in records(found)] == [
        (0, 'good, and "quoted"'),
        (5, 'a 5" disk'),
        (9, "last"),
    ]
    reasons = [(item.offset, item.reason) for item in failures(found)]
    assert reasons == [
        (1, "no CSV: ',' expected after '\"' (21 bytes are lost)"),
        (2, "no CSV: 3 fields where the header has 2"),
        (3, "no CSV: 1 fields where the header has 2"),
        (4, "not UTF-8"),
        (6, "binary: it has a NUL byte"),
        (7, f"{(2 << 20) + 3} bytes, more than data.max_document_bytes=1048576"),
        (8, f"{5 * (1 << 18) + 5} bytes in {(1 << 18) + 1} lines, more than data.max_document_bytes=1048576"),
        (10, "no CSV: unexpected end of data (30 bytes are lost)"),
    ]


def as_csv(row):
    """Quotes only where they must be: a bare field may have some inside, as in `27" screen`."""
    bare = [not (cell.startswith('"') or set(cell) & set(",\n")) for cell in row]
    return ",".join(
        cell if is_bare else '"' + cell.replace('"', '""') + '"' for cell, is_bare in zip(row, bare, strict=True)
    )


@settings(max_examples=400)
@given(st.lists(st.lists(st.text('"",\nax', max_size=12), min_size=2, max_size=2), max_size=12), st.integers(1, 9))
def test_a_record_of_csv_that_is_too_long_costs_itself_alone(source, rows, block_bytes):
    limit = 20
    written = [as_csv(row) + "\n" for row in rows]
    data = "".join(["a,text\n", *written]).encode()
    maker = RecordMaker(source, "a.csv", Limits(limit, 1 << 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_BLOCK_BYTES", block_bytes)
        found = list(lines.read_csv(io.BytesIO(data).read, ",", maker))
    assert [(item.offset, item.text) for item in records(found)] == [
        (number, row[1]) for number, row in enumerate(rows) if len(written[number]) <= limit
    ]
    assert [item.offset for item in failures(found)] == [
        number for number, record in enumerate(written) if len(record) > limit
    ]


def test_lines_before_the_header_of_csv_and_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\n\r\ntext,page\n"a","b"\nc,\xff\n')
    found = read_all(corpus_of(tmp_path, metadata_columns=("page",)))
    assert texts(found) == ["a"] and [(item.offset, item.reason) for item in failures(found)] == [(1, "not UTF-8")]


def test_byte_order_marks_of_files_behind_each_other(tmp_path):
    line = b'\xef\xbb\xbf{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 2 + b'\xef\xbb\xbf{"text": "\xff"}\n')
    found = read_all(corpus_of(tmp_path))
    assert texts(found) == ["good"] * 2 and [item.offset for item in failures(found)] == [2 * len(line) + 13]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\xff")
    assert [item.offset for item in read_all(corpus_of(tmp_path / "a.txt"))] == [6]


def test_a_csv_without_the_column_is_one_failure(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,x\n2,y\n")
    (failure,) = read_all(corpus_of(tmp_path))
    assert failure.reason == "no column 'text'; it has 'id', 'body'"
    assert texts(read_all(corpus_of(tmp_path, text_column="body"))) == ["x", "y"]
    (failure,) = read_all(corpus_of(tmp_path, text_column="body", metadata_columns=("url",)))
    assert failure.reason == "no column 'url'; it has 'id', 'body'"
    (tmp_path / "a.csv").write_bytes(b'\xff,"two\nlines"\n1,x\n')
    (failure,) = read_all(corpus_of(tmp_path))
    assert failure.reason == r"no column 'text'; it has '\udcff', 'two\nlines'"


@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_compressed_csv_and_its_damage(tmp_path, codec):
    data = "text\n" + "\n".join(str(n * 7919) for n in range(20_000))
    write(tmp_path / "a.csv", data.encode(), codec)
    assert texts(read_all(corpus_of(tmp_path))) == data.split("\n")[1:]
    path = tmp_path / f"a.csv{codec}"
    path.write_bytes(path.read_bytes()[:-1000])
    found = read_all(corpus_of(tmp_path))
    kept = texts(found)
    assert 5000 < len(kept) < 20_000 and kept == data.split("\n")[1 : len(kept) + 1]
    assert failures(found)[0].offset == len(kept) and found[-1] == failures(found)[0]
    bounded = Limits(LIMITS.max_document_bytes, 1000)
    assert failures(read_all(corpus_of(tmp_path), limits=bounded))[0].reason.endswith("max_decompressed_bytes=1000")


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_conversations_and_preferences(tmp_path):
    lines = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"conversation": CHAT}, {"messages": "text"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_all(corpus_of(tmp_path / "chat.jsonl", format="chat"))
    assert [json.loads(text) for text in texts(found)] == [CHAT] and len(failures(found)) == 3
    named = read_all(corpus_of(tmp_path / "chat.jsonl", format="chat", text_column="conversation"))
    assert [json.loads(text) for text in texts(named)] == [CHAT]
    good = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    lines = [good | {"id": 7}, {"prompt": "x", "chosen": "y"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = corpus_of(tmp_path / "p.jsonl", format="preference", metadata_columns=("id",))
    found = read_all(corpus)
    assert corpus.sources[0].kind == "preference" and len(failures(found)) == 1
    assert [json.loads(text) for text in texts(found)] == [good]
    assert records(found)[0].metadata == '{"id": 7}'
