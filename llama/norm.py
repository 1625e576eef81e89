"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, arXiv:1910.07467, eq. 4).

    The statistics are fp32 whatever the input type, as in LLaMA.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` → `[..., dim]`, same type."""
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), None, self.eps).type_as(x) * self.weight
