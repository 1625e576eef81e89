"""One step of the trainer: what counts in its loss, what dropout draws, which gradients are not applied."""

import math
from dataclasses import replace
from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from cluster.artifact import Artifact
from cluster.storage import Store
from llama import model as model_module
from llama.lora import LoraConfig
from llama.losses import IGNORE_INDEX
from llama.model import Transformer
from llama.norm import BatchNorm
from llama.training.batch import Batch, loss_sum
from llama.training.checkpoint import Checkpointer
from llama.training.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from llama.training.optim import build_optimizer
from llama.training.schedule import learning_rate
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, MOE, Samples, difference, samples, train_config, whole


def dropped_out(rank, world_size):
    """Losses of the same run twice, and of this rank's first sequence under the masks of step 0."""
    config = train_config(micro_batch=4, steps=2)
    model = replace(DENSE, residual_dropout=0.5, attention_dropout=0.2)
    runs = []
    for _ in range(2):
        seen = []
        Trainer(model, config, Samples(config, 61, rank, world_size), on_metrics=seen.append).fit()
        runs.append([metrics.loss for metrics in seen])
    return runs, torch.initial_seed()


@pytest.mark.integration
def test_dropout_is_reproducible_and_another_on_every_rank():
    (runs, seed), (_, other_seed) = run_ranks(dropped_out, 2)
    assert runs[0] == runs[1]
    assert seed != other_seed


def reduced_late(rank, world_size, parallel):
    """Weights after two steps of two micro-steps, and how many all-reduces it took: by whether gradients are whole."""
    config = train_config(micro_batch=1, steps=2, parallel=parallel)
    runs, all_reduce = [], dist.all_reduce
    for whole_gradients in (True, False):
        calls = []
        trainer = Trainer(MOE, config, Samples(config, 61, rank, world_size))
        allocate = trainer._allocate

        def allocate_for_a_gpu(trainer=trainer, allocate=allocate, whole_gradients=whole_gradients):
            allocate()
            assert trainer._step.whole_gradients
            trainer._step.whole_gradients = whole_gradients

        trainer._allocate = allocate_for_a_gpu
        dist.all_reduce = lambda *args, calls=calls, **kwargs: calls.append(1) or all_reduce(*args, **kwargs)
        trainer.fit()
        dist.all_reduce = all_reduce
        runs.append(({name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}, len(calls)))
    return runs


@pytest.mark.integration
@pytest.mark.parametrize("ep", [1, 2])
def test_with_shards_of_gradients_only_the_sum_over_replicas_waits_for_the_last_micro_step(ep):
    for (kept, calls), (reduced, calls_too) in run_ranks(reduced_late, 4, ParallelConfig(2, 2, ep)):
        assert calls == calls_too > 0
        assert all(difference(reduced[name], weight) <= 1e-5 for name, weight in kept.items())


def test_padding_behind_a_sequence_changes_nothing():
    config = train_config(micro_batch=8, steps=1)

    seen = []

    class Padded(Samples):
        def __iter__(self):
            for batch in super().__iter__():
                labels = batch.labels.clone()
                labels[:, 9:] = IGNORE_INDEX
                yield replace(batch, labels=labels)

    short = samples(0, 8, config, 61)[:, :10]
    model = Transformer(DENSE)
    model.init_weights(config.seed)
    logits = model(short[:, :-1])
    expected = cross_entropy(logits.flatten(0, 1), short[:, 1:].flatten()).item()
    Trainer(DENSE, config, Padded(config, 61), on_metrics=seen.append).fit()
    assert seen[0].loss == pytest.approx(expected, rel=1e-5)


class Given:
    """A loader of these batches, over and over."""

    epoch = None

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return cycle(self.batches)

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


@pytest.mark.parametrize("model_config", [DENSE, MOE])
def test_a_micro_batch_or_a_step_without_targets_adds_no_loss(model_config):
    """One of two micro-batches is all masked, then both are."""
    config = train_config(micro_batch=4, steps=1)
    tokens = samples(0, 8, config, 61)
    some, none = (Batch(part[:, :-1], part[:, 1:].clone()) for part in tokens.split(4))
    none.labels.fill_(IGNORE_INDEX)
    seen = []
    summary = Trainer(model_config, config, Given(some, none), on_metrics=seen.append).fit()
    model = Transformer(model_config)
    model.init_weights(config.seed)
    assert seen[0].loss == pytest.approx(loss_sum(model, some).item() / some.labels.numel(), rel=1e-5)
    assert summary.skipped_steps == 0 and math.isfinite(seen[0].grad_norm) and seen[0].grad_norm > 0
    Trainer(model_config, config, Given(none), on_metrics=seen.append).fit()
    assert (seen[1].loss, seen[1].skipped_steps) == (0.0, 0) and math.isfinite(seen[1].grad_norm)


