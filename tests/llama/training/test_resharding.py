"""A run saved under (1, 2, 2) goes on under other layouts: its state to the bit, its curve to rounding."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.training.checkpoint import Checkpointer, training_tensors
from llama.training.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from llama.training.tensor_files import read_index, read_tensors
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import MOE, Samples, difference, train_config, whole

pytestmark = pytest.mark.integration

KINDS = ("adamw", "muon")
SAVED_AT, STEPS = 4, 10
HOME = ParallelConfig(1, 2, 2)
# One expert's rows do not divide over two ranks, and neither do the rows of any matrix over four.
MODEL = replace(MOE, dim=36, num_heads=6, num_layers=2)


def config_of(kind, parallel, world_size, **settings):
    """A micro-step is the global batch, whatever the layout: the balance loss takes its averages over it."""
    return train_config(
        **{
            "steps": STEPS,
            "micro_batch": 8 // world_size,
            "parallel": parallel,
            "optimizer": OptimizerConfig(kind=kind, lr=3e-3, eps=1e-5, grad_clip=0.5, skip_sigma=3.0, skip_window=4),
            "schedule": ScheduleConfig("wsd", warmup_steps=2, decay_ratio=0.3),
            "checkpoint_every": SAVED_AT,
            "keep_last": 3,
        }
        | settings
    )


class Recording(Samples):
    """Remembers the numbers of the samples that were asked for."""

    def __iter__(self):
        self.first = self.consumed
        return super().__iter__()


def state(trainer):
    return {name: whole(tensor) for name, tensor in training_tensors(trainer.model, trainer.optimizer).items()}


def train(rank, world_size, folder, runs):
    """Each run: (name of its folder, config). The state as it was found, the curve, the state at the end, the log."""
    return [train_one(rank, world_size, f"{folder}/{name}", config) for name, config in runs]


def train_one(rank, world_size, folder, config):
    loader, seen, found, messages = Recording(config, MODEL.vocab_size, rank, world_size), [], {}, []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("llama.training")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)

    def on_resume(step):
        found.update(state(trainer), step=step)

    checkpointer = Checkpointer(Store(folder), Artifact, keep_last=3)
    trainer = Trainer(MODEL, config, loader, checkpointer, on_metrics=seen.append, on_resume=on_resume)
    summary = trainer.fit()
    logger.removeHandler(handler)
    return {
        "found": found,
        "curve": {metrics.step: (metrics.loss, metrics.grad_norm) for metrics in seen},
        "end": state(trainer),
        "resumed_step": summary.resumed_step,
        "samples": (loader.first, loader.consumed),
        "log": messages,
    }


LAYOUTS = {2: [HOME], 4: [ParallelConfig(1, 4, 2), ParallelConfig(2, 2, 1)], 1: [ParallelConfig(1, 1, 1)]}
CASES = [(kind, world_size, parallel) for kind in KINDS for world_size in LAYOUTS for parallel in LAYOUTS[world_size]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All ten steps under (1, 2, 2), then from the fourth on under every layout."""
    folder = tmp_path_factory.mktemp("runs")
    # Saves at 4, 8 and 10; the later ones are removed, as if the run had been killed before.
    home = run_ranks(train, 2, str(folder), [(kind, config_of(kind, HOME, 2)) for kind in KINDS])
    for kind in KINDS:
        for step in (8, STEPS):
            Artifact(Store(folder / kind / f"step-{step:08d}")).delete()
    resumed = {}
    for world_size, layouts in LAYOUTS.items():
        cases = [(kind, parallel) for kind in KINDS for parallel in layouts]
        # Nothing is saved before the end, and that goes to a copy: every layout finds the same checkpoint.
        named = []
        for number, (kind, parallel) in enumerate(cases):
            name = f"{kind}-{world_size}-{number}"
            shutil.copytree(folder / kind, folder / name)
            named.append((name, config_of(kind, parallel, world_size, checkpoint_every=0)))
        for rank, results in enumerate(run_ranks(train, world_size, str(folder), named)):
            for case, result in zip(cases, results, strict=True):
                resumed[case[0], world_size, case[1], rank] = result
    return folder, home, resumed


def ranks_of(runs, kind, world_size, parallel):
    return [runs[2][kind, world_size, parallel, rank] for rank in range(world_size)]


@pytest.mark.parametrize(("kind", "world_size", "parallel"), CASES)
def test_weights_and_optimizer_are_found_bit_equal(runs, kind, world_size, parallel):
    saved = {name: torch.empty_like(tensor) for name, tensor in runs[1][0][KINDS.index(kind)]["end"].items()}
    artifact = Artifact(Store(runs[0] / kind / f"step-{SAVED_AT:08d}"))
    read_tensors(artifact.files, read_index(artifact.files, artifact.manifest()), saved)
    assert {name.rsplit(".", 1)[1] for name in saved if name.startswith("optimizer.")} == (
        {"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if kind == "muon" else set())
    )
    for result in ranks_of(runs, kind, world_size, parallel):
        found = result["found"]
        assert found.pop("step") == SAVED_AT
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(("kind", "world_size", "parallel"), CASES)
def test_four_steps_and_six_are_ten(runs, kind, world_size, parallel):
    whole_run = runs[1][0][KINDS.index(kind)]
    assert whole_run["resumed_step"] == 0 and list(whole_run["curve"]) == list(range(1, STEPS + 1))
    for rank, result in enumerate(ranks_of(runs, kind, world_size, parallel)):
        assert result["resumed_step"] == SAVED_AT
        assert result["log"] == (["training goes on from the checkpoint of step 4"] if rank == 0 else [])
        assert result["samples"] == (SAVED_AT * 8, STEPS * 8)
        assert list(result["curve"]) == list(range(SAVED_AT + 1, STEPS + 1))
        if parallel == HOME:
            assert all(value == whole_run["curve"][step] for step, value in result["curve"].items())
            assert all(torch.equal(result["end"][name], value) for name, value in whole_run["end"].items())
            continue
        for step, value in result["curve"].items():
            assert value == pytest.approx(whole_run["curve"][step], rel=1e-5)
        off = {name: difference(result["end"][name], value) for name, value in whole_run["end"].items()}
        assert max(off.values()) <= 1e-4, off
