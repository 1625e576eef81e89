"""What a run may be of, and what the commands need to know of it: a recipe, one of an encoder–decoder, or a sweep.

The text tells which: `kind_of_file`, `stored_kind`. Everything else about a run is the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from cluster.storage import Store
from pipelines.generations import read_generations
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.recipe_text import RecipeError, parse_yaml
from pipelines.seq2seq import Seq2SeqRecipe, build_seq2seq_graph, is_seq2seq
from pipelines.stage import StageResult
from pipelines.stages import build_graph
from pipelines.sweep.config import SweepConfig, is_sweep
from pipelines.sweep.run import SweepRun
from pipelines.user_stage import user_modules

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.report import RunSummary
    from pipelines.runs import Run


RecipeT = TypeVar("RecipeT", Recipe, Seq2SeqRecipe)


class Conclusion(Protocol):
    """What a run that is over has to say."""

    @property
    def url(self) -> str | None:
        """Where it still serves."""
        ...

    def as_json(self) -> Any: ...

    def print(self, console: Console) -> None: ...


class RunKind(Protocol):
    """`keep_going`: a stage that fails does not keep those that do not need it from being run."""

    @property
    def keep_going(self) -> bool: ...

    @property
    def name(self) -> str: ...

    def to_yaml(self) -> str:
        """What is stored with the run; `stored_kind` makes an equal one of it."""
        ...

    def modules(self) -> list[str]:
        """Top-level modules that the cluster's workers must get from here."""
        ...

    def build(self, store: Store, dashboard_url: str, keep: bool) -> Graph:
        """The graph as the store has it now. Says what is wrong: GraphError, RecipeError."""
        ...

    def check_cluster(
        self, graph: Graph, selected: Sequence[str], store: Store, dashboard_url: str, keep: bool
    ) -> None:
        """What would stop the run on this cluster is said now, and not after minutes of training."""
        ...

    def conclude(
        self, run: Run, graph: Graph, results: Mapping[str, StageResult] | None, seconds: float
    ) -> Conclusion | None:
        """Writes into the run's folder what is made of its stages. `results` is None if a stage failed, and then
        there may be nothing to say."""
        ...


def kind_of_file(path: Path, overrides: Sequence[str], store: Store | None) -> RunKind:
    """Of a recipe's file. Raises RecipeError, also for a sweep's."""
    try:
        is_pairs = is_seq2seq(parse_yaml(path.read_text("utf-8"), "the recipe"))
    except (OSError, UnicodeDecodeError):
        is_pairs = False  # and no recipe either, which `load` says
    if is_pairs:
        return Seq2SeqRun(Seq2SeqRecipe.load(path, overrides, store))
    return RecipeRun(Recipe.load(path, overrides, store))


def stored_kind(text: str, overrides: Sequence[str], store: Store | None, command: str) -> RunKind:
    """Of a run's stored text. `command`: what makes its report again. Raises RecipeError."""
    values = parse_yaml(text, "the run's recipe")
    if is_sweep(values):
        return SweepRun(SweepConfig.from_yaml(text, overrides), command, store=store)
    if is_seq2seq(values):
        return Seq2SeqRun(Seq2SeqRecipe.from_yaml(text, overrides, store))
    return RecipeRun(Recipe.from_yaml(text, overrides, store))


@dataclass(frozen=True)
class _ModelRun(Generic[RecipeT]):
    """Of a recipe, which makes one model."""

    recipe: RecipeT
    keep_going: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.recipe.name

    def to_yaml(self) -> str:
        return self.recipe.to_yaml()

    def _check_room(self, graph: Graph, selected: Sequence[str], store: Store) -> None:
        from pipelines.pretrain import check_room

        if "pretrain" in selected and not graph.artifact(store, "pretrain").committed:
            check_room(self.recipe.model, self.recipe.train)

    def conclude(
        self, run: Run, graph: Graph, results: Mapping[str, StageResult] | None, seconds: float
    ) -> Conclusion | None:
        from pipelines.report import summarise

        return None if results is None else _RecipeConclusion(summarise(run, results, seconds))


@dataclass(frozen=True)
class RecipeRun(_ModelRun[Recipe]):
    def modules(self) -> list[str]:
        return user_modules(self.recipe.stages)

    def build(self, store: Store, dashboard_url: str, keep: bool) -> Graph:
        return build_graph(self.recipe, dashboard_url, keep, read_generations(store))

    def check_cluster(
        self, graph: Graph, selected: Sequence[str], store: Store, dashboard_url: str, keep: bool
    ) -> None:
        from cluster.serve import control

        if "deploy" in selected:
            control.check_can_deploy(dashboard_url, self.recipe.serve.port, replace=keep)
        self._check_room(graph, selected, store)


@dataclass(frozen=True)
class Seq2SeqRun(_ModelRun[Seq2SeqRecipe]):
    def modules(self) -> list[str]:
        return []

    def build(self, store: Store, dashboard_url: str, keep: bool) -> Graph:
        if keep:
            raise RecipeError("--keep leaves an endpoint running, and an encoder–decoder has none; leave it out")
        return build_seq2seq_graph(self.recipe, read_generations(store))

    def check_cluster(
        self, graph: Graph, selected: Sequence[str], store: Store, dashboard_url: str, keep: bool
    ) -> None:
        self._check_room(graph, selected, store)


@dataclass(frozen=True)
class _RecipeConclusion:
    summary: RunSummary

    @property
    def url(self) -> str | None:
        return self.summary.url

    def as_json(self) -> Any:
        return asdict(self.summary)

    def print(self, console: Console) -> None:
        from pipelines.progress import print_summary

        print_summary(console, self.summary)
