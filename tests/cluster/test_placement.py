import itertools
import socket

import pytest

from cluster import placement
from cluster.placement import (
    NodeResources,
    PlacementError,
    WorkerNeeds,
    WorldSizes,
    await_plan,
    capacity,
    largest_plan,
    plan,
    refit,
    verify,
)

ONE_CPU = WorkerNeeds()
H200 = WorkerNeeds(gpus=1, accelerator_type="H200")


def _nodes(slots: tuple[int, ...]) -> list[NodeResources]:
    return [NodeResources(f"node-{index}", cpus) for index, cpus in enumerate(slots)]


def _all_assignments(slots: tuple[int, ...], ep: int) -> list[tuple[int, ...]]:
    """Every way to put a multiple of ep on each node, found by trying everything."""
    counts = itertools.product(*(range(room + 1) for room in slots))
    return [each for each in counts if all(count % ep == 0 for count in each)]


_CASES = [slots for size in range(4) for slots in itertools.product(range(5), repeat=size)]


def test_plan_agrees_with_brute_force() -> None:
    for slots, ep in itertools.product(_CASES, (1, 2, 3)):
        nodes, assignments = _nodes(slots), _all_assignments(slots, ep)
        assert capacity(nodes, ep, ONE_CPU) == max(map(sum, assignments))
        for workers in range(1, 9):
            fitting = [each for each in assignments if sum(each) == workers]
            if not fitting:
                with pytest.raises(PlacementError):
                    plan(nodes, workers, ep, ONE_CPU)
                continue
            made = plan(nodes, workers, ep, ONE_CPU)
            by_node = dict(made.workers_by_node)
            assert tuple(by_node.get(node.node_id, 0) for node in nodes) in fitting
            assert len(by_node) == min(sum(count > 0 for count in each) for each in fitting), "the fewest nodes"
            assert made.workers == len(made.node_ids) == workers
            verify(sorted(made.node_ids), ep)


def test_refusal_names_the_nearest_plan_that_fits() -> None:
    for slots, ep, workers in itertools.product(_CASES, (1, 2, 3), range(1, 9)):
        nodes = _nodes(slots)
        try:
            plan(nodes, workers, ep, ONE_CPU)
        except PlacementError as error:
            if error.nearest is None:
                assert sum(slots) == 0 and "no node has room" in str(error)
                continue
            count, size = error.nearest
            assert plan(nodes, count, size, ONE_CPU).workers == count
            assert f"workers={count} with ep={size} would fit" in str(error)
            sums = {sum(each) for each in _all_assignments(slots, ep)} - {0}
            if sums:
                assert size == ep and abs(count - workers) == min(abs(each - workers) for each in sums)
            else:
                assert size == max(slots), "no group of ep fits anywhere, so the largest that does"


def test_the_largest_plan_agrees_with_brute_force() -> None:
    """Every world size that the batch allows, on every assignment of whole groups to nodes."""
    for slots, ep, smallest, largest, batch in itertools.product(
        [slots for slots in _CASES if len(slots) < 3], (1, 2), (1, 2, 3), (3, 4, 8), (4, 6)
    ):
        sizes = WorldSizes(smallest, largest, ep, lambda size, ep=ep, batch=batch: size % ep == 0 == batch % size)
        room = {sum(each) for each in _all_assignments(slots, ep)} - {0}
        usable = [size for size in room if size % ep == 0 == batch % size]
        inside = [size for size in usable if smallest <= size <= largest]
        if inside:
            made = largest_plan(_nodes(slots), sizes, ONE_CPU)
            assert made.workers == max(inside)
            verify(sorted(made.node_ids), ep)
            continue
        with pytest.raises(PlacementError) as refused:
            largest_plan(_nodes(slots), sizes, ONE_CPU)
        if usable:
            distances = {size: max(smallest - size, size - largest) for size in usable}
            count, size = refused.value.nearest or (0, 0)
            assert size == ep and distances[count] == min(distances.values())
            assert f"workers={count} with ep={ep} would fit" in str(refused.value)


def test_a_range_without_room_says_why_and_what_fits() -> None:
    sizes = WorldSizes(4, 8, 2, lambda size: size % 2 == 0)
    with pytest.raises(
        PlacementError, match=r"workers=\[4, 8\] in groups of ep=2 do not fit .*node-0: 3.*workers=2 with"
    ):
        largest_plan(_nodes((3, 1)), sizes, ONE_CPU)
    with pytest.raises(PlacementError, match=r"workers=\[4, 8\] in groups of ep=2 .*workers=2 with ep=1 would fit"):
        largest_plan(_nodes((1, 1)), sizes, ONE_CPU)
    with pytest.raises(PlacementError, match=r"workers=\[5, 7\] fit the training in no number; workers=4 with ep=2"):
        largest_plan(_nodes((8,)), WorldSizes(5, 7, 2, lambda size: size in (2, 4)), ONE_CPU)


