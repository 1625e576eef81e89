"""Pairs as they are read: batches that teach by force, and symbols and their ids."""

from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Store
from llama.losses import IGNORE_INDEX
from pipelines.pair_set import BOS, EOS, PairSet, Vocabulary
from pipelines.sources import DataError
from tests.pipelines.seq2seq_run import make_pairs, tiny


def test_a_batch_teaches_by_force(tmp_path: Path) -> None:
    pairs = PairSet(make_pairs(Store(tmp_path), tiny()), "train")
    batch = pairs.batch(np.array([3, 7, 11, 4]), seq_len=6)
    assert batch.source is not None and batch.source_lengths is not None and batch.lengths is not None
    assert batch.source.shape == (4, int(batch.source_lengths.max()))
    for row, number in enumerate([3, 7, 11, 4]):
        source, target = list(pairs)[number]
        assert batch.source[row, : batch.source_lengths[row]].tolist() == source
        assert batch.inputs[row].tolist() == [BOS, *target, *[EOS] * (5 - len(target))]
        assert batch.labels[row].tolist() == [*target, EOS, *[IGNORE_INDEX] * (5 - len(target))]
        assert batch.lengths[row] == len(target) + 1
    assert batch.num_tokens() == batch.num_targets()


def test_symbols_nobody_was_trained_with_are_named() -> None:
    vocabulary = Vocabulary([str(number) for number in range(12)])
    with pytest.raises(DataError, match=r"'x' is no symbol .* they are 0 1 2 3 4 5 6 7 \.\.\."):
        vocabulary.encode(["1", "x"])
    assert vocabulary.decode([2, 13, EOS, 3]) == ["0", "11"]
    assert vocabulary.decode([14, BOS]) == ["<14>", "<0>"]
