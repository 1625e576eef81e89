"""Where on a cluster of several nodes a stage runs."""

from collections.abc import Iterator

import pytest

from cluster import processes
from cluster.head import prepare_environment
from cluster.session import ray_processes
from cluster.storage import Store
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.ray_execution import OnRay
from pipelines.runs import Run
from pipelines.stage import Resources, Stage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    prepare_environment(loopback=True)
    import ray
    from ray.cluster_utils import Cluster

    fake = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        fake.add_node(num_cpus=1, node_ip_address="127.0.0.2")
        ray.init(address=fake.address, log_to_driver=False)
        yield
    finally:
        started = ray_processes()
        ray.shutdown()
        fake.shutdown()
        processes.await_end(started, grace=10)


def test_a_stage_with_workers_of_its_own_waits_for_them_beside_the_driver(cluster: None, tmp_path) -> None:
    import ray

    @ray.remote(num_cpus=1)
    class Busy:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    def node(context):
        return {"node": ray.get_runtime_context().get_node_id()}

    here = ray.get_runtime_context().get_node_id()
    held = Busy.options(label_selector={"ray.io/node-id": here}).remote()
    assert ray.get(held.node.remote()) == here
    stages = [
        Stage("own", 1, {}, node, always=True, resources=Resources(1, own_workers=True)),
        Stage("asks", 1, {}, node, always=True, resources=Resources(1)),
    ]
    store = Store(tmp_path)
    with OnRay() as executor:
        results = drive(Graph(stages), store, Run.create(store, "name: x\n"), executor=executor)
    assert results["own"].metadata["node"] == here
    assert results["asks"].metadata["node"] != here, "there is no room here for one that takes something"
