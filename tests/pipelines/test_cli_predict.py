"""`caravan predict`: answers of a run's checkpoint, and what it says of input that it cannot take."""

import io
import json
from pathlib import Path

import pytest

from cluster.storage import Store
from pipelines.pair_set import Vocabulary
from pipelines.runs import Run
from pipelines.seq2seq import build_seq2seq_graph
from pipelines.training_folder import CHECKPOINTS, training_folder
from pipelines.translate import answer, load_seq2seq
from tests.pipelines.commands import type_here
from tests.pipelines.seq2seq_run import RECIPE, make_run, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(Store(tmp_path_factory.mktemp("home") / "store"), tiny("train.optimizer.lr=0.02"))


def predict(run: Run, *arguments: object, code: int = 0) -> str:
    home = run.store.local_path()
    assert home is not None
    return type_here(home.parent, "predict", *arguments, code=code)


def expected(run: Run, lines: list[str]) -> list[list[str]]:
    from cluster.artifact import Artifact

    recipe, folder = tiny(), training_folder(run)
    assert folder is not None
    vocabulary = Vocabulary.load(build_seq2seq_graph(recipe).artifact(run.store, "pairs"))
    model = load_seq2seq(recipe.model, Artifact(folder.child(CHECKPOINTS, "step-00000004")))
    sources = [vocabulary.encode(line.split()) for line in lines]
    return [vocabulary.decode(tokens) for tokens in answer(model, sources, 64, recipe.max_tokens)]


def test_targets_are_the_models_of_the_last_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["1 2 3", "  4  ", "0 0 5 1 2", "3 1"]
    wanted = expected(run, lines)
    assert any(wanted)
    file = tmp_path / "sources.txt"
    file.write_text("\n".join(lines) + "\n")
    assert [line.split() for line in predict(run, "r1", file).splitlines()] == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    printed = predict(run, "r1", "--json", "--batch-size", 3).splitlines()
    assert [json.loads(line) for line in printed] == [
        {"source": line.split(), "target": target} for line, target in zip(lines, wanted, strict=True)
    ]
    assert [line.split() for line in predict(run, "r1", file, "--max-tokens", 1).splitlines()] == [
        target[:1] for target in wanted
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n\n3", "line 2 is empty; give a source with at least one symbol"),
        ("1 2\n3 x", "line 2: 'x' is no symbol that the model was trained with; they are 0 1 2 3 4 5"),
        ("1 2 3 4 5 0", "line 1 has 6 symbols, more than model.max_source_len=5; shorten it"),
    ],
)
def test_a_line_it_cannot_take_is_named_and_nothing_printed(
    run: Run, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert message in " ".join(predict(run, "r1", code=1).split())


def test_runs_and_files_that_do_not_do_are_refused(run: Run, tmp_path: Path) -> None:
    Run.create(run.store, "name: x\ndata: {}\n", "decoder")
    Run.create(run.store, RECIPE, "young")
    for arguments, message in (
        (("r1", tmp_path / "gone"), "there is no file"),
        (("r1", tmp_path), "cannot be read"),
        (("r1", "--max-tokens", 7), "--max-tokens=7 and the begin token do not fit into model.max_seq_len=7"),
        (("decoder",), "run 'decoder' is not of an encoder–decoder"),
        (("young",), "run 'young' has no checkpoint yet; go on with it: caravan resume young"),
    ):
        assert message in " ".join(predict(run, *arguments, code=1).split())
