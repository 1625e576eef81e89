"""The pretrain stage without a cluster: its key, and what it sends. The rest is in test_incarnations and test_job."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.config import ModelConfig
from llama.hf import save_pretrained
from llama.lora import LoraConfig
from llama.model import Transformer
from llama.training.config import OptimizerConfig, ParallelConfig
from llama.training.metrics import TrainSummary
from pipelines import incarnations, pretrain
from pipelines.finetune import StartError, find_start
from pipelines.graph import Graph
from pipelines.loader import ShardData
from pipelines.recipe import TrainRecipe
from pipelines.stage import Stage, StageContext
from pipelines.training_worker import Outcome, WorkerTask

MODEL = ModelConfig(dim=32, num_layers=1, num_heads=2)
TRAIN = TrainRecipe(workers=4, parallel=ParallelConfig(ep=2), gpus_per_worker=1, accelerator_type="H200")


def test_the_key_is_of_what_is_trained_not_of_where() -> None:
    def key(train: TrainRecipe) -> str:
        graph = Graph([Stage("shards", 1, {}, lambda context: {}), pretrain.pretrain_stage(MODEL, train)])
        return graph.keys["pretrain"]

    base = key(TRAIN)
    moved = replace(
        TRAIN,
        workers=(1, 2),
        hang_seconds=9,
        cpus_per_worker=3,
        micro_batch=4,
        parallel=ParallelConfig(),
        max_failures=9,
    )
    moved = replace(moved, activation_checkpointing="full", compile=True)
    assert key(replace(moved, cache_bytes=10**9)) == base
    seen = {"validate_every": 5, "validate_rows": 8, "keep_last": 3, "keep_best": 1, "keep_every": 100, "log_every": 1}
    assert key(replace(TRAIN, **seen)) == base
    assert key(replace(TRAIN, shuffle_shards=4)) != base
    for change in ({"steps": 7}, {"seed": 1}, {"precision": "bf16"}, {"optimizer": OptimizerConfig(lr=1e-4)}):
        assert key(replace(TRAIN, **change)) != base


def test_settings_reach_the_workers_and_the_summary_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[WorkerTask] = []
    summary = TrainSummary(
        step=200,
        finished=True,
        resumed_step=0,
        loss=1.5,
        tokens=10,
        tokens_per_second=1.0,
        val_loss=1.75,
        seconds=10.0,
        validation_seconds=0.5,
        checkpoint_seconds=0.0,
        all_to_all_bytes=0,
        skipped_steps=0,
    )

    def train(train, sizes, task, records, emit):  # type: ignore[no-untyped-def]
        sent.append(task("first", frozenset({"node"})))
        return Outcome(summary, ())

    monkeypatch.setattr(incarnations, "train_in_incarnations", train)
    monkeypatch.setattr(pretrain, "followed", lambda *_: nullcontext())
    store = Store(tmp_path)
    artifact = Artifact(store)
    attempt = artifact.begin()
    context = StageContext("pretrain", "", {"shards": artifact}, store, store, [], attempt, lambda event: None)
    metadata = pretrain._pretrain(MODEL, replace(TRAIN, shuffle_shards=3, cache_bytes=10**9), None, context)
    assert sent[0].data == ShardData(artifact, 3, 10**9)
    assert sent[0].known_nodes == {"node"} and sent[0].sizes.largest == 4
    assert attempt.store.read_json(pretrain.SUMMARY)["loss"] == metadata["loss"] == 1.5
    assert metadata["checkpoint"] == "checkpoints/step-00000200"


@pytest.mark.parametrize(("lora", "step", "refused"), [(LoraConfig(), 9, True), (None, 0, True), (None, 9, False)])
def test_an_incarnation_that_reads_its_start_refuses_one_that_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lora: LoraConfig | None, step: int, refused: bool
) -> None:
    def save(seed: int) -> None:
        model = Transformer(MODEL)
        model.init_weights(seed)
        save_pretrained(model, tmp_path / "base")

    def train(train, sizes, task, records, emit):  # type: ignore[no-untyped-def]
        task("first", frozenset())
        (tmp_path / "base" / "model.safetensors").unlink()
        save(seed=1)
        task("second", frozenset())
        raise InterruptedError

    save(seed=0)
    monkeypatch.setattr(incarnations, "train_in_incarnations", train)
    monkeypatch.setattr(pretrain, "followed", lambda *_: nullcontext())
    monkeypatch.setattr(pretrain._StoreRecords, "latest_step", lambda self: step)
    start, store = find_start(str(tmp_path / "base")), Store(tmp_path / "out")
    artifact = Artifact(store)
    context = StageContext("pretrain", "", {"shards": artifact}, store, store, [], artifact.begin(), lambda event: None)
    settings = replace(TRAIN, start_from=start.uri, lora=lora)
    with pytest.raises(StartError if refused else InterruptedError, match="has changed since" if refused else None):
        pretrain._pretrain(MODEL, settings, start, context)
