"""What a training starts from, and what it leaves as it is: adapters on ranks, checkpoints and directories as start."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.hf import load_weights, save_pretrained
from llama.lora import LoraConfig, apply_lora, init_adapters
from llama.model import Transformer
from llama.training.checkpoint import Checkpointer, load_model_weights
from llama.training.config import ParallelConfig
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, MOE, Samples, difference, samples, train_config, whole

pytestmark = pytest.mark.integration

PLAIN_MOE = replace(MOE, moe=replace(MOE.moe, balance_loss_weight=0.0, z_loss_weight=0.0))
# On two ranks a matrix of one row leaves a rank without any.
LORA = LoraConfig(rank=1, alpha=4, targets=("wq", "wv", "w1", "w2"))
CASES = {
    "dense, accumulated and recomputed": (
        DENSE,
        train_config(lora=LORA, micro_batch=2, activation_checkpointing="full"),
    ),
    "experts over ep": (PLAIN_MOE, train_config(lora=LORA, micro_batch=4, parallel=ParallelConfig(ep=2))),
    "experts, sharded like all else": (PLAIN_MOE, train_config(lora=replace(LORA, rank=3), micro_batch=2)),
}


ROUGH = train_config(lora=replace(LORA, dropout=0.5), micro_batch=2, precision="bf16", parallel=ParallelConfig(ep=2))


def train(rank, world_size):
    results = {}
    for name, (model_config, config) in CASES.items():
        seen, gradients = [], {}
        loader = Samples(config, model_config.vocab_size, rank, world_size)
        trainer = Trainer(model_config, config, loader, on_metrics=seen.append)

        def keep(*_, trainer=trainer, seen=seen, gradients=gradients):
            for parameter_name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{parameter_name}, step {len(seen)}"] = whole(parameter.grad)

        hook = register_optimizer_step_pre_hook(keep)
        trainer.fit()
        hook.remove()
        end = {key: whole(tensor) for key, tensor in trainer.model.state_dict().items()}
        results[name] = gradients, end, [(metrics.loss, metrics.grad_norm) for metrics in seen]
    runs = []
    for config in (
        ROUGH,
        replace(ROUGH, activation_checkpointing="full"),
        replace(ROUGH, lora=replace(LORA, dropout=0.0)),
    ):
        seen = []
        Trainer(PLAIN_MOE, config, Samples(config, 61, rank, world_size), on_metrics=seen.append).fit()
        runs.append([metrics.loss for metrics in seen])
    return results | {"bf16 with dropout": runs}


def reference(model_config, config):
    """The same in one process with plain adapters, torch's unfused AdamW and a norm over all adapters."""
    model = Transformer(model_config)
    model.init_weights(config.seed)
    apply_lora(model, config.lora)
    init_adapters(model, config.seed)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, foreach=False)
    gradients, history = {}, []
    for step, share in enumerate((0.5, 1.0, config.schedule.min_lr_ratio)):
        tokens = samples(step * config.global_batch, config.global_batch, config, model_config.vocab_size)
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in named.values()))
        for name, parameter in named.items():
            parameter.grad *= min(1.0, config.optimizer.grad_clip / norm)
            gradients[f"{name}, step {step}"] = parameter.grad.clone()
        optimizer.param_groups[0]["lr"] = config.optimizer.lr * share
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm))
    return gradients, {name: whole(tensor) for name, tensor in model.state_dict().items()}, history


def test_adapters_on_ranks_learn_what_they_learn_in_one_process():
    for results in run_ranks(train, 2):
        for name, (model_config, config) in CASES.items():
            (gradients, end, history), expected = results[name], reference(model_config, config)
            for ours, theirs in ((gradients, expected[0]), (end, expected[1])):
                assert ours.keys() == theirs.keys()
                off = {key: difference(ours[key], value) for key, value in theirs.items()}
                assert max(off.values()) <= 1e-5, (name, {key: value for key, value in off.items() if value > 1e-5})
            for (loss, norm), (expected_loss, expected_norm) in zip(history, expected[2], strict=True):
                assert loss == pytest.approx(expected_loss, rel=1e-6)
                assert norm == pytest.approx(expected_norm, rel=1e-5)
        dropped, recomputed, kept = results["bf16 with dropout"]
        exact = [loss for loss, _ in reference(PLAIN_MOE, replace(ROUGH, lora=LORA))[2]]
        assert dropped == recomputed != kept
        assert kept == pytest.approx(exact, rel=5e-3)


