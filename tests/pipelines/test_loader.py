import time
from collections import Counter

import numpy as np
import pytest
import torch

from cluster.storage import Artifact, CorruptArtifact, NotFound, Store
from pipelines.loader import IGNORE_INDEX, ShardLoader, ShardSet, held_out_batches, permute
from pipelines.sources import DataError
from tests.pipelines.data_stages import SEQ_LEN, data_config, data_graph, in_this_process, run_stages, write_corpus


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    write_corpus(folder / "corpus", documents=60)
    with in_this_process():
        return run_stages(data_graph(data_config(folder / "corpus")), Store(folder / "store"))["shards"]


def loader_of(artifact, global_batch=12, micro_batch=1, **options):
    return ShardLoader(artifact, seq_len=SEQ_LEN, global_batch=global_batch, micro_batch=micro_batch, **options)


def step(loaders, micro_batches):
    """The rows of one step over all ranks, in rank order."""
    rows = [next(loader) for loader in loaders for _ in range(micro_batches)]
    return [tuple(row) for batch in rows for row in batch.tolist()]


def full_rows(artifact):
    shards = ShardSet(artifact)
    return [tuple(row) for shard in shards.shards("train") for row in shards.rows(shard)[: shard.full_rows].tolist()]


# -- the permutation


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 97, 255, 256, 257, 1000, 4095, 4097])
def test_permutation_is_a_bijection(size):
    image = permute(np.arange(size), size, seed=3, epoch=5)
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_depends_on_seed_and_epoch_and_on_nothing_else():
    size = 1000
    keys = [(0, 0), (0, 1), (1, 0), (2, 7)]
    images = [tuple(permute(np.arange(size), size, *key)) for key in keys]
    assert len(set(images)) == len(keys)
    one_by_one = [int(permute(np.array([index]), size, 2, 7)[0]) for index in range(size)]
    assert one_by_one == list(images[3])


def test_permutation_looks_random():
    size = 4096
    image = permute(np.arange(size), size, 1, 1)
    # Expected of a random permutation: correlation 0 +- 1/sqrt(size), one fixed point.
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 5 / size**0.5
    assert (image == np.arange(size)).sum() < 10
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / size**0.5


def test_permutation_of_a_huge_range_needs_no_list():
    size = 10**12 + 7
    began = time.monotonic()
    image = permute(np.array([0, 1, size - 1]), size, 0, 0)
    assert len(set(image.tolist())) == 3 and all(0 <= number < size for number in image)
    assert time.monotonic() - began < 5


# -- training order


