"""Losses, as sums: the trainer divides by a count it has summed over all ranks.

Legend: T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llama.moe import LayerRouting

IGNORE_INDEX = -100
"""Label of a position that is not predicted (padding, or a prompt in fine-tuning)."""


def cross_entropy_sum(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Sum of −log p(label) in nats, fp32, and the number of labels counted, int64.

    Args:
        logits: `[..., vocab]`, any floating type; the softmax is fp32.
        labels: `[...]` int64; `ignore_index` positions add nothing.
    """
    flat = labels.reshape(-1)
    total = cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=ignore_index, reduction="sum"
    )
    return total, (flat != ignore_index).sum()


def balance_loss(routing: LayerRouting) -> Tensor:
    """E · Σᵢ fᵢ·Pᵢ over the tokens of the batch (Switch Transformer, arXiv:2101.03961, §2.2, eq. 4–6).

    fᵢ is the share of (token, choice) pairs sent to expert i, Pᵢ the mean probability of expert i. 1 when routing is
    uniform, its minimum; E when one expert takes all.
    """
    share_E = routing.counts_E / routing.counts_E.sum()
    return len(share_E) * (share_E * routing.probabilities_TE.mean(dim=0)).sum()


def z_loss(routing: LayerRouting) -> Tensor:
    """Mean squared log-partition of the router's logits (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return torch.logsumexp(routing.logits_TE, dim=-1).square().mean()
