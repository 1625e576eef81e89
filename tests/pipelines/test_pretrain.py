"""The driver's side of training without a cluster: what is retried, and how room is found. The rest is in test_job."""

import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from torch.distributed import DistNetworkError

from cluster import placement
from cluster.placement import NodeResources
from cluster.storage import Artifact, StorageError, Store
from llama.config import ModelConfig
from llama.training.config import OptimizerConfig, ParallelConfig
from pipelines import pretrain
from pipelines.graph import Graph, Stage, StageContext
from pipelines.recipe import TrainRecipe

MODEL = ModelConfig(dim=32, num_layers=1, num_heads=2)
TRAIN = TrainRecipe(workers=4, parallel=ParallelConfig(ep=2), gpus_per_worker=1, accelerator_type="H200")


@pytest.mark.parametrize(
    ("failures", "reason", "retryable"),
    [
        ({0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}, "worker of rank 1 was lost", True),
        ({0: RuntimeError("Connection closed by peer")}, "failed on rank 0: Connection closed", None),
        ({0: DistNetworkError("timed out")}, "failed on rank 0: timed out", True),
        ({0: StorageError("s3://x: cannot write 'y': it hangs"), 1: RuntimeError("echo")}, "it hangs", True),
        (
            {0: RuntimeError("echo"), 1: ValueError("train.x=1 is wrong\nat length")},
            "rank 1: train.x=1 is wrong",
            False,
        ),
    ],
)
def test_what_is_tried_again(failures: dict[int, Exception], reason: str, retryable: bool) -> None:
    said, again = pretrain._diagnose(WorkerGroupError("workers failed", failures))
    assert reason in said
    assert "\n" not in said
    assert again is retryable


def test_a_failed_controller_is_tried_again() -> None:
    assert pretrain._diagnose(ControllerError(RuntimeError("placement group removed")))[1]


def test_a_failure_of_unclear_origin_is_tried_again_only_after_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def fail(train: TrainRecipe, task: str) -> None:
        tries.append(task)
        raise WorkerGroupError("failed", {0: RuntimeError("shapes cannot be multiplied")})

    monkeypatch.setattr(pretrain, "_train_once", fail)
    said: list[str] = []
    steps = iter([0, 10, 10, 10, 10, 10])  # before and after each try
    with pytest.raises(pretrain.TrainingFailed, match="rank 0: shapes cannot be multiplied"):
        pretrain._train_with_restarts(TRAIN, lambda name: name, lambda: next(steps), said.append)
    assert len(tries) == 2
    assert [line for line in said if "restart" in line] == [
        "training failed on rank 0: shapes cannot be multiplied; restart 1 of 2 from the last committed checkpoint"
    ]


def test_restarts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(train: TrainRecipe, task: str) -> None:
        raise WorkerGroupError("failed", {1: ActorDiedError()})

    monkeypatch.setattr(pretrain, "_train_once", lose)
    said: list[str] = []
    with pytest.raises(pretrain.TrainingFailed, match="train.max_failures=2 restarts are used up"):
        pretrain._train_with_restarts(TRAIN, lambda name: name, lambda: 0, said.append)
    assert sum("restart" in line for line in said) == 2


def test_ray_trains_handling_of_ctrl_c_does_not_outlive_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), pretrain._interruptible():
        signal.signal(signal.SIGINT, lambda *_: None)
        raise SystemExit(0)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_recipes_resources_reach_rays_scaling_config() -> None:
    nodes = [NodeResources("gpu", cpus=96, gpus=8, accelerator_type="H200")]
    scaling = placement.plan(nodes, TRAIN.workers, 2, pretrain.worker_needs(TRAIN)).to_scaling()
    assert (scaling.num_workers, scaling.use_gpu, scaling.accelerator_type) == (4, True, "H200")
    assert scaling.resources_per_worker == {"CPU": 1.0, "GPU": 1}


def test_the_key_is_of_what_is_trained_not_of_where() -> None:
    def key(train: TrainRecipe) -> str:
        graph = Graph([Stage("shards", 1, {}, lambda context: {}), pretrain.pretrain_stage(MODEL, train)])
        return graph.keys["pretrain"]

    base = key(TRAIN)
    moved = replace(TRAIN, workers=2, cpus_per_worker=3, micro_batch=4, parallel=ParallelConfig(), max_failures=9)
    assert key(replace(moved, cache_bytes=10**9)) == base
    assert key(replace(TRAIN, shuffle_shards=4)) != base
    for change in ({"steps": 7}, {"seed": 1}, {"precision": "bf16"}, {"optimizer": OptimizerConfig(lr=1e-4)}):
        assert key(replace(TRAIN, **change)) != base


def test_the_loaders_settings_reach_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[pretrain.WorkerTask] = []
    monkeypatch.setattr(pretrain, "_train_with_restarts", lambda train, task, *_: sent.append(task("first")))
    monkeypatch.setattr(pretrain, "_followed", nullcontext)
    store = Store(tmp_path)
    artifact = Artifact(store)
    attempt = artifact.begin()
    attempt.store.write_json(pretrain.SUMMARY, {})
    context = StageContext("pretrain", "", {"shards": artifact}, store, store, [], attempt, lambda event: None)
    pretrain._pretrain(MODEL, replace(TRAIN, shuffle_shards=3, cache_bytes=10**9), context)
    assert (sent[0].shuffle_shards, sent[0].cache_bytes, sent[0].shards) == (3, 10**9, artifact)
