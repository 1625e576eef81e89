"""Positions other than rotary: sinusoidal, ALiBi and T5's relative bias.

Legend: H heads, L queries, S keys. Distances count from the key to the query: positive when the key comes first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding


def sinusoidal(positions: Tensor, dim: int) -> Tensor:
    """Sine in the even dimensions, cosine in the odd: PE(p, 2i) = sin(p / 10000^(2i/dim)), PE(p, 2i+1) = cos(same).

    Source: Vaswani et al., arXiv:1706.03762, §3.5. The angles are float64, lest large positions lose their fraction.

    Args:
        positions: `[...]` integers.
        dim: even.

    Returns:
        `[..., dim]` fp32.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions[..., None].double() / 10000.0**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """Slope of each head: 2^(-8/n), 2^(-16/n), ... for n heads (Press et al., arXiv:2108.12409, §3).

    If n is no power of two, the slopes of the power below come first, then every other slope of the power above, as in
    the authors' code.

    Returns:
        `[H]` fp32.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    first = [(head + 1) / power for head in range(power)]
    rest = [(2 * head + 1) / (2 * power) for head in range(num_heads - power)]
    return torch.tensor([2 ** (-8 * part) for part in first + rest], dtype=torch.float32, device=device)


def _distances(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    return query_positions[..., :, None] - key_positions[..., None, :]


class ALiBi:
    """Attention with linear biases: −slope·(i − j) on the score of query i and key j (arXiv:2108.12409, §3).

    Bidirectional, as in an encoder, it is −slope·|i − j|.
    """

    def __init__(self, num_heads: int, bidirectional: bool = False) -> None:
        self.num_heads = num_heads
        self.bidirectional = bidirectional

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """`[..., L]` and `[..., S]` int64 → `[..., H, L, S]` fp32."""
        slopes = alibi_slopes(self.num_heads, query_positions.device)
        distances = _distances(query_positions, key_positions)
        if self.bidirectional:
            distances = distances.abs()
        return distances.unsqueeze(-3) * -slopes[:, None, None]


def relative_bucket(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool = False) -> Tensor:
    """Bucket of each distance (Raffel et al., T5, arXiv:1910.10683, §2.1; the formula is in the authors' code).

    With n buckets to a direction, distances below e = n // 2 have one each; the others share, on a scale logarithmic
    from e to `max_distance`, beyond which all fall into the last one. Unidirectional, keys after their query count as
    distance 0; bidirectional, they have the second half of the buckets.

    Args:
        distance: int64, any shape: position of the query minus position of the key.

    Returns:
        int64, same shape, in [0, buckets).
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance < 0) * buckets
        distance = distance.abs()
    distance = distance.clamp(min=0)
    exact = buckets // 2
    # Below `exact` the logarithm is not used; the clamp keeps it finite.
    scale = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (scale * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, shared)


class RelativeBias:
    """T5's learned bias on the scores: one number for each head and bucket of distances.

    Holds the parameter as it is and reads it anew in every call. A plain object: build it inside the forward pass of
    the module that owns the parameter.
    """

    def __init__(self, weight: Tensor, max_distance: int, bidirectional: bool = False) -> None:
        """`weight` is `[buckets, H]`; distances from `max_distance` on share the last bucket."""
        self.weight = weight
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """`[..., L]` and `[..., S]` int64 → `[..., H, L, S]`, fp32 or the weight's type if that is wider."""
        distances = _distances(query_positions, key_positions)
        buckets = relative_bucket(distances, self.weight.shape[0], self.max_distance, self.bidirectional)
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return embedding(buckets, weight).movedim(-1, -3)
