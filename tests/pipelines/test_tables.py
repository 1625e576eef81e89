"""Parquet and Arrow against pyarrow's own readers and the `datasets` library."""

import datetime
import json
import random

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from pipelines import sources
from pipelines.formats import Limits
from tests.pipelines.reading import LIMITS, corpus_of, failures, read_all, records, texts

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def make_table(rows=1000, kind=None, seed=0):
    generator = random.Random(seed)
    column = [f"text {n} naïve 模型 " * generator.randint(1, 50) for n in range(rows)]
    column[7] = "\r\n"
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(n) for n in range(rows)]
    return pa.table({"id": range(rows), "text": pa.array(column, kind or pa.string()), "day": days})


def write(table, path, form):
    if form == "parquet":
        pq.write_table(table, path, row_group_size=90)
    elif form == "feather":
        feather.write_feather(table, path, compression="zstd", chunksize=100)
    else:
        opened = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)


FORMS = {"parquet": "a.parquet", "feather": "a.feather", "file": "a.arrow", "stream": "a.arrow"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_are_what_pyarrow_reads(tmp_path, form, kind):
    table = make_table(kind=kind)
    write(table, tmp_path / FORMS[form], form)
    found = read_all(corpus_of(tmp_path, metadata_columns=("id", "day")))
    assert texts(found) == table["text"].to_pylist() and not failures(found)
    assert [record.offset for record in records(found)] == list(range(1000))
    assert records(found)[3].metadata == '{"day": "2024-01-04", "id": 3}'
    assert records(found)[3].path == (tmp_path / FORMS[form]).as_uri()


def test_row_groups_are_read_once_however_the_file_is_divided(tmp_path, monkeypatch):
    table = make_table()
    write(table, tmp_path / "a.parquet", "parquet")
    for unit in (1000, 5000):
        monkeypatch.setattr(sources, "PARQUET_BYTES", unit)
        corpus = corpus_of(tmp_path)
        (group, *more) = sources.group_pieces(corpus.pieces[0], unit)
        assert len(more) >= (tmp_path / "a.parquet").stat().st_size // unit - 1 and len(group) == 1
        assert texts(read_all(corpus, unit)) == table["text"].to_pylist()


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_no_text(tmp_path, form):
    bad = pa.array([b"good", b"\xff", None, b"a\0b", b"x" * 2000], pa.binary())
    table = pa.table({"text": pa.StringArray.from_buffers(5, *bad.buffers()[1:], bad.buffers()[0], 1)})
    write(table, tmp_path / FORMS[form], form)
    found = read_all(corpus_of(tmp_path), limits=Limits(1024, 1 << 30))
    assert texts(found) == ["good"]
    assert [(item.offset, item.reason) for item in failures(found)] == [
        (1, "not UTF-8"),
        (2, "'text' is null, and no text"),
        (3, "binary: it has a NUL byte"),
        (4, "2000 bytes, more than data.max_document_bytes=1024"),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_tables_without_the_text(tmp_path, form):
    write(pa.table({"body": ["x"] * 3, "text": range(3)}), tmp_path / FORMS[form], form)
    (failure,) = read_all(corpus_of(tmp_path))
    assert failure.reason == "column 'text' is int64, and no text"
    assert failure.records == (3 if form == "parquet" else 1)  # only Parquet says in one place how many it has
    (failure,) = read_all(corpus_of(tmp_path, text_column="content"))
    assert failure.reason == "no column 'content'; it has 'body', 'text'"
    (failure,) = read_all(corpus_of(tmp_path, text_column="body", metadata_columns=("url",)))
    assert failure.reason == "no column 'url'; it has 'body', 'text'"


@pytest.mark.parametrize("form", FORMS)
def test_files_that_are_none_or_cut_off(tmp_path, form):
    table = make_table()
    path = tmp_path / FORMS[form]
    write(table, path, form)
    data = path.read_bytes()
    for cut in (5, len(data) // 2, len(data) - 4, len(data) - 8):
        path.write_bytes(data[:cut])
        found = read_all(corpus_of(tmp_path))
        assert len(failures(found)) == 1 and found[-1] == failures(found)[0]
        assert texts(found) == table["text"].to_pylist()[: len(records(found))]
        assert failures(found)[0].offset == len(records(found))
        if form == "stream":
            assert len(records(found)) >= 900 * (cut > len(data) - 9)
    path.write_bytes(b"this is something else")
    (failure,) = read_all(corpus_of(tmp_path))
    assert failure.offset == 0 and failure.reason.startswith("no ")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{path.name}.gz").write_bytes(data)
    (failure,) = read_all(corpus_of(tmp_path / "sub"))
    assert failure.reason.startswith(f"a {'parquet' if form == 'parquet' else 'arrow'} file inside gzip")


@pytest.mark.parametrize("size", range(8))
def test_a_stream_that_is_cut_anywhere_loses_nothing_in_silence(tmp_path, size):
    """Between two batches too, where what is padding looks like the mark of the end."""
    table = pa.table({"text": [letter * (size + 1) for letter in "abcdefg"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    data = (tmp_path / "a.arrow").read_bytes()
    for cut in range(1, len(data)):
        (tmp_path / "a.arrow").write_bytes(data[:cut])
        found = read_all(corpus_of(tmp_path))
        assert texts(found) == table["text"].to_pylist()[: len(records(found))] and len(failures(found)) == 1


def test_streams_behind_each_other_and_what_is_none(tmp_path):
    write(make_table(150), tmp_path / "a.arrow", "stream")
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data * 2)
    found = read_all(corpus_of(tmp_path))
    assert texts(found) == make_table(150)["text"].to_pylist() * 2 and not failures(found)
    for more in (b"rubbish" + bytes(4), bytes(4), bytes(8)):
        (tmp_path / "a.arrow").write_bytes(data + more)
        found = read_all(corpus_of(tmp_path))
        assert len(records(found)) == 150 and [item.offset for item in failures(found)] == [150]


@pytest.mark.parametrize("form", ["feather", "compressed"])
def test_a_damaged_record_batch_costs_no_other(tmp_path, form):
    table = make_table()
    path = tmp_path / "a.arrow"
    if form == "feather":
        write(table, path, form)
    else:
        with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table, max_chunksize=100)
    data = path.read_bytes()
    blocks = [at for at in range(len(data)) if data.startswith(b"\x28\xb5\x2f\xfd", at)]
    path.write_bytes(data[: blocks[17]] + b"\0\0\0\0" + data[blocks[17] + 4 :])  # of the fifth batch
    found = read_all(corpus_of(path))
    assert texts(found) == [text for row, text in enumerate(table["text"].to_pylist()) if not 400 <= row < 500]
    (failure,) = failures(found)
    assert failure.offset == 400 and "cannot be read" in failure.reason


@pytest.mark.parametrize("form", ["feather", "file"])
def test_of_a_file_without_its_footer_whole_batches_count(tmp_path, form):
    table = make_table()
    write(table, tmp_path / "a.arrow", form)
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) * 9 // 10])
    found = read_all(corpus_of(tmp_path))
    assert len(records(found)) in (800, 900) and texts(found) == table["text"].to_pylist()[: len(records(found))]
    (failure,) = failures(found)
    assert failure.offset == len(records(found))


NESTED = {
    "dictionary": lambda text: pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 1, 0]), text.slice(0, 3)),
    "string_view": lambda text: text.view(pa.binary()).cast(pa.binary_view()).view(pa.string_view()),
    "chat": lambda text: pa.ListArray.from_arrays(
        pa.array(range(6), pa.int32()),
        pa.StructArray.from_arrays([pa.array(["assistant"] * 5), text], ["role", "content"]),
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_what_is_no_utf8_costs_its_own_row_only(tmp_path, kind):
    buffers = pa.array([b"good", b"\xff\xfe", b"fine", b"\xff\xfe", b"good"], pa.binary()).buffers()
    column = NESTED[kind](pa.StringArray.from_buffers(5, buffers[1], buffers[2]))
    table = pa.table({"messages" if kind == "chat" else "text": column})
    write(table, tmp_path / "a.arrow", "file")
    found = read_all(corpus_of(tmp_path, format="chat" if kind == "chat" else "arrow"))
    assert [record.offset for record in records(found)] == [0, 2, 4]
    assert [(item.offset, item.reason) for item in failures(found)] == [(1, "not UTF-8"), (3, "not UTF-8")]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_what_shares_memory_is_counted_once_for_each_row(tmp_path, kind):
    column = [f"{row} " * 50 for row in range(3000)]
    write(pa.table({"text": pa.array(column).cast(kind)}), tmp_path / "a.feather", "feather")
    size = sum(map(len, column))
    assert len(records(read_all(corpus_of(tmp_path), limits=Limits(1 << 20, size)))) == 3000
    found = read_all(corpus_of(tmp_path), limits=Limits(1 << 20, size // 2))
    assert 1400 < len(records(found)) < 1700 and len(failures(found)) == 1


def test_text_that_is_not_compressed_is_read_whatever_its_size(tmp_path):
    write(make_table(), tmp_path / "a.arrow", "file")
    found = read_all(corpus_of(tmp_path), limits=Limits(1 << 20, 1000))
    assert len(records(found)) == 1000 and not failures(found)


def test_metadata_is_bounded_too(tmp_path):
    table = pa.table({"text": ["a", "b"], "page": ["x" * 5000, "y"]})
    write(table, tmp_path / "a.parquet", "parquet")
    found = read_all(corpus_of(tmp_path, metadata_columns=("page",)), limits=Limits(1024, 1 << 30))
    assert texts(found) == ["b"]
    assert failures(found)[0].reason == "5012 bytes of metadata, more than data.max_document_bytes=1024"


@pytest.mark.parametrize("form", FORMS)
def test_wrong_bytes_never_end_the_process(tmp_path, form):
    """Parquet says how many rows it has: of those nothing is lost in silence."""
    table = make_table(300)
    path = tmp_path / FORMS[form]
    write(table, path, form)
    data = path.read_bytes()
    generator = random.Random(1)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(generator.choice([1, 3, 20])):
            at = generator.choice([generator.randrange(len(data)), max(0, len(data) - generator.randint(1, 600))])
            broken[at] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, broken[at] ^ (1 << generator.randrange(8))])
        path.write_bytes(broken)
        found = read_all(corpus_of(tmp_path))
        assert failures(found) or len(records(found)) == 300 or form != "parquet"


@pytest.mark.parametrize("form", ["file", "parquet"])
def test_values_that_python_cannot_hold_cost_nothing_else(tmp_path, form):
    times = pa.array([0, 2**62, None], pa.int64()).cast(pa.timestamp("us"))
    write(pa.table({"text": ["a", "b", "c"], "seen": times}), tmp_path / FORMS[form], form)
    found = records(read_all(corpus_of(tmp_path, metadata_columns=("seen",))))
    assert [record.text for record in found] == ["a", "b", "c"]
    assert [json.loads(record.metadata)["seen"] for record in found] == [
        "1970-01-01 00:00:00",
        "date value out of range",
        None,
    ]
    said = pa.array([[{"role": "assistant", "content": "hello", "at": at}] for at in (0, 2**62)])
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "at": pa.timestamp("us")}))
    write(pa.table({"messages": said.cast(kind)}), tmp_path / FORMS[form], form)
    found = read_all(corpus_of(tmp_path, format="chat"))
    assert [(item.offset, item.reason) for item in failures(found)][-1] == (1, "date value out of range")


