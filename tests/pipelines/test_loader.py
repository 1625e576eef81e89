import gc
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.artifact import Artifact, CorruptArtifact
from cluster.storage import NotFound, Store
from llama.losses import IGNORE_INDEX
from pipelines.loader import ShardLoader, held_out_batches, validation_batches
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError
from tests.pipelines.background import eventually, threads
from tests.pipelines.data_stages import data_config, data_graph, in_this_process, run_stages, write_corpus
from tests.pipelines.shard_files import FarStore, Row, far, random_shards, used, write_shards

SEQ_LEN = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return random_shards(Store(tmp_path_factory.mktemp("loader")), train=9, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def artifact(made):
    return made[0]


def loader_of(artifact, global_batch=12, micro_batch=1, **options):
    return ShardLoader(artifact, seq_len=SEQ_LEN, global_batch=global_batch, micro_batch=micro_batch, **options)


def whole_rows(batch):
    """Inputs and the last target: the rows of a batch without masks."""
    return [tuple(row) for row in torch.cat((batch.inputs, batch.labels[:, -1:]), dim=1).tolist()]


def take(loader, batches):
    return [row for _ in range(batches) for row in whole_rows(next(loader))]


def full_rows(splits, split="train"):
    return [tuple(row.tokens) for rows in splits[split] for row in rows if len(row.tokens) == SEQ_LEN + 1]


# -- training order


@given(st.data())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_comes_once_an_epoch_whatever_the_world_sizes(made, data):
    """The number of ranks, the global batch and the micro-batch change in the middle of epochs."""
    artifact, splits = made
    rows = full_rows(splits)
    options = {
        "seed": data.draw(st.integers(0, 100)),
        "shuffle_shards": data.draw(st.sampled_from([None, 1, 2, 4, 20])),
    }
    seen, state = [], {"samples_consumed": 0}
    while len(seen) < 2 * len(rows):
        world = data.draw(st.integers(1, 8))
        micro, accumulation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
        sizes = {"micro_batch": micro, "global_batch": world * micro * accumulation}
        prefetch = data.draw(st.integers(0, 2))
        loaders = [
            loader_of(artifact, rank=rank, world_size=world, prefetch=prefetch, **sizes, **options)
            for rank in range(world)
        ]
        for loader in loaders:
            loader.load_state_dict(state)
        for _ in range(data.draw(st.integers(1, 4))):
            seen += [row for loader in loaders for row in take(loader, accumulation)]
        (state,) = [dict(each) for each in {tuple(loader.state_dict().items()) for loader in loaders}]
        assert state == {"samples_consumed": len(seen)}
        for loader in loaders:
            loader.close()
    for epoch in range(2):
        assert Counter(seen[epoch * len(rows) : (epoch + 1) * len(rows)]) == Counter(rows)
    with loader_of(artifact, global_batch=1, prefetch=0, **options) as reference:
        assert seen == take(reference, len(seen))
    assert seen[: len(rows)] != seen[len(rows) : 2 * len(rows)] and seen[: len(rows)] != rows


@pytest.mark.parametrize("shuffle_shards", [None, 2])
def test_resume_at_any_step_goes_on_in_the_same_order(artifact, shuffle_shards):
    whole = loader_of(artifact, global_batch=8, micro_batch=2, shuffle_shards=shuffle_shards)
    rows = take(whole, 4 * 80)
    for steps in (0, 1, 13, 78):
        resumed = loader_of(artifact, global_batch=8, micro_batch=4, shuffle_shards=shuffle_shards)
        resumed.load_state_dict({"samples_consumed": 8 * steps})
        assert take(resumed, 2) == rows[8 * steps : 8 * steps + 8]
        resumed.close()
    whole.close()


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_state_counts_whole_steps_of_what_was_handed_out(made, prefetch):
    artifact, splits = made
    with loader_of(artifact, global_batch=6, micro_batch=2, prefetch=prefetch) as loader:
        first = take(loader, 1)
        time.sleep(0.02)
        assert loader.state_dict() == {"samples_consumed": 0}
        second = take(loader, 2)
        assert loader.state_dict() == {"samples_consumed": 6}
        assert loader.epoch == 6 / len(full_rows(splits))
        loader.load_state_dict({"samples_consumed": 0})
        assert take(loader, 3) == first + second
        for bad in ({}, {"samples_consumed": -1}, {"samples_consumed": 1.5}, {"samples_consumed": 0, "epoch": 0}):
            with pytest.raises(ValueError, match="is no loader state"):
                loader.load_state_dict(bad)


def test_batches_have_the_trainer_s_shape(artifact):
    batch = next(iter(loader_of(artifact, global_batch=6, micro_batch=3)))
    assert batch.inputs.shape == batch.labels.shape == (3, SEQ_LEN)
    assert batch.inputs.dtype == batch.labels.dtype == torch.int64
    assert batch.documents is None
    assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])


