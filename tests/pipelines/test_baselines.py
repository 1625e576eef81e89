import math
import random
from collections import Counter

import numpy as np
import pytest
import zstandard

from cluster.storage import Store
from pipelines.baselines import (
    count_tokens,
    held_out_targets,
    measure_baselines,
    token_bytes,
    unigram_bits,
    zstd_bits,
)
from pipelines.ingest import list_parts, read_parts
from pipelines.loader import IGNORE_INDEX, ShardSet, held_out_batches
from pipelines.vocabulary import load_tokenizer, train_tokenizer
from tests.pipelines.data_stages import data_config, data_graph, in_this_process, run_stages, write_corpus


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    write_corpus(folder / "corpus", documents=60)
    with in_this_process():
        return run_stages(data_graph(data_config(folder / "corpus")), Store(folder / "store"))


def test_unigram_by_hand():
    # counts 3, 1, 0, 0 with one added: 4/8, 2/8, 1/8, 1/8
    assert unigram_bits(np.array([3, 1, 0, 0]), np.array([0, 1, 2, 3, 3])) == 1 + 2 + 3 + 3 + 3


def test_bytes_of_tokens_make_up_the_text():
    generator = random.Random(0)
    tokenizer = train_tokenizer(["naïve 模型 the cat 🙂\n" * 50], 300)
    pieces = token_bytes(tokenizer)
    for _ in range(50):
        text = "".join(generator.choice("aé模🙂 \n\0the cat\x7f\xad") for _ in range(40))
        assert b"".join(pieces[id_] for id_ in tokenizer.encode(text)) == text.encode()
    assert pieces[tokenizer.bos_id] == pieces[tokenizer.pad_id] == b""
    assert sorted(piece for piece in pieces if len(piece) == 1) == [bytes([byte]) for byte in range(256)]


def test_baselines_against_the_documents_themselves(artifacts):
    """Counted from texts and the tokenizer alone, with plain Python."""
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    streams = {}
    texts = {}
    for split in ("train", "validation"):
        parts = [part.path for part in list_parts(artifacts["ingest"], split)]
        texts[split] = [text for _, text in read_parts(artifacts["ingest"], parts)]
        ids = map(tokenizer.encode, texts[split])
        streams[split] = [id_ for document in ids for id_ in [tokenizer.bos_id, *document, tokenizer.eos_id]]
    shards = ShardSet(artifacts["shards"])
    counts = Counter(streams["train"])
    counts[tokenizer.bos_id] -= len(shards.shards("train"))  # a shard's first token is no target
    assert count_tokens(shards, "train").tolist() == [counts[id_] for id_ in range(tokenizer.vocab_size)]

    (shard,) = shards.shards("validation")
    targets = streams["validation"][1:]
    total = sum(counts.values()) + tokenizer.vocab_size
    bits = -sum(math.log2((counts[id_] + 1) / total) for id_ in targets)
    text = "".join(texts["validation"]).encode()
    found = measure_baselines(shards, tokenizer)
    assert (found.tokens, found.bytes) == (len(targets), len(text)) == (shard.tokens - 1, shard.bytes)
    assert found.unigram_bits_per_byte == pytest.approx(bits / len(text), rel=1e-12)
    frame = zstandard.ZstdCompressor(level=19).compress(text)
    assert found.zstd_bits_per_byte == 8 * len(frame) / len(text)


def test_baselines_score_the_rows_that_the_model_scores(artifacts):
    shards = ShardSet(artifacts["shards"])
    labels = np.concatenate([labels.numpy().reshape(-1) for _, labels in held_out_batches(shards, 3, max_rows=8)])
    assert held_out_targets(shards, max_rows=8).tolist() == labels[labels != IGNORE_INDEX].tolist()
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    capped = measure_baselines(shards, tokenizer, max_rows=8)
    assert 0 < capped.tokens < measure_baselines(shards, tokenizer).tokens


def test_zstd_frame_decompresses_to_the_text():
    data = b"abc" * 1000
    assert zstd_bits(data) == 8 * len(zstandard.ZstdCompressor(level=19).compress(data)) < 8 * 100
    assert zstd_bits(data + b"x") >= zstd_bits(data)
