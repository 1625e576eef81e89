"""Who goes on with a run that `caravan resume` names: its service, or this process."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import cli_resume
from pipelines.runs import Run
from pipelines.service.intake import RunRequest
from pipelines.service.loop import Orchestrator
from tests.pipelines.service.asked import NAMED, found_service
from tests.pipelines.service.fakes import RECIPE, FakeCluster, states
from tests.pipelines.test_cli import run_cli


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orchestrator]:
    with found_service(tmp_path, monkeypatch) as (made, _):
        made.submit(RunRequest(RECIPE, run_id="r", until="shards"))
        yield made


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What this process was asked to drive."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(cli_resume, "drive_again", lambda *arguments: asked.append(arguments))
    return asked


def test_a_submitted_run_is_queued_again(
    service: Orchestrator,
    driven: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    store = service.store.uri
    for options in ([], ["--store", store], ["--address", NAMED], ["--until", "shards"]):
        service.stop("r")
        assert states(service) == {"r": "stopped"}
        assert run_cli(monkeypatch, "resume", "r", *options, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"run_id": "r", "state": "queued", "store": store}
        assert states(service) == {"r": "queued"}
    service.stop("r")
    assert run_cli(monkeypatch, "resume", "r") == 0
    assert capsys.readouterr().out == f"submitted run r to {store}\n"
    assert driven == []


@pytest.mark.parametrize("state", ["queued", "starting", "running", "done"])
def test_what_the_service_will_not_do_is_its_own_one_line(
    service: Orchestrator,
    driven: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    state: str,
) -> None:
    cluster = service.jobs
    assert isinstance(cluster, FakeCluster)
    if state != "queued":
        service.tick()  # its job
    if state in ("running", "done"):
        cluster.begin("r")
    if state == "done":
        cluster.end("r")
    if state != "queued":
        service.tick()
    assert run_cli(monkeypatch, "resume", "r") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: run 'r' is {state}; ") and error.count("\n") == 1
    assert driven == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--set", "train.steps=100"], "--set"),
        (["--until", "deploy"], "--until"),
        (["--force", "shards", "--force", "tokenizer"], "--force"),
        (["--force", "shards", "--until", "deploy", "--keep"], "--force and --until and --keep"),
    ],
)
def test_another_run_than_was_submitted_is_driven_from_here_and_the_refusal_says_how(
    service: Orchestrator,
    driven: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    changes: list[str],
    named: str,
) -> None:
    service.stop("r")
    assert run_cli(monkeypatch, "resume", "r", *changes) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"as it was submitted; leave {named} out" in error
    assert (states(service), driven) == ({"r": "stopped"}, [])
    here = shlex.split(error.rpartition("past the queue: ")[2])
    assert here[:3] == ["caravan", "resume", "r"] and here[-2:] == ["--address", "HOST:PORT"]
    assert run_cli(monkeypatch, *here[1:]) == 0
    ((run_id, overrides, store, until, force, keep, address, _),) = driven
    assert (run_id, store, address) == ("r", service.store.uri, "HOST:PORT")
    given = [part for each in overrides for part in ("--set", each)]  # type: ignore[attr-defined]
    given += [part for each in force for part in ("--force", each)]  # type: ignore[attr-defined]
    given += (["--until", until] if until else []) + (["--keep"] if keep else [])
    assert given == changes


def test_a_keep_that_was_submitted_is_no_change() -> None:
    assert cli_resume._changes({"keep": True, "until": None}, None, None, None, keep=True) == []
    assert cli_resume._changes({"keep": False, "until": None}, None, None, None, keep=True) == ["--keep"]


def test_what_did_not_come_through_the_service_is_driven_from_here(
    service: Orchestrator,
    driven: list[tuple[object, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    Run.create(service.store, "name: x\n", "by-hand")
    service.stop("r")
    other = str(tmp_path / "other")
    for arguments in (["by-hand"], ["elsewhere"], ["r", "--store", other], ["r", "--address", "auto"]):
        assert run_cli(monkeypatch, "resume", *arguments) == 0
    assert [asked[0] for asked in driven] == ["by-hand", "elsewhere", "r", "r"]
    assert states(service)["r"] == "stopped"
    for run_id, words in (("by-hand", "was not submitted to this service"), ("elsewhere", "there is no run")):
        assert run_cli(monkeypatch, "resume", run_id, "--address", NAMED) == 1
        assert words in capsys.readouterr().err
    assert len(driven) == 4


def test_the_driver_that_the_service_starts_does_not_ask_it(
    service: Orchestrator, driven: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    service.stop("r")
    monkeypatch.setenv("CARAVAN_JOB", "r")
    assert run_cli(monkeypatch, "resume", "r", "--store", service.store.uri) == 0
    assert len(driven) == 1 and states(service) == {"r": "stopped"}
