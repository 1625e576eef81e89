import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

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
        lambda: jobs.check(address),
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


# -- with a cluster that only keeps a list


class FakeClient:
    """Ray's client of a cluster where every job is over at once."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobDetails] = {}
        self.error: Exception | None = None

    def list_jobs(self) -> list[JobDetails]:
        if self.error is not None:
            raise self.error
        return list(self.jobs.values())

    def submit_job(self, *, entrypoint: str, submission_id: str, metadata: dict[str, str], **_: Any) -> str:
        assert submission_id not in self.jobs, "Ray refuses an id twice"
        self.jobs[submission_id] = JobDetails(
            type=JobType.SUBMISSION,
            submission_id=submission_id,
            status=JobStatus.SUCCEEDED,
            entrypoint=entrypoint,
            start_time=1000 * (len(self.jobs) + 1),
            metadata=metadata,
        )
        return submission_id

    def get_job_info(self, job_id: str) -> JobDetails:
        return self.jobs[job_id]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: fake)
    return fake


URL = "http://127.0.0.1:1"


def test_job_ids_are_free_ones_and_runs_keep_their_own(client: FakeClient) -> None:
    submitted = [(run, jobs.submit("true", run, address=URL).id) for run in ("a", "a", "a-2", "a", "a-2", "a-3")]
    assert submitted == [
        ("a", "a"),
        ("a", "a-2"),
        ("a-2", "a-2-2"),
        ("a", "a-3"),
        ("a-2", "a-2-3"),
        ("a-3", "a-3-2"),
    ]
    latest = {run: jobs.status(run, URL).id for run in ("a", "a-2", "a-3")}
    assert latest == {"a": "a-3", "a-2": "a-2-3", "a-3": "a-3-2"}


def test_unknown_run_names_those_that_are_there(client: FakeClient) -> None:
    with pytest.raises(jobs.JobNotFound, match="no job of run 'x'; it has none at all"):
        jobs.status("x", URL)
    for run in ("b", "a", "b"):
        jobs.submit("true", run, address=URL)
    for call in (jobs.status, jobs.stop, lambda run, url: list(jobs.logs(run, url))):
        with pytest.raises(jobs.JobNotFound, match="no job of run 'x'; its runs are b, a$"):
            call("x", URL)
    for number in range(20):
        jobs.submit("true", f"many-{number}", address=URL)
    with pytest.raises(jobs.JobNotFound, match="its runs are many-19, .*many-10 and 12 older$"):
        jobs.status("x", URL)


def test_check_needs_a_jobs_api_and_not_only_a_dashboard(client: FakeClient) -> None:
    jobs.check(URL)
    client.error = RuntimeError("404 page not found")
    with pytest.raises(ClusterError, match=f"the Jobs API at {URL} failed: 404"):
        jobs.check(URL)


def test_a_log_that_is_silent_gives_its_reader_the_word_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    class Client:
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            try:
                yield "first"
                await asyncio.sleep(0.1 if job_id == "short" else 1000)
                yield "last"
            finally:
                ended.append(job_id)

    monkeypatch.setattr(jobs, "_SILENT_SECONDS", 0.02)
    pieces = [*jobs._pieces(Client(), "short", True)]  # type: ignore[arg-type]
    assert "" in pieces and "".join(pieces) == "firstlast"
    left = jobs._pieces(Client(), "long", True)  # type: ignore[arg-type]
    assert [next(left), next(left)] == ["first", ""]
    left.close()  # type: ignore[attr-defined]
    assert ended == ["short", "long"]
