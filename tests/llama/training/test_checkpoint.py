"""Checkpoints on the real store: whole or absent, bit-exact, in any layout."""

import io
import json
import logging
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from cluster.artifact import Artifact
from cluster.storage import StorageError, Store
from llama.model import Transformer
from llama.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    load_model_weights,
    training_tensors,
)
from llama.training.config import ParallelConfig
from llama.training.mesh import build_mesh, process_group
from llama.training.optim import build_optimizer
from llama.training.parallel import apply_parallel, init_sharded_weights
from llama.training.tensor_files import read_index, read_tensors
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import MOE, Samples, train_config, whole

pytestmark = pytest.mark.integration

CONFIG = train_config(steps=6, checkpoint_every=3, parallel=ParallelConfig(ep=2))


def state(model, optimizer):
    return {name: whole(tensor) for name, tensor in training_tensors(model, optimizer).items()}


def train(rank, world_size, folder):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("llama.training").addHandler(handler)
    checkpointer = Checkpointer(Store(folder), Artifact, keep_last=2)
    loader, seen, resumed = Samples(CONFIG, MOE.vocab_size, rank, world_size), [], []
    trainer = Trainer(MOE, CONFIG, loader, checkpointer, on_metrics=seen.append, on_resume=resumed.append)
    summary = trainer.fit()
    return {
        "state": state(trainer.model, trainer.optimizer),
        "losses": {metrics.step: metrics.loss for metrics in seen},
        "summary": asdict(summary),
        "consumed": loader.consumed,
        "resumed": resumed,
        "log": messages,
    }


def load(rank, world_size, folder, step, layouts):
    """The state that `step` gives under each layout, gathered; into a model that started from other weights."""
    states = []
    for parallel in layouts:
        with torch.device("meta"):
            model = Transformer(MOE)
        apply_parallel(model, build_mesh(parallel, world_size, "cpu"), "fp32")
        init_sharded_weights(model, 99, torch.device("cpu"))
        optimizer = build_optimizer(model, CONFIG.optimizer)
        Checkpointer(Store(folder), Artifact).load(step, training_tensors(model, optimizer))
        states.append(state(model, optimizer))
    return states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps without a pause, under (dp_shard=2, ep=2); checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_ranks(train, 2, str(folder))


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_three_steps_resumed_for_three_more_equal_six(run, tmp_path):
    folder, uninterrupted = run
    copy = copy_of(folder, tmp_path)
    Artifact(Store(copy / "step-00000006")).delete()
    for resumed, expected in zip(run_ranks(train, 2, str(copy)), uninterrupted, strict=True):
        assert resumed["summary"]["resumed_step"] == 3
        assert expected["summary"]["resumed_step"] == 0
        assert resumed["losses"] == {step: expected["losses"][step] for step in (4, 5, 6)}
        assert resumed["consumed"] == expected["consumed"] == 6 * CONFIG.global_batch
        assert resumed["summary"]["tokens"] == expected["summary"]["tokens"] == 6 * 8 * 16
        assert equal(resumed["state"], expected["state"])


def test_loads_bit_equal_under_other_layouts(run):
    folder, (first, _) = run
    for world_size, layouts in ((2, [ParallelConfig(ep=2), ParallelConfig(ep=1)]), (1, [ParallelConfig()])):
        for states in run_ranks(load, world_size, str(folder), 6, layouts):
            assert all(equal(loaded, first["state"]) for loaded in states)


def test_loads_bit_equal_into_a_plain_model_without_a_process_group(run):
    folder, (first, _) = run
    assert not dist.is_initialized()
    model = Transformer(MOE)
    model.init_weights(99)
    progress = load_model_weights(Artifact(Store(folder / "step-00000006")), model)
    assert (progress["step"], progress["loader"]) == (6, {"samples_consumed": 48})
    weights = {name.removeprefix("model."): t for name, t in first["state"].items() if name.startswith("model.")}
    assert equal(dict(model.state_dict()), weights)
    assert any(tensor.count_nonzero() for name, tensor in weights.items() if name.endswith("expert_bias"))


def test_optimizer_state_is_stored_by_parameter_name(run):
    folder, (first, _) = run
    artifact = Artifact(Store(folder / "step-00000006"))
    files, index = artifact.files, read_index(artifact.files, artifact.manifest())
    assert {name for name in index if not name.startswith("rng.")} == first["state"].keys()
    assert {"rng.0", "rng.1"} <= index.keys()
    moments = {name: torch.empty_like(t) for name, t in first["state"].items() if name.startswith("optimizer.")}
    read_tensors(files, index, moments)
    assert all(torch.equal(moments[name], first["state"][name]) for name in moments)
    assert any("experts.w1.exp_avg_sq" in name for name in moments)


def delete_part(attempt: Path):
    (attempt / "rank-00001.bin").unlink()


def shorten_part(attempt: Path):
    part = attempt / "rank-00000.bin"
    part.write_bytes(part.read_bytes()[:-8])


def delete_manifest(attempt: Path):
    (attempt.parents[1] / "manifest.json").unlink()


