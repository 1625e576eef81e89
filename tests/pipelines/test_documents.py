"""Part files: what is written is read, but for the rows that were dropped."""

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import given, settings

from cluster.artifact import Artifact, CorruptArtifact
from cluster.storage import NotFound, Store
from pipelines.documents import (
    DROPPED,
    KEPT,
    PARTS,
    Document,
    KeptPart,
    Part,
    document_id,
    ingest_parts,
    kept_entry,
    kept_parts,
    read_part,
    read_table,
    write_part,
    write_table,
)

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=8)


def documents(texts: list[str]) -> list[Document]:
    return [Document(document_id(text), text, f"file:///a/{n}", n * 7, '{"n": 1}') for n, text in enumerate(texts)]


@settings(max_examples=25, deadline=None)
@given(TEXTS, st.data())
def test_what_stays_is_read_in_order(tmp_path_factory, texts, data):
    store = Store(tmp_path_factory.mktemp("part"))
    written = documents(texts)
    entry, part = write_part(store, "train/x.parquet", 3, "train", "text", written)
    assert part == Part("train/x.parquet", 3, "train", "text", len(texts), sum(len(text.encode()) for text in texts))
    assert store.entry("train/x.parquet") == entry
    dropped = sorted(data.draw(st.sets(st.sampled_from(range(len(texts))))))
    kept = KeptPart(**asdict(part), dropped=tuple(dropped))
    assert list(read_part(store, kept)) == [one for row, one in enumerate(written) if row not in dropped]


def test_equal_documents_give_equal_files(tmp_path: Path):
    store = Store(tmp_path)
    entries = [write_part(store, f"{n}.parquet", 0, "train", "text", documents(["a", "b"]))[0] for n in range(2)]
    assert entries[0].checksum == entries[1].checksum


def commit(folder: Path, metadata: dict, dropped: pa.Table | None = None) -> Artifact:
    artifact = Artifact(Store(folder))
    attempt = artifact.begin()
    attempt.commit(metadata, [write_table(attempt.store, DROPPED, dropped)] if dropped else [])
    return artifact


def test_parts_and_what_is_kept_of_them(tmp_path: Path):
    parts = [Part(f"{n}.parquet", 0, "validation" if n == 1 else "train", "text", 10, 100) for n in range(3)]
    ingest = commit(tmp_path / "ingest", {PARTS: [asdict(part) for part in parts]})
    kept = [kept_entry(8, 70), kept_entry(10, 100), kept_entry(0, 0)]
    dropped = pa.table({"part": [0, 0, *[2] * 10], "row": [2, 5, *range(10)], "rule": ["exact"] * 12})
    dedup = commit(tmp_path / "dedup", {KEPT: kept}, dropped)
    assert ingest_parts(ingest) == parts
    assert kept_parts(ingest, dedup, "train") == [KeptPart("0.parquet", 0, "train", "text", 8, 70, (2, 5))]
    assert kept_parts(ingest, dedup, "validation") == [KeptPart("1.parquet", 0, "validation", "text", 10, 100, ())]
    with pytest.raises(NotFound, match="run the stage"):
        kept_parts(ingest, Artifact(Store(tmp_path / "nothing")), "train")


def test_damage_to_a_file_is_noticed(tmp_path: Path, monkeypatch):
    """A wrong bit in compressed text may decompress to another text: what comes of that would be committed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    store = Store(tmp_path)
    write_part(store, "x.parquet", 0, "train", "text", documents(["some text " * 20, "another " * 20]))
    data = store.read_bytes("x.parquet")
    table = read_table(store, "x.parquet")
    for position in range(0, len(data), 3):
        wrong = data[position] ^ 1 << position % 8
        store.write_bytes("x.parquet", data[:position] + bytes([wrong]) + data[position + 1 :])
        with suppress(CorruptArtifact):
            found = read_table(store, "x.parquet", table.column_names)
            another_type = found.schema.types != table.schema.types  # fails where it is used
            assert another_type or found.to_pylist() == table.to_pylist(), position
    for size in (0, 4, len(data) - 1):
        store.write_bytes("x.parquet", data[:size])
        with pytest.raises(CorruptArtifact, match=r"x\.parquet cannot be read .*; if it is damaged, delete"):
            read_table(store, "x.parquet")
