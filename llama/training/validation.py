"""The loss on held-out rows, by all ranks together with the sharded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llama.attention import Attend
from llama.model import LanguageModel
from llama.training.batch import Batch, loss_sum


def check_equally_many(batches: Sequence[Batch], device: torch.device) -> None:
    """A collective, for a loss whose every forward pass is one.

    Raises:
        ValueError: the ranks have different numbers of batches, or none.
    """
    extremes = torch.tensor([len(batches), -len(batches)], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    most, least = extremes[0].item(), -extremes[1].item()
    if most != least or most == 0:
        raise ValueError(
            f"ranks have {least} to {most} batches to validate on, and need equally many; fill up with rows without "
            "targets, or set train.validate_every=0"
        )


@torch.no_grad()
def validation_loss(
    model: LanguageModel,
    batches: Sequence[Batch],
    attend: Callable[[Tensor | None], Attend],
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean −log p of all ranks' targets, nats per token; NaN without any.

    The model is in evaluation mode meanwhile: no dropout, no capacity, no routing statistics, nothing random. It leaves
    weights and gradients as they are, and sharded.

    Args:
        batches: this rank's, as many as every rank has.
        on_batch: called after each.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    try:
        for batch in batches:
            there = batch.to(device)
            totals += torch.stack((loss_sum(model, there, attend).double(), there.num_targets().double()))
            on_batch()
    finally:
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass FSDP keeps what it has gathered
    dist.all_reduce(totals)
    nats, targets = totals.tolist()
    return nats / targets if targets else float("nan")
