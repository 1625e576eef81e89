"""The recipe of an encoder–decoder: what follows from the pairs, what is refused, and the stages that it means."""

from pathlib import Path

import pytest
import yaml

from cluster.storage import Store
from llama.config import ModelConfig
from pipelines.cli_serve import find_model
from pipelines.export import export_checkpoint
from pipelines.finetune import fill_in_start
from pipelines.pretrain import pretrain_stage
from pipelines.recipe_text import RecipeError
from pipelines.runs import Run, RunError
from pipelines.seq2seq import Seq2SeqRecipe, build_seq2seq_graph, is_seq2seq, recipe_of
from tests.pipelines.seq2seq_run import RECIPE, tiny

REVERSE = Path(__file__).parents[2] / "pipelines" / "recipes" / "reverse.yaml"


def test_the_shipped_recipe_is_one_and_its_sizes_follow_from_the_pairs() -> None:
    recipe = Seq2SeqRecipe.load(REVERSE, ["pairs.max_length=20"])
    assert Seq2SeqRecipe.from_yaml(recipe.to_yaml()) == recipe
    sizes = (recipe.model.vocab_size, recipe.model.source_len, recipe.model.max_seq_len, recipe.train.seq_len)
    assert sizes == (18, 20, 22, 21) and recipe.max_tokens == 21
    assert is_seq2seq(yaml.safe_load(REVERSE.read_text()))
    assert not is_seq2seq({"data": {}}) and not is_seq2seq(None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lora.rank=4", "train.lora={'rank': 4} has no place here: adapters go onto decoders; leave it out"),
        ("train.start_from=run", "train.start_from='run' has no place here: weights to start from are those of"),
        ("train.shuffle_shards=2", "train.shuffle_shards=2 has no place here: pairs are all mixed; leave it out"),
        ("train.cache_bytes=2", "train.cache_bytes=2 has no place here: pairs are held in memory; leave it out"),
        ("train.seq_len=5", "train.seq_len=5 is below pairs.max_length=5 and the begin token; leave it out, or set"),
        ("train.seq_len=9", "train.seq_len=9 is above model.max_seq_len=7"),
        ("model.vocab_size=7", "model.vocab_size=7 is below pairs.symbols=6 and two more; leave it out, or set at"),
        ("model.max_source_len=4", "model.max_source_len=4 is below pairs.max_length=5; leave it out, or set at"),
        ("evaluate.max_tokens=7", "evaluate.max_tokens=7 and the begin token do not fit into model.max_seq_len=7"),
        ("pairs={path: pairs.jsonl}", "model.vocab_size: missing; with pairs.path it is to be given"),
        ("model.moe.num_experts=4", "model.moe: an encoder–decoder has no experts; leave it out"),
        ("model.norms=layernorm", "model.norms: unknown key; did you mean model.norm?"),
        ("data={}", "data: unknown key"),
        ("stages.deploy.retries=1", "stages.deploy: there is no such stage; choose one of pairs, pretrain, evaluate"),
        ("stages.pairs.num_cpus=2", "stages.pairs.num_cpus: pairs is a stage of the project's own"),
        ("train.workers=3", "train.global_batch=8 is not divisible by train.micro_batch=8 times 3 workers"),
        ("pairs.symbols=yes", "pairs.symbols=True is no number; give one"),
        ("train.optimizer.lr=.nan", "train.optimizer.lr=nan"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        tiny(override)
    assert str(refused.value).startswith(message)


def test_the_graph_says_what_depends_on_what() -> None:
    graph = build_seq2seq_graph(tiny("train.workers=2", "train.micro_batch=4", "stages.evaluate.retries=2"))
    assert {name: stage.upstream for name, stage in graph.stages.items()} == {
        "pairs": (),
        "pretrain": ("pairs",),
        "evaluate": ("pairs", "pretrain"),
    }
    assert graph.stages["pretrain"].resources.num_cpus == 2 and graph.stages["evaluate"].tries.retries == 2

    def changed(*overrides: str) -> set[str]:
        keys = build_seq2seq_graph(tiny(*overrides)).keys
        return {name for name, key in build_seq2seq_graph(tiny()).keys.items() if keys[name] != key}

    assert changed("name=other", "train.log_every=1", "evaluate.batch_size=3") == set()
    assert changed("evaluate.max_tokens=3") == {"evaluate"}
    assert changed("model.encoder_layers=2") == {"pretrain", "evaluate"} == changed("train.seed=1")
    assert changed("pairs.task=sort") == {"pairs", "pretrain", "evaluate"}


def test_its_training_is_not_a_decoders() -> None:
    recipe = tiny()
    settings = {"vocab_size": 8, "dim": 16, "num_layers": 1, "num_heads": 2, "position": "learned", "max_seq_len": 7}
    ours, theirs = pretrain_stage(recipe.model, recipe.train), pretrain_stage(ModelConfig(**settings), recipe.train)
    assert (ours.upstream, theirs.upstream) == (("pairs",), ("shards",))
    assert ours.config != theirs.config


def test_a_run_of_another_kind_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert recipe_of(Run.create(store, RECIPE, "ours")).pairs.task == "reverse"
    with pytest.raises(RunError, match="run 'theirs' is not of an encoder–decoder"):
        recipe_of(Run.create(store, "name: x\ndata: {}\n", "theirs"))


def test_commands_for_decoders_say_what_the_run_is_of(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = Run.create(store, tiny().to_yaml(), "r1")
    for ask in (
        lambda: export_checkpoint(run, "last", str(tmp_path / "out")),
        lambda: find_model("r1", store.uri),
        lambda: fill_in_start({"train": {"start_from": "r1"}}, store),
    ):
        with pytest.raises(ValueError, match="run 'r1' is of a recipe of an encoder–decoder; name one of a recipe"):
            ask()
