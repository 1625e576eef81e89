"""`caravan sweep` without a cluster: what it would run, what it refuses, and what it says of a run that failed."""

import json
from pathlib import Path

import pytest
import yaml

from cluster.storage import Store
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.runs import Run
from pipelines.stage import Stage
from pipelines.sweep import trials
from pipelines.sweep.run import SweepRun
from tests.pipelines.sweep.sweeps import sweep
from tests.pipelines.test_cli import run_cli


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / "home"))
    (tmp_path / "s.yaml").write_text(sweep().to_yaml())
    return tmp_path / "s.yaml"


def test_a_dry_run_names_every_trial_s_stages(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "sweep", path, "--dry-run", "--json", "--set", "train.steps=2") == 0
    steps = json.loads(capsys.readouterr().out)
    assert [step["stage"] for step in steps][-2:] == ["pretrain@rmsnorm@1", "pretrain@layernorm@1"]
    assert len(steps) == 4 + 4 and not (path.parent / "home/store/runs").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (["--set", "model.norm=rmsnorm"], "model.norm='rmsnorm' and model.norm='rmsnorm' are both set for a cell"),
        (["--set", "train.stps=3"], "cell rmsnorm: train.stps: unknown key; did you mean train.steps?"),
        (["--out", "x"], "--dry-run writes no report; leave --out out"),
        (["--force", "pretrain"], "there is no stage 'pretrain' to force; choose one of ingest,"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    path: Path, given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "sweep", path, "--dry-run", *given) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_sweep_is_not_run_as_a_recipe_nor_a_recipe_as_a_sweep(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(monkeypatch, "run", path, "--dry-run") == 1
    assert "caravan sweep runs it" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(sweep().recipe))
    assert run_cli(monkeypatch, "sweep", path, "--dry-run") == 1
    assert "is no sweep" in capsys.readouterr().err


def test_a_trial_that_fails_is_shown_and_the_others_have_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def plain(recipe, dashboard_url, keep, generations, ingest):
        def train(context):
            if recipe.model.norm == "layernorm" and recipe.train.seed == 1:
                raise OSError("the disk | is full")
            context.attempt.store.write_bytes("out", b"")
            return {"val_loss": recipe.train.seed + (recipe.model.norm == "rmsnorm"), "tokens": 10}

        return Graph([Stage("pretrain", 1, recipe, train)])

    monkeypatch.setattr(trials, "build_graph", plain)
    store, kind = Store(tmp_path / "store"), SweepRun(sweep(), "caravan sweep s.yaml", tmp_path / "out")
    run = Run.create(store, kind.to_yaml(), "r")
    graph = kind.build(store, "", False)
    with pytest.raises(OSError, match="is full"):
        drive(graph, store, run, keep_going=kind.keep_going)
    conclusion = kind.conclude(run, graph, None, 1.0)
    cells = {cell["cell"]: cell for cell in conclusion.as_json()["cells"]}
    assert cells["rmsnorm"]["measures"]["pretrain.val_loss"]["mean"] == 1.5
    assert cells["layernorm"]["measures"]["pretrain.val_loss"]["count"] == 1
    assert cells["layernorm"]["missing"] == ("seed 1: the disk | is full",)
    for folder in (tmp_path / "out", tmp_path / "store/runs/r/sweep"):
        assert "layernorm, seed 1: the disk | is full" in (folder / "report.md").read_text()
        assert {path.name for path in folder.iterdir()} == {"report.md", "report.html", "sweep.json", "results.png"}
