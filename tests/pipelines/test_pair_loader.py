"""The loader of pairs: every pair once an epoch, on any number of ranks, from where it was."""

from pathlib import Path

import pytest
import torch

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.loader import RankSlices
from pipelines.pair_loader import PairData, PairLoader
from pipelines.pair_set import PairSet
from pipelines.sources import DataError
from tests.pipelines.seq2seq_run import make_pairs, tiny


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_pairs(Store(tmp_path_factory.mktemp("store")), tiny())


def sources(loader: PairLoader, batches: int) -> list[tuple[int, ...]]:
    found = []
    for _ in range(batches):
        batch = next(loader)
        assert batch.source is not None and batch.source_lengths is not None
        found += [tuple(row[:length].tolist()) for row, length in zip(batch.source, batch.source_lengths, strict=True)]
    return found


def test_an_epoch_has_every_pair_once_and_the_next_another_order(artifact: Artifact) -> None:
    loader = PairLoader(artifact, RankSlices(8, 8), 6, seed=1)
    first, second = sources(loader, 25), sources(loader, 25)
    assert sorted(first) == sorted(second) == sorted(tuple(source) for source, _ in PairSet(artifact, "train"))
    assert first != second and loader.epoch == 2
    assert sources(PairLoader(artifact, RankSlices(8, 8), 6, seed=1), 25) == first
    assert sources(PairLoader(artifact, RankSlices(8, 8), 6, seed=2), 25) != first


def test_ranks_share_a_step_and_go_on_from_its_number(artifact: Artifact) -> None:
    alone = PairLoader(artifact, RankSlices(8, 8), 6, seed=1)
    steps = [sources(alone, 1) for _ in range(6)]
    assert alone.state_dict() == {"samples_consumed": 48}
    two = [PairData(artifact).open(RankSlices(8, 2, rank, 2), 6, 1, Path()) for rank in range(2)]
    for step in steps[:3]:
        assert [sources(loader, 2) for loader in two] == [step[:4], step[4:]]
    resumed = PairLoader(artifact, RankSlices(8, 4), 6, seed=1)
    resumed.load_state_dict(two[0].state_dict())
    assert [sources(resumed, 2) for _ in range(3)] == steps[3:]


def test_validation_has_equally_many_batches_on_every_rank(artifact: Artifact) -> None:
    held_out = [tuple(source) for source, _ in PairSet(artifact, "held_out")]
    ranks = [PairLoader(artifact, RankSlices(8, 4, rank, 2), 6, seed=0) for rank in range(2)]
    batches = [loader.validation_batches(max_rows=29) for loader in ranks]
    assert [len(each) for each in batches] == [3, 3]
    seen = [
        tuple(row[:length].tolist())
        for each in batches
        for batch in each
        if batch.source is not None and batch.source_lengths is not None
        for row, length in zip(batch.source, batch.source_lengths, strict=True)
    ]
    assert sorted(seen) == sorted(held_out[:24])
    assert all(torch.equal(batch.inputs[:, 0], torch.zeros(4, dtype=torch.int64)) for batch in batches[0])
    with pytest.raises(DataError, match="7 held-out pairs are no micro-batch for each of 2 workers; raise"):
        ranks[0].validation_batches(max_rows=7)
