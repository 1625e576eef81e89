"""The data stages on a real Ray cluster of two CPUs."""

import os
import signal
from pathlib import Path

import pytest
import ray

from cluster.storage import Store
from pipelines.ray_map import map_on_cluster
from pipelines.sources import DataError
from tests.pipelines.data_stages import checksums, data_config, data_graph, in_this_process, run_stages, write_corpus

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster():
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def square(number: int) -> int:
    return number * number


def fail_on_three(number: int) -> int:
    if number == 3:
        raise DataError("number three is bad")
    return number


class DieOnce:
    """Kills its own process the first time that it meets item 1."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "died"

    def __call__(self, number: int) -> int:
        if number == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number + 100


def test_results_come_in_the_order_of_the_items(cluster):
    finished = []
    assert map_on_cluster(square, list(range(7)), finished.append) == [number**2 for number in range(7)]
    assert finished == list(range(1, 8))
    assert map_on_cluster(square, []) == []


def test_an_error_keeps_its_type_and_its_one_line(cluster):
    with pytest.raises(DataError) as caught:
        map_on_cluster(fail_on_three, list(range(6)))
    assert str(caught.value) == "number three is bad"
    assert "fail_on_three" in "".join(caught.value.__notes__)


def test_a_killed_worker_costs_a_retry_and_nothing_else(cluster, tmp_path):
    assert map_on_cluster(DieOnce(tmp_path), [0, 1, 2]) == [100, 101, 102]
    assert (tmp_path / "died").exists()


def test_the_stages_write_the_same_bytes_as_one_process_does(cluster, tmp_path):
    write_corpus(tmp_path / "corpus")
    graph = data_graph(data_config(tmp_path / "corpus"))
    parallel = run_stages(graph, Store(tmp_path / "parallel"))
    with in_this_process():
        serial = run_stages(graph, Store(tmp_path / "serial"))
    assert len(checksums(parallel["shards"])) >= 4
    for name in ("ingest", "tokenizer", "shards"):
        assert checksums(parallel[name]) == checksums(serial[name])
        assert parallel[name].manifest().metadata == serial[name].manifest().metadata
        parallel[name].verify()
