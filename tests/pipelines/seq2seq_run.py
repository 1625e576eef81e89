"""A run of a tiny encoder–decoder as one finds it after training, made without a cluster."""

from dataclasses import fields
from typing import Any

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.training.checkpoint import Checkpointer
from llama.training.config import TrainConfig
from llama.training.mesh import process_group
from llama.training.trainer import Trainer
from pipelines.drive import drive
from pipelines.loader import RankSlices
from pipelines.pair_loader import PairLoader
from pipelines.runs import Run, StageStatus
from pipelines.seq2seq import Seq2SeqRecipe, build_seq2seq_graph
from pipelines.training_folder import CHECKPOINTS

RECIPE = """
name: tiny
pairs: {task: reverse, symbols: 6, max_length: 5, training_pairs: 200, held_out_pairs: 30}
model: {dim: 16, num_layers: 1, encoder_layers: 1, num_heads: 2, position: learned}
train: {steps: 4, global_batch: 8, micro_batch: 8, checkpoint_every: 2, log_every: 2}
"""


def tiny(*overrides: str) -> Seq2SeqRecipe:
    return Seq2SeqRecipe.from_yaml(RECIPE, overrides)


def make_pairs(store: Store, recipe: Seq2SeqRecipe) -> Artifact:
    """The committed artifact of the stage `pairs`."""
    graph = build_seq2seq_graph(recipe)
    drive(graph, store, Run.create(store, recipe.to_yaml()), until="pairs")
    return graph.artifact(store, "pairs")


def make_run(store: Store, recipe: Seq2SeqRecipe) -> Run:
    """Trained here; the stage `pretrain` is committed, as its workers would have left it."""
    graph = build_seq2seq_graph(recipe)
    run = Run.create(store, recipe.to_yaml(), "r1")
    drive(graph, store, run, until="pairs")
    train, pretrain = recipe.train, graph.artifact(store, "pretrain")
    settings: dict[str, Any] = {item.name: getattr(train, item.name) for item in fields(TrainConfig)}
    slices = RankSlices(train.global_batch, train.micro_batch)
    with process_group():
        Trainer(
            recipe.model,
            TrainConfig(**settings),
            PairLoader(graph.artifact(store, "pairs"), slices, train.seq_len, train.seed),
            Checkpointer(pretrain.store.child(CHECKPOINTS), Artifact),
        ).fit()
    attempt = pretrain.begin()
    attempt.store.write_json("summary.json", {})
    attempt.commit({"checkpoint": f"{CHECKPOINTS}/step-{train.steps:08d}"})
    run.status.stages["pretrain"] = StageStatus("done", graph.keys["pretrain"])
    run.save()
    return run
