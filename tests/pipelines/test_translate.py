"""The evaluation of an encoder–decoder: its figures counted by hand, on answers of one that has learned a little."""

import pytest
import torch

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.pair_set import BOS, EOS, PairSet, Vocabulary
from pipelines.seq2seq import build_seq2seq_graph
from pipelines.training_folder import CHECKPOINTS
from pipelines.translate import TranslateTask, answer, answer_held_out, load_seq2seq
from tests.pipelines.seq2seq_run import make_run, tiny


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TranslateTask:
    recipe = tiny(
        "pairs={task: copy, symbols: 4, max_length: 4, training_pairs: 60, held_out_pairs: 30}",
        "train.steps=60",
        "train.optimizer.lr=0.01",
        "train.checkpoint_every=0",
    )
    store = Store(tmp_path_factory.mktemp("store"))
    graph, _ = build_seq2seq_graph(recipe), make_run(store, recipe)
    checkpoint = Artifact(graph.artifact(store, "pretrain").store.child(CHECKPOINTS, "step-00000060"))
    return TranslateTask(recipe.model, checkpoint, graph.artifact(store, "pairs"), 7, recipe.max_tokens, "cpu", 1)


def test_figures_are_those_counted_by_hand(task: TranslateTask) -> None:
    figures, predictions = answer_held_out(task)
    exact = right = tokens = 0
    for prediction, (source, target) in zip(predictions, PairSet(task.pairs, "held_out"), strict=True):
        names = Vocabulary.load(task.pairs)
        assert prediction["source"].split() == names.decode(source)
        assert prediction["target"].split() == names.decode(target)
        wanted, got = [*prediction["target"].split(), "end"], [*prediction["predicted"].split(), "end"]
        exact += wanted == got
        right += sum(place < len(got) and got[place] == symbol for place, symbol in enumerate(wanted))
        tokens += len(wanted)
    assert figures == {"exact_match": exact / 30, "token_accuracy": right / tokens, "pairs": 30}
    assert 0 < right < tokens  # it has learned something, and not all


def test_answers_do_not_depend_on_the_batch(task: TranslateTask) -> None:
    model = load_seq2seq(task.model, task.checkpoint).double()
    sources = [source for source, _ in PairSet(task.pairs, "held_out")]
    together = list(answer(model, sources, 7, task.max_tokens))
    assert together == [next(answer(model, [source], 1, task.max_tokens)) for source in sources]
    uncached = [
        model.generate(torch.tensor([source]), max_tokens=task.max_tokens, bos=BOS, eos=EOS, use_cache=False)[0]
        for source in sources
    ]
    assert together == uncached
    assert list(answer(model, [], 7, task.max_tokens)) == []
