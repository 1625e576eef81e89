"""A sweep's graph: the stages of all its trials, those that are the same once.

A stage that every trial shares keeps its name; others are named `kind@cell@seed` after the first trial that needs them,
or `kind@cell` where a cell's trials share it. Keys are those that a plain run of the trial's recipe has, so that
whatever either has made serves the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from pipelines.extrapolate import ExtrapolateConfig, extrapolate_stage
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage
from pipelines.recipe_text import RecipeError
from pipelines.shards import ShardConfig, shards_stage
from pipelines.stage import GraphError, Resources, Stage
from pipelines.stages import build_graph
from pipelines.sweep.config import Trial

_Id = tuple[str, str]
"""A stage's kind and key."""


@dataclass(frozen=True)
class SweepGraph:
    """`stages`: for each trial, by its label, what the stages of its own graph that it needs are called in this one."""

    graph: Graph
    stages: Mapping[str, Mapping[str, str]]


def sweep_graph(
    trials: Sequence[Trial],
    kinds: Sequence[str],
    generations: Mapping[str, int] | None = None,
    extrapolate: ExtrapolateConfig | None = None,
) -> SweepGraph:
    """What has to run for these kinds of stages to be there for every trial.

    Raises GraphError for a kind that the recipe has not, or that leaves nothing behind; RecipeError for a model that
    cannot be measured beyond its training; and what `build_graph` does.
    """
    stages: dict[_Id, Stage] = {}
    upstream: dict[_Id, list[_Id]] = {}
    users: dict[_Id, list[Trial]] = {}
    own: dict[str, dict[str, _Id]] = {}
    look = cache(ingest_stage)  # once for all trials with the same sources
    for trial in trials:
        graph = build_graph(trial.recipe, "", False, generations, look)
        if extrapolate is not None:
            graph = _beyond(graph, trial, extrapolate)
        ids = {name: (stage.kind, graph.keys[name]) for name, stage in graph.stages.items()}
        wanted = {stage.name for kind in kinds for stage in graph.selected(_measurable(graph, kind))}
        for stage in graph.stages.values():
            if stage.name in wanted:
                stages.setdefault(ids[stage.name], stage)
                upstream[ids[stage.name]] = [ids[name] for name in stage.upstream]
                users.setdefault(ids[stage.name], []).append(trial)
        own[trial.label] = {name: id for name, id in ids.items() if name in wanted}
    _check_different(trials, kinds, own)
    names = {id: _name(stages[id], each, len(trials)) for id, each in users.items()}
    graph = Graph(
        [replace(stages[id], name=names[id], upstream=tuple(names[up] for up in upstream[id])) for id in stages],
        generations,
    )
    return SweepGraph(graph, {label: {name: names[id] for name, id in ids.items()} for label, ids in own.items()})


def _check_different(trials: Sequence[Trial], kinds: Sequence[str], own: Mapping[str, Mapping[str, _Id]]) -> None:
    """Raises GraphError for two cells of which everything that is measured is the same artifact."""
    seen: dict[tuple[_Id, ...], Trial] = {}
    for trial in trials:
        first = seen.setdefault(tuple(own[trial.label][kind] for kind in kinds), trial)
        if first.seed == trial.seed and first.cell != trial.cell:
            raise GraphError(
                f"cells {first.cell} and {trial.cell} are one training: they differ only in what does not change what "
                "is trained, such as how it is laid out, computed or reported; compare speed with caravan bench train"
            )


def _beyond(graph: Graph, trial: Trial, config: ExtrapolateConfig) -> Graph:
    """With rows of the longer length, and the stage that measures on them."""
    recipe, train = trial.recipe, trial.recipe.train
    if recipe.model.position != "rope" or recipe.model.rope_scaling is not None:
        config = config.model_copy(update={"scalings": None})
    long = shards_stage(ShardConfig.of(recipe.data, config.factor * train.seq_len))
    try:
        stage = extrapolate_stage(
            recipe.model, train.seq_len, config, train.worker_needs, train.wait_for_nodes, _long(config)
        )
    except ValueError as error:
        raise RecipeError(f"cell {trial.cell}: {error}") from error
    taken = Resources(train.cpus_per_worker, train.gpus_per_worker, own_workers=True)
    shards = graph.stages["shards"]
    long = replace(long, name=_long(config), resources=shards.resources, tries=shards.tries)
    stages = [*graph.stages.values(), long, replace(stage, resources=taken)]
    return Graph(stages, graph.generations)


def _long(config: ExtrapolateConfig) -> str:
    """Holds a character that no cell's name has."""
    return f"shards@long:{config.factor}"


def _measurable(graph: Graph, kind: str) -> str:
    if kind not in graph.stages:
        raise GraphError(f"measures: the recipe has no stage {kind!r}; its stages are {', '.join(graph.stages)}")
    if graph.stages[kind].always:
        raise GraphError(f"measures: stage {kind!r} leaves nothing to be measured; choose another")
    return kind


def _name(stage: Stage, users: Sequence[Trial], number: int) -> str:
    """Of the one stage that these of so many trials have in common."""
    if len(users) == number:
        whose = ""
    elif len(users) > 1 and len({trial.cell for trial in users}) == 1:
        whose = users[0].cell
    else:
        whose = users[0].label
    return "@".join(filter(None, [stage.name, whose]))