@pytest.mark.parametrize("form", ["file", "parquet"])
def test_a_dictionary_counts_as_much_as_the_rows_that_use_it(tmp_path, form):
    names = [f"{number} " * 100 for number in range(1000)]
    column = pa.DictionaryArray.from_arrays(pa.array(range(1000), pa.int32()), names)
    table = pa.table({"text": [str(number) for number in range(1000)], "name": column})
    write(table, tmp_path / FORMS[form], form)
    corpus = corpus_of(tmp_path, metadata_columns=("name",))
    assert len(records(read_all(corpus, limits=Limits(1 << 20, 500_000)))) == 1000


def test_a_value_of_a_dictionary_may_stand_in_every_row(tmp_path):
    """A file of some kilobytes with gigabytes of text is read in bounded memory, up to its bound."""
    big = "x" * (4 << 20)
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), [big])})
    pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    found = read_all(corpus_of(tmp_path), limits=Limits(8 << 20, 100 << 20))
    assert 16 <= len(records(found)) <= 25 and len(failures(found)) == 1
    assert failures(found)[0].reason.startswith("more text than data.max_decompressed_bytes=104857600")
    assert pa.total_allocated_bytes() < 200 << 20


def test_saved_data_sets(tmp_path):
    import datasets

    table = make_table(500)
    data = datasets.Dataset(table)
    datasets.DatasetDict({"train": data, "test": data.select(range(100, 120)).shuffle(seed=1)}).save_to_disk(
        str(tmp_path / "both"), num_shards={"train": 3, "test": 1}
    )
    loaded = datasets.load_from_disk(str(tmp_path / "both"))
    loaded["train"].map(lambda row: {"text": row["text"].upper()}, load_from_cache_file=False)
    assert list((tmp_path / "both" / "train").glob("cache-*.arrow"))
    for split in ("train", "test"):
        corpus = corpus_of(tmp_path / "both" / split, metadata_columns=("id",))
        assert not corpus.quarantined
        by_id = {json.loads(record.metadata)["id"]: record.text for record in records(read_all(corpus))}
        assert by_id == dict(zip(loaded[split]["id"], loaded[split]["text"], strict=True))
    assert len(read_all(corpus_of(tmp_path / "both"))) == 520


