"""Pairs: drawn ones are right, different and disjoint, files say what is wrong with them, batches teach by force."""

import json
from pathlib import Path

import pytest

from cluster.storage import Store
from pipelines.graph import Graph
from pipelines.pair_set import PairSet, Vocabulary
from pipelines.pairs import PairsConfig, Room, draw, pairs_stage, read_pairs, split
from pipelines.recipe import validated
from pipelines.recipe_text import RecipeError
from pipelines.sources import DataError
from tests.pipelines.seq2seq_run import make_pairs, tiny

SOLUTIONS = {"reverse": lambda x: x[::-1], "sort": lambda x: sorted(x, key=int), "copy": lambda x: x}


@pytest.mark.parametrize("task", SOLUTIONS)
def test_drawn_pairs_are_solved_and_no_two_alike(task: str) -> None:
    config = PairsConfig(task=task, symbols=12, min_length=2, max_length=5, training_pairs=300, held_out_pairs=50)
    pairs = draw(config)
    assert len({source for source, _ in pairs}) == len(pairs) == 350
    assert {len(source) for source, _ in pairs} == {2, 3, 4, 5}
    assert {symbol for source, _ in pairs for symbol in source} == {str(number) for number in range(12)}
    assert all(list(target) == list(SOLUTIONS[task](list(source))) for source, target in pairs)
    assert draw(config) == pairs != draw(config.model_copy(update={"seed": 1}))


def test_the_held_out_sources_are_not_trained_on() -> None:
    pairs = [((str(number % 40),), (str(number),)) for number in range(100)]  # several targets of one source
    training, held_out = split(pairs, 10, seed=3)
    assert sorted(training + held_out) == sorted(pairs)
    away = {source for source, _ in held_out}
    assert len(away) == 10 and not away & {source for source, _ in training}
    assert split(pairs, 10, seed=3) == (training, held_out) != split(pairs, 10, seed=4)
    with pytest.raises(DataError, match="pairs.held_out_pairs=40 leaves nothing to train on of 40 different sources"):
        split(pairs, 40, seed=0)


def test_the_artifact_has_both_splits_in_the_vocabularys_ids(tmp_path: Path) -> None:
    recipe = tiny()
    artifact = make_pairs(Store(tmp_path), recipe)
    vocabulary = Vocabulary.load(artifact)
    assert vocabulary.symbols == tuple("012345")
    splits = {name: list(PairSet(artifact, name)) for name in ("train", "held_out")}
    assert (len(splits["train"]), len(splits["held_out"])) == (200, 30)
    expected = {source: target for source, target in draw(recipe.pairs)}
    for source, target in [*splits["train"], *splits["held_out"]]:
        assert expected.pop(tuple(vocabulary.decode(source))) == tuple(vocabulary.decode(target))
    assert not expected


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_file_brings_pairs_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"source": "b a  ü", "target": "a b"}, "", {"source": [10, 9], "target": []})
    pairs = read_pairs(path)
    assert pairs == [(("b", "a", "ü"), ("a", "b")), (("10", "9"), ())]
    assert Vocabulary.of(symbol for pair in pairs for side in pair for symbol in side).symbols == (
        *("10", "9", "a", "b", "ü"),
    )
    assert Vocabulary.of(["10", "9", "-3"]).symbols == ("-3", "9", "10")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ([1], r"line 2: \[1\] is no object with source and target"),
        ({"source": "a"}, "line 2: .* is no object with source and target"),
        ({"source": [], "target": [1]}, "line 2: source is empty"),
        ({"source": [1.5], "target": [1]}, r"line 2: source=\[1.5\] is neither a list of whole numbers nor symbols"),
        ({"source": [1], "target": {"a": 1}}, "line 2: target=.* is neither"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path / "p.jsonl", {"source": "a", "target": "b"}, line))


def test_a_file_that_is_not_there_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs.path=.*gone.jsonl does not exist"):
        pairs_stage(PairsConfig(path=str(tmp_path / "gone.jsonl")), Room(9, 9, 9))
    path = write(tmp_path / "p.jsonl", *({"source": [1, 2, n], "target": [n] * n} for n in range(4)))
    settings = [f"pairs={{path: {path}, held_out_pairs: 1}}", "model.max_seq_len=9", "train.seq_len=3"]
    recipe = tiny(*settings, "model.vocab_size=5", "model.max_source_len=2")
    with pytest.raises(DataError) as refused:
        make_pairs(Store(tmp_path / "store"), recipe)
    assert str(refused.value) == (
        "model.vocab_size=5 is below the 6 that the pairs need; model.max_source_len=2 is below the 3 that the pairs "
        "need; train.seq_len=3 is below the 4 that the pairs need; raise it"
    )
    fits = tiny(*settings[:2], "train.seq_len=4", "model.vocab_size=6", "model.max_source_len=3")
    assert len(PairSet(make_pairs(Store(tmp_path / "store"), fits), "train")) == 3


def test_the_key_of_a_file_is_its_content(tmp_path: Path) -> None:
    def key(name: str, *lines: object) -> str:
        path = write(tmp_path / name, *lines)
        return Graph([pairs_stage(PairsConfig(path=path), Room(9, 9, 9))]).keys["pairs"]

    pair = {"source": "a", "target": "b"}
    assert key("a.jsonl", pair) == key("b.jsonl", pair) != key("a.jsonl", pair, pair)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "pairs.task draws pairs and pairs.path names a file of them; give one of the two"),
        ({"task": "sort", "path": "p"}, "pairs.task draws pairs and pairs.path names a file"),
        ({"path": "p", "symbols": 3}, "pairs.symbols=3 is for drawn pairs, and pairs.path names a file"),
        ({"task": "sort", "min_length": 5, "max_length": 4}, "pairs.min_length=5 is above pairs.max_length=4"),
        ({"task": "sort", "symbols": 2, "max_length": 4}, "pairs.symbols=2 make 16 sequences of pairs.max_length=4"),
    ],
)
def test_settings_that_mean_no_pairs_are_refused(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validated(PairsConfig, values)
