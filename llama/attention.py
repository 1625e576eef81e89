"""Grouped-query attention, with one seam between the projections and the attention itself.

Legend: B batch, L queries of a sequence, S its keys, H query heads, G key/value heads, R = H / G query heads that share
one, D head dimension, M model dimension, N any leading rows.

`Attention` projects, normalises, rotates and asks an `Attend` for the weighted sum. `CausalAttend` works on whole
sequences; generation brings one that keeps a cache, the engine one that reads and writes pages. The model knows of no
cache. What a layer wants of its scores travels with the call as a `Scoring`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from llama.autocast import autocast_off
from llama.config import ModelConfig
from llama.linear import Linear, linears
from llama.norm import RMSNorm
from llama.rope import apply_rotary


class ScoreBias(Protocol):
    """A bias on the scores by position: ALiBi's, or T5's relative one (llama/position.py)."""

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """`[..., L]` and `[..., S]` int64 → `[..., H, L, S]`."""
        ...


@dataclass(frozen=True)
class Scoring:
    """How a layer scores its keys; a query sees the keys up to its own position.

    score(i, j) = softcap(qᵢ·kⱼ·scale) + bias(i, j), for j ≤ i and i − j < window.
    """

    scale: float
    window: int | None = None
    """Keys that a query sees, itself included; None for all."""
    softcap: float | None = None
    """c·tanh(score / c) bounds the score (Gemma 2, arXiv:2408.00118, §2)."""
    dropout: float = 0.0
    """Probability of dropping a weight after the softmax; 0 outside training."""
    bias: ScoreBias | None = None

    @property
    def plain(self) -> bool:
        """Whether a causal softmax of the scaled products is all there is, but for the window."""
        return self.softcap is None and self.bias is None and self.dropout == 0


class Attend(Protocol):
    """The attention of one layer over queries and keys that are normalised and rotated already."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        """Returns `[B, L, H, D]`: softmax of the scores times v; query head h reads key/value head h // R."""
        ...


def visible_keys(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys a query sees: `[..., L]` and `[..., S]` int64 → `[..., L, S]` bool."""
    queries, keys = query_positions[..., :, None], key_positions[..., None, :]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def attend_visible(
    q_NHLD: Tensor, k_NGSD: Tensor, v_NGSD: Tensor, visible: Tensor | None, scoring: Scoring, bias: Tensor | None = None
) -> Tensor:
    """The masked softmax itself: `[N, H, L, D]`. A query that sees no key gives 0.

    Args:
        visible: bool that broadcasts to `[N, 1, L, S]`; None when every query sees every key.
        bias: `scoring.bias` at these positions, broadcasts to `[N, H, L, S]`. In another type than the queries' the
            scores are summed in fp32.
    """
    if scoring.softcap is None and (bias is None or bias.dtype == q_NHLD.dtype):
        mask = visible
        if bias is not None:
            mask = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
        return scaled_dot_product_attention(
            q_NHLD,
            k_NGSD,
            v_NGSD,
            attn_mask=mask,
            dropout_p=scoring.dropout,
            scale=scoring.scale,
            enable_gqa=q_NHLD.shape[1] != k_NGSD.shape[1],
        )
    wide = torch.promote_types(q_NHLD.dtype, torch.float32)
    q_NGRLD = q_NHLD.to(wide).unflatten(1, (k_NGSD.shape[1], -1))
    with autocast_off(q_NHLD):
        scores_NHLS = (q_NGRLD @ k_NGSD.to(wide)[:, :, None].transpose(-1, -2)).flatten(1, 2) * scoring.scale
    if scoring.softcap is not None:
        scores_NHLS = scoring.softcap * torch.tanh(scores_NHLS / scoring.softcap)
    if bias is not None:
        scores_NHLS = scores_NHLS + bias
    if visible is not None:
        scores_NHLS = scores_NHLS.masked_fill(~visible, -torch.inf)
    weights_NHLS = scores_NHLS.softmax(dim=-1)
    if visible is not None:
        # A row without any key is 0 / 0.
        weights_NHLS = weights_NHLS.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    weights_NHLS = dropout(weights_NHLS, scoring.dropout, training=scoring.dropout > 0).type_as(v_NGSD)
    return (weights_NHLS.unflatten(1, q_NGRLD.shape[1:3]) @ v_NGSD[:, :, None]).flatten(1, 2)


class CausalAttend:
    """Every token attends to itself and those before it in its row; no key is kept.

    Args:
        documents: `[B, L]` int64: packed sequences, where a token sees only tokens of its own document. What hides the
            others is computed once for all layers.
    """

    def __init__(self, documents: Tensor | None = None) -> None:
        self._documents = documents
        self._visible: dict[int | None, Tensor] = {}
        """With documents: the mask by window."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        q_BHLD, k_BGLD, v_BGLD = (x.transpose(1, 2) for x in (q_BLHD, k_BLGD, v_BLGD))
        length = q_BHLD.shape[2]
        everything = scoring.window is None or scoring.window >= length
        if everything and self._documents is None and scoring.softcap is None and scoring.bias is None:
            out_BHLD = scaled_dot_product_attention(
                q_BHLD,
                k_BGLD,
                v_BGLD,
                is_causal=True,
                dropout_p=scoring.dropout,
                scale=scoring.scale,
                enable_gqa=q_BHLD.shape[1] != k_BGLD.shape[1],
            )
            return out_BHLD.transpose(1, 2)
        # Distances within a row or a document are those of the indices, whatever position it starts at.
        index_L = torch.arange(length, device=q_BLHD.device)
        if self._documents is None:
            visible = visible_keys(index_L, index_L, scoring.window)
        else:
            visible = self._within_documents(self._documents, index_L, scoring.window)
        bias = scoring.bias(index_L, index_L) if scoring.bias is not None else None
        return attend_visible(q_BHLD, k_BGLD, v_BGLD, visible, scoring, bias).transpose(1, 2)

    def _within_documents(self, documents_BL: Tensor, index_L: Tensor, window: int | None) -> Tensor:
        if window not in self._visible:
            same_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
            self._visible[window] = (visible_keys(index_L, index_L, window) & same_BLL)[:, None]
        return self._visible[window]


class FullAttend:
    """Every query sees every key of its row, whatever their order: an encoder's attention, and that to its output.

    Args:
        lengths: `[B]` int64: keys of each row, at least one, before the padding at its end, which nobody sees; None:
            there is none.
    """

    def __init__(self, lengths: Tensor | None = None) -> None:
        self._lengths = lengths
        self._visible: Tensor | None = None

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        length, keys = q_BLHD.shape[1], k_BLGD.shape[1]
        if self._visible is None and self._lengths is not None:
            self._visible = torch.arange(keys, device=q_BLHD.device) < self._lengths[:, None, None, None]
        bias = None
        if scoring.bias is not None:
            index = torch.arange(max(length, keys), device=q_BLHD.device)
            bias = scoring.bias(index[:length], index[:keys])
        q_BHLD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BLHD, k_BLGD, v_BLGD))
        return attend_visible(q_BHLD, k_BGSD, v_BGSD, self._visible, scoring, bias).transpose(1, 2)


