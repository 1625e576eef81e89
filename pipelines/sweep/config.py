"""What a sweep compares: one recipe, the ways in which it is changed, and the seeds that each way is tried with.

A file of its own, `caravan sweep` takes it. It is stored with the run, the recipe within it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from cluster.storage import Store
from llama.training.metrics import TrainSummary
from pipelines.baselines import Baselines
from pipelines.data_config import STDLIB
from pipelines.extrapolate import ExtrapolateConfig
from pipelines.recipe import Recipe, validated
from pipelines.recipe_text import RecipeError, first_line, masked, parse_yaml, shown
from pipelines.section import Section, lasting_uri
from pipelines.sweep.curves import CURVE_MEASURES, CURVES

_LABEL = r"[A-Za-z0-9][A-Za-z0-9_=+.-]*"
_SEED = "train.seed"

_LONGEST_LABEL = 60
_OF_VALIDATION = ("pretrain.val_loss", "curve.gap")
_LEFT = {
    "pretrain": [*TrainSummary.__dataclass_fields__, "parameters", "active_parameters"],
    "evaluate": ["loss", "perplexity", "bits_per_byte", *Baselines.__dataclass_fields__],
}
"""What can be measured of the stages whose metadata is flat."""

Label = Annotated[str, Field(pattern=rf"^{_LABEL}$", max_length=_LONGEST_LABEL)]
Measure = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*(\.[A-Za-z0-9_-]+)+$")]
"""`stage.key`: a number that a stage has left, such as `evaluate.bits_per_byte`; or `curve.NAME`, see curves.py."""
Term = Annotated[str, Field(pattern=rf"^{_LABEL}(/[a-z][a-z0-9_-]*(\.[A-Za-z0-9_-]+)+)?$")]
"""A cell, or `CELL/MEASURE`."""


class CellConfig(Section):
    """A way of changing the recipe that no grid gives."""

    name: Label
    set: dict[str, Any] = {}
    """Values by the recipe's keys, dotted."""


