"""A sweep's graph: the stages of all its trials, those that are the same once.

A stage that every trial shares keeps its name; others are named `kind@trial`, or `kind@cell` where only the seed of
the training differs. Keys are those that a plain run of the trial's recipe has, so that whatever either has made
serves the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.extrapolate import ExtrapolateConfig, extrapolate_stage
from pipelines.graph import Graph
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
    for trial in trials:
        graph = build_graph(trial.recipe, "", False, generations)
        if extrapolate is not None:
            graph = _beyond(graph, trial, extrapolate)
        ids = {name: (stage.kind, graph.keys[name]) for name, stage in graph.stages.items()}
        wanted = {stage.name for kind in kinds for stage in graph.selected(_measurable(graph, kind))}
        for stage in graph.stages.values():
            if stage.name in wanted:
                stages.setdefault(ids[stage.name], stage)
                upstream[ids[stage.name]] = [ids[name] for name in stage.upstream]
                users.setdefault(ids[stage.name], []).append(trial)
    names = {id: _name(stages[id], each, len(trials)) for id, each in users.items()}
    graph = Graph(
        [replace(stages[id], name=names[id], upstream=tuple(names[up] for up in upstream[id])) for id in stages],
        generations,
    )
    found: dict[str, dict[str, str]] = {trial.label: {} for trial in trials}
    for id, each in users.items():
        for trial in each:
            found[trial.label][stages[id].name] = names[id]
    return SweepGraph(graph, found)


def _beyond(graph: Graph, trial: Trial, config: ExtrapolateConfig) -> Graph:
    """With rows of the longer length, and the stage that measures on them."""
    recipe, train = trial.recipe, trial.recipe.train
    if recipe.model.position != "rope" or recipe.model.rope_scaling is not None:
        config = config.model_copy(update={"scalings": None})
    long = shards_stage(ShardConfig.of(recipe.data, config.factor * train.seq_len))
    try:
        stage = extrapolate_stage(
            recipe.model, train.seq_len, config, train.worker_needs, train.wait_for_nodes, f"{long.name}@long"
        )
    except ValueError as error:
        raise RecipeError(f"cell {trial.cell}: {error}") from error
    taken = Resources(train.cpus_per_worker, train.gpus_per_worker, own_workers=True)
    stages = [*graph.stages.values(), replace(long, name=f"{long.name}@long"), replace(stage, resources=taken)]
    return Graph(stages, graph.generations)


def _measurable(graph: Graph, kind: str) -> str:
    if kind not in graph.stages:
        raise GraphError(f"measures: the recipe has no stage {kind!r}; its stages are {', '.join(graph.stages)}")
    if graph.stages[kind].always:
        raise GraphError(f"measures: stage {kind!r} leaves nothing to be measured; choose another")
    return kind


def _name(stage: Stage, users: Sequence[Trial], number: int) -> str:
    """Of the one stage that these of so many trials have in common."""
    own = stage.name.partition("@")[2]
    if len(users) == number:
        whose = ""
    elif len(users) > 1 and len({trial.cell for trial in users}) == 1:
        whose = users[0].cell
    else:
        whose = users[0].label
    return "@".join(filter(None, [stage.kind, ".".join(filter(None, [own, whose]))]))