@pytest.mark.parametrize("world_sizes", [(1,), (2,), (3,), (4,), (1, 4), (4, 2, 3), (3, 1, 2, 4)])
def test_every_row_comes_once_an_epoch_whatever_the_world_sizes(artifact, world_sizes):
    """The world changes every three steps, in the middle of epochs."""
    rows = full_rows(artifact)
    epochs = 2
    seen, consumed, turn = [], 0, 0
    while len(seen) < epochs * len(rows):
        world = world_sizes[turn % len(world_sizes)]
        loaders = [loader_of(artifact, rank=rank, world_size=world, seed=11) for rank in range(world)]
        for loader in loaders:
            loader.load_state_dict({"samples_consumed": consumed})
        for _ in range(3):
            seen += step(loaders, 12 // world)
        (state,) = {tuple(loader.state_dict().items()) for loader in loaders}
        consumed, turn = dict(state)["samples_consumed"], turn + 1
    for epoch in range(epochs):
        assert Counter(seen[epoch * len(rows) : (epoch + 1) * len(rows)]) == Counter(rows)
    reference = loader_of(artifact, seed=11)
    assert seen == [tuple(next(reference)[0].tolist()) for _ in range(len(seen))]
    assert seen[: len(rows)] != seen[len(rows) : 2 * len(rows)] and seen[: len(rows)] != rows


def test_resume_at_any_step_goes_on_in_the_same_order(artifact):
    whole = loader_of(artifact, global_batch=8, micro_batch=2)
    rows = [next(whole) for _ in range(4 * 30)]
    for steps in (0, 1, 13, 29):
        resumed = loader_of(artifact, global_batch=8, micro_batch=4)  # another micro-batch, the same samples
        resumed.load_state_dict({"samples_consumed": 8 * steps})
        assert torch.equal(torch.cat([next(resumed), next(resumed)]), torch.cat(rows[4 * steps : 4 * steps + 4]))


def test_state_counts_whole_steps(artifact):
    loader = loader_of(artifact, global_batch=6, micro_batch=2)
    first = next(loader)
    assert loader.state_dict() == {"samples_consumed": 0}
    next(loader)
    next(loader)
    assert loader.state_dict() == {"samples_consumed": 6}
    assert loader.epoch == 6 / len(full_rows(artifact))
    loader.load_state_dict({"samples_consumed": 0})
    assert torch.equal(next(loader), first)
    for bad in ({}, {"samples_consumed": -1}, {"samples_consumed": 0, "epoch": 0}):
        with pytest.raises(ValueError, match="is no loader state"):
            loader.load_state_dict(bad)


def test_batches_have_the_trainer_s_shape(artifact):
    batch = next(iter(loader_of(artifact, global_batch=6, micro_batch=3)))
    assert batch.shape == (3, SEQ_LEN + 1) and batch.dtype == torch.int64


def test_validation_split_can_be_read_in_the_same_way(artifact):
    loader = loader_of(artifact, split="validation", global_batch=1)
    rows = [tuple(next(loader)[0].tolist()) for _ in range(loader.rows)]
    assert len(set(rows)) == loader.rows and not set(rows) & set(full_rows(artifact))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "global_batch=10 is not a multiple of micro_batch=4 x world_size=1"),
        ({"world_size": 5}, "global_batch=12 is not a multiple of micro_batch=1 x world_size=5"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not in 0..1"),
    ],
)
def test_sizes_that_do_not_fit(artifact, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(artifact, **options)


def test_another_sequence_length_than_the_shards_is_refused(artifact):
    with pytest.raises(ValueError, match="seq_len=32, but the shards were packed for 64"):
        ShardLoader(artifact, seq_len=32, global_batch=1, micro_batch=1)


def test_a_split_without_a_full_row_is_refused(tmp_path):
    write_corpus(tmp_path / "corpus", documents=60)
    with in_this_process():
        graph = data_graph(data_config(tmp_path / "corpus"), seq_len=100_000)
        shards = run_stages(graph, Store(tmp_path / "store"))["shards"]
    with pytest.raises(DataError, match="the train split has no row of 100001 tokens; add text or lower seq_len"):
        ShardLoader(shards, seq_len=100_000, global_batch=1, micro_batch=1)


# -- held-out rows


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (7, 1), (1000, 1), (4, 3)])
def test_held_out_targets_come_once_and_padding_is_ignored(artifact, batch_size, world_size):
    shards = ShardSet(artifact)
    expected = Counter(
        (int(row[column]), int(row[column + 1]))
        for shard in shards.shards("validation")
        for number, row in enumerate(shards.rows(shard))
        for column in range(SEQ_LEN)
        if number * SEQ_LEN + column + 1 < shard.tokens
    )
    found: Counter = Counter()
    for rank in range(world_size):
        for inputs, labels in held_out_batches(shards, batch_size, rank=rank, world_size=world_size):
            assert inputs.shape == labels.shape and len(inputs) <= batch_size
            counted = labels != IGNORE_INDEX
            found.update(zip(inputs[counted].tolist(), labels[counted].tolist(), strict=True))
    assert found == expected
    assert sum(expected.values()) == sum(shard.tokens - 1 for shard in shards.shards("validation"))


def test_held_out_rows_can_be_capped(artifact):
    shards = ShardSet(artifact)
    everything = torch.cat([labels for _, labels in held_out_batches(shards, 5)])
    capped = torch.cat([labels for _, labels in held_out_batches(shards, 5, max_rows=7)])
    assert torch.equal(capped, everything[:7])


# -- what may be wrong with the files


def copy_of(artifact, folder):
    store = Store(folder)
    for path in artifact.store.list():
        store.write_bytes(path, artifact.store.read_bytes(path))
    return Artifact(store)


def test_a_missing_or_cut_shard_is_named(artifact, tmp_path):
    copy = copy_of(artifact, tmp_path)
    path = copy.files.local_path("train/shard-00001.arrow")
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(CorruptArtifact, match=r"train/shard-00001\.arrow has \d+ bytes"):
        ShardSet(copy)
    path.unlink()
    with pytest.raises(CorruptArtifact, match=r"train/shard-00001\.arrow is missing"):
        ShardSet(copy)


def test_nothing_committed(tmp_path):
    with pytest.raises(NotFound, match="nothing is committed"):
        ShardSet(Artifact(Store(tmp_path)))