def damage_manifest(attempt: Path):
    manifest = attempt.parents[1] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b":", b"\xff"))


@pytest.mark.parametrize("damage", [delete_part, shorten_part, delete_manifest, damage_manifest])
def test_latest_ignores_what_is_not_whole(run, tmp_path, damage, caplog):
    copy = copy_of(run[0], tmp_path)
    checkpointer = Checkpointer(Store(copy), Artifact)
    assert checkpointer.latest() == 6
    damage(next((copy / "step-00000006" / "attempts").iterdir()))
    assert checkpointer.latest() == 3
    damage(next((copy / "step-00000003" / "attempts").iterdir()))
    caplog.clear()
    assert checkpointer.latest() is None
    assert "steps [6, 3] are stored, none of them whole" in caplog.messages[-1]


class Unreachable(Artifact):
    """Its manifest cannot be asked for, or only from the second time on."""

    failures = 1

    def manifest(self):
        if self.failures:
            self.failures -= 1
            raise StorageError("the store's service failed")
        return super().manifest()


class UnreachableFolder(Store):
    def child(self, *parts):
        return UnreachableFolder(str(super().child(*parts).local_path()))

    def open_input(self, path):
        raise StorageError("the store cannot be reached")


def test_a_store_that_fails_is_not_taken_for_a_broken_checkpoint(run):
    with pytest.raises(StorageError, match="cannot be reached"):
        Checkpointer(UnreachableFolder(run[0]), Unreachable).latest()
    assert Checkpointer(Store(run[0]), Unreachable).latest() == 6


def change_a_byte(attempt: Path, path: str = "rank-00000.bin"):
    artifact = Artifact(Store(attempt.parents[1]))
    index = read_index(artifact.files, artifact.manifest())
    shards = [at for name, tensor in index.items() if name.startswith("model.") for at in tensor.shards]
    data = bytearray((attempt / path).read_bytes())
    data[next(at.begin for at in shards if at.file == path and all(at.shape))] ^= 1
    (attempt / path).write_bytes(data)


def rename_a_tensor(attempt: Path):
    index = attempt / "index.json"
    index.write_bytes(index.read_bytes().replace(b"model.norm", b"model.form"))


def change_another_rank(attempt: Path):
    change_a_byte(attempt, "rank-00001.bin")


@pytest.mark.parametrize(
    ("damage", "word"),
    [(change_another_rank, "rank-00001.bin"), (rename_a_tensor, "index.json"), (damage_manifest, "manifest.json")],
)
def test_a_changed_byte_costs_that_checkpoint_and_no_older_one(run, tmp_path, damage, word):
    folder, uninterrupted = run
    copy = copy_of(folder, tmp_path)
    damage(next((copy / "step-00000006" / "attempts").iterdir()))
    results = run_ranks(train, 2, str(copy))
    for resumed, expected in zip(results, uninterrupted, strict=True):
        assert (resumed["summary"]["resumed_step"], resumed["resumed"]) == (3, [3])
        assert resumed["losses"] == {step: expected["losses"][step] for step in (4, 5, 6)}
        assert equal(resumed["state"], expected["state"])
    assert any("checkpoint of step 6" in message and word in message for message in results[0]["log"])
    assert results[1]["log"] == []
    assert Checkpointer(Store(copy), Artifact).latest() == 6


def test_without_a_readable_checkpoint_training_starts_anew(run, tmp_path):
    folder, uninterrupted = run
    copy = copy_of(folder, tmp_path)
    for step in (3, 6):
        change_a_byte(next((copy / f"step-{step:08d}" / "attempts").iterdir()))
    results = run_ranks(train, 2, str(copy))
    for fresh, expected in zip(results, uninterrupted, strict=True):
        assert (fresh["summary"]["resumed_step"], fresh["resumed"]) == (0, [0])
        assert fresh["losses"] == expected["losses"]
        assert equal(fresh["state"], expected["state"])
    discarded, older, anew = results[0]["log"]
    assert "checkpoint of step 6" in discarded and "checkpoint of step 3" in older and "starts from step 0" in anew


class BadLine(Store):
    """The first time that it hands out tensors, a byte is wrong."""

    tries = 0

    def child(self, *parts):
        child = super().child(*parts)
        child.__class__ = BadLine
        return child

    def open_input(self, path):
        source = super().open_input(path)
        if not path.endswith(".bin"):
            return source
        BadLine.tries += 1
        if BadLine.tries > 1:
            return source
        data = bytearray(source.read())
        data[0] ^= 1
        return io.BytesIO(data)


def test_bytes_that_went_wrong_on_their_way_cost_no_checkpoint(tmp_path):
    saved, loaded = {"model.a": torch.arange(4.0)}, {"model.a": torch.zeros(4)}
    with process_group():
        Checkpointer(Store(tmp_path), Artifact).begin(1, saved, {}).result()
        Checkpointer(BadLine(tmp_path), Artifact).load(1, loaded)
    assert BadLine.tries == 2
    assert loaded["model.a"].tolist() == [0, 1, 2, 3]


