"""What a training keeps in the folder of its artifact besides the tries, shared by all of them."""

from __future__ import annotations

from typing import Any

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.runs import Run

CHECKPOINTS, METRICS, INCARNATIONS, HANGS = "checkpoints", "metrics", "incarnations", "hangs"
START = "start_fingerprint"
"""In an incarnation's record: of the weights that it started from."""


def training_folder(run: Run) -> Store | None:
    """Where a run's training keeps its checkpoints and metrics; None before it has got there."""
    stage = run.status.stages.get("pretrain")
    return run.store.child("artifacts", "pretrain", stage.key) if stage is not None and stage.key else None


def checkpoints_of(run: Run) -> dict[int, dict[str, Any]]:
    """The run's whole checkpoints by step, in order, each with what was saved beside the tensors."""
    folder = training_folder(run)
    if folder is None or not folder.folders(CHECKPOINTS):
        return {}
    from llama.training.checkpoint import Checkpointer  # which takes torch with it

    return Checkpointer(folder.child(CHECKPOINTS), Artifact).committed()
