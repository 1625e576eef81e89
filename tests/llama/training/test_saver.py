"""A store that fails: checkpoints are left out, counted and tried again. And a training that is told to stop."""

import gc
import os
import time
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.artifact import Artifact
from cluster.storage import StorageError, Store
from llama.training.checkpoint import Checkpointer, CheckpointError
from llama.training.control import Request
from llama.training.saver import Saver
from llama.training.trainer import Trainer
from llama.training.watchdog import Watchdog
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, Samples, train_config


class Failing(Store):
    """A store that does what the file `{weather}` says when a tensor file is written on rank 1: fail, hang or work."""

    weather: Path

    def child(self, *parts):
        child = super().child(*parts)
        child.__class__, child.weather = Failing, self.weather
        return child

    def __reduce__(self):
        return _failing, (self.uri, self.weather)

    @contextmanager
    def open_output(self, path, **settings):
        with super().open_output(path, **settings) as output:
            yield output
            if path.endswith(".bin") and dist.get_rank() == 1:
                while self.weather.read_text() == "hang":
                    time.sleep(0.01)
                if self.weather.read_text() == "fail":
                    raise StorageError("the store's service failed")


def _failing(uri, weather):
    store = Failing(uri)
    store.weather = weather
    return store


def let(rank, weather, how):
    dist.barrier()
    if rank == 0:
        weather.write_text(how)
    dist.barrier()


def saves(rank, world_size, folder):
    weather = Path(folder) / "weather"
    let(rank, weather, "work")
    checkpointer = Checkpointer(_failing(f"{folder}/store", weather), Artifact, keep_last=9)
    saver = Saver(checkpointer, Watchdog(0), patience=0.3, limit=2.0)
    seen = []

    def save(step):
        saver.save(step, {"model.a": torch.full((4,), float(step))}, {})
        seen.append(saver.failed)
        if weather.read_text() != "hang":
            wait([saver._pending])  # for the weather is about to change

    let(rank, weather, "fail")
    save(1)
    save(2)  # finds that 1 has failed
    let(rank, weather, "work")
    save(3)  # finds that 2 has failed
    save(4)
    let(rank, weather, "hang")
    save(5)
    save(6)  # is left out: 5 is being written
    began = time.monotonic()
    assert not saver.save_now(7, {"model.a": torch.full((4,), 7.0)}, {}), "5 and 7 are given up"
    seen.append(saver.failed)
    waited = time.monotonic() - began
    let(rank, weather, "work")
    assert saver.save_now(8, {"model.a": torch.full((4,), 8.0)}, {})
    seen.append(saver.failed)
    committed = [step for step in range(1, 9) if checkpointer.artifact(step).manifest() is not None]
    loaded = {"model.a": torch.zeros(4)}
    checkpointer.load(8, loaded)
    return seen, waited, committed, loaded["model.a"].tolist()


@pytest.mark.integration
def test_what_fails_or_hangs_on_one_rank_is_left_out_on_all_and_counted(tmp_path):
    for seen, waited, committed, loaded in run_ranks(saves, 2, str(tmp_path)):
        assert seen == [0, 1, 2, 2, 2, 3, 5, 5]
        assert 2.0 < waited < 8
        assert {3, 4, 8} <= set(committed) <= {3, 4, 5, 7, 8}, "one that was given up may still end"
        assert loaded == [8.0] * 4


def fails_often(rank, world_size, folder):
    weather = Path(folder) / "weather"
    let(rank, weather, "fail")
    saver = Saver(Checkpointer(_failing(f"{folder}/store", weather), Artifact), Watchdog(0))

    def held_after(step):
        saver.save_now(step, {"model.a": torch.zeros(4)}, {})
        gc.collect()  # the error's traceback has the group in it
        return len(os.listdir("/proc/self/fd"))

    return [held_after(step) for step in range(1, 7)]


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_a_checkpoint_that_fails_leaves_nothing_open(tmp_path):
    for held in run_ranks(fails_often, 2, str(tmp_path)):
        assert held[-1] == held[1], held


