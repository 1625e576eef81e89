"""A run as one finds it after training, made without a cluster: checkpoints, reports, a tokenizer, a recipe."""

from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.config import ModelConfig
from llama.model import Transformer
from llama.tokenizer_training import train_tokenizer
from llama.training.checkpoint import Checkpointer
from llama.training.mesh import process_group
from pipelines.metrics import MetricsWriter
from pipelines.runs import Run, StageStatus
from pipelines.training_folder import CHECKPOINTS, METRICS
from tests.pipelines.reports import report

MODEL = {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"sources": [{"uri": "stdlib"}]},
    "tokenizer": {"vocab_size": 300},
    "model": MODEL,
    "train": {"steps": 100, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
}


def plain_model(seed: int) -> Transformer:
    model = Transformer(ModelConfig(vocab_size=300, **MODEL))
    model.init_weights(seed)
    return model


def make_run(store: Store, folder: Path, losses: dict[int, float | None], **sections: Any) -> Run:
    """The weights of step n are those that the seed n gives; `losses` are the checkpoints' of validation, by step.
    `sections`: of the recipe, in place of `RECIPE`'s."""
    run = Run.create(store, yaml.safe_dump(RECIPE | sections), "r1")
    run.status.stages = {
        "tokenizer": StageStatus("done", "t", started=10.0, ended=12.0),
        "pretrain": StageStatus("failed", "p", started=12.0, ended=372.0, progress="step 3", error="[it] broke"),
        "export": StageStatus(),
    }
    run.save()
    train_tokenizer(["def a(): return 1"] * 5, 300).save(folder / "tokenizer")
    attempt = Artifact(store.child("artifacts", "tokenizer", "t")).begin()
    attempt.commit({}, [attempt.store.upload(path, path.name) for path in (folder / "tokenizer").iterdir()])
    trained = store.child("artifacts", "pretrain", "p")
    with process_group():
        checkpointer = Checkpointer(trained.child(CHECKPOINTS), Artifact, keep_last=9)
        for step, loss in losses.items():
            weights = {f"model.{name}": tensor for name, tensor in plain_model(step).state_dict().items()}
            progress = {"loss": 3.0, "val_loss": loss}
            checkpointer.begin(step, weights | {"optimizer.x": torch.ones(1)}, progress).result()
    writer = MetricsWriter(trained.child(METRICS), "t1")
    for step in losses:
        writer.write(report(step, val_loss=losses[step]))
    writer.flush()
    return run
