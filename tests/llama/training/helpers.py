"""A model small enough to train in tests, and a loader whose batches depend on nothing but the sample number."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama.config import ModelConfig, MoEConfig
from llama.losses import IGNORE_INDEX
from llama.training.batch import Batch
from llama.training.config import OptimizerConfig, ScheduleConfig, TrainConfig

MOE = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    max_seq_len=32,
    moe=MoEConfig(
        num_experts=4,
        top_k=2,
        num_shared_experts=1,
        expert_hidden_dim=24,
        balance_loss_weight=0.05,
        z_loss_weight=0.02,
        bias_update_rate=0.01,
        first_dense_layers=1,
    ),
)
SAMPLES = 40
DENSE = ModelConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, multiple_of=16, tie_embeddings=False)


def train_config(**settings: Any) -> TrainConfig:
    """Three steps of eight sequences, clipped, from a warm-up that is felt."""
    return TrainConfig(
        **{
            "steps": 3,
            "global_batch": 8,
            "micro_batch": 2,
            "seq_len": 16,
            "optimizer": OptimizerConfig(lr=3e-3, eps=1e-5, grad_clip=0.5),
            "schedule": ScheduleConfig(warmup_steps=2),
            "log_every": 1,
            "checkpoint_every": 3,
        }
        | settings
    )


def samples(first: int, count: int, config: TrainConfig, vocab_size: int) -> Tensor:
    """Samples `first` to `first + count - 1`: `[count, seq_len + 1]`."""
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 + number)
        rows.append(torch.randint(vocab_size, (config.seq_len + 1,), generator=generator))
    return torch.stack(rows)


def sample_lengths(first: int, count: int, config: TrainConfig) -> Tensor:
    """`[count]`: positions before the padding of such samples where they are padded, from 2 to `seq_len`."""
    return torch.tensor([2 + 7 * number % (config.seq_len - 1) for number in range(first, first + count)])


def pad_labels(labels: Tensor, lengths: Tensor) -> Tensor:
    """A row's last token and its padding foretell nothing."""
    return labels.masked_fill(torch.arange(1, labels.shape[1] + 1) >= lengths[:, None], IGNORE_INDEX)


class Samples:
    """Micro-step by micro-step, every rank takes its run of the next `micro_batch · world_size` samples."""

    def __init__(
        self, config: TrainConfig, vocab_size: int, rank: int = 0, world_size: int = 1, padded: bool = False
    ) -> None:
        self.config, self.vocab_size, self.rank, self.world_size = config, vocab_size, rank, world_size
        self.padded = padded
        self.consumed = 0

    def __iter__(self) -> Iterator[Batch]:
        size = self.config.micro_batch
        while True:
            first = self.consumed + self.rank * size
            self.consumed += size * self.world_size
            tokens = samples(first, size, self.config, self.vocab_size)
            if self.padded:
                lengths = sample_lengths(first, size, self.config)
                yield Batch(tokens[:, :-1], pad_labels(tokens[:, 1:], lengths), lengths=lengths)
            else:
                yield Batch(tokens[:, :-1], tokens[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        return {"samples_consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["samples_consumed"]

    @property
    def epoch(self) -> float:
        """As if there were `SAMPLES`."""
        return self.consumed / SAMPLES


def whole(tensor: Tensor) -> Tensor:
    """A copy of the full tensor; a collective for a sharded one."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def difference(value: Tensor, reference: Tensor) -> float:
    """max|Δ| / max|reference|; the plain maximum where the reference is all zero."""
    scale = reference.abs().max().item() or 1.0
    return (value - reference).abs().max().item() / scale