class ExpectConfig(Section):
    """What is known already: each cell of `lower` ends lower than each of `than`, in the first measure or their own."""

    lower: Annotated[tuple[Term, ...], Field(min_length=1)] | Term
    than: Annotated[tuple[Term, ...], Field(min_length=1)] | Term
    source: str = ""
    """Who found it."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        lower, than = ((each,) if isinstance(each, str) else each for each in (self.lower, self.than))
        return list(product(lower, than))


class SweepConfig(Section):
    """`SweepConfig.load` reads one from YAML."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str = ""
    """The report's."""
    notes: str = ""
    """What the report says first: plain text, paragraphs apart by an empty line."""
    recipe: dict[str, Any]
    """In a file also the path of a recipe, seen from that file."""
    set: dict[str, Any] = {}
    """What all cells change."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Values by key; every combination is a cell, named after its values."""
    cells: tuple[CellConfig, ...] = ()
    """Further cells."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)] = (0, 1, 2)
    """Each cell is trained with every one of them as `train.seed`."""
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = ("pretrain.val_loss",)
    """What is compared; the table is sorted by the first, the lowest on top."""
    curves: tuple[str, ...] = ("loss",)
    """What is drawn over the training, of curves.py."""
    extrapolate: ExtrapolateConfig | None = None
    """Measures each trained model beyond the length of its training, which also makes a picture."""
    expect: tuple[ExpectConfig, ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SweepConfig:
        """Read a YAML file; `overrides`, each `dotted.key=value`, are set in the recipe of every cell.

        Raises RecipeError."""
        values = parse_yaml(_text_of(Path(path), "sweep"), "the sweep")
        if not is_sweep(values):
            raise RecipeError(
                f"{os.fspath(path)!r} is no sweep: it has no key `recipe` beside `grid` or `cells`; a plain recipe is "
                "run by caravan run"
            )
        if isinstance(named := values["recipe"], str):
            found = Path(path).parent / named
            values = values | {"recipe": parse_yaml(_text_of(found, "recipe"), f"the recipe {named!r}")}
        return cls._of(values, overrides)

    @classmethod
    def from_yaml(cls, text: str, overrides: Sequence[str] = ()) -> SweepConfig:
        """Of a sweep that holds its recipe, as `to_yaml` gives it."""
        return cls._of(parse_yaml(text, "the sweep"), overrides)

    @classmethod
    def _of(cls, values: Any, overrides: Sequence[str]) -> SweepConfig:
        changed: dict[str, Any] = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise RecipeError(f"override {masked(override)!r} is not of the form key.path=value")
            changed[key.strip()] = parse_yaml(text, f"the value of override {masked(override)!r}")
        if changed and isinstance(before := values.get("set") or {}, dict):  # else it is refused below
            values = values | {"set": {**before, **changed}}
        return validated(cls, values)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    @model_validator(mode="before")
    @classmethod
    def _means_the_same_everywhere(cls, values: Any) -> Any:
        """A sweep is stored with its run and may be read in another folder."""
        parts = ("recipe", "set", "grid", "cells")
        return values | {part: _with_lasting_places(values[part]) for part in parts if part in values}

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if not self.grid and not self.cells:
            raise ValueError("the sweep has neither a grid nor cells; name what is to be compared")
        keys = [("set", key) for key in self.set] + [("grid", key) for key in self.grid]
        keys += [(f"cells[{index}].set", key) for index, cell in enumerate(self.cells) for key in cell.set]
        for where, key in keys:
            if key.split(".")[0] == "name" or key == _SEED:
                other = "seeds" if key == _SEED else "name"
                raise ValueError(f"{where}.{key}: the sweep has a key of its own for it; set {other}")
        for cell, changes in self.changes():
            if not re.fullmatch(_LABEL, cell) or len(cell) > _LONGEST_LABEL:
                raise ValueError(
                    f"grid: {shown(cell)} is no name for a cell (letters, digits and _=+.-, at most {_LONGEST_LABEL}"
                    "); list such cells under `cells`, named"
                )
            _check_apart({**self.set, **changes}, {key for key in self.set if key in changes})
        for name, values in (("seeds", self.seeds), ("cells", self.cell_names), ("measures", self.measures)):
            if twice := [str(value) for value in values if list(values).count(value) > 1]:
                raise ValueError(f"{name}: {twice[0]} comes twice; leave one out, or name it otherwise")
        self._check_measures()
        return self

    def _check_measures(self) -> None:
        for name in self.curves:
            if name not in CURVES:
                raise ValueError(f"curves: {name!r} cannot be drawn; choose of {', '.join(CURVES)}")
        for measure in self.all_measures:
            stage, _, key = measure.partition(".")
            if stage == "curve" and key not in CURVE_MEASURES:
                raise ValueError(f"measures: {measure!r} is not one of the curve's, {', '.join(CURVE_MEASURES)}")
            if stage == "extrapolate" and self.extrapolate is None:
                raise ValueError(f"measures: {measure!r} is of a stage that runs with the key extrapolate; give {{}}")
            if key.startswith("beyond_twice.") and self.extrapolate is not None and self.extrapolate.factor < 3:
                raise ValueError(f"measures: {measure!r} needs extrapolate.factor of at least 3")
            if stage in _LEFT and key not in _LEFT[stage]:
                raise ValueError(f"measures: {stage} leaves no {key!r}; it leaves {', '.join(_LEFT[stage])}")
        for each in self.expect:
            if same := [one for one, other in each.pairs if one == other]:
                raise ValueError(f"expect: {same[0]!r} cannot be below itself")
            for term in (term for pair in each.pairs for term in pair):
                if term.partition("/")[0] not in self.cell_names:
                    known = ", ".join(self.cell_names)
                    raise ValueError(f"expect: {term!r} names no cell; the cells are {known}")

    @property
    def all_measures(self) -> list[str]:
        """Those of the table, and whatever an expectation names besides."""
        terms = [term for each in self.expect for pair in each.pairs for term in pair]
        return list(dict.fromkeys([*self.measures, *(own for term in terms if (own := own_measure(term)))]))

    @property
    def kinds(self) -> list[str]:
        """The stages that have to run for the measures and curves."""
        stages = [measure.partition(".")[0] for measure in self.all_measures]
        kinds = ["pretrain" if stage == "curve" else stage for stage in stages]
        kinds += ["extrapolate"] if self.extrapolate is not None else []
        return list(dict.fromkeys([*kinds, *(["pretrain"] if self.curves else [])]))

    @property
    def cell_names(self) -> list[str]:
        return [name for name, _ in self.changes()]

    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        """Each cell's name and what it sets, the grid's first. Raises ValueError for a value that gives no name."""
        combinations = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        named = [("-".join(_named(key, value) for key, value in each.items()), each) for each in combinations if each]
        return named + [(cell.name, dict(cell.set)) for cell in self.cells]

    def trials(self, store: Store | None = None) -> list[Trial]:
        """Every cell with every seed, seed by seed. Raises RecipeError for the first that makes no recipe."""
        text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        made = []
        for seed in self.seeds:
            for cell, changes in self.changes():
                overrides = [_override(key, value) for key, value in {**self.set, **changes, _SEED: seed}.items()]
                try:
                    made.append(Trial(cell, seed, Recipe.from_yaml(text, overrides, store)))
                except RecipeError as error:
                    raise RecipeError(f"cell {cell}: {error}") from error
                validated = made[-1].recipe.train.validate_every > 0
                if wants := [each for each in self.all_measures if each in _OF_VALIDATION and not validated]:
                    raise RecipeError(f"cell {cell}: {wants[0]} is measured with train.validate_every; set it")
        return made


@dataclass(frozen=True)
class Trial:
    cell: str
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.cell}@{self.seed}"


def own_measure(term: str) -> str:
    """Of `CELL/MEASURE` the measure; empty for a cell alone."""
    return term.partition("/")[2]


def is_sweep(values: object) -> bool:
    """Whether a YAML file of these values is one; otherwise it may be a recipe."""
    return isinstance(values, dict) and "recipe" in values and bool({"grid", "cells"} & values.keys())


def _check_apart(changes: Mapping[str, Any], twice: Collection[str]) -> None:
    """Raises ValueError where a cell would lose one change to another: `model.moe.top_k` to `model.moe`.

    `twice`: keys that are set for all cells, and by this one.
    """
    for key in changes:
        for other in changes:
            if key in twice or key.startswith((f"{other}.", f"{other}[")):
                other = key if key in twice else other
                raise ValueError(
                    f"{key}={shown(changes[key])} and {other}={shown(changes[other])} are both set for a cell, and one "
                    "would undo the other; leave one of them out"
                )


def _named(key: str, value: Any) -> str:
    """`relu` for a name, `num_kv_heads=2` for what says nothing by itself."""
    if isinstance(value, str) and re.fullmatch(_LABEL, value):
        return value
    if not isinstance(value, bool | int | float | None):
        raise ValueError(f"grid.{key}: {shown(value)} gives no name to a cell; list such cells under `cells`, named")
    return f"{key.rpartition('.')[2]}={'none' if value is None else str(value).lower()}"


def _override(key: str, value: Any) -> str:
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float('inf'))}"


def _with_lasting_places(value: Any, key: str = "") -> Any:
    """Whatever a recipe's keys for a place say, said so that it means that everywhere (section.py)."""
    if isinstance(value, dict):
        # What a user's own stages are told is theirs.
        own = {k: v for k, v in value.items() if str(k).split(".")[0] == "stages"}
        return {k: own[k] if k in own else _with_lasting_places(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_lasting_places(each, key) for each in value]
    name = key.rpartition(".")[2]
    is_place = name in ("uri", "path") or name == "start_from" and "/" in str(value)
    if not isinstance(value, str) or not is_place or value == STDLIB:
        return value
    try:
        return lasting_uri(value)
    except ValueError:
        return value  # the recipe says what is wrong with it


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no {what} {os.fspath(path)!r}; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the {what} {os.fspath(path)!r} cannot be read: {first_line(error)}") from error
