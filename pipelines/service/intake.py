"""A request to run a recipe, turned into what is kept of it, or refused with the field that is wrong.

All that can be found wrong without a cluster is found here, so that it is an answer and not a line in a job's log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.storage import StorageError, Store
from pipelines.generations import read_generations
from pipelines.graph import Graph
from pipelines.recipe import Recipe
from pipelines.recipe_text import RecipeError, parse_yaml, set_override, sets_preset
from pipelines.runs import Run, RunError, one_line
from pipelines.service.errors import RequestRefused, WrongState
from pipelines.service.needs import needs_of
from pipelines.service.policy import PolicyError, RecipePolicy
from pipelines.service.submission import Submission
from pipelines.stage import GraphError, Stage
from pipelines.stages import build_graph
from pipelines.user_stage import user_modules


@dataclass(frozen=True)
class RunRequest:
    """`recipe` is YAML or its values; `overrides` are `dotted.path=value` each; the rest is a `Submission`'s."""

    recipe: str | Mapping[str, Any]
    overrides: Sequence[str] = ()
    run_id: str | None = None
    until: str | None = None
    from_stage: str | None = None
    force: Sequence[str] = ()
    keep: bool = False
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Accepted:
    name: str
    recipe_yaml: str
    submission: Submission
    graph: Graph


def accept(request: RunRequest, store: Store, policy: RecipePolicy, now: float) -> Accepted:
    """Raises RequestRefused, and StorageError if it is the store that fails."""
    recipe = _read(request, store, policy)
    try:
        graph = build_graph(recipe, "", request.keep, read_generations(store))
    except StorageError:
        raise
    except ValueError as error:  # a source, a start or a tokenizer that is not there
        raise RequestRefused(one_line(error), "recipe") from error
    stages = _stages(request, graph)
    try:
        submission = Submission(
            until=request.until,
            from_stage=request.from_stage,
            force=tuple(request.force),
            keep=request.keep,
            priority=request.priority,
            tags=dict(request.tags),
            needs=needs_of(recipe, stages),
            modules=tuple(user_modules(recipe.stages)),
            submitted=now,
        )
    except ValueError as error:
        raise RequestRefused(str(error), str(error).partition("=")[0].partition(":")[0]) from error
    return Accepted(recipe.name, recipe.to_yaml(), submission, graph)


def _read(request: RunRequest, store: Store, policy: RecipePolicy) -> Recipe:
    """The recipe, of which nothing is opened before the policy has seen where it lies."""
    try:
        text = request.recipe if isinstance(request.recipe, str) else yaml.safe_dump(dict(request.recipe))
        values = parse_yaml(text, "the recipe")
        if isinstance(values, dict):
            for override in request.overrides:
                if not sets_preset(override):  # which changes `model` alone, and names no place
                    set_override(values, override)
            policy.check(values)
        recipe = Recipe.from_yaml(text, request.overrides, store)
        policy.check(recipe.model_dump(mode="json"))
        return recipe
    except PolicyError as error:
        raise RequestRefused(str(error), error.field) from error
    except StorageError:
        raise
    except (RecipeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestRefused(one_line(error), "recipe") from error


def _stages(request: RunRequest, graph: Graph) -> list[Stage]:
    """The stages that are asked for."""
    for name, value in (("until", request.until), ("from_stage", request.from_stage)):
        if value is not None and value not in graph.stages:
            raise RequestRefused(f"{name}={value!r} is no stage; choose one of {', '.join(graph.stages)}", name)
    if request.keep and request.until not in (None, "deploy"):
        raise RequestRefused(
            f"keep leaves an endpoint running, but until={request.until} starts none; leave one of them out", "keep"
        )
    try:
        for name in request.force:
            graph.check_forced(name)
    except GraphError as error:
        raise RequestRefused(str(error), "force") from error
    try:
        return graph.selected(request.until, request.from_stage)
    except GraphError as error:
        raise RequestRefused(str(error), "from_stage") from error


def create_run(store: Store, run_id: str, accepted: Accepted) -> Run:
    """The folder of an accepted run. Raises RequestRefused, WrongState if there is a run of that id, StorageError."""
    asked = accepted.submission
    try:
        return Run.create(store, accepted.recipe_yaml, run_id, asked.until, asked.from_stage)
    except RunError as error:
        if "malformed" in str(error):
            raise RequestRefused(str(error), "run_id") from error
        begun = Run.open(store, run_id)
        is_half = begun.status.state == "pending" and not begun.directory.exists("submission.json")
        if is_half and (begun.recipe_yaml, begun.status.until, begun.status.from_stage) == (
            accepted.recipe_yaml,
            asked.until,
            asked.from_stage,
        ):
            return begun  # a service was killed after this much of the very same request
        raise WrongState(f"run {run_id!r} exists already; resume it, or choose another id") from error
