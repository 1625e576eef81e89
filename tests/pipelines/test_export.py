"""The model of any checkpoint of a run."""

from pathlib import Path

import pytest
import torch

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.hf import load_pretrained
from llama.tokenizer import Tokenizer
from pipelines import export
from pipelines.export import export_checkpoint
from pipelines.finetune import StartError, find_start
from pipelines.runs import Run, RunError
from pipelines.training_folder import CHECKPOINTS, INCARNATIONS, START, training_folder
from tests.pipelines.test_cli import run_cli
from tests.pipelines.trained_run import RECIPE, make_run, plain_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return make_run(Store(folder / "store"), folder, {10: 4.0, 20: 2.5, 30: 3.0, 35: None})


@pytest.mark.parametrize(("step", "seed"), [("10", 10), ("best", 20), ("last", 35)])
def test_a_checkpoint_becomes_a_directory(run: Run, tmp_path: Path, step: str, seed: int) -> None:
    assert export_checkpoint(run, step, str(tmp_path / "out")) == seed
    found, expected = load_pretrained(tmp_path / "out").state_dict(), plain_model(seed).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("def a")) == "def a"


def test_the_command_says_in_a_line_what_is_not_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    store = ("--store", run.store.uri)
    for arguments, words in [
        (("r1", "--step", "11", "--to", tmp_path / "new"), ["--step=11", "no such checkpoint", "10, 20, 30, 35"]),
        (("r1", "--step", "first", "--to", tmp_path / "new"), ["--step=first", "last or best"]),
        (("r1", "--to", tmp_path / "full"), ["full is not empty"]),
        (("r2", "--to", tmp_path / "new"), ["there is no run 'r2'", "r1"]),
    ]:
        assert run_cli(monkeypatch, "export", *arguments, *store) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "new").exists()


def test_without_a_checkpoint_or_a_validation_loss_there_is_nothing_to_choose(tmp_path: Path) -> None:
    bare = make_run(Store(tmp_path / "bare"), tmp_path, {5: None})
    with pytest.raises(RunError, match=r"none is the best; give --step last, or train with train\.validate_every"):
        export_checkpoint(bare, "best", str(tmp_path / "out"))
    bare.store.delete("artifacts/pretrain")
    with pytest.raises(RunError, match="has no checkpoint yet; go on with it: caravan resume r1"):
        export_checkpoint(bare, "last", str(tmp_path / "out"))


def test_adapters_are_not_put_on_weights_that_have_changed(run: Run, tmp_path: Path) -> None:
    below = tmp_path / "below"
    export_checkpoint(run, "10", str(below))
    train = RECIPE["train"] | {"start_from": str(below), "lora": {"rank": 2}}
    tuned = make_run(Store(tmp_path / "store"), tmp_path, {5: 1.0}, train=train, tokenizer={"path": str(below)})
    records = tuned.store.child("artifacts", "pretrain", "p", INCARNATIONS)
    records.write_json("first.json", {START: find_start(str(below)).fingerprint})
    records.write_json("of-an-earlier-version.json", {})
    with pytest.raises(ValueError, match="has no tensor .*lora_a"):  # what this run calls a checkpoint holds none
        export_checkpoint(tuned, "last", str(tmp_path / "out"))
    (below / "config.json").touch()
    with pytest.raises(StartError, match="below has changed since the training began; put its files back"):
        export_checkpoint(tuned, "last", str(tmp_path / "out"))


def test_a_checkpoint_that_is_removed_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(Store(tmp_path / "store"), tmp_path, {10: None, 20: None})

    def choose_and_remove(run: Run, step: str, losses: dict[int, float | None]) -> int:
        Artifact(training_folder(run).child(CHECKPOINTS, "step-00000010")).delete()
        return 10

    monkeypatch.setattr(export, "_choose", choose_and_remove)
    with pytest.raises(RunError, match="^the checkpoint of step 10 has just been removed: .* keeps the latest 2"):
        export_checkpoint(run, "10", str(tmp_path / "out"))
