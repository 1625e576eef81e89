"""The data stages with their sources and their store on an S3 service."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.artifact import Artifact, CorruptArtifact
from cluster.storage import Store
from pipelines.formats import Record
from pipelines.loader import ShardLoader
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError
from tests.pipelines.data_stages import (
    SEQ_LEN,
    checksums,
    data_config,
    data_graph,
    in_this_process,
    run_stages,
    write_corpus,
)
from tests.pipelines.reading import corpus_of, failures, read_all, records
from tests.swift import Swift

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stages(swift: Swift, tmp_path_factory):
    """(bucket, artifacts made from S3 on S3, artifacts of the same corpus on disk)

    A big file, read in pieces, and a small one: every object costs the service some time."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "big.txt").write_text("\n\n".join(write_corpus(folder / "texts", documents=300)), "utf-8")
    (folder / "corpus" / "small.txt").write_text("a small document, but long enough to be kept")
    bucket = swift.make_bucket()
    source = Store(swift.uri(bucket, "texts"))
    for path in sorted((folder / "corpus").iterdir()):
        source.upload(path, path.name)
    with in_this_process():
        remote = run_stages(data_graph(data_config(swift.uri(bucket, "texts"))), Store(swift.uri(bucket, "store")))
        local = run_stages(data_graph(data_config(folder / "corpus")), Store(folder / "store"))
    return bucket, remote, local


def _shards(artifact: Artifact) -> dict[str, str]:
    """Without the report, which names the sources' URIs."""
    return {path: checksum for path, checksum in checksums(artifact).items() if not path.startswith("data_report")}


def test_shards_are_the_same_as_on_disk(stages):
    _, remote, local = stages
    assert checksums(remote["tokenizer"]) == checksums(local["tokenizer"])
    assert _shards(remote["shards"]) == _shards(local["shards"])
    remote["shards"].verify()


def test_remote_shards_are_read_through_a_verified_local_cache(stages, tmp_path):
    _, remote, local = stages
    options = {"seq_len": SEQ_LEN, "global_batch": 4, "micro_batch": 2, "seed": 5}
    with pytest.raises(ValueError, match="is remote; give a cache_dir"):
        ShardLoader(remote["shards"], **options)
    cached = ShardLoader(remote["shards"], cache_dir=tmp_path / "cache", **options)
    direct = ShardLoader(local["shards"], **options)
    for _ in range(30):
        found, expected = next(cached), next(direct)
        assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.labels, expected.labels)
    assert list((tmp_path / "cache").rglob("train/shard-00000.arrow"))
    cached.close()
    direct.close()


def test_a_remote_shard_with_a_wrong_byte_is_named(stages, tmp_path):
    _, remote, _ = stages
    files, path = remote["shards"].files, "validation/shard-00000.arrow"
    data = files.read_bytes(path)
    files.write_bytes(path, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    try:
        with pytest.raises(CorruptArtifact, match=path):
            list(ShardSet(Artifact(remote["shards"].store), cache_dir=tmp_path).in_order("validation", 10))
    finally:
        files.write_bytes(path, data)


def test_single_and_missing_objects(stages, swift: Swift):
    bucket, _, _ = stages
    (record,) = read_all(corpus_of(swift.uri(bucket, "texts/small.txt")))
    assert isinstance(record, Record) and record.text.startswith("a small document")
    assert record.path == Store(swift.uri(bucket, "texts")).child("small.txt").uri
    with pytest.raises(DataError, match="has no files"):
        corpus_of(swift.uri(bucket, "nothing"))
    for pattern in ("texts", "**/*.txt"):
        with pytest.raises(DataError, match="its bucket does not exist; create it, or correct the URI"):
            corpus_of(swift.uri("no-such-bucket", pattern))


def test_records_on_an_object_store_are_those_on_disk(swift: Swift, tmp_path):
    table = pa.table({"text": [f"text {number} " * 50 for number in range(500)], "id": range(500)})
    (tmp_path / "deep").mkdir()
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    lines = "\n".join(json.dumps(row) for row in table.to_pylist())
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "deep" / "c d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pa.ipc.new_stream(tmp_path / "deep" / "e.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    (tmp_path / "deep" / "empty.jsonl").touch()
    (tmp_path / ".hidden.jsonl").write_text(lines)
    bucket = swift.make_bucket()
    remote = Store(swift.uri(bucket, "records"))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            remote.upload(path, str(path.relative_to(tmp_path)))
    for pattern in ("a.parquet", "*.parquet", "**/*.jsonl", "deep/*.gz", "deep/*.arrow", "**/[ab].*l"):
        local = corpus_of(tmp_path / pattern, metadata_columns=("id",))
        far = corpus_of(swift.uri(bucket, f"records/{pattern}"), metadata_columns=("id",))
        assert far.sources[0].format == local.sources[0].format
        expected = read_all(local, 20_000)
        found = read_all(far, 20_000)
        assert not failures(found), (pattern, failures(found)[:3], [piece for piece in far.pieces[0]])
        assert [(record.text, record.offset, record.metadata) for record in records(found)] == [
            (record.text, record.offset, record.metadata) for record in records(expected)
        ]
        assert len(found) == len(expected) >= 500
        assert [item.reason for item in far.left_out[0]] == [item.reason for item in local.left_out[0]]