def test_validation_split_can_be_read_in_the_same_way(made):
    artifact, splits = made
    with loader_of(artifact, split="validation", global_batch=1) as loader:
        assert Counter(take(loader, loader.samples)) == Counter(full_rows(splits, "validation"))


@pytest.mark.parametrize("masked", [False, True])
def test_packed_rows_come_with_their_documents_and_without_first_tokens_as_targets(tmp_path, masked):
    artifact, splits = random_shards(Store(tmp_path), packing="best_fit", masked=masked, seq_len=SEQ_LEN)
    expected = Counter()
    for row in (row for rows in splits["train"] for row in rows):
        tokens = row.tokens + [0] * (SEQ_LEN + 1 - len(row.tokens))
        labels = [IGNORE_INDEX] * SEQ_LEN
        for place in row.targets("best_fit", masked):
            labels[place - 1] = row.tokens[place]
        ends = [*row.starts[1:], len(row.tokens)]
        documents = [sum(end <= place for end in ends) for place in range(SEQ_LEN)]
        expected[tuple(tokens[:-1]), tuple(labels), tuple(documents)] += 1
    with loader_of(artifact, global_batch=1) as loader:
        batches = [next(loader) for _ in range(loader.samples)]
        assert loader.epoch == 1
    found = Counter(
        (
            tuple(batch.inputs[0].tolist()),
            tuple(batch.labels[0].tolist()),
            tuple((batch.documents[0] - batch.documents[0, 0]).tolist()),
        )
        for batch in batches
    )
    assert found == expected
    assert sum(batch.num_targets().item() for batch in batches) == sum(
        shard.targets for shard in loader.shards.shards("train")
    )