class Watched(Checkpointer):
    """Keeps the save that was begun last, for whoever waits for its end."""

    def begin(self, *arguments):
        self.begun = super().begin(*arguments)
        return self.begun


def trains(rank, world_size, folder):
    """Checkpoints are due at 2, 4, 6 and 8; those of 2 and 4 fail, and so does the first try at the last."""
    weather = Path(folder) / "weather"
    let(rank, weather, "fail")
    config = train_config(steps=8, checkpoint_every=2)
    failed = {}

    def on_metrics(metrics):
        failed[metrics.step] = metrics.failed_checkpoints
        if metrics.step in (5, 7):
            wait([checkpointer.begun])  # the weather is that of a whole save
            let(rank, weather, "work" if metrics.step == 5 else "fail")

    class Sky(Watchdog):
        def sleep(self, seconds):  # the pause before the second try
            let(rank, weather, "work")

    checkpointer = Watched(_failing(f"{folder}/store", weather), Artifact, keep_last=9)
    loader = Samples(config, DENSE.vocab_size, rank, world_size)
    trainer = Trainer(DENSE, config, loader, checkpointer, on_metrics=on_metrics, watchdog=Sky(0))
    summary = trainer.fit()
    return failed, summary, [step for step in (2, 4, 6, 8) if checkpointer.artifact(step).manifest() is not None]


@pytest.mark.integration
def test_a_training_goes_on_without_its_checkpoints_and_insists_on_the_last(tmp_path):
    for failed, summary, committed in run_ranks(trains, 2, str(tmp_path)):
        assert committed == [6, 8]
        assert (failed[4], failed[5], failed[7], summary.failed_checkpoints) == (0, 1, 2, 2)
        assert summary.finished


def never(rank, world_size, folder):
    weather = Path(folder) / "weather"
    let(rank, weather, "fail")
    checkpointer = Checkpointer(_failing(f"{folder}/store", weather), Artifact)
    saver = Saver(checkpointer, Watchdog(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watchdog, "sleep", lambda *_: None)
        with pytest.raises(CheckpointError, match="last checkpoint, of step 3, .*rank 1: the store's service failed"):
            saver.save_or_fail(3, {"model.a": torch.zeros(4)}, {})
    return saver.failed


@pytest.mark.integration
def test_a_last_checkpoint_that_is_never_written_fails_on_every_rank(tmp_path):
    assert run_ranks(never, 2, str(tmp_path)) == [1, 1]


def stops(rank, world_size, folder):
    """One rank alone is told: to stop at a checkpoint after the first step, then to stop at once after the fifth."""
    config = train_config(steps=9, checkpoint_every=3)
    steps, summaries = [], []
    for request, told in ((Request.STOP_AT_CHECKPOINT, 1), (Request.STOP_NOW, 5), (Request.GO_ON, 99)):
        steps.append([])

        def control(request=request, told=told):
            done = steps[-1][-1] if steps[-1] else 0
            return request if rank == 1 and done >= told else Request.GO_ON

        trainer = Trainer(
            DENSE,
            config,
            Samples(config, DENSE.vocab_size, rank, world_size),
            Checkpointer(Store(folder), Artifact),
            on_metrics=lambda metrics: steps[-1].append(metrics.step),
            control=control,
        )
        summaries.append(trainer.fit())
    return steps, [(summary.step, summary.resumed_step, summary.finished) for summary in summaries]


@pytest.mark.integration
def test_a_request_to_one_rank_stops_all_with_a_checkpoint(tmp_path):
    for steps, ends in run_ranks(stops, 2, str(tmp_path)):
        assert steps == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        assert ends == [(3, 0, False), (6, 3, False), (9, 6, True)]


def test_the_most_urgent_request_is_read_from_the_sum():
    for first in Request:
        for second in Request:
            assert Request.of_sum(float(first) + float(second) + 1000 * float(first)) is max(first, second)