def test_a_run_resumed_at_its_end_knows_its_last_loss(run, tmp_path):
    folder, uninterrupted = run
    for resumed, expected in zip(run_ranks(train, 2, str(copy_of(folder, tmp_path))), uninterrupted, strict=True):
        assert resumed["summary"]["resumed_step"] == 6 and resumed["losses"] == {}
        assert resumed["summary"]["loss"] == expected["summary"]["loss"] == expected["losses"][6]
        assert resumed["summary"]["tokens_per_second"] is None
        json.dumps(resumed["summary"], allow_nan=False)


def test_a_changed_byte_is_found_when_read(run, tmp_path):
    copy = copy_of(run[0], tmp_path)
    change_a_byte(next((copy / "step-00000006" / "attempts").iterdir()))
    with pytest.raises(CorruptCheckpoint, match=r"rank-00000\.bin: the \d+ bytes of model\."):
        load_model_weights(Artifact(Store(copy / "step-00000006")), Transformer(MOE))


class Faulty:
    """A store whose new binary files wait for the file `gate`, or fail before their end on the given rank."""

    def __init__(self, store, gate=None, failing_rank=None):
        self.store, self.gate, self.failing_rank = store, gate, failing_rank

    def __getattr__(self, name):
        if name.startswith("__") or name == "store":
            raise AttributeError(name)
        return getattr(self.store, name)

    def child(self, *parts):
        return Faulty(self.store.child(*parts), self.gate, self.failing_rank)

    @contextmanager
    def open_output(self, path):
        with self.store.open_output(path) as output:
            yield output
            if path.endswith(".bin"):
                deadline = time.monotonic() + 30
                while self.gate is not None and not self.gate.exists():
                    if time.monotonic() > deadline:
                        raise StorageError("the gate stayed shut: saving waited for the write")
                    time.sleep(0.01)
                if dist.get_rank() == self.failing_rank:
                    raise StorageError("the disk is full")


def tensors_of(value):
    return {"model.a": torch.full((4,), float(value))}


def saves(rank, world_size, folder):
    store = Store(folder)
    healthy = Checkpointer(store, Artifact, keep_last=2)
    for step in (1, 2, 3):
        healthy.begin(step, tensors_of(step), {"note": step}).result()
    kept = sorted({path.split("/")[0] for path in store.list()})
    dist.barrier()

    broken = Checkpointer(Faulty(store, failing_rank=1), Artifact, keep_last=1)
    with pytest.raises(CheckpointException, match="the disk is full"):
        broken.begin(4, tensors_of(4), {}).result()
    after_failure = (healthy.latest(), Artifact(store.child("step-00000004")).committed)
    dist.barrier()

    # No write can end before the gate opens, and it opens only after save has returned.
    gate = Path(folder).with_name("gate")
    slow = Checkpointer(Faulty(store, gate=gate), Artifact, keep_last=2)
    tensors = tensors_of(5)
    pending = slow.begin(5, tensors, {"note": 5})
    tensors["model.a"].fill_(-1.0)
    committed_at_once = Artifact(store.child("step-00000005")).committed
    dist.barrier()
    gate.touch()
    pending.result()
    loaded = tensors_of(0)
    progress = slow.load(slow.latest(), loaded)
    dist.barrier()

    # Step 5 loses a part; training has gone back and reaches it again.
    if rank == 0:
        store.delete(next(path for path in store.list("step-00000005") if path.endswith("rank-00000.bin")))
    dist.barrier()
    lost = healthy.latest()
    healthy.begin(5, tensors_of(55), {}).result()
    rewritten = tensors_of(0)
    healthy.load(5, rewritten)
    with pytest.raises(CheckpointError, match="model.b"):
        healthy.load(5, {"model.b": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="step 77"):
        healthy.load(77, tensors_of(0))
    return {
        "kept": kept,
        "after_failure": after_failure,
        "committed_at_once": committed_at_once,
        "loaded": loaded["model.a"],
        "progress": progress,
        "lost": lost,
        "rewritten": rewritten["model.a"],
        "left": sorted({path.split("/")[0] for path in store.list()}),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return run_ranks(saves, 2, str(tmp_path_factory.mktemp("saves")))


def test_only_the_last_are_kept(saved):
    assert all(result["kept"] == ["step-00000002", "step-00000003"] for result in saved)


def test_one_rank_that_fails_commits_nothing_and_costs_no_older_checkpoint(saved):
    assert all(result["after_failure"] == (3, False) for result in saved)


def test_saving_does_not_wait_and_holds_the_values_of_its_moment(saved):
    for result in saved:
        assert not result["committed_at_once"]
        assert result["loaded"].tolist() == [5.0] * 4
        assert result["progress"] == {"step": 5, "note": 5}


def test_a_broken_checkpoint_is_written_again_and_remains_are_removed(saved):
    for result in saved:
        assert result["lost"] == 3
        assert result["rewritten"].tolist() == [55.0] * 4
        assert "step-00000002" not in result["left"]
