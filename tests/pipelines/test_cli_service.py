"""The commands around submitted runs where there is no service, and what they say of options that cannot be meant."""

import json
from pathlib import Path

import pytest

from cluster.storage import Store
from pipelines import cli
from pipelines.runs import Run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "CARAVAN_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    return Store(tmp_path / "store")


def caravan(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["caravan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def make(store: Store, run_id: str, state: str, name: str = "tiny") -> None:
    run = Run.create(store, f"name: {name}\n", run_id)
    run.status.state, run.status.started, run.status.ended = state, 5.0, 9.0  # type: ignore[assignment]
    run.save()


def test_runs_are_listed_without_a_service(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for number, (state, name) in enumerate([("done", "tiny"), ("failed", "tiny"), ("done", "sft")]):
        make(store, f"r{number}", state, name)

    def listed(*options: object) -> list[str]:
        assert caravan(monkeypatch, "runs", "--sort", "id", "--ascending", *options, "--json") == 0
        return [run["id"] for run in json.loads(capsys.readouterr().out)["runs"]]

    assert listed() == ["r0", "r1", "r2"]
    assert listed("--state", "done", "--name", "ti") == ["r0"]
    assert listed("--limit", 1, "--offset", 1) == ["r1"]
    assert listed("--tag", "user=ana") == listed("--since", "2999-01-31") == []
    assert caravan(monkeypatch, "runs", "--limit", 2) == 0
    shown = capsys.readouterr().out
    assert "r2" in shown and "sft" in shown and "2 of 3; --limit and --offset show the others" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs", "--state", "over"], ["--state=over", "queued"]),
        (["runs", "--sort", "size"], ["--sort=size", "created"]),
        (["runs", "--tag", "user"], ["--tag=user", "name=value"]),
        (["runs", "--since", "yesterday"], ["--since=yesterday", "2026-01-31"]),
        (["delete", "nobody"], ["there is no run 'nobody'"]),
        (["delete", "../x"], ["malformed"]),
        (["up", "--cap", "user"], ["--cap=user", "user=2"]),
        (["up", "--cap", "user=0"], ["--cap=user=0"]),
        (["up", "--token-file", "/no/such/token"], ["/no/such/token", "cannot be read"]),
        (["up", "--allow", "s3://key:word@bucket"], ["credentials"]),
        (["up", "--service-port", "70000"], ["service_port=70000"]),
        (["up", "--webhook", "https://example.org"], ["webhook_secret_file", "signed"]),
        (["up", "--webhook-secret-file", "/x"], ["without webhooks", "name a URL"]),
        (["up", "--webhook", "http://h/word", "--webhook-secret-file", "/x"], ["http://h is not encrypted"]),
        (["up", "--webhook", "https://h/word", "--webhook-secret-file", "/no/such/key"], ["/no/such/key", "be read"]),
        (["up", "--no-service", "--webhook", "https://h/word"], ["--webhook", "--no-service"]),
        (["stop", "nobody"], ["caravan up", "--address"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_meant_is_one_line(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], words: list[str]
) -> None:
    assert caravan(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words) and "word" not in error, error


def test_only_what_is_over_is_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make(store, "old", "done")
    live = Run.create(store, "name: x\n", "live")
    with live.driving():
        assert caravan(monkeypatch, "delete", "live") == 1
        assert "run live is running; stop it first" in capsys.readouterr().err
    assert caravan(monkeypatch, "delete", "old") == 0
    assert [path for path in store.list() if "old" in path] == []
    assert store.exists("runs/live/status.json")
