"""The driver's side of training without a cluster: what is retried, and how room is found. The rest is in test_job."""

from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from cluster import placement
from cluster.placement import NodeResources, PlacementError
from cluster.storage import StorageError
from llama.config import ModelConfig
from llama.training.config import OptimizerConfig, ParallelConfig
from pipelines import pretrain
from pipelines.graph import Graph, Stage
from pipelines.recipe import TrainRecipe

MODEL = ModelConfig(dim=32, num_layers=1, num_heads=2)
TRAIN = TrainRecipe(workers=4, parallel=ParallelConfig(ep=2), gpus_per_worker=1, accelerator_type="H200")


@pytest.mark.parametrize(
    ("failures", "reason", "retryable"),
    [
        ({0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}, "worker of rank 1 was lost", True),
        ({0: RuntimeError("Connection closed by peer")}, "Connection closed", True),
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


class FakeCluster:
    """Nodes that appear when an autoscaler was asked for them often enough."""

    def __init__(self, nodes: list[NodeResources], after_looks: int) -> None:
        self.nodes = nodes
        self.after_looks = after_looks
        self.looks = 0
        self.requests: list[list[dict[str, float]]] = []

    def alive_nodes(self) -> list[NodeResources]:
        self.looks += 1
        return self.nodes if self.looks > self.after_looks else [NodeResources("head", cpus=8)]

    def request_resources(self, bundles: list[dict[str, float]]) -> None:
        self.requests.append(bundles)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    nodes = [NodeResources("head", cpus=8), NodeResources("gpu", cpus=96, gpus=8, accelerator_type="H200")]
    fake = FakeCluster(nodes, after_looks=2)
    monkeypatch.setattr(placement, "alive_nodes", fake.alive_nodes)
    monkeypatch.setattr(pretrain, "request_resources", fake.request_resources)
    monkeypatch.setattr(pretrain, "_POLL_SECONDS", 0.001)
    return fake


def test_no_room_is_refused_at_once_with_the_reason(cluster: FakeCluster) -> None:
    with pytest.raises(PlacementError, match="no node has room"):
        pretrain._plan(TRAIN)
    assert cluster.requests == []


def test_an_autoscaler_is_asked_once_and_the_request_is_withdrawn(cluster: FakeCluster) -> None:
    plan = pretrain._plan(replace(TRAIN, wait_for_nodes=30))
    assert plan.node_ids == ["gpu"] * 4
    assert cluster.requests == [[{"CPU": 1.0, "GPU": 1, "accelerator_type:H200": 0.001}] * 4, []]
    scaling = plan.to_scaling()
    assert (scaling.num_workers, scaling.use_gpu, scaling.accelerator_type) == (4, True, "H200")
    assert scaling.resources_per_worker == {"CPU": 1.0, "GPU": 1}


def test_waiting_ends(cluster: FakeCluster) -> None:
    cluster.after_looks = 10**9
    with pytest.raises(PlacementError):
        pretrain._plan(replace(TRAIN, wait_for_nodes=0.02))
    assert cluster.requests[-1] == []


def test_the_key_is_of_what_is_trained_not_of_where() -> None:
    def key(train: TrainRecipe) -> str:
        graph = Graph([Stage("shards", 1, {}, lambda context: {}), pretrain.pretrain_stage(MODEL, train)])
        return graph.keys["pretrain"]

    base = key(TRAIN)
    moved = replace(TRAIN, workers=2, cpus_per_worker=3, micro_batch=4, parallel=ParallelConfig(), max_failures=9)
    assert key(moved) == base
    for change in ({"steps": 7}, {"seed": 1}, {"precision": "bf16"}, {"optimizer": OptimizerConfig(lr=1e-4)}):
        assert key(replace(TRAIN, **change)) != base
