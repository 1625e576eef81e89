"""A sweep's graph: the stages of all its trials, those that are the same once.

A stage that every trial shares keeps its name; others are named `kind@trial`, or `kind@cell` where only the seed of
the training differs. Keys are those that a plain run of the trial's recipe has, so that whatever either has made
serves the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.graph import Graph
from pipelines.stage import GraphError, Stage
from pipelines.stages import build_graph
from pipelines.sweep.config import Trial

_Id = tuple[str, str]
"""A stage's kind and key."""


@dataclass(frozen=True)
class SweepGraph:
    """`stages`: for each trial, by its label, the graph's stage of every kind that it needs."""

    graph: Graph
    stages: Mapping[str, Mapping[str, str]]


def sweep_graph(
    trials: Sequence[Trial], kinds: Sequence[str], generations: Mapping[str, int] | None = None
) -> SweepGraph:
    """What has to run for these kinds of stages to be there for every trial.

    Raises GraphError for a kind that the recipe has not, or that leaves nothing behind; and what `build_graph` does.
    """
    stages: dict[_Id, Stage] = {}
    upstream: dict[_Id, list[_Id]] = {}
    users: dict[_Id, list[Trial]] = {}
    for trial in trials:
        graph = build_graph(trial.recipe, "", False, generations)
        ids = {name: (stage.kind, graph.keys[name]) for name, stage in graph.stages.items()}
        wanted = {stage.name for kind in kinds for stage in graph.selected(_measurable(graph, kind))}
        for stage in graph.stages.values():
            if stage.name in wanted:
                stages.setdefault(ids[stage.name], stage)
                upstream[ids[stage.name]] = [ids[name] for name in stage.upstream]
                users.setdefault(ids[stage.name], []).append(trial)
    names = _names(users, len(trials))
    graph = Graph(
        [replace(stages[id], name=names[id], upstream=tuple(names[up] for up in upstream[id])) for id in stages],
        generations,
    )
    found: dict[str, dict[str, str]] = {trial.label: {} for trial in trials}
    for id, each in users.items():
        for trial in each:
            found[trial.label][id[0]] = names[id]
    return SweepGraph(graph, found)


def _measurable(graph: Graph, kind: str) -> str:
    if kind not in graph.stages:
        raise GraphError(f"measures: the recipe has no stage {kind!r}; its stages are {', '.join(graph.stages)}")
    if graph.stages[kind].always:
        raise GraphError(f"measures: stage {kind!r} leaves nothing to be measured; choose another")
    return kind


def _names(users: Mapping[_Id, Sequence[Trial]], number: int) -> dict[_Id, str]:
    names: dict[_Id, str] = {}
    for id, trials in users.items():
        cells = {trial.cell for trial in trials}
        if len(trials) == number:
            name = id[0]
        elif len(cells) == 1 and len(trials) > 1:
            name = f"{id[0]}@{trials[0].cell}"
        else:
            name = f"{id[0]}@{trials[0].label}"
        names[id] = name
    return names
