"""docs/components.md: every cell of its tables is what the models themselves show (tests/components.py)."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from llama import config as settings
from llama.hf import export_architecture
from llama.hf_architectures import ARCHITECTURES
from llama.presets import PRESETS
from llama.tokenizer_training import TokenizerKind
from pipelines.explain.registry import COMPONENTS
from pipelines.recipe import TokenizerConfig
from tests.components import SOURCES, observe, observe_preset, observe_tokenizer, observe_torch

transformers = pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[1] / "docs" / "components.md").read_text("utf-8")


def tables() -> Iterator[list[dict[str, str]]]:
    for block in re.findall(r"^\|.*\n\|[-|]+\n(?:\|.*\n?)+", PAGE, re.MULTILINE):
        heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield [dict(zip(heads, row, strict=True)) for row in rows]


MODELS, PARTS = tables()


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row["model"])
def test_a_row_is_what_the_model_shows(row: dict[str, str]) -> None:
    source = row["checked against"].strip("`")
    if source in PRESETS:
        found = observe_preset(PRESETS[source])
    elif source in SOURCES:
        found = observe(SOURCES[source])
    else:
        assert source == "torch.nn.Transformer"
        found = observe_torch()
    cells = {"norm, placement" if name == "norm" else name: value for name, value in found.items()}
    assert {name: row[name] for name in cells} == cells
    assert row["Caravan loads it"] == ("yes" if loads(source) else "no")
    assert row["tokenizer"] == tokenizer_of(source, row["tokenizer"])


def loads(source: str) -> bool:
    names = {architecture.name for architecture in ARCHITECTURES}
    if source in PRESETS:
        return export_architecture(PRESETS[source]) in names
    return source.replace("Config", "ForCausalLM") in names


def tokenizer_of(source: str, cell: str) -> str:
    """Of the class that transformers takes for the architecture, or that the cell names where it takes none."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    kind: Any = source
    if source in SOURCES:
        kind = getattr(transformers, source).model_type
    elif source in PRESETS:
        # A preset is written as an architecture whose class stands for models with quite different tokenizers.
        (kind,) = (each.model_type for each in ARCHITECTURES if each.name == export_architecture(PRESETS[source]))
    found = TOKENIZER_MAPPING_NAMES.get(kind)
    if found in (None, "TokenizersBackend"):
        if kind == "llama" and source in SOURCES:
            found = "LlamaTokenizer"
        else:
            return "—"
    assert isinstance(found, str)
    return observe_tokenizer(found)


def test_the_rows_are_of_all_sources_and_no_model_twice() -> None:
    checked = [row["checked against"].strip("`") for row in MODELS]
    assert set(checked) >= set(SOURCES)
    assert len(set(checked)) == len(checked) > 20
    assert len({row["model"] for row in MODELS}) == len(MODELS)


@pytest.mark.parametrize("row", PARTS, ids=lambda row: row["component"])
def test_a_component_is_set_and_drawn_where_the_page_says(row: dict[str, str]) -> None:
    section, *path = row["in a recipe"].strip("`").split(".")
    if section == "tokenizer":
        assert path[0] in TokenizerConfig.model_fields
        choices: Any = TokenizerKind
    else:
        owner = {"moe": settings.MoEConfig, "rope_scaling": settings.RopeScaling}.get(path[0], settings.ModelConfig)
        (setting,) = [each for each in fields(owner) if each.name == path[-1]]
        choices = getattr(settings, str(setting.type), None)
    named = [name for name in get_args(choices) if isinstance(name, str)]
    if named:
        assert row["values"].split(", ") == named
    for command in re.findall(r"`caravan explain (\S+)`", row["picture"]):
        assert command in COMPONENTS
    assert row["picture"] == "—" or "caravan explain" in row["picture"]


def test_every_picture_belongs_to_a_component() -> None:
    drawn = set(re.findall(r"`caravan explain (\S+)`", PAGE))
    assert drawn == set(COMPONENTS)
