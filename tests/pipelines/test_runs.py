import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.storage import StorageError, Store
from pipelines.runs import LOST_AFTER_SECONDS, Run, RunError, RunStatus, StageStatus, list_runs, new_run_id, one_line


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_run_is_read_back_as_it_was_written(store):
    run = Run.create(store, "name: x\n", "my-run.1")
    run.status.stages = {"a": StageStatus("done", "key", 1.0, 2.0, "step 3", "")}
    run.save()
    again = Run.open(store, "my-run.1")
    assert (again.recipe_yaml, again.status) == ("name: x\n", run.status)
    assert list_runs(store) == ["my-run.1"]
    assert (
        Run.create(store, "", "part", until="shards").status.until == Run.open(store, "part").status.until == "shards"
    )
    with pytest.raises(RunError, match="'my-run.1' exists already"):
        Run.create(store, "name: y\n", "my-run.1")


def test_new_ids_sort_by_time():
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) == 50 and all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run_id) for run_id in ids)
    assert [run_id[:15] for run_id in ids] == sorted(run_id[:15] for run_id in ids)


def test_unknown_ids_are_answered_with_near_ones(store):
    with pytest.raises(RunError, match="there is no run 'abc' in .*; the store holds no runs"):
        Run.open(store, "abc")
    for run_id in ("20260101-000000-aaaaaa", "20260102-000000-bbbbbb"):
        Run.create(store, "", run_id)
    with pytest.raises(RunError, match="did you mean 20260102-000000-bbbbbb"):
        Run.open(store, "20260102-000000-bbbbbc")


@pytest.mark.parametrize("run_id", ["../x", "a/b", ".hidden", "x" * 65, "a b"])
def test_an_id_cannot_be_a_path(store, run_id):
    with pytest.raises(RunError, match="malformed"):
        Run.create(store, "", run_id)
    with pytest.raises(RunError, match="malformed"):
        Run.open(store, run_id)


def test_a_damaged_status_is_an_error_of_one_line(store):
    run = Run.create(store, "")
    run.directory.write_bytes("status.json", b"{")
    with pytest.raises(RunError, match="damaged") as caught:
        Run.open(store, run.id)
    assert "\n" not in str(caught.value)


def test_a_status_from_before_runs_knew_how_far_they_go(store):
    run = Run.create(store, "", "old")
    status = run.directory.read_json("status.json")
    del status["until"]
    run.directory.write_json("status.json", status)
    assert Run.open(store, "old").status == run.status


def test_driving_records_the_outcome(store):
    run = Run.create(store, "")
    with run.driving():
        status = Run.open(store, run.id).status
        assert (status.state, status.pid, status.host) == ("running", os.getpid(), socket.gethostname())
    assert Run.open(store, run.id).status.state == "done"
    with pytest.raises(KeyboardInterrupt), Run.open(store, run.id).driving():
        raise KeyboardInterrupt
    status = Run.open(store, run.id).status
    assert (status.state, status.error) == ("failed", "interrupted")


def test_a_store_that_fails_is_told_once_and_nothing_unwritten_is_pointed_at(store, monkeypatch, caplog):
    run = Run.create(store, "")
    written = run.keep_traceback("export", ValueError("first"))
    assert written == store.child("runs", run.id, "errors", "export.txt").uri
    remote = Run(Store("s3://bucket/x?endpoint_override=127.0.0.1:1"), "r1", "", run.status)
    monkeypatch.setattr(Store, "write_bytes", lambda *_, **__: None)
    assert remote.keep_traceback("a b", ValueError()).endswith(
        "/runs/r1/errors/a%20b.txt?endpoint_override=127.0.0.1:1"
    )

    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    for _ in range(2):
        monkeypatch.setattr(Store, "write_bytes", full)
        assert run.keep_traceback("export", ValueError("second")) is None
        run.save_or_warn()
        run.save_or_warn()
        assert [record.message for record in caplog.records] == [
            f"the status of run {run.id} was not written: the disk is full"
        ]
        caplog.clear()
        monkeypatch.undo()
        run.save()


def test_the_heartbeat_is_renewed(store, monkeypatch):
    monkeypatch.setattr("pipelines.runs.HEARTBEAT_SECONDS", 0.05)
    run = Run.create(store, "")
    with run.driving():
        first = Run.open(store, run.id).status.heartbeat
        deadline = time.monotonic() + 10
        while Run.open(store, run.id).status.heartbeat == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_one_driver_at_a_time(store):
    run = Run.create(store, "")
    rival = Run.open(store, run.id)
    with run.driving(), pytest.raises(RunError, match=f"still driven by process {os.getpid()}"), rival.driving():
        pass
    assert Run.open(store, run.id).status.state == "done"


def test_a_silent_driver_elsewhere_is_lost():
    status = RunStatus(state="running", heartbeat=1000.0, host="another-machine", pid=1)
    assert not status.is_lost(now=1000.0 + LOST_AFTER_SECONDS)
    assert status.is_lost(now=1001.0 + LOST_AFTER_SECONDS)
    status.state = "done"
    assert not status.is_lost(now=1e12)


@pytest.mark.integration
def test_a_killed_driver_is_lost_at_once_and_its_run_can_be_driven_again(store):
    run = Run.create(store, "")
    code = (
        "import sys, time; from cluster.storage import Store; from pipelines.runs import Run\n"
        "with Run.open(Store(sys.argv[1]), sys.argv[2]).driving(): print('driving', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(store.local_path()), run.id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as driver:
        try:
            assert driver.stdout.readline() == b"driving\n"
            assert not Run.open(store, run.id).status.is_lost()
            driver.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 10
            while not Run.open(store, run.id).status.is_lost():  # not waited for: a zombie still has its pid
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            driver.kill()
    with Run.open(store, run.id).driving():
        pass
    assert Run.open(store, run.id).status.state == "done"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad\nthing"), "bad"),
        (ValueError(), "ValueError"),
        (
            RuntimeError("ray::task() (pid=1)\nTraceback (most recent call last):\n  File x\nOSError: no disk\n"),
            "OSError: no disk",
        ),
    ],
)
def test_one_line(error, line):
    assert one_line(error) == line