@pytest.mark.parametrize("model_config", [DENSE, replace(MOE, moe=replace(MOE.moe, balance_loss_weight=0.0))])
def test_packed_documents_are_trained_on_as_if_each_were_alone(model_config):
    config = train_config(micro_batch=8, steps=1)
    tokens = samples(0, 8, config, 61)
    documents = (torch.arange(16) >= torch.arange(1, 9)[:, None]).long()
    labels = tokens[:, 1:].clone()
    labels[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
    batch, seen = Batch(tokens[:, :-1], labels, documents), []
    Trainer(model_config, config, Given(batch), on_metrics=seen.append).fit()
    model = Transformer(model_config)
    model.init_weights(config.seed)
    alone = [
        Batch(inputs[None, document == each], targets[None, document == each])
        for inputs, targets, document in zip(batch.inputs, labels, documents, strict=True)
        for each in (0, 1)
    ]
    expected = sum(loss_sum(model, each) for each in alone) / batch.num_targets()
    assert seen[0].loss == pytest.approx(expected.item(), rel=1e-5)
    if model_config.moe is None:
        expected.backward()
        norm = math.sqrt(sum(parameter.grad.double().square().sum() for parameter in model.parameters()))
        assert seen[0].grad_norm == pytest.approx(norm, rel=1e-4)


BATCH_NORM = replace(DENSE, norm="batchnorm")


@pytest.mark.parametrize("model_config", [MOE, BATCH_NORM], ids=["experts", "batchnorm"])
def test_a_non_finite_gradient_skips_the_step_and_is_counted(monkeypatch, model_config):
    config, seen, weights, calls = train_config(micro_batch=8), [], [], 0

    def keep(metrics):
        seen.append(metrics)
        weights.append({name: whole(tensor) for name, tensor in trainer.model.state_dict().items()})

    trainer = Trainer(model_config, config, Samples(config, model_config.vocab_size), on_metrics=keep)
    original = model_module.linear_cross_entropy_sum

    def poisoned(hidden, weight, labels):
        nonlocal calls
        calls += 1
        total = original(hidden, weight, labels)
        return total * math.inf if calls == 2 else total

    monkeypatch.setattr(model_module, "linear_cross_entropy_sum", poisoned)
    summary = trainer.fit()
    assert not dist.is_initialized()
    assert [metrics.skipped_steps for metrics in seen] == [0, 1, 1]
    assert (summary.skipped_steps, summary.step) == (1, 3)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    assert math.isfinite(seen[2].loss) and summary.loss == seen[2].loss


def test_an_outlying_gradient_skips_the_step_and_is_counted(monkeypatch):
    config = train_config(
        steps=9,
        micro_batch=8,
        optimizer=OptimizerConfig(skip_sigma=3.0, skip_window=6),
        schedule=ScheduleConfig("constant", warmup_steps=0),
    )
    seen, calls = [], 0
    original = model_module.linear_cross_entropy_sum

    def spiked(hidden, weight, labels):
        nonlocal calls
        calls += 1
        return original(hidden, weight, labels) * (100 if calls == 7 else 1)

    monkeypatch.setattr(model_module, "linear_cross_entropy_sum", spiked)
    trainer = Trainer(DENSE, config, Samples(config, DENSE.vocab_size), on_metrics=seen.append)
    trainer.fit()
    assert [metrics.skipped_steps for metrics in seen] == [0] * 6 + [1] * 3
    applied = [metrics.grad_norm for metrics in seen[:6] + seen[7:]]
    assert trainer._step.guard.state() == {"norms": applied[-6:], "outliers": 0}


def running(rank, world_size, folder):
    """Four steps with and without recomputation, and two of them again from a checkpoint: the state at the end."""
    ends = []
    for kind in ("none", "full", "selective", "resumed"):
        config = train_config(
            steps=4, checkpoint_every=2, activation_checkpointing="none" if kind == "resumed" else kind
        )
        checkpointer = None
        if kind in ("none", "resumed"):
            checkpointer = Checkpointer(Store(folder), Artifact)
        if kind == "resumed":
            checkpointer.discard(4, Exception("for the test"))
        trainer = Trainer(BATCH_NORM, config, Samples(config, 61, rank, world_size), checkpointer)
        assert trainer.fit().resumed_step == (2 if kind == "resumed" else 0)
        ends.append({name: whole(tensor) for name, tensor in trainer.model.state_dict().items()})
    return ends


@pytest.mark.integration
def test_running_statistics_are_of_all_micro_batches_of_all_ranks_once_a_step(tmp_path):
    """Of four micro-batches a step, on two ranks, against a loop over them that takes each norm's input."""
    config = train_config(steps=4)
    model = Transformer(BATCH_NORM)
    model.init_weights(config.seed)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    inputs = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().double()))
    optimizer = build_optimizer(model, config.optimizer)
    mean = {name: torch.zeros(32, dtype=torch.float64) for name in norms}
    variance = {name: torch.ones(32, dtype=torch.float64) for name in norms}
    for step in range(config.steps):
        for part in samples(8 * step, 8, config, 61).split(config.micro_batch):
            loss = loss_sum(model, Batch(part[:, :-1], part[:, 1:])) / (8 * config.seq_len)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        assert norm > config.optimizer.grad_clip
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        for name, seen in inputs.items():
            rows = [x.flatten(0, 1) for x in seen]
            mean[name] = 0.9 * mean[name] + 0.1 * sum(x.mean(0) for x in rows) / 4
            variance[name] = 0.9 * variance[name] + 0.1 * sum(x.var(0) for x in rows) / 4
            assert len(rows) == 4
            seen.clear()
    for plain, *others in run_ranks(running, 2, str(tmp_path)):
        for name in norms:
            assert difference(plain[f"{name}.running_mean"].double(), mean[name]) < 1e-4
            assert difference(plain[f"{name}.running_var"].double(), variance[name]) < 1e-4
        for other in others:
            assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_below_adapters_batch_norms_are_frozen():
    config = train_config(micro_batch=8, lora=LoraConfig(rank=2))
    trainer = Trainer(BATCH_NORM, config, Samples(config, 61))
    trainer.fit()
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, torch.full_like(buffer, name.endswith("running_var")))
