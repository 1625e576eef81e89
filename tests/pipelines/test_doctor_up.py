"""`caravan doctor` beside a real head of `caravan up`, alive and killed."""

import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster import head, processes
from pipelines import doctor_cluster
from tests.pipelines.test_doctor_cluster import by_name

pytestmark = pytest.mark.integration


def test_it_sees_a_head_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    record = head.up(num_cpus=1, num_gpus=0)
    try:
        for address in (None, record.address, record.dashboard_url):
            found = by_name(doctor_cluster.cluster(address))
            assert found["ray"] == ("ok", f"Ray {version('ray')} at {record.dashboard_url}")
            assert found["dashboard"][0] == "ok" and "cluster" not in found
        process = processes.find(record.pid, record.started)
        assert process is not None
        processes.end_tree(process, 3)  # then it is killed: its raylet would wait half a minute for idle workers
        deadline = time.monotonic() + 10
        while head.recorded() is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert by_name(doctor_cluster.cluster(None))["cluster"][0] == "fail"
    finally:
        with suppress(head.ClusterError):  # it has ended already
            head.down()
    assert head.left_behind() is None