def test_masked_rows_of_a_stream_predict_what_is_to_be_learned(tmp_path):
    artifact, splits = random_shards(Store(tmp_path), masked=True, seq_len=SEQ_LEN)
    rows = {tuple(row.tokens): row for rows in splits["train"] for row in rows}
    with loader_of(artifact, global_batch=1) as loader:
        for _ in range(loader.samples):
            batch = next(loader)
            (row,) = [row for tokens, row in rows.items() if tokens[:-1] == tuple(batch.inputs[0].tolist())]
            mask = torch.tensor(row.mask[1:]).bool()
            assert torch.equal(batch.labels[0], torch.tensor(row.tokens[1:]).where(mask, IGNORE_INDEX))
            assert batch.documents is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "global_batch=10 is not a multiple of micro_batch=4 x world_size=1"),
        ({"world_size": 5}, "global_batch=12 is not a multiple of micro_batch=1 x world_size=5"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not in 0..1"),
        ({"prefetch": -1}, "prefetch=-1 must not be negative"),
        ({"shuffle_shards": 0}, "shuffle_shards=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(artifact, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(artifact, **options)


def test_another_sequence_length_than_the_shards_is_refused(artifact):
    with pytest.raises(ValueError, match="seq_len=32, but the shards were packed for 16"):
        ShardLoader(artifact, seq_len=32, global_batch=1, micro_batch=1)


def test_a_split_without_a_full_row_is_refused(tmp_path):
    row = Row([1, 2, 3], [0], [0], [1, 1, 1])
    shards = write_shards(Store(tmp_path), {"train": [[row]], "validation": [[row]]}, SEQ_LEN)
    with pytest.raises(DataError, match="the train split has no row of 17 tokens; add text or lower seq_len"):
        loader_of(shards)


# -- threads


NAMES = "prefetch", "read-ahead"


def test_threads_end_with_the_loader(artifact, tmp_path):
    before = threads(*NAMES)
    with loader_of(far(artifact), cache_dir=tmp_path) as loader:
        next(loader)
        assert len(threads(*NAMES) - before) == 2
    eventually(lambda: not threads(*NAMES) - before)
    loader = loader_of(far(artifact), cache_dir=tmp_path)
    next(loader)
    assert len(threads(*NAMES) - before) == 2
    del loader
    gc.collect()
    eventually(lambda: not threads(*NAMES) - before)


def test_a_closed_loader_goes_on_where_it_was(artifact):
    loader, reference = (loader_of(artifact, prefetch=prefetch) for prefetch in (3, 0))
    expected = take(reference, 8)
    found = take(loader, 5)
    loader.close()
    assert found + take(loader, 3) == expected
    loader.close()


# -- remote shards


def stored(artifact):
    """Bytes of the shards that training draws from, the largest first; one of the nine has no full row."""
    shards = ShardSet(artifact)
    sizes = sorted((shards.stored_bytes(shard) for shard in shards.shards("train") if shard.samples), reverse=True)
    assert len(sizes) == 8
    return sizes


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bounded_cache_gives_the_same_batches(artifact, tmp_path, prefetch):
    limit = sum(stored(artifact)[:4])
    options = {"global_batch": 4, "micro_batch": 2, "seed": 5, "shuffle_shards": 2}
    with (
        loader_of(far(artifact), cache_dir=tmp_path, cache_bytes=limit, prefetch=prefetch, **options) as remote,
        loader_of(artifact, **options) as local,
    ):
        while remote.epoch < 3:
            assert take(remote, 2) == take(local, 2)
            assert used(tmp_path) <= limit < sum(stored(artifact))


def test_the_first_batch_needs_its_own_shards_only(artifact, tmp_path, monkeypatch):
    download, gate = FarStore.download, threading.Event()
    with loader_of(artifact, prefetch=0) as local, loader_of(far(artifact), cache_dir=tmp_path, prefetch=0) as loader:
        shards, _ = loader._order.locate(np.array([0]))
        own = loader.shards.shards("train")[int(shards[0])].path
        copied = []

        def gated(store, path, local_path):
            assert path == own or gate.wait(10)
            copied.append(path)
            return download(store, path, local_path)

        monkeypatch.setattr(FarStore, "download", gated)
        assert take(loader, 1) == take(local, 1) and copied == [own]
        gate.set()
        eventually(lambda: len(copied) == 8)
        assert take(loader, 50) == take(local, 50) and len(copied) == 8


@pytest.mark.parametrize(("shuffle_shards", "shards"), [(None, 8), (1, 2), (3, 6), (5, 8)])
def test_a_cache_that_does_not_hold_two_windows_is_refused(artifact, tmp_path, shuffle_shards, shards):
    needed = sum(stored(artifact)[:shards])
    options = {"cache_dir": tmp_path, "shuffle_shards": shuffle_shards}
    with pytest.raises(
        ValueError, match=rf"cache_bytes={needed - 1} .* shuffle_shards={shuffle_shards} .*cache_bytes={needed},"
    ):
        loader_of(far(artifact), cache_bytes=needed - 1, **options)
    loader_of(far(artifact), cache_bytes=needed, **options)
    loader_of(artifact, cache_bytes=1, shuffle_shards=shuffle_shards)  # what is here already needs no copy


def copy_of(artifact, folder):
    store = Store(folder)
    for path in artifact.store.list():
        store.write_bytes(path, artifact.store.read_bytes(path))
    return Artifact(store)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_wrong_byte_of_a_remote_shard_is_named_when_it_is_met(artifact, tmp_path, prefetch):
    copy = copy_of(artifact, tmp_path / "copy")
    path = "train/shard-00004.arrow"
    data = copy.files.read_bytes(path)
    copy.files.write_bytes(path, data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    options = {"global_batch": 1, "shuffle_shards": 1}
    with (
        loader_of(far(copy), cache_dir=tmp_path / "cache", prefetch=prefetch, **options) as loader,
        loader_of(artifact, **options) as local,
    ):
        with pytest.raises(CorruptArtifact, match=path):
            while loader.epoch < 1:
                assert take(loader, 1) == take(local, 1)
        copy.files.write_bytes(path, data)
        while loader.epoch < 1:
            assert take(loader, 1) == take(local, 1)


@pytest.mark.parametrize("column", ["length", "documents"])
def test_a_shard_whose_numbers_lead_nowhere_is_named(tmp_path, column):
    artifact, _ = random_shards(Store(tmp_path), packing="best_fit", seq_len=SEQ_LEN)
    shard = ShardSet(artifact).shards("train")[0]
    path = artifact.files.local_path() / shard.path
    data = path.read_bytes()
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        found = batch.column(column)
        values = (found if column == "length" else found.values).to_numpy().astype("<i4").tobytes()
    at = data.rindex(values)
    path.write_bytes(data[:at] + (1000).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(CorruptArtifact, match=shard.path):
        list(held_out_batches(ShardSet(artifact), 4, split="train"))


def test_a_shard_that_the_background_finds_wrong_is_named_before_it_is_needed(artifact, tmp_path):
    copy = copy_of(artifact, tmp_path / "copy")
    with loader_of(artifact, global_batch=1, shuffle_shards=1) as local:
        next(local)
        ahead, _ = local._order.ahead(0)
    path = f"train/shard-{ahead[1]:05d}.arrow"  # of the second window
    copy.files.write_bytes(path, bytes(len(copy.files.read_bytes(path))))
    with loader_of(far(copy), cache_dir=tmp_path / "cache", global_batch=1, shuffle_shards=1, prefetch=0) as loader:
        next(loader)
        with pytest.raises(CorruptArtifact, match=path):
            eventually(lambda: loader.shards._ahead.check())


# -- held-out rows


@pytest.mark.parametrize(("packing", "masked"), [("concatenate", False), ("best_fit", False), ("best_fit", True)])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (7, 1), (1000, 1), (4, 3)])
def test_held_out_targets_come_once(tmp_path, packing, masked, batch_size, world_size):
    artifact, splits = random_shards(Store(tmp_path), packing=packing, masked=masked, seq_len=SEQ_LEN)
    expected = Counter(
        (row.tokens[place - 1], row.tokens[place])
        for rows in splits["validation"]
        for row in rows
        for place in row.targets(packing, masked)
    )
    found: Counter = Counter()
    for rank in range(world_size):
        for batch in held_out_batches(ShardSet(artifact), batch_size, rank=rank, world_size=world_size):
            assert batch.inputs.shape == batch.labels.shape and len(batch.inputs) <= batch_size
            assert (batch.documents is not None) == (packing == "best_fit")
            counted = batch.labels != IGNORE_INDEX
            found.update(zip(batch.inputs[counted].tolist(), batch.labels[counted].tolist(), strict=True))
    assert found == expected
    assert sum(expected.values()) == sum(shard.targets for shard in ShardSet(artifact).shards("validation"))


def test_held_out_rows_can_be_capped(artifact):
    shards = ShardSet(artifact)
    everything = torch.cat([batch.labels for batch in held_out_batches(shards, 5)])
    for cap in (0, 7, len(everything) - 1, 10**6):
        capped = [batch.labels for batch in held_out_batches(shards, 5, max_rows=cap)]
        taken = min(cap, len(everything))
        places = [number * len(everything) // taken for number in range(taken)]
        assert torch.equal(torch.cat([*capped, everything[:0]]), everything[places])


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 3), (100, 2), (2, 40)])
def test_ranks_validate_on_the_same_rows_in_equally_many_batches(tmp_path, packing, batch_size, world_size):
    shards = ShardSet(random_shards(Store(tmp_path), packing=packing, seq_len=SEQ_LEN)[0])
    for cap in (7, 10**6):
        (expected,) = held_out_batches(shards, 10**6, max_rows=cap)
        ranks = [validation_batches(shards, batch_size, cap, rank, world_size) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(len(batch.inputs) == batch_size for batches in ranks for batch in batches)
        # Most rows of a rank come in the order in which they lie, and none without targets is one.
        batches = [batch for batches in ranks for batch in batches]
        rows = Counter(tuple(row) for batch in batches for row in batch.labels.tolist() if max(row) >= 0)
        assert rows == Counter(map(tuple, expected.labels.tolist()))
        assert sum(map(len, ranks)) * batch_size < len(expected.labels) + 2 * batch_size * world_size


def test_validation_without_a_row_is_refused(tmp_path):
    shards = ShardSet(random_shards(Store(tmp_path), validation=0)[0])
    with pytest.raises(DataError, match=r"raise data\.validation_fraction, or set train\.validate_every=0"):
        validation_batches(shards, 1, 8)


# -- padding


def test_a_batch_says_where_its_padding_begins(tmp_path):
    """Of packed rows drawn for training; rows without padding say nothing."""
    artifact, splits = random_shards(Store(tmp_path), packing="best_fit", seq_len=SEQ_LEN)
    lengths = [min(len(row.tokens), SEQ_LEN) for rows in splits["train"] for row in rows]
    loader = loader_of(artifact, global_batch=4, micro_batch=4, prefetch=0)
    found: Counter = Counter()
    for _ in range(-(-len(lengths) // 4) * 2):
        batch = next(loader)
        if batch.lengths is None:
            found.update({SEQ_LEN: 4})
            continue
        assert min(batch.lengths) < SEQ_LEN
        found.update(batch.lengths.tolist())
        assert int(batch.num_tokens()) == int(batch.counted().sum()) == int(batch.lengths.sum())
        assert not batch.inputs[~batch.counted()].any() and batch.inputs[batch.counted()].all()  # PAD is 0
    assert set(found) == set(lengths)


# -- what may be wrong with the files


@pytest.mark.parametrize("remote", [False, True])
def test_a_missing_or_cut_shard_is_named(artifact, tmp_path, remote):
    copy = copy_of(artifact, tmp_path)
    path = copy.files.local_path("train/shard-00001.arrow")
    opened = far(copy) if remote else copy
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(CorruptArtifact, match=r"train/shard-00001\.arrow has \d+ bytes"):
        ShardSet(opened, tmp_path / "cache")
    path.unlink()
    with pytest.raises(CorruptArtifact, match=r"train/shard-00001\.arrow is missing"):
        ShardSet(opened, tmp_path / "cache")


@pytest.mark.parametrize("content", [None, b"no arrow file at all"])
def test_a_shard_that_is_spoiled_later_is_named(artifact, tmp_path, content):
    copy = copy_of(artifact, tmp_path)
    loader = loader_of(copy, global_batch=1, prefetch=0)
    for shard in loader.shards.shards("train"):
        copy.files.delete(shard.path)
        if content:
            copy.files.write_bytes(shard.path, content)
    with pytest.raises(CorruptArtifact, match=r"train/shard-0000\d\.arrow is no shard of rows of 17 tokens"):
        next(loader)


def test_a_remote_store_needs_a_cache(artifact):
    with pytest.raises(ValueError, match="is remote; give a cache_dir"):
        loader_of(far(artifact))


def test_nothing_committed(tmp_path):
    with pytest.raises(NotFound, match="nothing is committed"):
        ShardSet(Artifact(Store(tmp_path)))


# -- what the stage writes


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_the_targets_are_those_that_the_stage_counts(tmp_path, packing):
    write_corpus(tmp_path / "corpus", documents=40)
    with in_this_process():
        graph = data_graph(data_config(tmp_path / "corpus", packing=packing), seq_len=SEQ_LEN)
        artifact = run_stages(graph, Store(tmp_path / "store"))["shards"]
    with loader_of(artifact, global_batch=1, shuffle_shards=1) as loader:
        shards = loader.shards
        for split in ("train", "validation"):
            targets = sum(len(rows.targets()) for rows in shards.in_order(split, 100))
            assert targets == sum(shard.targets for shard in shards.shards(split)) > 0
        drawn = sum(next(loader).num_targets().item() for _ in range(loader.samples))
    found = sum(shard.targets for shard in shards.shards("train"))
    rest = found - drawn  # of a stream, the last row of each shard is not drawn
    assert rest == 0 if packing == "best_fit" else 0 <= rest < SEQ_LEN * len(shards.shards("train"))
