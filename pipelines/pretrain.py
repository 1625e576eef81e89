"""The pretrain stage: Ray Train around `llama.training`.

    {artifact}/checkpoints/step-00000100/        checkpoints, each an artifact (llama/training/checkpoint.py)
    {artifact}/incarnations/{name}.json          one per start of the workers: resumed step, ranks, nodes
    {artifact}/metrics/{name}-{step}.parquet     the training curve in parts (pipelines/metrics.py)
    {artifact}/hangs/{name}/rank-00000.txt       the stacks of an incarnation that hung (llama/training/watchdog.py)
    {artifact}/attempts/{attempt}/summary.json   the finished run

The driver trains in incarnations (pipelines/incarnations.py); a worker of one is pipelines/training_worker.py.
Checkpoints belong to the artifact's key, not to a run: whoever trains the same thing next, after a killed driver for
instance, goes on from them.

The key leaves out how the work is laid out over ranks (workers, parallelism, micro-batches), what is computed twice or
compiled, and when it is reported or saved, so that a run may be resumed on a smaller cluster. The layout changes
results by rounding, through the micro-step over which the balance loss takes its averages, and through what counts by
rank and micro-batch: the draws of dropout, and a capacity limit.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster import placement
from cluster.artifact import Artifact
from cluster.storage import JSON, StorageError
from llama.config import ModelConfig
from llama.retry import retried
from llama.seq2seq_config import Seq2SeqConfig
from llama.training.config import TrainConfig
from pipelines.finetune import Start, find_start
from pipelines.follow import followed
from pipelines.recipe import TrainRecipe
from pipelines.stage import Stage, StageContext
from pipelines.training_folder import CHECKPOINTS, HANGS, INCARNATIONS, METRICS

if TYPE_CHECKING:
    from pipelines.training_worker import TrainingData, WorkerTask

SUMMARY = "summary.json"

_LAYOUT = {
    "micro_batch",
    "parallel",
    "activation_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "keep_every",
    "validate_every",
    "validate_rows",
    "log_every",
    "hang_seconds",
}
"""Settings of TrainConfig that do not belong to what is trained."""

_log = logging.getLogger(__name__)


def pretrain_stage(model: ModelConfig, train: TrainRecipe, start: Start | None = None) -> Stage:
    """The stage `pretrain`, downstream of `shards`: from nothing, or fine-tuning from `start`. That of an
    encoder–decoder is downstream of `pairs`."""
    settings = {item.name: getattr(train, item.name) for item in fields(TrainConfig) if item.name not in _LAYOUT}
    settings["shuffle_shards"] = train.shuffle_shards  # the order of the samples
    settings["start_from"] = start.fingerprint if start is not None else None
    run = partial(_pretrain, model, train, start)
    return Stage("pretrain", 1, {"model": model, "train": settings}, run, (_upstream(model),))


def _upstream(model: ModelConfig) -> str:
    return "pairs" if isinstance(model, Seq2SeqConfig) else "shards"


def _data(model: ModelConfig, train: TrainRecipe, context: StageContext) -> TrainingData:
    from pipelines.loader import ShardData
    from pipelines.pair_loader import PairData

    artifact = context.inputs[_upstream(model)]
    if isinstance(model, Seq2SeqConfig):
        return PairData(artifact)
    return ShardData(artifact, train.shuffle_shards, train.cache_bytes)


def check_room(model: ModelConfig, train: TrainRecipe) -> None:
    """Raises PlacementError if the nodes of this process's cluster hold no plan, and none are to be waited for; it
    names the nearest that fits. For whoever would prepare data first."""
    if train.wait_for_nodes == 0:
        placement.largest_plan(placement.alive_nodes(), train.world_sizes(model), train.worker_needs)


def _pretrain(model: ModelConfig, train: TrainRecipe, start: Start | None, context: StageContext) -> dict[str, JSON]:
    # Ray Train takes seconds to import, and whoever only asks what a recipe means does not need it
    from pipelines.incarnations import train_in_incarnations
    from pipelines.training_worker import WorkerTask

    sizes = train.world_sizes(model)
    settings = TrainConfig(**{item.name: getattr(train, item.name) for item in fields(TrainConfig)})

    records = _StoreRecords(context, train)

    def task(incarnation: str, known_nodes: frozenset[str]) -> WorkerTask:
        if start is not None and (train.lora is not None or records.latest_step() == 0):
            # Its files may have been replaced since the key was made of them, or since the last incarnation.
            start.require(retried(partial(find_start, start.uri), "looking at what training starts from").fingerprint)
        return WorkerTask(
            model=model,
            train=settings,
            threads=max(1, int(train.cpus_per_worker)),
            data=_data(model, train, context),
            start=start,
            output=context.artifact_store,
            incarnation=incarnation,
            run=context.run_id,
            stage=context.stage,
            sizes=sizes,
            needs=train.worker_needs,
            known_nodes=known_nodes,
        )

    store = context.artifact_store
    with followed(context, store.child(METRICS), store.child(INCARNATIONS)):
        outcome = train_in_incarnations(train, sizes, task, records, context.emit)
    summary: dict[str, Any] = asdict(outcome.summary)
    assert context.attempt is not None
    retried(partial(context.attempt.store.write_json, SUMMARY, summary), "writing the summary")
    return {
        **summary,
        "checkpoint": f"{CHECKPOINTS}/step-{train.steps:08d}",
        "start_from": train.start_from,
        "start_fingerprint": start.fingerprint if start is not None else None,
        "lora": asdict(train.lora) if train.lora is not None else None,
        "parameters": model.num_parameters(),
        "active_parameters": model.num_active_parameters(),
    }


class _StoreRecords:
    """What the artifact's folder tells of the training."""

    def __init__(self, context: StageContext, train: TrainRecipe) -> None:
        self._store = context.artifact_store
        self._hang_seconds = train.hang_seconds

    def latest_step(self) -> int:
        from llama.training.checkpoint import Checkpointer

        checkpoints = self._store.child(CHECKPOINTS)
        return retried(lambda: Checkpointer(checkpoints, Artifact).latest(), "looking for checkpoints") or 0

    def hang(self, incarnation: str) -> str | None:
        folder = self._store.child(HANGS, incarnation)
        try:
            found = (re.fullmatch(r"rank-(\d+)\.txt", path) for path in folder.list())
            ranks = [str(int(rank[1])) for rank in found if rank is not None]
        except StorageError as error:
            _log.warning("whether the training hung could not be found out: %s", error)
            return None
        if not ranks:
            return None
        where = f"the stacks of rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} lie in {folder.uri}"
        return f"training hung: no step ended for train.hang_seconds={self._hang_seconds:g}; {where}"
