"""A recipe's own stages: what may be said of them, how they are found, what is shipped for them."""

import sys

import pytest
import yaml

from cluster.storage import Store
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.recipe import Recipe, RecipeError
from pipelines.runs import Run
from pipelines.stage import GraphError, Resources, Stage, Tries
from pipelines.stage_options import OWN_STAGES, StageOptions
from pipelines.stages import build_graph
from pipelines.user_stage import user_modules, user_stages

RECIPE = {
    "name": "tiny",
    "data": {"sources": [{"uri": "stdlib"}], "max_bytes": 100_000},
    "tokenizer": {"vocab_size": 300},
    "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
    "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
}


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The folder of a user, with a module in it."""
    (tmp_path / "count_words.py").write_text(
        "def count(context, config):\n"
        "    text = context.inputs['texts'].files.read_bytes('out').decode()\n"
        "    number = text.count(config['word'])\n"
        "    context.attempt.store.write_bytes('count', str(number).encode())\n"
        "    return {'words': number}\n"
        "def silent(context, config): context.attempt.store.write_bytes('x', b'x')\n"
        "def wrong(context, config): return 7\n"
        "def odd(context, config): return {'words': {7}}\n"
        "NUMBER = 7\n"
        "class Words:\n"
        "    @staticmethod\n"
        "    def none(context, config): pass\n"
    )
    (tmp_path / "broken_words.py").write_text("1 / 0\n")
    (tmp_path / "script_words.py").write_text("raise SystemExit(2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("count_words", "broken_words", "script_words"):
        sys.modules.pop(name, None)


def recipe(**stages):
    return Recipe.from_yaml(yaml.safe_dump({**RECIPE, "stages": stages}))


def texts():
    def run(context):
        context.attempt.store.write_bytes("out", b"a rose is a rose")
        return {}

    return Stage("texts", 1, {}, run)


def options(uses="count_words:count", **more):
    return StageOptions(uses=uses, after=("texts",), config={"word": "rose"}, **more)


def test_a_function_from_the_users_folder_is_a_stage(words, tmp_path):
    store = Store(tmp_path / "store")

    def results(**more):
        graph = Graph([texts(), *user_stages({"count": options(**more)})])
        return drive(graph, store, Run.create(store, "name: x\n"))["count"]

    first = results()
    assert first.metadata == {"words": 2} and first.artifact.files.read_bytes("count") == b"2"
    assert results().state == "skipped"
    assert results(version=2).state == "done", "its code is said to be new"
    assert results(retries=3, timeout=None, num_cpus=2.0).state == "skipped", "how it is run is not what it makes"
    assert results(uses="count_words:silent").metadata == {}
    with pytest.raises(GraphError, match="stage 'count' returned a int; return a dict, or None"):
        results(uses="count_words:wrong")
    with pytest.raises(GraphError, match="stage 'count' returned what is no JSON: .*set.*; return plain numbers"):
        results(uses="count_words:odd")


def test_what_a_stage_of_the_users_is_in_the_graph(words):
    own = {"uses": "count_words:Words.none", "after": ["export", "shards"], "num_gpus": 1, "accelerator_type": "H200"}
    found = recipe(mine={**own, "num_cpus": 0.5, "retries": 2, "timeout": 60, "retry_wait": 1}, pretrain={"retries": 4})
    graph = build_graph(found, "", keep=False)
    stage = graph.stages["mine"]
    assert stage.upstream == ("export", "shards")
    assert stage.resources == Resources(0.5, 1, 0, "H200")
    assert stage.tries == Tries(2, 1, 60)
    assert graph.stages["pretrain"].tries == Tries(4)
    assert graph.keys["pretrain"] == build_graph(recipe(), "", keep=False).keys["pretrain"]
    assert Recipe.from_yaml(found.to_yaml()) == found


def test_the_own_stages_are_those_of_the_graph():
    graph = build_graph(recipe(), "", keep=False)
    assert set(graph.stages) == set(OWN_STAGES)
    resources = {name: stage.resources for name, stage in graph.stages.items()}
    assert all(each.own_workers for each in resources.values())
    two = Recipe.from_yaml(yaml.safe_dump(RECIPE), ["train.workers=[1, 2]"])
    assert build_graph(two, "", keep=False).stages["pretrain"].resources.num_cpus == 2


@pytest.mark.parametrize(
    ("stages", "words_of_error"),
    [
        ({"mine": {}}, "stages.mine.uses: missing; name its function"),
        ({"ingest": {"uses": "a:b"}}, "stages.ingest.uses: ingest is a stage of the project's own"),
        ({"deploy": {"num_cpus": 4}}, "stages.deploy.num_cpus: deploy is a stage of the project's own"),
        ({"mine": {"uses": "no colon"}}, "stages.mine.uses='no colon'"),
        ({"mine": {"uses": "a:b", "accelerator_type": "H200"}}, "stages.mine.accelerator_type='H200' names a GPU"),
        ({"Mine!": {"uses": "a:b"}}, "stages.Mine!"),
        ({"mine": {"uses": "a:b", "retires": 3}}, "stages.mine.retires: unknown key"),
        ({"pretrain": {"timeout": 0}}, "stages.pretrain.timeout=0"),
        ({"pretrain": {"retries": -1}}, "stages.pretrain.retries=-1"),
    ],
)
def test_what_cannot_be_meant_is_refused(stages, words_of_error):
    with pytest.raises(RecipeError) as caught:
        recipe(**stages)
    assert words_of_error in str(caught.value)


@pytest.mark.parametrize(
    ("uses", "words_of_error"),
    [
        ("no_such_module:x", "stages.mine.uses='no_such_module:x' cannot be imported: No module named"),
        ("count_words:no", "module count_words has no function 'no'"),
        ("count_words:NUMBER", "module count_words has no function 'NUMBER'"),
        ("broken_words:x", "importing it raised ZeroDivisionError"),
        ("script_words:x", "importing it raised SystemExit"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(words, uses, words_of_error):
    with pytest.raises(GraphError) as caught:
        build_graph(recipe(mine={"uses": uses}), "", keep=False)
    assert words_of_error in str(caught.value)


def test_a_stage_after_one_that_is_not_there(words):
    with pytest.raises(GraphError, match="stage 'mine' needs 'no', which is not in the graph"):
        build_graph(recipe(mine={"uses": "count_words:count", "after": ["no"]}), "", keep=False)


def test_only_what_is_not_installed_is_shipped(words):
    sys.path.append(str(words))
    stages = {"a": options(), "b": options("json:dumps"), "c": options("yaml.nodes:Node"), "pretrain": StageOptions()}
    assert user_modules(stages) == ["count_words"]