def test_error_says_why_and_what_fits() -> None:
    nodes = _nodes((3, 3))
    with pytest.raises(
        PlacementError, match=r"workers=6 in groups of ep=2 do not fit .*node-0: 3, node-1: 3.*workers=4"
    ):
        plan(nodes, 6, 2, ONE_CPU)
    with pytest.raises(PlacementError, match=r"workers=3 is not a multiple of ep=2; workers=2 with ep=2 would fit"):
        plan(nodes, 3, 2, ONE_CPU)
    with pytest.raises(PlacementError, match=r"no node has room for even one worker of 1 CPU and 1 GPU of H200"):
        plan(nodes, 2, 2, WorkerNeeds(gpus=1, accelerator_type="H200"))
    for workers, ep in ((0, 1), (2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            plan(nodes, workers, ep, ONE_CPU)


def test_slots_follow_the_scarcest_resource_and_the_accelerator() -> None:
    node = NodeResources("a", cpus=8, gpus=4, accelerator_type="H200")
    for needs, slots in (
        (WorkerNeeds(cpus=1), 8),
        (WorkerNeeds(cpus=1, gpus=1), 4),
        (WorkerNeeds(cpus=3, gpus=1), 2),
        (WorkerNeeds(cpus=0.1), 80),
        (WorkerNeeds(cpus=0, gpus=1, accelerator_type="H200"), 4),
        (WorkerNeeds(cpus=0, gpus=1, accelerator_type="A100"), 0),
    ):
        assert needs.slots(node) == slots, needs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cpus": -1}, "cpus_per_worker=-1 is negative"),
        ({"gpus": -1}, "gpus_per_worker=-1 is negative"),
        ({"cpus": 0}, "must ask for something"),
        ({"accelerator_type": "H200"}, "'H200' needs gpus_per_worker"),
    ],
)
def test_senseless_needs_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerNeeds(**arguments)


def test_verify_names_the_group_that_crosses_nodes() -> None:
    verify(["a", "a", "b", "b"], 2)
    verify(["a", "a", "a", "b"], 1)
    with pytest.raises(PlacementError, match=r"group 1 crosses nodes \(rank 2 on a, rank 3 on b\)"):
        verify(["a", "a", "a", "b"], 2)
    with pytest.raises(PlacementError, match="world size 3 is not a multiple of ep=2"):
        verify(["a", "a", "a"], 2)


def test_refit_is_the_largest_multiple() -> None:
    for available, ep in itertools.product(range(20), range(1, 6)):
        fitting = [size for size in range(available + 1) if size % ep == 0]
        assert refit(available, ep) == max(fitting)


def test_a_node_whose_raylet_takes_no_connection_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = {"here": server.getsockname()[1], "gone": closed.getsockname()[1], "known to be dead": 1}
        closed.close()
        nodes = [
            {"NodeID": name, "Alive": name[0] != "k", "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in ports.items()
        ]
        monkeypatch.setattr("ray.nodes", lambda: nodes)
        assert placement.unreachable_nodes() == {"gone"}


# -- waiting for nodes


class FakeCluster:
    """A node with GPUs that appears at some look; and a record of what an autoscaler was asked for."""

    def __init__(self, appears_at: float) -> None:
        self.appears_at = appears_at
        self.looks = 0
        self.requests: list[list[dict[str, float]]] = []

    def alive_nodes(self, without: object) -> list[NodeResources]:
        self.looks += 1
        head, node = NodeResources("head", cpus=8), NodeResources("gpu", cpus=96, gpus=8, accelerator_type="H200")
        return [head, node] if self.looks >= self.appears_at else [head]

    def request_resources(self, bundles: list[dict[str, float]]) -> None:
        self.requests.append(bundles)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster(appears_at=4)
    monkeypatch.setattr(placement, "alive_nodes", fake.alive_nodes)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", fake.request_resources)
    monkeypatch.setattr(placement, "_POLL_SECONDS", 0.001)
    return fake


def test_no_room_is_refused_at_once_with_the_reason(cluster: FakeCluster) -> None:
    with pytest.raises(PlacementError, match="no node has room for even one worker of 1 CPU and 1 GPU of H200"):
        await_plan(WorldSizes.exactly(4, 2), H200)
    assert cluster.requests == [] and cluster.looks == 1


def test_an_autoscaler_is_asked_once_and_the_request_is_withdrawn(cluster: FakeCluster) -> None:
    assert await_plan(WorldSizes.exactly(4, 2), H200, wait_seconds=30).node_ids == ["gpu"] * 4
    assert cluster.looks == 4
    assert cluster.requests == [[{"CPU": 1.0, "GPU": 1, "accelerator_type:H200": 0.001}] * 4, []]


def test_room_that_is_there_is_asked_of_nobody(cluster: FakeCluster) -> None:
    assert await_plan(WorldSizes.exactly(4, 2), ONE_CPU, wait_seconds=30).node_ids == ["head"] * 4
    assert cluster.requests == []


def test_the_fewest_are_waited_for_and_the_most_that_are_there_taken(cluster: FakeCluster) -> None:
    sizes = WorldSizes(4, 16, 2, lambda size: size % 4 == 0)
    assert await_plan(sizes, H200, wait_seconds=30).node_ids == ["gpu"] * 8
    assert cluster.requests == [[{"CPU": 1.0, "GPU": 1, "accelerator_type:H200": 0.001}] * 4, []]


def test_waiting_ends_and_withdraws(cluster: FakeCluster) -> None:
    cluster.appears_at = float("inf")
    with pytest.raises(PlacementError):
        await_plan(WorldSizes.exactly(4, 2), H200, wait_seconds=0.02)
    assert cluster.requests[1:] == [[]]


def test_what_no_node_could_help_is_not_waited_for(cluster: FakeCluster) -> None:
    with pytest.raises(PlacementError, match="workers=3 is not a multiple of ep=2"):
        await_plan(WorldSizes.exactly(3, 2), H200, wait_seconds=30)
    assert cluster.requests == [] and cluster.looks == 1


def test_interrupt_withdraws_the_request(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        await_plan(WorldSizes.exactly(4, 2), H200, wait_seconds=30)
    assert cluster.requests[1:] == [[]]
