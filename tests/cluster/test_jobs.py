import time

import pytest

from cluster import jobs
from cluster.session import ClusterError


@pytest.fixture(autouse=True)
def nobodys_cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", "a b", "-a", "x" * 200])
def test_run_id_that_is_no_plain_name_is_refused(run_id: str) -> None:
    with pytest.raises(ValueError, match="run_id=.* is not usable"):
        jobs.submit("true", run_id, address="http://127.0.0.1:1")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1", "nonsense"])
def test_bad_address_is_one_clear_error_at_once(address: str) -> None:
    begun = time.monotonic()
    for call in (
        lambda: jobs.submit("true", "run", address=address),
        lambda: jobs.list_jobs(address),
        lambda: jobs.status("run", address),
        lambda: list(jobs.logs("run", address)),
        lambda: jobs.stop("run", address),
    ):
        with pytest.raises(ClusterError, match=f"{address}.*"):
            call()
    assert time.monotonic() - begun < 20


def test_no_cluster_at_all_names_the_ways_to_one() -> None:
    with pytest.raises(ClusterError, match="caravan up.*--address"):
        jobs.list_jobs()


def test_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for before in (None, "http://127.0.0.1:2"):
        if before:
            monkeypatch.setenv("RAY_API_SERVER_ADDRESS", before)
        with pytest.raises(ClusterError, match="127.0.0.1:1"):  # the argument, not the environment
            jobs.list_jobs("http://127.0.0.1:1")
        assert os.environ.get("RAY_API_SERVER_ADDRESS") == before