@pytest.mark.parametrize("form", FORMS)
def test_conversations_and_preferences_in_tables(tmp_path, form):
    conversations = [CHAT, CHAT * 2, CHAT[:1], None]
    write(pa.table({"messages": conversations, "source": list("abcd")}), tmp_path / FORMS[form], form)
    found = read_all(corpus_of(tmp_path, format="chat", metadata_columns=("source",)))
    assert [json.loads(text) for text in texts(found)] == conversations[:2] and len(failures(found)) == 2
    assert records(found)[1].metadata == '{"source": "b"}'
    calls = [{"role": "assistant", "tool_calls": [{"city": "Rome"}, {"city": "Oslo", "zone": "CET"}]}]
    write(pa.table({"messages": [calls]}), tmp_path / FORMS[form], form)
    (text,) = texts(read_all(corpus_of(tmp_path, format="chat")))
    assert json.loads(text) == calls, "what other rows have is not null here but absent"
    row = {"prompt": "2+2?", "chosen": CHAT, "rejected": CHAT * 2}
    write(pa.table({key: [value, value] for key, value in row.items()}), tmp_path / FORMS[form], form)
    found = read_all(corpus_of(tmp_path, format="preference"), limits=LIMITS)
    assert [json.loads(text) for text in texts(found)] == [row, row]
