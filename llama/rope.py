"""Rotary position embedding (Su et al., arXiv:2104.09864, §3.4.2).

Dimension i of the first half of a head turns together with dimension i of the second half, as in Hugging Face's LLaMA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians per position of each pair, theta^(-2i/head_dim): `[head_dim / 2]`, fp32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables `[..., head_dim]` fp32 for integer `positions` `[...]`."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x_BLHD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> Tensor:
    """Turns every head of x, `[batch, seq, heads, head_dim]`, by its position's angles; computed in fp32."""
    x = x_BLHD.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos_BLD[:, :, None] + turned * sin_BLD[:, :, None]).type_as(x_BLHD)
