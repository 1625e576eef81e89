import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import Store
from pipelines.ingest import SPLITS, list_parts, read_parts
from pipelines.shards import join_documents, pack, token_dtype
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint
from tests.pipelines.data_stages import (
    SEQ_LEN,
    checksums,
    data_config,
    data_graph,
    in_this_process,
    run_stages,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(corpus, tmp_path_factory):
    with in_this_process():
        return run_stages(data_graph(data_config(corpus)), Store(tmp_path_factory.mktemp("shards") / "store"))


def read(artifacts, path):
    """(rows, document starts by row) of a shard."""
    batch = pa.ipc.open_file(pa.BufferReader(artifacts["shards"].files.read_bytes(path))).get_batch(0)
    return np.array(batch["tokens"].to_pylist()), batch["documents"].to_pylist()


def shard_list(artifacts, split):
    return artifacts["shards"].manifest().metadata["splits"][split]["shards"]


def texts_of(artifacts, split):
    paths = [part.path for part in list_parts(artifacts["ingest"], split)]
    return [text for _, text in read_parts(artifacts["ingest"], paths)]


@pytest.mark.parametrize("split", SPLITS)
def test_decoding_the_shards_gives_every_text_once_in_order(artifacts, split):
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    decoded = []
    for shard in shard_list(artifacts, split):
        rows, starts = read(artifacts, shard["path"])
        stream = np.concatenate([rows[:, :-1].reshape(-1), rows[-1:, -1]])[: shard["tokens"]]
        positions = [number * SEQ_LEN + start for number, row in enumerate(starts) for start in row]
        assert len(positions) == shard["documents"]
        for begin, end in zip(positions, [*positions[1:], len(stream)], strict=True):
            assert (stream[begin], stream[end - 1]) == (tokenizer.bos_id, tokenizer.eos_id)
            decoded.append(tokenizer.decode(stream[begin + 1 : end - 1].tolist(), skip_special_tokens=False))
    assert decoded == texts_of(artifacts, split)


@pytest.mark.parametrize("split", SPLITS)
def test_every_token_but_the_first_of_a_shard_is_a_target_once(artifacts, split):
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    texts = iter(texts_of(artifacts, split))
    for shard in shard_list(artifacts, split):
        documents = (tokenizer.encode(next(texts)) for _ in range(shard["documents"]))
        stream = [id_ for ids in documents for id_ in [tokenizer.bos_id, *ids, tokenizer.eos_id]]
        rows, _ = read(artifacts, shard["path"])
        assert rows[:, 1:].reshape(-1)[: shard["tokens"] - 1].tolist() == stream[1:]
        assert rows[:, :-1].reshape(-1)[: shard["tokens"] - 1].tolist() == stream[:-1]
        assert set(rows[:, 1:].reshape(-1)[shard["tokens"] - 1 :]) <= {tokenizer.pad_id}


def test_the_manifest_counts_tokens_bytes_and_rows(artifacts):
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    metadata = artifacts["shards"].manifest().metadata
    for split in SPLITS:
        texts, totals = texts_of(artifacts, split), metadata["splits"][split]
        assert totals["documents"] == len(texts)
        assert totals["bytes"] == sum(len(text.encode()) for text in texts)
        assert totals["tokens"] == sum(len(tokenizer.encode(text)) + 2 for text in texts)
        for shard in totals["shards"]:
            assert len(read(artifacts, shard["path"])[0]) == shard["rows"]
            assert shard["full_rows"] == (shard["tokens"] - 1) // SEQ_LEN in (shard["rows"], shard["rows"] - 1)
    assert len(metadata["splits"]["train"]["shards"]) >= 3
    assert metadata["tokenizer"] == tokenizer_fingerprint(tokenizer)
    assert (metadata["seq_len"], metadata["vocab_size"]) == (SEQ_LEN, tokenizer.vocab_size)
    assert (metadata["bos_id"], metadata["pad_id"]) == (tokenizer.bos_id, tokenizer.pad_id)


def test_files_are_uncompressed_arrow_of_fixed_size_lists(artifacts):
    for shard in shard_list(artifacts, "train"):
        data = artifacts["shards"].files.read_bytes(shard["path"])
        schema = pa.ipc.open_file(pa.BufferReader(data)).schema
        assert schema.field("tokens").type == pa.list_(pa.uint16(), SEQ_LEN + 1)
        rows, _ = read(artifacts, shard["path"])
        assert rows.astype(np.uint16).tobytes() in data


def test_the_order_of_the_tasks_does_not_show(corpus, artifacts, tmp_path):
    with in_this_process(backwards=True):
        again = run_stages(data_graph(data_config(corpus)), Store(tmp_path))
    assert checksums(again["shards"]) == checksums(artifacts["shards"])


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 9])
def test_packing_a_short_stream(length):
    rows = pack(np.arange(1, length + 1, dtype=np.uint16), 3, 0)
    stream = [*range(1, length + 1), 0, 0, 0, 0]
    expected = [stream[begin : begin + 4] for begin in range(0, length - 1, 3)]
    assert rows.tolist() == [row + [0] * (4 - len(row)) for row in expected]


def test_joining_documents():
    stream, starts = join_documents([np.array([5, 6]), np.array([7])], 1, 2, np.dtype(np.uint16))
    assert stream.tolist() == [1, 5, 6, 2, 1, 7, 2] and starts.tolist() == [0, 4]


def test_the_smallest_type_that_holds_every_id():
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32
