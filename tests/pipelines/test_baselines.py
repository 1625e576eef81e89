import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
import zstandard
from tokenizers import AddedToken, decoders, models, normalizers, trainers

from cluster.storage import Store
from llama.tokenizer import SPECIAL_TOKENS, Tokenizer
from llama.tokenizer_training import train_tokenizer
from pipelines.baselines import (
    count_tokens,
    held_out_targets,
    measure_baselines,
    token_bytes,
    unigram_bits,
    zstd_bits,
)
from pipelines.loader import held_out_batches
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError
from tests.pipelines.shard_files import Row, concatenated, packed, write_shards

SEQ_LEN = 16


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


def byte_level():
    """With tokens added that hold a space, or no character of the alphabet of bytes."""
    backend = train_tokenizer([SAMPLE], 300).backend
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("模型", normalized=False), "<think>"])
    return Tokenizer(backend)


def sentence_piece():
    """As LLaMA 2's: "▁" for a space and one in front of the text, bytes for what is not in the vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<|pad|>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator([SAMPLE], trainers.BpeTrainer(vocab_size=400, special_tokens=names))
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL_TOKENS)]  # bytes are found in no text
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)))


SAMPLE = "the cat    sat on the naïve mat\n" * 20


@pytest.mark.parametrize(("make", "front"), [(byte_level, b""), (sentence_piece, b" ")])
def test_bytes_of_the_tokens_of_others(make, front):
    tokenizer = make()
    pieces = token_bytes(tokenizer)
    for text in ("the cat    sat <think> on", " a 模型\t🙂\0 ▂", "<|user|>"):
        assert b"".join(pieces[id_] for id_ in tokenizer.encode(text)) == front + text.encode()
    assert {pieces[tokenizer.backend.token_to_id(name)] for name in SPECIAL_TOKENS} == {b""}


TEXTS = {
    "train": [[f"the cat {number} sat on 模型\n" * (number % 7 + 1) for number in range(9)], ["naïve " * 40, "🙂"]],
    "validation": [["the cat sat on the naïve 🙂\n" * 4, "x", "on 模型"]],
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((text for shards in TEXTS.values() for texts in shards for text in texts), 300)


def shards_of(folder, tokenizer, packing, masked=False):
    """Shards of TEXTS and their rows; with a mask, every other token of a document is to be learned."""
    lay_out = {"concatenate": concatenated, "best_fit": packed}[packing]
    splits = {}
    for split, shards in TEXTS.items():
        documents = [
            [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts] for texts in shards
        ]
        masks = [[[place % 2 for place in range(len(ids))] for ids in texts] for texts in documents]
        splits[split] = [lay_out(*each, SEQ_LEN) for each in zip(documents, masks, strict=True)]
    artifact = write_shards(Store(folder), splits, SEQ_LEN, packing, masked, tokenizer.vocab_size)
    return ShardSet(artifact), splits


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_baselines_against_the_documents_themselves(tokenizer, tmp_path, packing):
    """Counted from texts and the tokenizer alone, with plain Python."""
    shards, _ = shards_of(tmp_path, tokenizer, packing)
    streams = {}
    for split, parts in TEXTS.items():
        streams[split] = []
        for texts in parts:
            ids = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
            # A document's first token is no target where documents are kept apart, else only the shard's first.
            streams[split] += sum((document[1:] for document in ids), []) if packing == "best_fit" else sum(ids, [])[1:]
    counts = Counter(streams["train"])
    assert count_tokens(shards, "train").tolist() == [counts[id_] for id_ in range(tokenizer.vocab_size)]
    targets, total = streams["validation"], sum(counts.values()) + tokenizer.vocab_size
    bits = -sum(math.log2((counts[id_] + 1) / total) for id_ in targets)
    found = measure_baselines(shards, tokenizer)
    size = len("".join(TEXTS["validation"][0]).encode())
    assert (found.tokens, found.bytes) == (len(targets), size)
    assert found.unigram_bits_per_byte == pytest.approx(bits / size, rel=1e-12)
    if packing == "concatenate":
        frame = zstandard.ZstdCompressor(level=19).compress("".join(TEXTS["validation"][0]).encode())
        assert found.zstd_bits_per_byte == 8 * len(frame) / size


@pytest.mark.parametrize(("packing", "masked"), [("concatenate", False), ("concatenate", True), ("best_fit", True)])
def test_baselines_score_the_rows_that_the_model_scores(tokenizer, tmp_path, packing, masked):
    shards, splits = shards_of(tmp_path, tokenizer, packing, masked)
    for cap in (None, 2):
        labels = torch.cat([batch.labels.flatten() for batch in held_out_batches(shards, 2, max_rows=cap)])
        everything = splits["validation"][0]
        rows = everything if cap is None else [everything[0], everything[len(everything) // 2]]
        expected = [row.tokens[place] for row in rows for place in row.targets(packing, masked)]
        assert held_out_targets(shards, max_rows=cap).tolist() == labels[labels >= 0].tolist() == expected
    assert 0 < measure_baselines(shards, tokenizer, max_rows=2).tokens < measure_baselines(shards, tokenizer).tokens


def test_a_split_without_text_is_refused(tokenizer, tmp_path):
    row = Row([tokenizer.bos_id, tokenizer.eos_id], [0], [0], [1, 1])
    for number, rows in enumerate(([], [row])):
        store = Store(tmp_path / str(number))
        artifact = write_shards(store, {"train": [[row]], "validation": [rows]}, SEQ_LEN, vocab_size=300)
        with pytest.raises(DataError, match="validation split has no text to predict"):
            measure_baselines(ShardSet(artifact), tokenizer)


def test_zstd_frame_decompresses_to_the_text():
    data = b"abc" * 1000
    assert zstd_bits(data) == 8 * len(zstandard.ZstdCompressor(level=19).compress(data)) < 8 * 100
    assert zstd_bits(data + b"x") >= zstd_bits(data)
