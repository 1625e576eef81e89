"""Grouped-query attention, with one seam between the projections and the attention itself.

Legend: B batch, L sequence, H query heads, G key/value heads, D head dimension, M model dimension.

`Attention` projects, rotates and asks an `Attend` for the weighted sum. `CausalAttend` is the whole-sequence
implementation used in training; the engine brings its own that reads and writes a paged cache. The model knows of
no cache.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llama.config import ModelConfig
from llama.rope import apply_rotary


class Attend(Protocol):
    """The attention of one layer over rotated queries and keys."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor) -> Tensor:
        """Returns `[B, L, H, D]`: softmax(q·kᵀ/√D)·v, causal, H/G query heads to a key/value head."""
        ...


class CausalAttend:
    """Every token attends to itself and all before it in its row; nothing is kept."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor) -> Tensor:
        out_BHLD = scaled_dot_product_attention(
            q_BLHD.transpose(1, 2),
            k_BLGD.transpose(1, 2),
            v_BLGD.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BLHD.shape[2] != k_BLGD.shape[2],
        )
        return out_BHLD.transpose(1, 2)


class Attention(nn.Module):
    """Queries, keys and values by `wq`, `wk`, `wv`, no biases; output by `wo`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.resolved_head_dim
        self.wq = nn.Linear(config.dim, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, self.num_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, self.num_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.num_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x_BLM: Tensor, cos_BLD: Tensor, sin_BLD: Tensor, attend: Attend) -> Tensor:
        """`[batch, seq, dim]` → `[batch, seq, dim]`."""
        batch, length, _ = x_BLM.shape
        q_BLHD = self.wq(x_BLM).view(batch, length, self.num_heads, self.head_dim)
        k_BLGD = self.wk(x_BLM).view(batch, length, self.num_kv_heads, self.head_dim)
        v_BLGD = self.wv(x_BLM).view(batch, length, self.num_kv_heads, self.head_dim)
        out_BLHD = attend(
            self.layer, apply_rotary(q_BLHD, cos_BLD, sin_BLD), apply_rotary(k_BLGD, cos_BLD, sin_BLD), v_BLGD
        )
        return self.wo(out_BLHD.reshape(batch, length, -1))
