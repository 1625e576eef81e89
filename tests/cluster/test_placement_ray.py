"""A plan on a real Ray of two nodes with three slots each, which declare GPUs they do not have."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import processes
from cluster.head import prepare_environment
from cluster.placement import PlacementError, WorkerNeeds, alive_nodes, plan, run_on_cluster, verify
from cluster.session import node_folder, ray_processes

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    prepare_environment(loopback=True)
    import ray
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 3, "num_gpus": 3, "resources": {"accelerator_type:H200": 1}}
    fake = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        fake.add_node(**node, node_ip_address="127.0.0.2")  # Train tells nodes apart by address
        ray.init(address=fake.address, log_to_driver=False)
        yield
    finally:
        started = ray_processes()
        ray.shutdown()
        fake.shutdown()
        processes.await_end(started, grace=10)


def test_ray_left_alone_splits_a_group(cluster: None) -> None:
    """Why a plan is needed; if this ever fails, Ray has learnt to keep groups together."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    group = placement_group([{"GPU": 1}] * 4, strategy="PACK")
    ray.get(group.ready(), timeout=60)
    nodes = placement_group_table(group)["bundles_to_node_id"].values()
    remove_placement_group(group)
    assert sorted(Counter(nodes).values()) == [1, 3]


def test_planned_workers_never_split_and_their_gpus_are_asked_of_ray(cluster: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    made = plan(alive_nodes(), 4, 2, WorkerNeeds(cpus=0.5, gpus=1, accelerator_type="H200"))
    assert sorted(count for _, count in made.workers_by_node) == [2, 2]

    class Worker:
        def facts(self) -> tuple[str, int, dict]:
            context = ray.get_runtime_context()
            return context.get_node_id(), len(context.get_accelerator_ids()["GPU"]), context.get_assigned_resources()

    # what Train's controller does with a ScalingConfig, without the half minute that a fit() of four workers takes
    scaling: Any = made.to_scaling()
    resources = scaling._resources_per_worker_not_none
    group = placement_group(
        [resources] * scaling.num_workers,
        strategy=scaling.placement_strategy,
        bundle_label_selector=scaling.label_selector,
    )
    ray.get(group.ready(), timeout=60)
    workers: list[Any] = [
        ray.remote(Worker)
        .options(
            num_cpus=resources["CPU"],
            num_gpus=resources["GPU"],
            resources={"accelerator_type:H200": resources["accelerator_type:H200"]},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote()
        for index in range(scaling.num_workers)
    ]
    facts: Any = ray.get([worker.facts.remote() for worker in workers], timeout=60)
    remove_placement_group(group)

    nodes = sorted(node for node, _, _ in facts)  # Train sorts workers by node before it numbers them
    verify(nodes, 2)
    assert Counter(nodes) == dict(made.workers_by_node)
    for _, gpus, assigned in facts:
        assert gpus == 1 and assigned["GPU"] == 1 and assigned["CPU"] == 0.5
        assert assigned["accelerator_type:H200"] == 0.001


def test_function_runs_with_what_it_needs(cluster: None) -> None:
    def facts(word: str) -> tuple[str, int, dict]:
        import ray

        context = ray.get_runtime_context()
        return word, os.getpid(), context.get_assigned_resources()

    word, pid, assigned = run_on_cluster(WorkerNeeds(cpus=0.5, gpus=2, accelerator_type="H200"), facts, "hello")
    assert word == "hello" and pid != os.getpid()
    assert (assigned["CPU"], assigned["GPU"], assigned["accelerator_type:H200"]) == (0.5, 2, 0.001)


def test_function_that_fits_nowhere_is_refused_instead_of_queued(cluster: None) -> None:
    with pytest.raises(PlacementError, match="no node has room for even one worker of 1 CPU and 4 GPU") as refused:
        run_on_cluster(WorkerNeeds(gpus=4), os.getpid)
    assert "\n" not in str(refused.value)


def test_function_raises_its_own_error(cluster: None) -> None:
    def fail() -> None:
        raise FileNotFoundError("the checkpoint is gone")

    with pytest.raises(FileNotFoundError) as failure:
        run_on_cluster(WorkerNeeds(), fail)
    assert type(failure.value) is FileNotFoundError and str(failure.value) == "the checkpoint is gone"


def test_interrupt_cancels_the_task(cluster: None, tmp_path: Path) -> None:
    def work(begun: Path, ended: Path) -> None:
        try:
            begun.touch()
            for _ in range(600):
                time.sleep(0.1)
        finally:
            ended.touch()

    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_on_cluster(WorkerNeeds(), work, tmp_path / "begun", tmp_path / "ended")
    thread.join()
    assert (tmp_path / "ended").exists(), "it was told before the interrupt was passed on"


def test_folder_of_a_node_is_the_same_for_its_workers(cluster: None) -> None:
    def look() -> tuple[str, bool]:
        folder = node_folder("shards")
        return str(folder), folder.is_dir()

    found = {run_on_cluster(WorkerNeeds(), look) for _ in range(2)}
    assert found == {(str(node_folder("shards")), True)}
    assert node_folder("other") != node_folder("shards")
    for name in ("..", "a/b", ""):
        with pytest.raises(ValueError, match="plain"):
            node_folder(name)