def document_positions(documents: Tensor) -> Tensor:
    """Each token's place in its own document, from 0: `[B, L]` int64 ids, equal ids side by side → `[B, L]` int64."""
    index_BL = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts_BL = torch.ones_like(documents, dtype=torch.bool)
    starts_BL[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index_BL - (index_BL * starts_BL).cummax(dim=1).values


class LayerContext:
    """What all layers of one forward pass share. Not a dataclass: FSDP copies those it finds among arguments."""

    def __init__(self, attend: Attend, rotary: tuple[Tensor, Tensor] | None, bias: ScoreBias | None) -> None:
        self.attend = attend
        self.rotary = rotary
        """Cosine and sine of each token's angles, see llama/rope.py; None without rotary positions."""
        self.bias = bias


class Attention(nn.Module):
    """Queries, keys and values by `wq`, `wk`, `wv`, output by `wo`; optionally with biases and q/k norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.resolved_head_dim
        self.rope_layout = config.rope_layout
        self.dropout = config.attention_dropout
        self.scoring = Scoring(self.head_dim**-0.5, config.window(layer), config.attention_softcap)
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv_bias, output_bias = config.attention_bias != "none", config.attention_bias == "qkvo"
        self.wq = Linear(config.dim, q_dim, bias=qkv_bias)
        self.wk = Linear(config.dim, kv_dim, bias=qkv_bias)
        self.wv = Linear(config.dim, kv_dim, bias=qkv_bias)
        self.wo = Linear(q_dim, config.dim, bias=output_bias)
        self.norm_each_head = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim if self.norm_each_head else q_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim if self.norm_each_head else kv_dim, config.norm_eps)

    def forward(self, x_BLM: Tensor, context: LayerContext) -> Tensor:
        """`[batch, seq, dim]` → `[batch, seq, dim]`."""
        q_BLN, k_BLN, v_BLN = linears(x_BLM, self.wq, self.wk, self.wv)
        q_BLHD = self._heads(q_BLN, self.q_norm, context.rotary)
        k_BLGD = self._heads(k_BLN, self.k_norm, context.rotary)
        v_BLGD = v_BLN.unflatten(-1, (-1, self.head_dim))
        out_BLHD = context.attend(self.layer, q_BLHD, k_BLGD, v_BLGD, self._scoring(context.bias))
        return self.wo(out_BLHD.flatten(-2))

    def _scoring(self, bias: ScoreBias | None) -> Scoring:
        if bias is None and not (self.dropout and self.training):
            return self.scoring
        return replace(self.scoring, bias=bias, dropout=self.dropout if self.training else 0.0)

    def _heads(
        self, projected_BLN: Tensor, norm: RMSNorm | None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Splits a projection into heads, normalises them (each, or before the split) and turns them."""
        x = projected_BLN
        if norm is not None and not self.norm_each_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_each_head:
            x = norm(x)
        if rotary is not None:
            x = apply_rotary(x, *rotary, self.rope_layout)
        # Under autocast a norm's fp32 weight widens its result.
        return x.type_as(projected_BLN)
