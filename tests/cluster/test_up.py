"""One head of `up`, with real jobs on it, and `down` at the end."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from cluster import jobs, processes
from cluster.session import ClusterError, ClusterRecord, down, recorded, up

pytestmark = pytest.mark.integration

_WHERE = """
import os, sys
from cluster.session import connect
with connect() as session:  # in a job: the job's own cluster, and no second runtime environment
    import ray
    import llama, cluster
    print("owned", session.owned, "address", session.address)
    print("driver", llama.__file__, cluster.__file__)

    @ray.remote
    def worker():
        import llama, cluster, pipelines
        return llama.__file__, pipelines.__file__

    print("worker", *ray.get(worker.remote()))
    print("folder", sorted(os.listdir()), open("recipe.yaml").read(), os.environ["GREETING"], sys.executable)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRecord]:
    home, user = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARAVAN_HOME", str(home))
        patch.setenv("HOME", str(user))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        record = up(num_cpus=2)
        try:
            yield record
        finally:
            process = processes.find(record.pid, record.started)
            members = processes.tree(process) if process else []
            assert len(members) > 5
            assert down() == record
            assert [member for member in members if processes.find(member.pid)] == [], "down() leaves no process"
            assert recorded() is None and not (home / "cluster.json").exists()
            assert list(user.iterdir()) == [], "no ~/.ray"


@pytest.mark.parametrize("address", [None, "explicit", "auto"])
def test_driver_connects_to_it(head: ClusterRecord, address: str | None) -> None:
    if address == "auto" and len(_heads()) > 1:
        pytest.skip("another Ray runs on this machine, and auto may mean that one")
    script = (
        "import sys; from cluster.session import connect\n"
        "with connect(sys.argv[1] or None) as session: print(session.address, session.owned, session.dashboard_url)"
    )
    argument = {None: "", "explicit": head.address}.get(address, "auto")
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == [head.address, "False", head.dashboard_url]


def _heads() -> list[str]:
    found = subprocess.run(["pgrep", "-x", "gcs_server"], capture_output=True, text=True)
    return found.stdout.split()


def test_job_runs_our_packages_in_a_folder_of_its_own(head: ClusterRecord) -> None:
    job = jobs.submit(
        "python where.py",
        "run-1",
        files={"where.py": _WHERE.encode(), "recipe.yaml": b"name: x"},
        env_vars={"GREETING": "hello"},
        metadata={"recipe": "x"},
    )
    assert (job.id, job.run_id, job.metadata) == ("run-1", "run-1", {"recipe": "x"}) and not job.is_over
    text = "".join(jobs.logs("run-1", follow=True))
    job = jobs.status("run-1", head.dashboard_url)
    assert job.status == "SUCCEEDED" and job.is_over and job.started and job.ended, (job, text)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert lines["owned"] == ["False", "address", head.address]
    for file in lines["driver"] + lines["worker"]:
        assert "/py_modules_files/" in file, file
    assert lines["folder"] == ["['recipe.yaml',", "'where.py']", "name:", "x", "hello", sys.executable]
    assert "".join(jobs.logs("run-1", head.address)) == text


def test_job_is_listed_stopped_and_submitted_again(head: ClusterRecord) -> None:
    first = jobs.submit("echo begun; sleep 300", "run-2")
    with pytest.raises(ClusterError, match="run run-2 is .* as job run-2; stop it first"):
        jobs.submit("true", "run-2")
    _await(lambda: "begun" in "".join(jobs.logs("run-2")))
    assert [job.id for job in jobs.list_jobs() if job.run_id == "run-2"] == [first.id]
    assert jobs.stop("run-2").status == "STOPPED" and jobs.stop("run-2").status == "STOPPED"
    again = jobs.submit("exit 3", "run-2")
    assert again.id == "run-2-2"
    _await(lambda: jobs.status("run-2").is_over)
    failed = jobs.status("run-2")
    assert (failed.id, failed.status) == ("run-2-2", "FAILED") and "3" in failed.message
    for call in (jobs.status, jobs.stop, lambda run_id: list(jobs.logs(run_id))):
        with pytest.raises(jobs.JobNotFound, match="no job of run 'run-9'"):
            call("run-9")


def test_a_job_that_is_stopped_may_clear_up(head: ClusterRecord) -> None:
    waits = "import time\ntry:\n    print('begun', flush=True)\n    time.sleep(300)\n"
    clears = "finally:\n    time.sleep(4)\n    print('cleared', flush=True)\n"
    raises = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    jobs.submit("python clears.py", "run-3", files={"clears.py": (raises + waits + clears).encode()})
    _await(lambda: "begun" in "".join(jobs.logs("run-3")))
    assert jobs.stop("run-3").status == "STOPPED"
    assert "cleared" in "".join(jobs.logs("run-3"))


def test_head_that_has_worked_is_noted_loopback_only_and_the_only_one(head: ClusterRecord) -> None:
    assert recorded() == head
    listeners = processes.listeners(processes.tree(processes.find(head.pid, head.started)))
    assert len(listeners) > 5 and all(listener.is_loopback for listener in listeners), listeners
    assert os.getsid(head.pid) == head.pid, "it does not end with this terminal"
    with pytest.raises(
        ClusterError, match=rf"a cluster is up already at {head.address} \(pid {head.pid}\).*caravan down"
    ):
        up()


def _await(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)
