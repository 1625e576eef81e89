"""One graph of many trials: what they share is there once, under the keys of plain runs."""

import pytest

from pipelines.recipe_text import RecipeError
from pipelines.stage import GraphError
from pipelines.stages import build_graph
from pipelines.sweep import trials
from pipelines.sweep.trials import sweep_graph
from tests.pipelines.sweep.sweeps import sweep


def test_trials_share_what_does_not_differ() -> None:
    config = sweep()
    made = sweep_graph(config.trials(), ["pretrain"])
    assert list(made.graph.stages) == [
        *("ingest", "dedup", "tokenizer", "shards"),
        *(f"pretrain@{norm}@{seed}" for seed in (0, 1) for norm in ("rmsnorm", "layernorm")),
    ]
    assert made.stages["layernorm@1"] == {
        **{kind: kind for kind in ("ingest", "dedup", "tokenizer", "shards")},
        "pretrain": "pretrain@layernorm@1",
    }


def test_a_stage_that_differs_by_cell_only_is_named_after_the_cell() -> None:
    config = sweep(grid={"tokenizer.vocab_size": [300, 400]})
    made = sweep_graph(config.trials(), ["evaluate"])
    names = set(made.graph.stages)
    assert {
        "ingest",
        "dedup",
        "tokenizer@vocab_size=300",
        "shards@vocab_size=400",
        "evaluate@vocab_size=400@1",
    } <= names
    assert made.graph.stages["pretrain@vocab_size=300@1"].upstream == ("shards@vocab_size=300",)


def test_keys_are_those_of_plain_runs() -> None:
    tried = sweep(grid={"tokenizer.vocab_size": [300, 400]}).trials()
    made = sweep_graph(tried, ["evaluate", "pretrain"])
    for trial in tried:
        plain = build_graph(trial.recipe, "", False)
        for kind, name in made.stages[trial.label].items():
            assert made.graph.keys[name] == plain.keys[kind]
    anew = {made.graph.first_keys["tokenizer@vocab_size=400"]: 1}
    again = sweep_graph(tried, ["evaluate"], anew)
    plain = build_graph(tried[-1].recipe, "", False, anew)
    assert again.graph.keys["evaluate@vocab_size=400@1"] == plain.keys["evaluate"]
    assert again.graph.keys["evaluate@vocab_size=300@1"] == made.graph.keys["evaluate@vocab_size=300@1"]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(GraphError, match="the recipe has no stage 'evalute'; its stages are ingest"):
        sweep_graph(sweep().trials(), ["evalute"])
    with pytest.raises(GraphError, match="'deploy' leaves nothing to be measured"):
        sweep_graph(sweep().trials(), ["deploy"])


def test_beyond_the_training_s_length_rows_are_long_and_only_rotary_models_are_rescaled() -> None:
    config = sweep(
        grid={"model.position": ["rope", "alibi"]}, seeds=[0], extrapolate={"factor": 4, "scalings": ["yarn"]}
    )
    made = sweep_graph(config.trials(), config.kinds, extrapolate=config.extrapolate)
    rows = {name: stage.config.seq_len for name, stage in made.graph.stages.items() if stage.kind == "shards"}
    assert rows == {"shards": 32, "shards@long:4": 128}
    for cell, scalings in (("rope", ("yarn",)), ("alibi", None)):
        stage = made.graph.stages[f"extrapolate@{cell}@0"]
        assert stage.upstream == ("shards@long:4", f"pretrain@{cell}@0")
        assert stage.config["extrapolate"].scalings == scalings
    assert made.graph.stages["pretrain@rope@0"].upstream == ("shards",)
    learned = sweep(grid={"model.position": ["learned"]}, seeds=[0])
    with pytest.raises(RecipeError, match="cell learned: model.max_seq_len=64 positions are learned"):
        sweep_graph(learned.trials(), ["extrapolate"], extrapolate=config.extrapolate)


def test_cells_that_are_one_training_are_refused() -> None:
    """They would be shown as two that took equally long."""
    config = sweep(grid={"train.activation_checkpointing": ["none", "full"]}, measures=["pretrain.loss"])
    with pytest.raises(GraphError, match="cells none and full are one training: they differ only in what does not"):
        sweep_graph(config.trials(), config.kinds)


def test_names_of_cells_and_trials_do_not_meet() -> None:
    cells = [
        {"name": name, "set": {"tokenizer.vocab_size": size}} for name, size in (("a", 300), ("a.0", 400), ("b", 300))
    ]
    cells[2]["set"]["model.norm"] = "layernorm"
    made = sweep_graph(sweep(grid={}, cells=cells).trials(), ["pretrain"])
    assert {name for name in made.graph.stages if "tokenizer" in name} == {"tokenizer@a@0", "tokenizer@a.0"}
    assert made.stages["b@1"]["tokenizer"] == "tokenizer@a@0"


def test_sources_are_looked_at_once(monkeypatch) -> None:
    looked = []
    real = trials.ingest_stage
    monkeypatch.setattr(trials, "ingest_stage", lambda data: looked.append(data) or real(data))
    sweep_graph(sweep().trials(), ["pretrain"])
    assert len(looked) == 1
