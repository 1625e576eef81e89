"""docs/data.md: its recipe is one, its thresholds are those of the paper, and its links lead somewhere."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pipelines.data_config import CleanConfig, DataConfig, DecontaminateConfig, NearDuplicateConfig, SourceConfig
from pipelines.decontaminate import LEAST_WORDS
from pipelines.recipe import Recipe, TokenizerConfig, TrainRecipe

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
# Rae et al. 2021, appendix A.1: table A1 (repetition) and the rules of quality before it.
GOPHER = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_chars": 3,
    "max_mean_word_chars": 10,
    "max_symbol_ratio": 0.1,
    "max_bullet_line_ratio": 0.9,
    "max_ellipsis_line_ratio": 0.3,
    "min_alphabetic_word_ratio": 0.8,
    "min_stop_words": 2,
    "max_duplicate_line_ratio": 0.3,
    "max_duplicate_paragraph_ratio": 0.3,
    "max_duplicate_line_char_ratio": 0.2,
    "max_duplicate_paragraph_char_ratio": 0.2,
    "max_top_ngram_char_ratios": (0.20, 0.18, 0.16),
    "max_duplicate_ngram_char_ratios": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
}


@pytest.fixture(scope="module")
def guide() -> str:
    return GUIDE.read_text("utf-8")


def test_the_recipe_of_the_guide_is_one_and_has_gophers_thresholds(guide: str) -> None:
    recipe = Recipe.from_yaml(re.findall(r"```yaml\n(name:.*?)```", guide, re.DOTALL)[0])
    clean = recipe.data.clean.model_dump()
    assert {name: clean[name] for name in GOPHER} == GOPHER
    assert set(clean) - set(GOPHER) == {"unicode", "control_characters", "max_chars", "language"}
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_guide_names_only_settings_that_there_are(guide: str) -> None:
    sections = (DataConfig, SourceConfig, CleanConfig, DecontaminateConfig, NearDuplicateConfig, TokenizerConfig)
    known = {name for section in sections for name in section.model_fields} | {
        each.name for each in fields(TrainRecipe)
    }
    for name in re.findall(r"`((?:max|min)_[a-z_]+|[a-z]+_bytes|[a-z]+_columns?)`", guide):
        assert name in known, name


def test_the_links_of_the_guide_lead_somewhere(guide: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", guide)
    assert len(links) > 10
    assert not [link for link in links if not (GUIDE.parent / link).exists()]


def test_the_map_of_the_guide_has_every_file(guide: str) -> None:
    listed = re.findall(r"\]\(\.\./pipelines/(\w+\.py)\)", guide.split("## Where things live")[1])
    there = [path.name for path in (GUIDE.parents[1] / "pipelines").glob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(there)


def test_the_limits_of_the_guide_are_the_defaults(guide: str) -> None:
    size = re.search(r"`max_document_bytes` \((\d+) MiB\)", guide)
    assert size is not None
    assert int(size[1]) << 20 == DataConfig.model_fields["max_document_bytes"].default
    words = re.search(r"one of fewer than (\d+) is ignored", guide)
    assert words is not None and int(words[1]) == LEAST_WORDS
