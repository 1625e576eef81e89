"""The trainer with an encoder–decoder: against a plain loop in one process, over two ranks, and resumed."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from cluster.artifact import Artifact
from cluster.storage import Store
from llama import Seq2Seq, Seq2SeqConfig
from llama.losses import IGNORE_INDEX
from llama.training.batch import Batch
from llama.training.checkpoint import Checkpointer, load_model_weights
from llama.training.config import OptimizerConfig, TrainConfig
from llama.training.control import Request
from llama.training.mesh import process_group
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, Samples, difference, train_config, whole

CONFIG = Seq2SeqConfig(
    vocab_size=17, dim=32, num_layers=2, encoder_layers=1, num_heads=4, hidden_dim=48, max_seq_len=8, position="t5"
)
SOURCE, TARGET = 7, 6


def batch(first: int, count: int) -> Batch:
    """Samples of the numbers `first` onwards, of which some have shorter sources and targets."""
    rows = [torch.Generator().manual_seed(number) for number in range(first, first + count)]
    source = torch.stack([torch.randint(17, (SOURCE,), generator=row) for row in rows])
    target = torch.stack([torch.randint(17, (TARGET + 1,), generator=row) for row in rows])
    numbers = torch.arange(first, first + count)
    lengths, labelled = 1 + numbers % SOURCE, 2 + numbers % (TARGET - 1)
    labels = target[:, 1:].masked_fill(torch.arange(TARGET) >= labelled[:, None], IGNORE_INDEX)
    return Batch(target[:, :-1], labels, lengths=labelled, source=source, source_lengths=lengths)


class Pairs(Samples):
    def __iter__(self) -> Iterator[Batch]:
        size = self.config.micro_batch
        while True:
            first = self.consumed + self.rank * size
            self.consumed += size * self.world_size
            yield batch(first, size)


def settings(**changes: Any) -> TrainConfig:
    return train_config(seq_len=TARGET, **changes)


def train(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    seen: list[Any] = []
    trainer = Trainer(CONFIG, config, Pairs(config, 17, rank, world_size), on_metrics=seen.append)
    trainer.fit()
    return {
        "history": [(metrics.loss, metrics.grad_norm) for metrics in seen],
        "tokens": seen[-1].tokens,
        "end": {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()},
    }


def by_hand(config: TrainConfig) -> dict[str, Any]:
    model = Seq2Seq(CONFIG)
    model.init_weights(config.seed)
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if p.ndim < 2 or "embeddings" in name or "bias" in name]
    decayed = [p for p in named.values() if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.optimizer.eps, foreach=False)
    history, tokens = [], 0
    for step, share in enumerate((0.5, 1.0, 0.1)):
        drawn = batch(step * config.global_batch, config.global_batch)
        logits = model(drawn.source, drawn.inputs, source_lengths=drawn.source_lengths)
        loss = cross_entropy(logits.flatten(0, 1), drawn.labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip).item()
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * share
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm))
        tokens += int((drawn.labels != IGNORE_INDEX).sum())
    return {"history": history, "tokens": tokens, "end": model.state_dict()}


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["tokens"] == expected["tokens"]
    for got, wanted in zip(result["history"], expected["history"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert result["end"].keys() == expected["end"].keys()
    off = {name: difference(result["end"][name], value) for name, value in expected["end"].items()}
    assert max(off.values()) < 1e-5, off


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_equals_a_plain_loop(recomputed: str) -> None:
    config = settings(activation_checkpointing=recomputed)
    assert_same(train(0, 1, config), by_hand(config))


@pytest.mark.integration
def test_two_ranks_are_one() -> None:
    config = settings()
    expected = by_hand(config)
    for result in run_ranks(train, 2, config):
        assert_same(result, expected)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, kind: str) -> None:
    config = settings(steps=6, checkpoint_every=2, optimizer=OptimizerConfig(kind=kind, lr=3e-3))

    def run(folder: str, stop_after: int | None = None) -> list[tuple[int, float, float]]:
        seen: list[tuple[int, float, float]] = []

        def control() -> Request:
            return Request.STOP_NOW if stop_after == len(seen) + 1 else Request.GO_ON

        with process_group():
            Trainer(
                CONFIG,
                config,
                Pairs(config, 17),
                Checkpointer(Store(tmp_path / folder), Artifact),
                on_metrics=lambda metrics: seen.append((metrics.step, metrics.loss, metrics.grad_norm)),
                control=control,
            ).fit()
        return seen

    whole_run = run("whole")
    first = run("stopped", stop_after=3)
    assert len(first) == 3 and first + run("stopped") == whole_run
    model = Seq2Seq(CONFIG)
    progress = load_model_weights(Artifact(Store(tmp_path / "stopped" / "step-00000006")), model)
    assert progress["model"] == asdict(CONFIG)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_batches_of_the_other_kind_are_refused() -> None:
    config = settings()
    with pytest.raises(ValueError, match="batches have sources where the model is no encoder–decoder, or none"):
        Trainer(CONFIG, config, Samples(config, 17)).fit()
    with pytest.raises(ValueError, match="batches have sources where"):
        Trainer(DENSE, config, Pairs(config, 17)).fit()
