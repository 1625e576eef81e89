"""What a worker does beside training: reports that the store does not take, and what it sees of the cluster."""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cluster import placement
from cluster.artifact import Artifact
from cluster.placement import NodeResources, WorkerNeeds, WorldSizes
from cluster.storage import StorageError, Store
from llama.config import ModelConfig
from llama.training.config import TrainConfig
from llama.training.control import Request
from llama.training.metrics import StepMetrics
from llama.training.watchdog import Watchdog
from pipelines import training_worker
from pipelines.loader import ShardData
from pipelines.metrics import MetricsReader
from pipelines.training_worker import ClusterWatch, WorkerTask, _Reports


def task(store: Store, known_nodes: frozenset[str] = frozenset({"a"})) -> WorkerTask:
    return WorkerTask(
        model=ModelConfig(dim=32, num_layers=1, num_heads=2),
        train=TrainConfig(steps=9, checkpoint_every=2),
        threads=1,
        data=ShardData(Artifact(store), None, None),
        start=None,
        output=store,
        incarnation="first",
        run="run",
        stage="pretrain",
        sizes=WorldSizes(2, 4, 2, lambda size: size % 2 == 0),
        needs=WorkerNeeds(),
        known_nodes=known_nodes,
    )


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        steps=9,
        loss=1.0,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=10,
        tokens_per_second=1.0,
        mfu=None,
        memory_bytes=1,
        samples=number,
        epoch=None,
        checkpoint_seconds=0.0,
        val_loss=None,
        balance_loss=None,
        z_loss=None,
        expert_load={},
        router_entropy={},
        all_to_all_bytes=0,
        skipped_steps=0,
    )


def test_reports_that_the_store_does_not_take_are_kept_for_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    down, tried = threading.Event(), threading.Event()
    write, threads = Store.write_bytes, set()

    def fail_when_down(self: Store, path: str, data: bytes, **settings: Any) -> Any:
        threads.add(threading.current_thread().name)
        if down.is_set():
            tried.set()
            raise StorageError("the store's service failed")
        return write(self, path, data, **settings)

    monkeypatch.setattr(Store, "write_bytes", fail_when_down)
    down.set()
    store = Store(tmp_path)
    with caplog.at_level(logging.WARNING), _Reports(task(store), Watchdog(0)) as reports:
        reports.start(0, ["a", "a"])
        for number in range(1, 5):
            reports.step(step(number))
        assert tried.wait(10)
        while not reports._reports.empty():
            tried.wait(0.01)
        down.clear()
    assert store.read_json("incarnations/first.json") == {"resumed_step": 0, "world_size": 2, "nodes": ["a", "a"]}
    reader = MetricsReader(store.child("metrics"))
    reader.poll()
    assert [line["step"] for line in reader.steps()] == [1, 2, 3, 4]
    assert sum("kept for later" in record.message for record in caplog.records) == 1
    assert threads == {"reports"}, "the training's own thread never waits for the store"


@pytest.mark.parametrize(("log_every", "reported", "kept"), [(1, [1, 2, 3, 4, 5], 4), (3, [1, 3, 6, 9], 3)])
def test_what_was_reported_before_a_checkpoint_is_there_when_it_is(
    tmp_path: Path, log_every: int, reported: list[int], kept: int
) -> None:
    """A training that dies at once after the checkpoint of step 4 and goes on from it does not repeat these lines."""
    train = TrainConfig(steps=9, checkpoint_every=4, log_every=log_every)
    store = Store(tmp_path)
    with _Reports(replace(task(store), train=train), Watchdog(0)) as reports:
        for number in reported:
            reports.step(step(number))
            if number == kept:
                break
        done = threading.Event()
        reports._reports.put(done.set)
        assert done.wait(10)
        reader = MetricsReader(store.child("metrics"))
        reader.poll()
        assert [line["step"] for line in reader.steps()] == [each for each in reported if each <= 4]


def test_a_report_that_cannot_be_told_does_not_silence_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def set_gauges(metrics: StepMetrics) -> None:
        if metrics.step == 1:
            raise TypeError("no number")

    with _Reports(task(Store(tmp_path)), Watchdog(0)) as reports:
        monkeypatch.setattr(reports._gauges, "set", set_gauges)
        for number in (1, 2):
            reports.step(step(number))
    reader = MetricsReader(Store(tmp_path).child("metrics"))
    reader.poll()
    assert [line["step"] for line in reader.steps()] == [1, 2]
    assert [record.message for record in caplog.records] == ["a report was left out"]


class Notice:
    preempted_node_ids = ("a",)


@pytest.mark.parametrize(
    ("nodes", "notice", "request_"),
    [
        (["a"], None, Request.GO_ON),
        (["a", "b"], None, Request.STOP_AT_CHECKPOINT),
        (["a", "too-small"], None, Request.GO_ON),
        (["a", "b"], Notice(), Request.STOP_NOW),
    ],
)
def test_what_the_cluster_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nodes: list[str], notice: Notice | None, request_: Request
) -> None:
    found = [NodeResources(name, cpus=1 if name == "too-small" else 2) for name in nodes]
    monkeypatch.setattr(placement, "alive_nodes", lambda: found)
    monkeypatch.setattr(training_worker.ray.train, "get_preemption_info", lambda: notice)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    watch = ClusterWatch(task(Store(tmp_path)))
    watch._look()
    assert watch.request() is request_
    assert watch.preempted == (("a",) if notice else ())


def test_room_on_nodes_that_were_there_before_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Somebody else may hold it: the plan had it before it, and got less."""
    monkeypatch.setattr(placement, "alive_nodes", lambda: [NodeResources("a", 2), NodeResources("b", 2)])
    monkeypatch.setattr(training_worker.ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    watch = ClusterWatch(task(Store(tmp_path), frozenset({"a", "b"})))
    watch._look()
    assert watch.request() is Request.GO_ON
