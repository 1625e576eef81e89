"""`caravan gc`: what a kept run or a deployment needs stays, the rest goes, and being killed anywhere does no harm."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from cluster import hold
from cluster.artifact import Artifact, Attempt
from cluster.condemn import Marker
from cluster.liveness import Process
from cluster.parts import keep_part
from cluster.storage import StorageError, Store
from pipelines import cli
from pipelines.garbage import ABANDONED_S, collect
from pipelines.retention import Policy, RetentionError
from pipelines.runs import Run, RunStatus, StageStatus
from tests.stepping import Actor, stepped

NOW = 1_900_000_000.0
NONE = Policy(keep_last=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def artifact(store: Store, stage: str, key: str) -> Artifact:
    return Artifact(store.child("artifacts", stage, key))


def commit(found: Artifact, data: bytes = b"data") -> Attempt:
    attempt = found.begin()
    attempt.store.write_bytes("out", data)
    attempt.commit({})
    return attempt


def add_run(store: Store, run_id: str, keys: dict[str, str], state: str = "done", ended: float = NOW, **recipe: object):
    status = RunStatus(state=state, created=ended - 10, ended=ended)
    status.stages = {name: StageStatus("done", key) for name, key in keys.items()}
    directory = store.child("runs", run_id)
    directory.write_bytes("recipe.yaml", yaml.safe_dump({"name": "x", **recipe}).encode())
    directory.write_json("status.json", asdict(status))


def gc(store: Store, policy: Policy = NONE, dry_run: bool = False):
    return collect(store, policy, dry_run, now=lambda: NOW)


def there(store: Store) -> set[str]:
    """Artifacts of which anything is stored."""
    return {"/".join(path.split("/")[:2]) for path in store.child("artifacts").list()}


def committed(store: Store) -> set[str]:
    return {path for path in there(store) if Artifact(store.child("artifacts", *path.split("/"))).committed}


def age(store: Store, days: float) -> None:
    """Everything was written so many days earlier."""
    root = store.local_path()
    assert root is not None
    for path in root.rglob("*"):
        at = path.stat().st_mtime - 86400 * days
        os.utime(path, (at, at))


def test_what_runs_that_are_kept_need_stays(store):
    for key in ("a", "b", "c", "shared"):
        commit(artifact(store, "train", key))
    for number, key in enumerate("abc"):
        add_run(store, f"r{number}", {"train": key, "deploy": ""}, ended=NOW - 86400 * (10 - number))
    add_run(store, "r0b", {"train": "shared"}, ended=NOW - 86400 * 20)
    assert gc(store, Policy()).removed == [] and there(store) == {"train/a", "train/b", "train/c", "train/shared"}
    report = gc(store, Policy(keep_last=2))
    assert report.kept_runs == ("r1", "r2") and report.dropped_runs == ("r0", "r0b")
    assert committed(store) == there(store) == {"train/b", "train/c"}
    gc(store, Policy(keep_days=8.5))
    assert there(store) == {"train/c"}
    assert report.bytes > 0 and report.bytes == sum(plan.bytes for plan in report.removed)
    gc(store)
    assert store.child("artifacts").list() == [] and store.list("runs"), "the runs stay on record"


@pytest.mark.parametrize("state", ["pending", "running"])
def test_runs_that_have_not_ended_or_are_lost_keep_all(store, state):
    commit(artifact(store, "train", "a"))
    loser = artifact(store, "train", "a").begin()
    loser.store.write_bytes("out", b"half")
    artifact(store, "export", "b").begin().store.write_bytes("out", b"half")
    add_run(store, "r", {"train": "a", "export": "b"}, state, ended=NOW - 86400 * 100)
    age(store, 30)
    before = store.list()
    assert gc(store).removed == [] and store.list() == before


def test_dry_run_says_what_would_go_and_touches_nothing(store):
    commit(artifact(store, "train", "a"))
    before = store.stats()
    report = gc(store, dry_run=True)
    assert [plan.address for plan in report.removed] == [("train", "a")] and store.stats() == before
    assert gc(store).removed == report.removed and there(store) == set()


def test_what_a_kept_run_starts_from_stays(store, tmp_path):
    for stage, key in (("pretrain", "base"), ("export", "base"), ("tokenizer", "base"), ("shards", "base")):
        commit(artifact(store, stage, key))
    train = artifact(store, "pretrain", "base")
    for step in (10, 20):
        commit(Artifact(train.store.child("checkpoints", f"step-{step:08d}")))
    add_run(store, "old", {"pretrain": "base", "export": "base", "tokenizer": "base", "shards": "base"})
    checkpoint = train.store.child("checkpoints", "step-00000020").uri
    tokenizer = str(artifact(store, "tokenizer", "base").files.local_path())
    add_run(store, "new", {}, "pending", train={"start_from": checkpoint}, tokenizer={"path": tokenizer})
    gc(store)
    assert there(store) == {"pretrain/base", "tokenizer/base"}
    assert Artifact(Store(checkpoint)).verify() and train.store.list("checkpoints/step-00000010") != []
    add_run(store, "new", {}, "done", train={"start_from": checkpoint}, tokenizer={"path": tokenizer})
    gc(store)
    assert there(store) == set()


def test_of_a_training_that_only_others_start_from_their_checkpoint_alone_stays(store):
    train = artifact(store, "pretrain", "base")
    commit(train)
    for step in (10, 20):
        commit(Artifact(train.store.child("checkpoints", f"step-{step:08d}")))
    checkpoint = train.store.child("checkpoints", "step-00000010").uri
    add_run(store, "new", {"pretrain": "tuned"}, train={"start_from": checkpoint})
    report = gc(store, Policy())
    assert [plan.address for plan in report.removed] == [("pretrain", "base")]
    assert Artifact(Store(checkpoint)).verify() and train.verify()
    assert train.store.list("checkpoints/step-00000020") == []


def test_what_is_served_stays_until_it_is_not(store):
    found = artifact(store, "export", "a")
    commit(found)
    hold.take(found.store.uri, "http://127.0.0.1:8265")
    report = gc(store)
    assert committed(store) == {"export/a"} and "says that it is served" in report.left[0]
    hold.release(found.store.uri, "http://10.0.0.1:8265")
    gc(store)
    assert committed(store) == {"export/a"}
    hold.release(found.store.uri, "http://127.0.0.1:8265")
    gc(store)
    assert there(store) == set()
    hold.take(found.store.uri, "http://127.0.0.1:8265")
    assert there(store) == set(), "no hold on what is not there"


def test_a_hold_that_is_taken_meanwhile_counts(store, monkeypatch):
    found = artifact(store, "export", "a")
    commit(found)
    place = Marker.__init__

    def take_first(self, *args):
        found.store.write_json("holds/x.json", {})
        place(self, *args)

    monkeypatch.setattr(Marker, "__init__", take_first)
    gc(store)
    assert committed(store) == {"export/a"}


def test_tries_that_lost_go_after_a_day(store):
    found = artifact(store, "train", "a")
    loser, young = found.begin(), found.begin()
    winner = commit(found)
    loser.store.write_bytes("out", b"lost")
    keep_part(loser, "p", [], None)
    add_run(store, "r", {"train": "a"})
    gc(store, Policy())
    assert found.store.list(f"attempts/{loser.name}"), "it may still be at work"
    age(store, 2)
    young.store.write_bytes("out", b"late")
    gc(store, Policy())
    assert {path.split("/")[1] for path in found.store.list("attempts")} == {winner.name, young.name}
    assert found.verify().attempt == winner.name


def test_what_no_run_needs_and_is_not_committed_goes_after_a_day(store):
    found = artifact(store, "train", "a")
    attempt = found.begin()
    keep_part(attempt, "p", [attempt.store.write_bytes("out", b"half")], None)
    found.store.write_json("claims/x.json", {})
    report = gc(store)
    assert found.store.list("attempts") and "was written within a day" in report.left[0]
    age(store, ABANDONED_S / 86400)
    gc(store)
    assert there(store) == set()


def test_a_young_try_of_an_artifact_that_goes_stays_and_may_still_commit(store):
    found = artifact(store, "train", "a")
    zombie = found.begin()
    entry = zombie.store.write_bytes("out", b"zombie")
    commit(found)
    report = gc(store)
    assert not found.committed and "unfinished tries" in report.left[0]
    zombie.commit({}, [entry])
    assert found.verify().attempt == zombie.name


@pytest.mark.parametrize(
    "path", ["notes.txt", "extra/file", "attempts/loose", "checkpoints/step-00000001/loose", "checkpoints/loose"]
)
def test_what_is_not_understood_stays_and_is_named(store, path):
    found = artifact(store, "train", "a")
    commit(found)
    found.store.write_bytes(path, b"mine")
    store.write_bytes("artifacts/train/loose", b"mine")
    before = store.list()
    report = gc(store)
    assert store.list() == before and report.removed == []
    assert any(path in line for line in report.left) and any("artifacts/train/loose" in line for line in report.left)


def test_a_manifest_that_is_none_stays_and_is_named(store):
    found = artifact(store, "train", "a")
    commit(found)
    found.store.write_bytes("manifest.json", b"{")
    assert "is no manifest" in gc(store).left[0] and found.store.list("attempts")


def test_a_run_that_cannot_be_read_stops_it(store):
    commit(artifact(store, "train", "a"))
    store.write_bytes("runs/r/status.json", b'{"state": "done", "stages": ')
    with pytest.raises(RetentionError, match="run 'r' cannot be read, so what it needs is not known"):
        gc(store)
    assert committed(store) == {"train/a"}


def test_a_store_that_fails_on_one_artifact_loses_nothing_of_the_others(store, monkeypatch):
    for key in "ab":
        commit(artifact(store, "train", key))
    delete = Store.delete

    def failing(self: Store, path: str) -> None:
        if "train/a" in self.uri and path == "manifest.json":
            raise StorageError("it fails")
        delete(self, path)

    monkeypatch.setattr(Store, "delete", failing)
    report = gc(store)
    assert report.failed and report.left == ["artifacts/train/a: it fails"] and there(store) == {"train/a"}


def test_whoever_begins_while_it_looks_finds_what_was_there(store, monkeypatch):
    """A run that puts its keys on record between the first look at the roots and the marker."""
    commit(artifact(store, "train", "a"))
    place = Marker.__init__

    def begin_first(self, *args):
        add_run(store, "r", {"train": "a"}, "running")
        place(self, *args)

    monkeypatch.setattr(Marker, "__init__", begin_first)
    gc(store)
    assert committed(store) == {"train/a"} and artifact(store, "train", "a").store.list("condemned") == []


@pytest.mark.parametrize("how", ["kill", "kill after", "fail", "fail after"])
def test_killed_anywhere_and_run_again_it_finishes(tmp_path, how, monkeypatch):
    monkeypatch.setattr(Process, "has_ended", lambda self: True)  # whoever left a marker
    steps, finished = 0, False
    while not finished:
        steps += 1
        store = stepped(Store(tmp_path / f"{how}{steps}"), Store(tmp_path)._files)
        kept, gone = artifact(store, "train", "kept"), artifact(store, "train", "gone")
        for each in (kept, gone):
            commit(each)
            commit(Artifact(each.store.child("checkpoints", "step-00000001")))
        add_run(store, "r", {"train": "kept"})
        actor = Actor(lambda at=store: gc(at, Policy()))
        for _ in range(steps):
            if not actor.done:
                actor.step()
        finished = actor.done
        if not actor.done:
            actor.step(how)
            actor.kill() if how.startswith("kill") else None
        while not actor.done:
            actor.step()
        assert gc(store, Policy()).left == []
        assert committed(store) == there(store) == {"train/kept"}, steps
        assert kept.verify() and store.list("artifacts/train/kept/condemned") == []
    assert steps > 20


def test_a_run_is_a_folder_that_the_service_may_have_begun(store):
    """A recipe without a status yet protects what it names."""
    commit(artifact(store, "export", "a"))
    recipe = json.dumps({"train": {"start_from": artifact(store, "export", "a").store.uri}})
    store.write_bytes("runs/queued/recipe.yaml", recipe.encode())
    assert gc(store).removed == [] and committed(store) == {"export/a"}
    Run(store, "queued", recipe, RunStatus(state="failed", created=time.time())).save()
    gc(store)
    assert there(store) == set()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["caravan", "gc", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_says_what_it_does_and_does_it(store, monkeypatch, capsys):
    commit(artifact(store, "train", "a"), b"x" * 1500)
    add_run(store, "r", {"train": "a"}, ended=time.time())
    assert command(monkeypatch, "--store", store.uri) == 0
    assert "removed 0 bytes of 0 artifacts; 1 runs kept, 0 not" in capsys.readouterr().out
    assert command(monkeypatch, "--store", store.uri, "--keep-last", 0, "--dry-run") == 0
    assert re.search(r"would remove artifacts/train/a \(1\.\d KB\): no kept run needs it", capsys.readouterr().out)
    assert command(monkeypatch, "--store", store.uri, "--keep-last", 0, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["removed"][0]["artifact"] == "train/a" and report["dropped_runs"] == ["r"] and not report["dry_run"]
    assert there(store) == set()
    store.write_bytes("runs/bad/status.json", b"{")
    assert command(monkeypatch, "--store", store.uri) == 1
    assert "run 'bad' cannot be read" in capsys.readouterr().err
    assert command(monkeypatch, "--store", store.uri, "--keep-last", -1) == 2


def test_the_command_needs_neither_ray_nor_torch(store):
    script = "import sys; sys.modules['ray'] = sys.modules['torch'] = None\n"
    script += "import sys; sys.argv = ['caravan', 'gc', '--store', sys.argv[1]]; from pipelines.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", script, store.uri], capture_output=True, text=True)
    assert ended.returncode == 0 and "removed 0 bytes" in ended.stdout, ended.stderr


def test_one_that_slept_for_a_day_is_not_put_off_by_another_s_cleaning(store, monkeypatch):
    """Its file for the time was taken for one that a killed process had left."""
    stats, taken = Store.stats, []

    def clean(self, *below):
        if self.uri.endswith("/probes") and len(taken) < limit:
            taken.extend(stats(self))
            self.delete(taken[-1])
        return stats(self, *below)

    monkeypatch.setattr(Store, "stats", clean)
    limit = 2
    collect(store, Policy(0))
    assert len(taken) == 2 and store.list("probes") == []
    limit = 99
    with pytest.raises(StorageError, match="was written and is not there"):
        collect(store, Policy(0))
