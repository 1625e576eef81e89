"""What is scored, against each document's own log-probabilities."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from cluster.storage import Store
from llama.model import Transformer
from pipelines.evaluate import score
from pipelines.shard_set import ShardSet
from tests.llama.training.helpers import DENSE
from tests.pipelines.shard_files import packed, random_shards, write_shards

SEQ_LEN = 16


@pytest.fixture(scope="module")
def model():
    model = Transformer(DENSE)
    model.init_weights(0)
    return model.double().eval()


@torch.inference_mode()
def nats(model, tokens):
    """−log p of each token but the first."""
    ids = torch.tensor([token % DENSE.vocab_size for token in tokens])
    return cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none").tolist()


def small(splits):
    """Ids within the model's vocabulary."""
    for shards in splits.values():
        for row in (row for rows in shards for row in rows):
            row.tokens = [token % DENSE.vocab_size for token in row.tokens]
    return splits


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_packed_documents_are_scored_as_if_each_were_alone(model, tmp_path, batch_size, masked):
    _, splits = random_shards(Store(tmp_path / "drawn"), packing="best_fit", seq_len=SEQ_LEN)
    artifact = write_shards(Store(tmp_path / "small"), small(splits), SEQ_LEN, "best_fit", masked)
    expected, tokens = 0.0, 0
    for row in (row for rows in splits["validation"] for row in rows):
        for begin, end in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True):
            counted = [not masked or bool(learn) for learn in row.mask[begin + 1 : end]]
            expected += sum(
                each for each, counts in zip(nats(model, row.tokens[begin:end]), counted, strict=True) if counts
            )
            tokens += sum(counted)
    found = score(model, ShardSet(artifact), batch_size, None)
    assert found == (pytest.approx(expected, rel=1e-10), tokens)


def test_a_stream_is_scored_row_by_row_and_masks_leave_targets_out(model, tmp_path):
    for masked in (False, True):
        _, splits = random_shards(Store(tmp_path / f"drawn-{masked}"), seq_len=SEQ_LEN)
        artifact = write_shards(Store(tmp_path / f"small-{masked}"), small(splits), SEQ_LEN, masked=masked)
        everything = [row for rows in splits["validation"] for row in rows]
        rows = [everything[number * len(everything) // 5] for number in range(5)]
        expected = [
            each
            for row in rows
            for each, learn in zip(nats(model, row.tokens), row.mask[1:], strict=True)
            if learn or not masked
        ]
        found = score(model, ShardSet(artifact), 2, 5)
        assert found == (pytest.approx(sum(expected), rel=1e-10), len(expected))


def test_documents_longer_than_a_row_lose_nothing_but_context(tmp_path):
    documents = [list(range(2, 52)), [2, 3, 4]]
    rows = packed(documents, [[1] * len(document) for document in documents], SEQ_LEN)
    artifact = write_shards(Store(tmp_path), {"train": [rows], "validation": [rows]}, SEQ_LEN, "best_fit")
    targets = [id_ for each in ShardSet(artifact).in_order("validation", 3) for id_ in each.targets().tolist()]
    assert sorted(targets) == sorted(id_ for document in documents for id_ in document[1:])
