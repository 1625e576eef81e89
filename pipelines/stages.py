"""The main job: which stages a recipe means, and how they are wired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pipelines.adopted_tokenizer import check_takes_chats
from pipelines.data_config import DataConfig
from pipelines.dedup import dedup_stage
from pipelines.deploy import deploy_stage
from pipelines.evaluate import evaluate_stage
from pipelines.export import export_stage
from pipelines.finetune import fitting_start
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage
from pipelines.pretrain import pretrain_stage
from pipelines.recipe import Recipe
from pipelines.shards import ShardConfig, shards_stage
from pipelines.stage import Resources, Stage
from pipelines.user_stage import user_stages
from pipelines.vocabulary import tokenizer_stage


def build_graph(
    recipe: Recipe,
    dashboard_url: str,
    keep: bool,
    generations: Mapping[str, int] | None = None,
    ingest: Callable[[DataConfig], Stage] = ingest_stage,
) -> Graph:
    """Raw text to endpoint, and the recipe's own stages, whose modules are imported.

    Args:
        dashboard_url: where the Ray cluster's dashboard listens; the deploy stage talks to it.
        keep: leave the endpoint running.
        generations: which stages were made anew (pipelines/generations.py).
        ingest: makes that stage, for which it looks at the sources.

    Raises:
        StartError: what `train.start_from` names has gone, or its weights are not of the recipe's model.
        DataError: a source does not exist, or an adopted tokenizer cannot be used or takes no conversations, and there
            are some.
        GraphError: a stage of the recipe's own is not there, or waits for one that is not.
    """
    if recipe.tokenizer.path is not None:
        check_takes_chats(recipe.tokenizer.path, recipe.tokenizer.eos_token, recipe.data.sources)
    stages = [
        ingest(recipe.data),
        dedup_stage(recipe.data),
        tokenizer_stage(recipe.tokenizer),
        shards_stage(ShardConfig.of(recipe.data, recipe.train.seq_len)),
        pretrain_stage(recipe.model, recipe.train, fitting_start(recipe.train.start_from, recipe.model)),
        evaluate_stage(recipe.model, recipe.evaluate, recipe.train.worker_needs, recipe.train.wait_for_nodes),
        export_stage(recipe.model, recipe.export),
        deploy_stage(recipe.name, recipe.serve, recipe.export.dtype, dashboard_url, keep),
    ]
    own = [_as_run(stage, recipe) for stage in stages]
    return Graph([*own, *(_tried(stage, recipe) for stage in user_stages(recipe.stages))], generations)


def _as_run(stage: Stage, recipe: Recipe) -> Stage:
    """One of ours, with what its workers take and how often it is tried."""
    train, serve = recipe.train, recipe.serve
    workers = train.world_sizes(recipe.model).largest
    taken = {
        "pretrain": (workers * train.cpus_per_worker, workers * train.gpus_per_worker),
        "evaluate": (train.cpus_per_worker, train.gpus_per_worker),
        "deploy": (serve.replicas * serve.cpus_per_replica, serve.replicas * serve.gpus_per_replica),
    }
    num_cpus, num_gpus = taken.get(stage.name, (1.0, 0.0))
    return _tried(replace(stage, resources=Resources(num_cpus, num_gpus, own_workers=True)), recipe)


def _tried(stage: Stage, recipe: Recipe) -> Stage:
    options = recipe.stages.get(stage.name)
    return stage if options is None else replace(stage, tries=options.tries)
