"""What a run's folder and its artifacts tell of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store
from pipelines.runs import Run
from pipelines.service.index import write_submission
from pipelines.service.resources import Room
from pipelines.service.submission import Submission
from pipelines.show import view
from tests.pipelines.service.asked import NAMED, found_service
from tests.pipelines.test_cli import run_cli
from tests.pipelines.trained_run import make_run


def test_a_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = make_run(Store(tmp_path / "store"), tmp_path, {10: 4.0, 20: 2.5, 30: None})
    run.directory.write_bytes("plots/loss.png", b"")
    run.status.state, run.status.host, run.status.pid = "running", "elsewhere", 1
    run.save()
    assert run_cli(monkeypatch, "show", "r1", "--store", run.store.uri, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run_id"], found["state"]) == ("r1", "lost")
    assert [(stage["name"], stage["state"], stage["seconds"]) for stage in found["stages"]] == [
        ("tokenizer", "done", 2.0),
        ("pretrain", "failed", 360.0),
        ("export", "pending", None),
    ]
    assert (found["last"]["step"], found["validated"]["step"], found["validated"]["val_loss"]) == (30, 20, 2.5)
    assert [(saved["step"], saved["val_loss"]) for saved in found["checkpoints"]] == [(10, 4.0), (20, 2.5), (30, None)]
    assert found["files"] == [str(tmp_path / "store/runs/r1/plots/loss.png")]
    assert run_cli(monkeypatch, "show", "r1", "--store", run.store.uri) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "[it] broke" in shown and "validation 2.500 at 20" in shown and "step 20 │ 3.0000 │ 2.5000" in shown


def test_looking_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run_cli(monkeypatch, "show", "r1", "--store", str(tmp_path / "typo")) == 1
    assert "there is no run 'r1'" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_run_that_has_done_nothing_is_shown_too(tmp_path: Path) -> None:
    empty = view(Run.create(Store(tmp_path), "", "r1"))
    assert (empty.stages, empty.last, empty.checkpoints, empty.files) == ([], None, [], [])


def test_a_submitted_run_is_shown_as_its_service_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def shown(*options: str) -> dict[str, Any]:
        assert run_cli(monkeypatch, "show", "r1", *options, "--json") == 0
        return json.loads(capsys.readouterr().out)

    with found_service(tmp_path, monkeypatch) as (service, cluster):
        cluster.room = Room({"CPU": 0.0}, {})
        make_run(service.store, tmp_path, {10: 4.0})
        by_hand = shown()
        assert (by_hand["state"], by_hand["waits_for"]) == ("starting", "")
        assert by_hand == shown("--store", service.store.uri) == shown("--address", NAMED)

        submitted = Submission(submitted=2e9, needs={"CPU": 1.0})
        write_submission(service.store, "r1", submitted)
        service.load()
        service.tick()
        queued = shown()
        assert (queued["state"], queued["waits_for"]) == ("queued", "needs 1 CPU, the cluster has 0")
        same = ("stages", "last", "validated", "checkpoints", "files")
        assert [queued[name] for name in same] == [by_hand[name] for name in same] and queued["checkpoints"]
        assert run_cli(monkeypatch, "show", "r1") == 0
        assert "run r1: queued needs 1 CPU, the cluster has 0\n" in capsys.readouterr().out

        Run.create(Store(tmp_path / "store"), "", "other")
        assert run_cli(monkeypatch, "show", "other") == 0, "a run of the default store"
        assert run_cli(monkeypatch, "show", "other", "--address", NAMED) == 1
        assert "there is no run 'other'" in capsys.readouterr().err

        there = service.health()
        monkeypatch.setattr(type(service), "health", lambda self: there | {"store": f"file://{tmp_path}/not/here"})
        assert run_cli(monkeypatch, "show", "r1", "--json") == 0
        said = capsys.readouterr()
        far = json.loads(said.out)
        assert (far["state"], far["stages"], far["checkpoints"]) == ("queued", queued["stages"], [])
        assert "are not shown" in said.err and said.err.count("\n") == 1
