"""The data stages with their sources and their store on an S3 service."""

import pytest
import torch

from cluster.storage import Artifact, CorruptArtifact, Store
from pipelines.loader import ShardLoader, ShardSet
from pipelines.recipe import SourceConfig
from pipelines.sources import DataError, Document, find_corpus, read_documents
from tests.pipelines.data_stages import (
    SEQ_LEN,
    checksums,
    data_config,
    data_graph,
    in_this_process,
    run_stages,
    write_corpus,
)
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


def test_shards_are_the_same_as_on_disk(stages):
    _, remote, local = stages
    assert checksums(remote["tokenizer"]) == checksums(local["tokenizer"])
    assert checksums(remote["shards"]) == checksums(local["shards"])
    remote["shards"].verify()


def test_remote_shards_are_read_through_a_verified_local_cache(stages, tmp_path):
    _, remote, local = stages
    options = {"seq_len": SEQ_LEN, "global_batch": 4, "micro_batch": 2, "seed": 5}
    with pytest.raises(ValueError, match="is remote; give a cache_dir"):
        ShardLoader(remote["shards"], **options)
    cached = ShardLoader(remote["shards"], cache_dir=tmp_path / "cache", **options)
    direct = ShardLoader(local["shards"], **options)
    assert all(torch.equal(next(cached), next(direct)) for _ in range(30))
    assert str(cached.shards.folder).startswith(str(tmp_path))


def test_a_remote_shard_with_a_wrong_byte_is_named(stages, tmp_path):
    _, remote, _ = stages
    files, path = remote["shards"].files, "validation/shard-00000.arrow"
    data = files.read_bytes(path)
    files.write_bytes(path, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    try:
        with pytest.raises(CorruptArtifact, match=path):
            ShardSet(Artifact(remote["shards"].store), cache_dir=tmp_path)
    finally:
        files.write_bytes(path, data)


def test_single_and_missing_objects(stages, swift: Swift):
    bucket, _, _ = stages
    corpus = find_corpus([SourceConfig(uri=swift.uri(bucket, "texts/small.txt"))], None)
    (document,) = read_documents(corpus.sources[0], corpus.pieces[0])
    assert isinstance(document, Document) and document.text.startswith("a small document")
    with pytest.raises(DataError, match="has no files"):
        find_corpus([SourceConfig(uri=swift.uri(bucket, "nothing"))], None)
