"""What the command says when it is given something wrong: one line, a non-zero exit, nothing left behind."""

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cluster import placement, session
from cluster.storage import StorageError, Store
from pipelines import cli, cli_drive
from pipelines.recipe import Recipe
from pipelines.runs import Run
from pipelines.screen import only_json, print_json
from pipelines.sources import DataError

RECIPE = {
    "name": "tiny",
    "data": {"sources": [{"uri": "stdlib"}], "max_bytes": 100_000},
    "tokenizer": {"vocab_size": 300},
    "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
    "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32, "workers": 2},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.fixture
def recipe(home: Path) -> Path:
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To a cluster of one node with a single CPU."""
    monkeypatch.setattr(session, "connect", lambda address, modules: nullcontext(SimpleNamespace(dashboard_url="")))
    monkeypatch.setattr(placement, "alive_nodes", lambda: [placement.NodeResources("a", 1)])
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["caravan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=5"], ["train.stepz", "unknown key", "train.steps"]),
        (["data.sources[0].uri=/no/such/folder"], ["/no/such/folder"]),
        (["data.sources[0].uri=s3:/bucket/x"], ["data.sources[0].uri", "one slash", "s3://bucket/prefix"]),
        (["train.parallel.ep=3"], ["train.parallel.ep=3", "does not divide"]),
        (["model.num_heads=5"], ["model.dim=32", "model.num_heads=5"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["train.seq_len=128"], ["train.seq_len=128", "model.max_seq_len=64"]),
        (["serve.port=99999"], ["serve.port", "99999"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_bad_recipe_is_one_line(
    recipe: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    overrides: list[str],
    words: list[str],
) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    assert run_cli(monkeypatch, "run", recipe, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in words), captured.err
    assert not list(home.rglob("runs/*")), "a run was begun"


def test_an_empty_source_is_one_line(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (home / "empty").mkdir()
    assert run_cli(monkeypatch, "run", recipe, "--set", f"data.sources[0].uri={home / 'empty'}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "empty" in error
    assert not list(home.rglob("runs/*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "missing.yaml"], ["missing.yaml"]),
        (["resume", "20260101-000000-abcdef"], ["there is no run", "20260101-000000-abcdef"]),
        (["resume", "../../etc"], ["malformed"]),
        (["deploy", "20260101-000000-abcdef"], ["there is no run"]),
        (["deploy", "/no/such/model", "--address", "127.0.0.1:1"], ["127.0.0.1:1"]),
        (["deploy", "/no/such/model", "--accelerator-type", "H200"], ["accelerator_type", "gpus_per_replica"]),
        (["deploy", "/no/such/model", "--cpus-per-replica", "0"], ["cpus_per_replica", "greater than 0"]),
        (["deploy", "/no/such/model"], ["no cluster is up", "caravan up"]),
        (["deploy", "/no/such/model", "--replicas", "2", "--min", "1", "--max", "3"], ["--replicas=2", "--min"]),
        (["deploy", "/no/such/model", "--min", "3", "--max", "2"], ["min_replicas=3", "max_replicas=2"]),
        (["deploy", "/no/such/model", "--min", "3"], ["min_replicas=3", "give both"]),
        (["deploy", "/no/such/model", "--api-key-file", "/no/such/keys"], ["/no/such/keys"]),
        (["deploy", "/no/such/model", "--update", "--port", "8001"], ["--update", "leave the other options out"]),
        (["deploy", "/no/such/model", "--update"], ["no cluster is up", "caravan up"]),
        (["status"], ["no cluster is up", "--address auto"]),
        (["trace", "cmpl-1"], ["no cluster is up", "--address auto"]),
        (["status", "--address", "127.0.0.1:1"], ["127.0.0.1:1"]),
        (["logs", "some-run"], ["caravan up", "--address"]),
        (["down"], ["no cluster is up"]),
        (["bench", "data", "--rounds", "2"], ["rounds=2", "at least 5"]),
        (["bench", "tokenizers", "--text", "english"], ["--text", "'english'", "NAME=URI"]),
        (["bench", "tokenizers", "--vocab-size", "9"], ["vocab_size=9"]),
        (["bench", "tokenizers", "--text", "mine=/no/such/text"], ["/no/such/text", "does not exist"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_is_not_there_is_one_line(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(home)
    assert run_cli(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--store", "ftp://host/x"], ["ftp"]),
        (["--store", "s3:/bucket/x"], ["one slash", "s3://bucket/prefix"]),
        (["--store", "s3://bucket/x?bogus=1"], ["bogus"]),
        (["--store", "s3://key:secret@bucket/x"], ["credentials", "environment"]),
        (["--keep", "--until", "export"], ["--keep", "--until=export"]),
    ],
    ids=lambda value: " ".join(value),
)
@pytest.mark.parametrize("command", ["run", "submit"])
def test_bad_options_are_one_line(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    command: str,
    arguments: list[str],
    words: list[str],
) -> None:
    assert run_cli(monkeypatch, command, recipe, *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert "secret" not in error


def test_submitting_to_nobody_leaves_nothing(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "submit", recipe, "--run-id", "mine", "--address", "127.0.0.1:1") == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert not list(home.rglob("runs/*"))


def test_relative_sources_mean_the_same_from_any_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    changed = {**RECIPE, "data": {"sources": [{"uri": "texts"}, {"uri": "stdlib"}, {"uri": "s3://bucket/texts"}]}}
    loaded = Recipe.from_yaml(yaml.safe_dump(changed))
    assert [source.uri for source in loaded.data.sources] == [str(home / "texts"), "stdlib", "s3://bucket/texts"]


def test_usage_errors_and_interruptions_have_their_own_exit_codes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "run") == 2
    assert "Missing argument 'recipe'" in capsys.readouterr().err

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_drive.Selection, "build", interrupted)
    assert run_cli(monkeypatch, "run", recipe) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_an_unknown_stage_is_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "run", recipe, "--until", "training") == 1
    error = capsys.readouterr().err
    assert "training" in error
    assert "pretrain" in error


def test_an_unwritable_store_is_one_line(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (home / "file").write_text("")
    assert run_cli(monkeypatch, "run", recipe, "--store", home / "file" / "store") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "file/store" in error


def test_a_run_is_resumed_as_it_was_begun() -> None:
    options = {"--store": "s3://bucket/x?a=1&b=2", "--address": None}
    command = cli_drive.resume_command("r1", options, keep=False)
    assert command == "caravan resume r1 --store 's3://bucket/x?a=1&b=2'"
    assert cli_drive.resume_command("r1", {"--store": None}, keep=True) == "caravan resume r1 --keep"


@pytest.mark.parametrize(
    ("begun", "given", "goes_to"),
    [("shards", None, "shards"), ("shards", "deploy", "deploy"), (None, None, None), (None, "shards", "shards")],
)
def test_a_resumed_run_goes_as_far_as_it_was_begun_for(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, begun: str | None, given: str | None, goes_to: str | None
) -> None:
    store = Store(home / "store")
    Run.create(store, recipe.read_text(), "r1", begun)
    driven = []

    def drive(
        recipe: Recipe, open_run: Callable[[], Run], store: Store, selection: cli_drive.Selection, *_: object
    ) -> None:
        with open_run().driving():  # which may be killed
            driven.append((selection.until, Run.open(store, "r1").status.until))

    monkeypatch.setattr(cli_drive, "_drive", drive)
    assert run_cli(monkeypatch, "resume", "r1", "--store", home / "store", *(["--until", given] if given else [])) == 0
    assert driven == [(goes_to, goes_to)]


@pytest.mark.usefixtures("connected")
def test_what_is_refused_makes_nothing_anew(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    store = Store(home / "store")

    def said(*arguments: object) -> str:
        assert run_cli(monkeypatch, *arguments, "--store", home / "store") == 1
        return " ".join(capfd.readouterr().err.split())

    unselected = "stage 'tokenizer' is not among those to run; leave out --force tokenizer"
    assert unselected in said("run", recipe, "--until", "ingest", "--force", "tokenizer")
    assert unselected in said("run", recipe, "--from", "shards", "--force", "tokenizer", "--dry-run")
    with Run.create(store, recipe.read_text(), "r1").driving():
        before = store.list()
        refusal = said("resume", "r1", "--force", "ingest", "--until", "shards", "--set", "tokenizer.vocab_size=400")
        assert "run 'r1' is still driven by process" in refusal
        assert store.list() == before and store.read_bytes("runs/r1/recipe.yaml") == recipe.read_bytes()


def test_a_dry_run_says_what_the_run_would_say(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "run", recipe, "--from", "tokenizer", "--until", "tokenizer", "--dry-run") == 1
    assert "stage 'tokenizer' needs 'ingest', of which nothing is committed; run" in capfd.readouterr().err


@pytest.mark.usefixtures("connected")
@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            DataError("no text is left"),
            "change the data, or a setting with --set, and go on with it: caravan resume r1",
        ),
        (StorageError("the disk is full"), "go on with it: caravan resume r1"),
    ],
)
def test_an_error_comes_before_what_to_do_next(
    recipe: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    error: Exception,
    hint: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.drive.drive", fail)
    monkeypatch.setattr(cli_drive, "out", cli_drive.err)
    assert run_cli(monkeypatch, "run", recipe, "--run-id", "r1", "--until", "shards") == 1
    assert capfd.readouterr().err.splitlines()[-2:] == [f"error: {error}", hint]


@pytest.mark.usefixtures("connected")
def test_workers_without_room_are_refused_before_anything_starts(
    recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def begin(*_: object, **__: object) -> None:
        raise StorageError("it has begun")

    def said(*arguments: str) -> str:
        assert run_cli(monkeypatch, "run", recipe, "--store", home / "store", *arguments) == 1
        return capfd.readouterr().err

    monkeypatch.setattr("pipelines.drive.drive", begin)
    refusal = said("--until", "pretrain").splitlines()[-1]
    assert refusal.startswith("error: workers=2 in groups of ep=1 do not fit") and "workers=1 with ep=1" in refusal
    assert Store(home / "store").list() == [], "not even the run"
    for enough in (["--until", "shards"], ["--set", "train.wait_for_nodes=60"], ["--set", "train.workers=1"]):
        assert "error: it has begun" in said("--until", "pretrain", *enough)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_with_json_what_libraries_print_goes_to_stderr(capsys: pytest.CaptureFixture) -> None:
    with only_json(True):
        print("(raylet) a worker died")
    with only_json(False):
        print("progress")
    print_json({"a": 1})
    captured = capsys.readouterr()
    assert captured.err == "(raylet) a worker died\n"
    assert captured.out == 'progress\n{\n  "a": 1\n}\n'
