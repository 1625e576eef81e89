"""What a sweep's file may say, and which trials come of it."""

import os

import pytest
import yaml

from pipelines.recipe_text import RecipeError
from pipelines.sweep.config import SweepConfig, is_sweep
from tests.pipelines.sweep.sweeps import RECIPE, sweep


def test_a_grid_is_every_combination_and_a_seed_sets_the_training_s() -> None:
    config = sweep(grid={"model.norm": ["rmsnorm", "layernorm"], "model.num_kv_heads": [4, 1]}, seeds=[3, 7])
    assert config.cell_names == [
        "rmsnorm-num_kv_heads=4",
        "rmsnorm-num_kv_heads=1",
        "layernorm-num_kv_heads=4",
        "layernorm-num_kv_heads=1",
    ]
    trials = config.trials()
    assert [trial.label for trial in trials[:5]] == [
        *(f"{name}@3" for name in config.cell_names),
        f"{config.cell_names[0]}@7",
    ]
    assert {(t.recipe.model.norm, t.recipe.model.kv_heads, t.recipe.train.seed) for t in trials} == {
        (norm, heads, seed) for norm in ("rmsnorm", "layernorm") for heads in (4, 1) for seed in (3, 7)
    }


def test_cells_set_what_no_grid_can_and_all_cells_share_set() -> None:
    cells = [{"name": "plain"}, {"name": "moe", "set": {"model.moe": {"num_experts": 4}, "model.hidden_dim": 64}}]
    config = sweep(grid={}, cells=cells, set={"train.steps": 9}, seeds=[0])
    plain, moe = (trial.recipe for trial in config.trials())
    assert plain.model.moe is None and moe.model.moe is not None and moe.model.moe.num_experts == 4
    assert plain.train.steps == moe.train.steps == 9


