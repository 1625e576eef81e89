"""What a run would do, and why: every stage beside what the last run of that recipe was like."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.storage import JSON, NotFound, Store
from pipelines.graph import Graph
from pipelines.runs import list_runs
from pipelines.stage import Stage
from pipelines.stage_key import canonical

_RECORD = "graph.json"
_RUNS_LOOKED_AT = 50
_SHOWN_CHANGES = 3
_SHOWN_CHARS = 40


@dataclass(frozen=True)
class Step:
    """`why` is one line."""

    stage: str
    key: str
    action: Literal["skip", "run"]
    why: str


@dataclass(frozen=True)
class Record:
    """What the stages of a run were: by name, `version`, `config`, `upstream` (a list of names) and `key`."""

    run_id: str
    stages: Mapping[str, Mapping[str, Any]]


def write_record(graph: Graph, recipe_name: str, run_directory: Store) -> None:
    """Keep what a run's stages are, for the plans of later ones."""
    run_directory.write_json(_RECORD, {"name": recipe_name, "stages": _described(graph)})


def last_record(store: Store, recipe_name: str) -> Record | None:
    """Of the latest run of a recipe of that name, among the latest runs of the store. Raises StorageError."""
    for run_id in reversed(list_runs(store)[-_RUNS_LOOKED_AT:]):
        try:
            found = store.child("runs", run_id).read_json(_RECORD)
            if found["name"] == recipe_name:
                return Record(run_id, found["stages"])
        except (NotFound, ValueError, TypeError, KeyError):
            continue
    return None


def plan(
    graph: Graph, selected: Sequence[Stage], committed: Collection[str], forced: Collection[str], last: Record | None
) -> list[Step]:
    """What each of the selected stages would do. `committed`: names of those whose artifact is there; `forced`: of
    those that are made anew, which `graph` must know already."""
    steps: list[Step] = []
    running: set[str] = set()
    for stage in selected:
        if stage.name in committed and not stage.always:
            steps.append(Step(stage.name, graph.keys[stage.name], "skip", "committed already"))
            continue
        why = _why(graph, stage, running, forced, last)
        running.add(stage.name)
        steps.append(Step(stage.name, graph.keys[stage.name], "run", why))
    return steps


def _why(graph: Graph, stage: Stage, running: set[str], forced: Collection[str], last: Record | None) -> str:
    if stage.name in forced:
        return "made anew, as asked for"
    if stage.always:
        return "always runs"
    now = _describe(graph, stage)
    before = last.stages.get(stage.name) if last else None
    if last is None or before is None:
        return "has not run before"
    reasons = list(_changes(before, now))
    if reasons:
        return ", ".join(reasons)
    if follows := [name for name in stage.upstream if name in running]:
        return f"follows {' and '.join(follows)}"
    if before["key"] != now["key"]:
        return "what it starts from has changed"
    return f"run {last.run_id} has not committed it, or it was deleted"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before["version"] != now["version"]:
        yield f"its code changed, version {before['version']} → {now['version']}"
    if before["upstream"] != now["upstream"]:
        yield f"it follows {_listed(now['upstream'])} instead of {_listed(before['upstream'])}"
    changed = list(_differences(before["config"], now["config"]))
    yield from changed[:_SHOWN_CHANGES]
    if len(changed) > _SHOWN_CHANGES:
        yield f"and {len(changed) - _SHOWN_CHANGES} more"


def _differences(before: JSON, now: JSON, path: str = "") -> Iterator[str]:
    """`vocab_size changed 4096 → 8192`, for all that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            inner = f"{path}.{name}" if path else name
            if name not in now:
                yield f"{inner} is no more, it was {_shown(before[name])}"
            elif name not in before:
                yield f"{inner} is new: {_shown(now[name])}"
            else:
                yield from _differences(before[name], now[name], inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif before != now or type(before) is not type(now):
        yield f"{path or 'it'} changed {_shown(before)} → {_shown(now)}"


def _shown(value: JSON) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "nothing"


def _described(graph: Graph) -> dict[str, JSON]:
    return {stage.name: _describe(graph, stage) for stage in graph.stages.values()}


def _describe(graph: Graph, stage: Stage) -> dict[str, Any]:
    return {
        "version": stage.version,
        "config": canonical(stage.config, stage.name),
        "upstream": list(stage.upstream),
        "key": graph.keys[stage.name],
    }