BASE = train_config(steps=2, checkpoint_every=2, parallel=ParallelConfig(ep=2))


def pretrain(rank, world_size, folder):
    """Two steps under (dp_shard=2, ep=2), to start from."""
    trainer = Trainer(MOE, BASE, Samples(BASE, 61, rank, world_size), Checkpointer(Store(folder), Artifact))
    trainer.fit()
    return {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}


def finetune(rank, world_size, folder, base, config, directory):
    """From the checkpoint or the directory at `base`; returns the weights at its step 0, at its end, and the steps."""
    calls, started, resumed = [], [], []

    def start(model):
        calls.append(1)
        if directory:
            load_weights(base, model)
        else:
            load_model_weights(Artifact(Store(base)), model, below_adapters=True)

    def on_resume(step):
        resumed.append(step)
        started.append({name: whole(tensor) for name, tensor in trainer.model.state_dict().items()})

    checkpointer = Checkpointer(Store(folder), Artifact)
    loader = Samples(config, 61, rank, world_size)
    trainer = Trainer(MOE, config, loader, checkpointer, start=start, on_resume=on_resume)
    summary = trainer.fit()
    end = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    return {"start": started[0], "end": end, "resumed": resumed[0], "calls": len(calls), "step": summary.step}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint written by two ranks, what it holds, and the same model as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    weights = run_ranks(pretrain, 2, str(folder))[0]
    model = Transformer(MOE)
    load_model_weights(Artifact(Store(folder / "step-00000002")), model)
    save_pretrained(model, folder / "hf")
    return folder, weights


def equal(state, expected):
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("place", "lora", "parallel"),
    [("step-00000002", None, ParallelConfig(dp_replicate=2)), ("hf", LORA, ParallelConfig(ep=2))],
    ids=["a checkpoint, all weights, replicas", "a directory, adapters, split experts"],
)
def test_starts_from_weights_in_any_layout_and_resumes_from_its_own(base, tmp_path, place, lora, parallel):
    folder, weights = base
    config = train_config(steps=4, checkpoint_every=2, lora=lora, parallel=parallel)
    arguments = str(tmp_path), str(folder / place), config, place == "hf"
    first = run_ranks(finetune, 2, *arguments)[0]
    assert (first["resumed"], first["calls"], first["step"]) == (0, 1, 4)
    assert equal(first["start"], weights)
    assert equal(first["end"], weights) == (lora is not None)
    Artifact(Store(tmp_path / "step-00000004")).delete()
    again = run_ranks(finetune, 2, *arguments)[0]
    # Of a run that trains everything nothing is read but its own checkpoint.
    assert (again["resumed"], again["calls"], again["step"]) == (2, int(lora is not None), 4)
    assert equal(again["end"], first["end"])
    if lora is None:
        return
    artifact = Artifact(Store(tmp_path / "step-00000004"))
    assert artifact.manifest().metadata["model"]["dim"] == MOE.dim
    assert sum(size for path, size in artifact.files.sizes().items() if path.endswith(".bin")) < 60_000
    model = apply_lora(Transformer(MOE), LORA)
    load_weights(folder / "hf", model)
    load_model_weights(artifact, model)
    assert equal(model.state_dict(), first["end"])
    with pytest.raises(ValueError, match="the checkpoint has no tensor model.tok_embeddings.weight"):
        load_model_weights(artifact, Transformer(MOE))


def test_a_directory_of_another_shape_is_refused(base):
    folder, _ = base
    with pytest.raises(ValueError, match="holds a model of other shapes"):
        load_weights(folder / "hf", Transformer(DENSE))
