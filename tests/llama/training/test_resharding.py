"""A run saved under (1, 2, 2) goes on under other layouts: its state to the bit, its curve to rounding."""

from dataclasses import replace

import pytest
import torch

from cluster.storage import Artifact, Store
from llama.training.checkpoint import Checkpointer, training_tensors
from llama.training.config import OptimizerConfig, ParallelConfig, ScheduleConfig
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
    """Each run: (name of its folder, config). The state as it was found, the curve, the state at the end."""
    results = []
    for name, config in runs:
        loader, seen, found = Recording(config, MODEL.vocab_size, rank, world_size), [], {}
        checkpointer = Checkpointer(Store(f"{folder}/{name}"), Artifact, keep_last=3) if name else None
        trainer = Trainer(
            MODEL,
            config,
            loader,
            checkpointer,
            on_metrics=seen.append,
            on_resume=lambda step, found=found: found.update(state(trainer), step=step),
        )
        summary = trainer.fit()
        results.append(
            {
                "found": found,
                "curve": {metrics.step: (metrics.loss, metrics.grad_norm) for metrics in seen},
                "end": state(trainer),
                "resumed_step": summary.resumed_step,
                "samples": (loader.first, loader.consumed),
            }
        )
    return results