def test_what_is_stored_is_the_same_sweep(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"data": {"sources": [{"uri": "texts"}]}}))
    (tmp_path / "in" / "s.yaml").write_text(
        "name: s\nrecipe: r.yaml\ngrid: {model.norm: [rmsnorm]}\n"
        "cells: [{name: other, set: {data.sources: [{uri: ./more}], tokenizer.path: tok}}]\n"
    )
    config = SweepConfig.load("in/s.yaml", ["train.steps=7", "model.activation=relu"])
    assert SweepConfig.from_yaml(config.to_yaml()) == config
    assert config.set == {"train.steps": 7, "model.activation": "relu"}
    monkeypatch.chdir("/")
    again = SweepConfig.from_yaml(config.to_yaml())
    assert again.recipe["data"]["sources"][0]["uri"] == os.path.join(tmp_path, "texts")
    assert again.cells[0].set["data.sources"] == [{"uri": os.path.join(tmp_path, "more")}]
    assert again.cells[0].set["tokenizer.path"] == os.path.join(tmp_path, "tok")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"grid": {}}, "neither a grid nor cells"),
        ({"grid": {"model.norm": []}}, "grid.model.norm"),
        ({"grid": {"model.moe": [{"num_experts": 2}]}}, "gives no name to a cell; list such cells under `cells`"),
        ({"grid": {"train.seed": [1, 2]}}, "train.seed: the sweep has a key of its own for it; set seeds"),
        ({"set": {"name": "x"}}, "set name"),
        ({"set": {"model.norm": "rmsnorm"}}, "model.norm='rmsnorm' and model.norm='rmsnorm' are both set for a cell"),
        (
            {"set": {"model.moe.top_k": 1}, "cells": [{"name": "a", "set": {"model.moe": {"num_experts": 4}}}]},
            "model.moe.top_k=1 and model.moe={'num_experts': 4} are both set for a cell",
        ),
        ({"seeds": [True]}, "seeds[0]=True"),
        ({"expect": [{"lower": "rmsnorm", "than": ["rmsnorm"]}]}, "expect: 'rmsnorm' cannot be below itself"),
        ({"expect": [{"lower": [], "than": "rmsnorm"}]}, "expect[0].lower"),
        ({"measures": ["pretrain.loss", "pretrain.loss"]}, "measures: pretrain.loss comes twice"),
        ({"measures": ["pretrain.val_los"]}, "pretrain leaves no 'val_los'; it leaves step, finished"),
        ({"measures": ["extrapolate.within.own"]}, "runs with the key extrapolate"),
        (
            {"measures": ["extrapolate.beyond_twice.own"], "extrapolate": {"factor": 2}},
            "extrapolate.factor of at least 3",
        ),
        ({"grid": {"stages.x.config./a": [1]}}, "is no name for a cell"),
        ({"seeds": [1, 1]}, "seeds: 1 comes twice"),
        ({"cells": [{"name": "rmsnorm"}]}, "cells: rmsnorm comes twice"),
        ({"cells": [{"name": "a/b"}]}, "cells[0].name"),
        ({"curves": ["lost"]}, "curves: 'lost' cannot be drawn; choose of loss, val_loss"),
        ({"measures": ["curve.lost"]}, "is not one of the curve's, imbalance, gap"),
        ({"measures": ["loss"]}, "measures"),
        (
            {"expect": [{"lower": "rmsnorm", "than": "layernrom"}]},
            "'layernrom' names no cell; the cells are rmsnorm, layernorm",
        ),
        ({"sets": {}}, "sets: unknown key"),
    ],
)
def test_refusals_name_the_key(keys, message) -> None:
    with pytest.raises(RecipeError) as error:
        sweep(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_cell_that_makes_no_recipe_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^cell groupnorm: model.norm='groupnorm'"):
        sweep(grid={"model.norm": ["rmsnorm", "groupnorm"]}).trials()


def test_what_is_measured_by_validation_needs_one() -> None:
    with pytest.raises(RecipeError, match="cell rmsnorm: pretrain.val_loss is measured with train.validate_every"):
        sweep(set={"train.validate_every": 0}).trials()
    assert sweep(set={"train.validate_every": 0}, measures=["pretrain.loss"]).trials()


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(RecipeError, match="there is no sweep"):
        SweepConfig.load(tmp_path / "none.yaml")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(RecipeError, match="is no sweep: it has no key `recipe`"):
        SweepConfig.load(tmp_path / "recipe.yaml")
    (tmp_path / "s.yaml").write_text("name: s\nrecipe: absent.yaml\ngrid: {model.norm: [rmsnorm]}\n")
    with pytest.raises(RecipeError, match="there is no recipe"):
        SweepConfig.load(tmp_path / "s.yaml")
    with pytest.raises(RecipeError, match="not of the form key.path=value"):
        (tmp_path / "s.yaml").write_text("name: s\nrecipe: recipe.yaml\ngrid: {model.norm: [rmsnorm]}\n")
        SweepConfig.load(tmp_path / "s.yaml", ["train.steps"])
    (tmp_path / "s.yaml").write_text("name: s\nrecipe: recipe.yaml\ngrid: {model.norm: [rmsnorm]}\nset: [1]\n")
    with pytest.raises(RecipeError, match="^set="):
        SweepConfig.load(tmp_path / "s.yaml", ["train.steps=1"])
    assert is_sweep({"recipe": {}, "cells": []}) and not is_sweep(RECIPE) and not is_sweep(None)


def test_what_has_to_run_follows_from_what_is_measured() -> None:
    expect = [{"lower": "rmsnorm/evaluate.loss", "than": "layernorm/evaluate.loss"}]
    config = sweep(measures=["tokenizer.bytes_per_token"], curves=[])
    assert config.kinds == ["tokenizer"]
    config = sweep(measures=["tokenizer.bytes_per_token", "curve.gap"], curves=[], expect=expect)
    assert config.kinds == ["tokenizer", "pretrain", "evaluate"]
    assert config.all_measures == ["tokenizer.bytes_per_token", "curve.gap", "evaluate.loss"]
