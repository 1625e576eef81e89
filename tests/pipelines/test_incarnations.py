"""The driver's side of training without a cluster: what is tried again, what counts, and with how many workers."""

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, PreemptionError, PreemptionInfo, TrainingFailedError, WorkerGroupError
from torch.distributed import DistNetworkError

from cluster import placement
from cluster.placement import NodeResources, PlacementError, PlacementPlan
from cluster.storage import StorageError
from llama.config import ModelConfig, MoEConfig
from llama.training.checkpoint import CheckpointError
from llama.training.config import ParallelConfig
from llama.training.metrics import TrainSummary
from pipelines import incarnations
from pipelines.incarnations import TrainingFailed, train_in_incarnations
from pipelines.recipe import TrainRecipe
from pipelines.training_worker import Outcome

TRAIN = TrainRecipe(workers=4, micro_batch=1, parallel=ParallelConfig(ep=2), gpus_per_worker=1, accelerator_type="H200")
MODEL = ModelConfig(vocab_size=512, dim=64, num_layers=1, num_heads=4, moe=MoEConfig(num_experts=4))
LOST = WorkerGroupError("failed", {1: ActorDiedError()})
UNCLEAR = WorkerGroupError("failed", {0: RuntimeError("shapes cannot be multiplied")})


def node(name: str, slots: int = 2) -> NodeResources:
    return NodeResources(name, cpus=96, gpus=slots, accelerator_type="H200")


def summary(step: int, finished: bool) -> TrainSummary:
    return TrainSummary(step, finished, 0, 1.0, 0, 1.0, 1.0, 0.0, 0, 0)


DONE = Outcome(summary(100, True), ())


class Story:
    """What becomes of one incarnation after the other: an outcome, an error, or a change of the cluster before one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: list[NodeResources], *ends: Any) -> None:
        self.nodes, self.ends, self.step = nodes, list(ends), 0
        self.plans: list[PlacementPlan] = []
        self.known: list[frozenset[str]] = []
        self.said: list[str] = []
        self.hung: str | None = None
        monkeypatch.setattr(placement, "alive_nodes", self.alive_nodes)
        self.unreachable: frozenset[str] = frozenset()
        monkeypatch.setattr(placement, "unreachable_nodes", lambda: self.unreachable)
        monkeypatch.setattr(incarnations, "_train_once", self.train_once)

    def alive_nodes(self, without: Any = ()) -> list[NodeResources]:
        return [node for node in self.nodes if node.node_id not in without]

    def latest_step(self) -> int:
        return self.step

    def hang(self, incarnation: str) -> str | None:
        return self.hung

    def train_once(self, plan: PlacementPlan, task: frozenset[str]) -> Outcome:
        self.plans.append(plan)
        self.known.append(task)
        end = self.ends.pop(0)
        while isinstance(end, Callable):  # type: ignore[arg-type]
            end(self)
            end = self.ends.pop(0)
        if isinstance(end, TrainingFailedError):
            raise end
        return end

    def tell(self, train: TrainRecipe = TRAIN, dim: int = 64) -> Outcome:
        sizes = train.world_sizes(replace(MODEL, dim=dim))
        return train_in_incarnations(train, sizes, lambda incarnation, known: known, self, self.said.append)  # type: ignore[arg-type, return-value]

    def workers(self) -> list[int]:
        return [plan.workers for plan in self.plans]


def got_to(step: int) -> Callable[[Story], None]:
    return lambda story: setattr(story, "step", step)


def with_nodes(*nodes: NodeResources) -> Callable[[Story], None]:
    return lambda story: setattr(story, "nodes", list(nodes))


@pytest.mark.parametrize(
    ("failures", "reason", "retryable"),
    [
        ({0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}, "worker of rank 1 was lost", True),
        ({0: RuntimeError("Connection closed by peer")}, "failed on rank 0: Connection closed", None),
        ({0: DistNetworkError("timed out")}, "failed on rank 0: timed out", True),
        ({0: StorageError("s3://x: cannot write 'y': it hangs"), 1: RuntimeError("echo")}, "it hangs", True),
        ({0: CheckpointError("the last checkpoint could not be written")}, "the last checkpoint could", True),
        (
            {0: RuntimeError("echo"), 1: ValueError("train.x=1 is wrong\nat length")},
            "rank 1: train.x=1 is wrong",
            False,
        ),
    ],
)
def test_what_is_tried_again(failures: dict[int, Exception], reason: str, retryable: bool) -> None:
    failure = incarnations._diagnose(WorkerGroupError("workers failed", failures))
    assert reason in failure.reason
    assert "\n" not in failure.reason
    assert failure.retryable is retryable and failure.counts


def test_a_failed_controller_is_tried_again() -> None:
    failure = incarnations._diagnose(ControllerError(RuntimeError("placement group removed")))
    assert failure.retryable and failure.counts


def test_a_failure_of_unclear_origin_is_tried_again_only_after_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, [node("a", 4)], got_to(10), UNCLEAR, UNCLEAR)
    with pytest.raises(TrainingFailed, match="rank 0: shapes cannot be multiplied"):
        story.tell()
    assert story.workers() == [4, 4]
    assert [line for line in story.said if "restart" in line] == [
        "training failed on rank 0: shapes cannot be multiplied; restart 1 of 2 from the last committed checkpoint"
    ]


def test_restarts_in_a_row_are_counted_and_progress_ends_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, [node("a", 4)], LOST, LOST, got_to(10), LOST, LOST, LOST)
    with pytest.raises(TrainingFailed, match="train.max_failures=2 restarts are used up"):
        story.tell()
    restarts = [line.partition("; restart ")[2][:6] for line in story.said if "restart" in line]
    assert restarts == ["1 of 2", "2 of 2", "1 of 2", "2 of 2"]


def test_a_hang_is_named_with_the_place_of_its_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, [node("a", 4)], LOST, DONE)
    story.hung = "training hung: the stacks lie in s3://x"
    assert story.tell() is DONE
    assert story.said[1].startswith("training hung: the stacks lie in s3://x; restart 1 of 2")


def test_a_lost_node_is_done_without_and_one_that_comes_back_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = Outcome(summary(50, False), ())
    story = Story(
        monkeypatch,
        [node("a"), node("b")],
        with_nodes(node("a")),
        LOST,
        with_nodes(node("a"), node("c")),
        growing,
        DONE,
    )
    assert story.tell(replace(TRAIN, workers=(2, 4), max_failures=1)) is DONE
    assert story.workers() == [4, 2, 4]
    assert story.known == [{"a", "b"}, {"a"}, {"a", "c"}]
    assert "stopped at step 50: there is room for more workers" in story.said


def test_a_node_whose_loss_ray_has_not_noticed_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_silent(story: Story) -> None:
        story.unreachable = frozenset({"b"})

    story = Story(monkeypatch, [node("a"), node("b")], fall_silent, LOST, DONE)
    assert story.tell(replace(TRAIN, workers=(2, 4))) is DONE
    assert story.workers() == [4, 2]
    assert story.known[1] == {"a", "b"}, "it is no new node either, as long as Ray lists it"


def test_as_many_workers_as_could_not_share_an_expert_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, [node("a"), node("b"), node("c")], DONE)
    assert story.tell(replace(TRAIN, workers=(2, 6), global_batch=96)) is DONE
    assert story.workers() == [4]


def test_a_node_that_will_be_taken_away_is_planned_without_and_counts_as_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"b": [0, 1]}))
    story = Story(monkeypatch, [node("a"), node("b"), node("c")], Outcome(summary(7, False), ("a",)), late, DONE)
    assert story.tell(replace(TRAIN, workers=(2, 6), global_batch=96, max_failures=0), dim=96) is DONE
    assert [[name for name, _ in plan.workers_by_node] for plan in story.plans] == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert "stopped at step 7: a node will be taken away" in story.said


class WorkerGroupStartupTimeoutError(Exception):
    """As Ray's is named."""


NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError("waited 60 s"))


def test_workers_that_find_no_room_are_planned_anew_and_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, [node("a"), node("b")], NO_ROOM, LOST, DONE)
    assert story.tell(replace(TRAIN, workers=(2, 4), max_failures=1)) is DONE
    assert story.workers() == [4, 2, 4]
    assert "something else holds it; end that, or lower train.workers; planning anew" in story.said[1]


def test_finding_no_room_is_a_failure_once_the_wait_for_nodes_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = 0.0
    monkeypatch.setattr(incarnations, "_clock", lambda: 3600 * hours + 1)

    def later(story: Story) -> None:
        nonlocal hours
        hours += 1

    train = replace(TRAIN, wait_for_nodes=2 * 3600, max_failures=1)
    story = Story(monkeypatch, [node("a"), node("b")], NO_ROOM, later, NO_ROOM, later, NO_ROOM, later, NO_ROOM)
    with pytest.raises(TrainingFailed, match="found no room.*train.max_failures=1 restarts are used up"):
        story.tell(train)
    assert story.workers() == [4, 4, 4, 4]
    waits = Story(monkeypatch, [node("a"), node("b")], NO_ROOM, later, LOST, later, NO_ROOM, later, NO_ROOM, DONE)
    assert waits.tell(train) is DONE, "another end begins the wait anew"


def test_too_few_nodes_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(monkeypatch, [node("a", 3)])
    with pytest.raises(PlacementError, match=r"workers=\[4, 8\] in groups of ep=2 do not fit.*workers=2 with ep=2"):
        story.tell(replace(TRAIN, workers=(4, 8), global_batch=64))
    assert story.plans == [] and story.said == []


def test_ray_trains_handling_of_ctrl_c_does_not_outlive_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), incarnations._interruptible():
        signal.signal(signal.SIGINT, lambda *_: None)
        raise SystemExit(0)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_recipes_resources_reach_rays_scaling_config() -> None:
    nodes = [NodeResources("gpu", cpus=96, gpus=8, accelerator_type="H200")]
    needs = TRAIN.worker_needs
    scaling = placement.largest_plan(nodes, TRAIN.world_sizes(MODEL), needs).to_scaling()
    assert (scaling.num_workers, scaling.use_gpu, scaling.accelerator_type) == (4, True, "H200")
    assert scaling.resources_per_worker == {"CPU": 1.0, "GPU": 1}
