"""The main job: which stages a recipe means, and how they are wired."""

from __future__ import annotations

from pipelines.adopted_tokenizer import check_takes_chats
from pipelines.dedup import dedup_stage
from pipelines.deploy import deploy_stage
from pipelines.evaluate import evaluate_stage
from pipelines.export import export_stage
from pipelines.finetune import fitting_start
from pipelines.graph import Graph
from pipelines.incarnations import worker_needs
from pipelines.ingest import ingest_stage
from pipelines.pretrain import pretrain_stage
from pipelines.recipe import Recipe
from pipelines.shards import ShardConfig, shards_stage
from pipelines.vocabulary import tokenizer_stage


def build_graph(recipe: Recipe, dashboard_url: str, keep: bool) -> Graph:
    """Raw text to endpoint.

    Args:
        dashboard_url: where the Ray cluster's dashboard listens; the deploy stage talks to it.
        keep: leave the endpoint running.

    Raises:
        StartError: what `train.start_from` names has gone, or its weights are not of the recipe's model.
        DataError: a source does not exist, or an adopted tokenizer cannot be used or takes no conversations, and there
            are some.
    """
    if recipe.tokenizer.path is not None:
        check_takes_chats(recipe.tokenizer.path, recipe.tokenizer.eos_token, recipe.data.sources)
    return Graph(
        [
            ingest_stage(recipe.data),
            dedup_stage(recipe.data),
            tokenizer_stage(recipe.tokenizer),
            shards_stage(ShardConfig.of(recipe.data, recipe.train.seq_len)),
            pretrain_stage(recipe.model, recipe.train, fitting_start(recipe.train.start_from, recipe.model)),
            evaluate_stage(recipe.model, recipe.evaluate, worker_needs(recipe.train), recipe.train.wait_for_nodes),
            export_stage(recipe.model, recipe.export),
            deploy_stage(recipe.name, recipe.serve, recipe.export.dtype, dashboard_url, keep),
        ]
    )
