"""Which kind of run a text is of, and that it is stored and found again as the same."""

from pathlib import Path

import pytest
import yaml

from cluster.storage import Store
from pipelines.recipe import Recipe
from pipelines.recipe_text import RecipeError
from pipelines.run_kinds import RecipeRun, RunKind, Seq2SeqRun, kind_of_file, stored_kind
from pipelines.sweep.run import SweepRun
from tests.pipelines.sweep.sweeps import RECIPE, sweep

RECIPES = Path(__file__).resolve().parents[2] / "pipelines/recipes"


def again(kind: RunKind) -> RunKind:
    return stored_kind(kind.to_yaml(), [], None, "caravan resume x")


def test_recipes_are_told_apart_by_what_they_hold() -> None:
    quickstart, reverse = (kind_of_file(RECIPES / f"{name}.yaml", [], None) for name in ("quickstart", "reverse"))
    assert isinstance(quickstart, RecipeRun) and isinstance(reverse, Seq2SeqRun)
    assert (quickstart.name, reverse.name) == ("quickstart", "reverse")
    assert again(quickstart) == quickstart and again(reverse) == reverse
    changed = kind_of_file(RECIPES / "reverse.yaml", ["pairs.task=sort"], None)
    assert isinstance(changed, Seq2SeqRun) and changed.recipe.pairs.task == "sort"
    kept = sweep()
    found = again(SweepRun(kept, "caravan sweep s.yaml"))
    assert isinstance(found, SweepRun) and found.config == kept and found.keep_going


def test_what_is_not_what_was_asked_for_is_refused_with_the_command_that_takes_it(tmp_path) -> None:
    (tmp_path / "s.yaml").write_text(sweep().to_yaml())
    with pytest.raises(RecipeError, match="has a key `recipe`, and so is a sweep; caravan sweep runs it"):
        kind_of_file(tmp_path / "s.yaml", [], None)
    with pytest.raises(RecipeError, match="has a key `pairs`, and so is a recipe of an encoder–decoder"):
        Recipe.load(RECIPES / "reverse.yaml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        kind_of_file(tmp_path / "none.yaml", [], None)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"dta": 1}))
    with pytest.raises(RecipeError, match="dta: unknown key; did you mean data"):
        kind_of_file(tmp_path / "r.yaml", [], None)


def test_neither_a_sweep_nor_an_encoder_decoder_leaves_an_endpoint(tmp_path) -> None:
    for kind in (SweepRun(sweep(), ""), kind_of_file(RECIPES / "reverse.yaml", [], None)):
        with pytest.raises(RecipeError, match="--keep leaves an endpoint running"):
            kind.build(Store(tmp_path), "", True)
        assert "deploy" not in kind.build(Store(tmp_path), "", False).stages
