"""The ready sweeps: each makes recipes, compares what it says it compares, and has a report of just that."""

import json
import re
from pathlib import Path

import pytest

from pipelines.sweep.config import SweepConfig, Trial

REPOSITORY = Path(__file__).resolve().parents[3]
SWEEPS = sorted(path for path in (REPOSITORY / "pipelines/recipes/sweeps").glob("*.yaml") if path.stem != "base")


def cells(name: str) -> dict[str, Trial]:
    config = SweepConfig.load(REPOSITORY / f"pipelines/recipes/sweeps/{name}.yaml")
    return {trial.cell: trial for trial in config.model_copy(update={"seeds": (0,)}).trials()}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_makes_recipes_that_differ_and_has_a_report_of_its_cells_and_seeds(path: Path) -> None:
    config = SweepConfig.load(path)
    assert config.name == path.stem and config.title
    trials = config.trials()
    assert len({trial.recipe.to_yaml() for trial in trials}) == len(trials) > 2
    report = REPOSITORY / "docs/comparisons" / path.stem
    figures = json.loads((report / "sweep.json").read_text())
    assert sorted(cell["cell"] for cell in figures["cells"]) == sorted(config.cell_names)
    assert (figures["seeds"], figures["measures"]) == (list(config.seeds), list(config.measures))
    assert [each["source"] for each in figures["expected"]] == [e.source for e in config.expect for _ in e.pairs]
    text = (report / "report.md").read_text()
    assert figures["machine"]["processor"] in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures and all((report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_guide_leads_to_every_sweep_and_report() -> None:
    guide = (REPOSITORY / "docs/comparisons.md").read_text()
    assert re.findall(r"recipes/sweeps/(\w+)\.yaml\)", guide) == re.findall(r"\(comparisons/(\w+)/report\.md\)", guide)
    assert sorted(re.findall(r"recipes/sweeps/(\w+)\.yaml\)", guide)) == [path.stem for path in SWEEPS]


def test_what_is_said_to_be_equal_is() -> None:
    parameters = {trial.recipe.model.num_parameters() for trial in cells("activations").values()}
    assert max(parameters) - min(parameters) <= 3, "but for β of the learned swish, one a layer"
    flops = [trial.recipe.model.flops_per_token(128) for trial in cells("experts").values()]
    assert max(flops) / min(flops) < 1.02, "but for the router"
    heads = {cell: trial.recipe.model.num_parameters() for cell, trial in cells("heads").items()}
    assert all(abs(heads[cell] / heads["mha"] - 1) < 0.001 for cell in ("gqa-2-wide", "mqa-wide"))
    tables = {cell: trial.recipe.model.num_parameters() for cell, trial in cells("embeddings").items()}
    assert abs(tables["tied-wide"] / tables["untied"] - 1) < 0.001
    epochs = cells("repetition")
    fresh = epochs.pop("fresh").recipe
    tokens = fresh.train.steps * fresh.train.global_batch * fresh.train.seq_len
    assert fresh.data.max_tokens == tokens
    assert {cell: tokens // (trial.recipe.data.max_tokens or 1) for cell, trial in epochs.items()} == {
        "2-epochs": 2,
        "4-epochs": 4,
        "8-epochs": 8,
    }
