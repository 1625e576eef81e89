"""Causal attention for training on the CPU, block of queries by block of queries.

Legend: B batch, L sequence, H query heads, G key/value heads, R = H / G, N = B·G, D head dimension, Q block of queries.

Each block attends only to the keys from its window's start to its own end, so the masked part of the square is never
computed, and the R query heads of a group share one matrix product. The probabilities are kept for backward: L²/2
numbers a head and row of the batch, which is why `MAX_BYTES` bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llama.attention import CausalAttend, Scoring
from llama.autograd import first_order

BLOCK = 64
MAX_BYTES = 4096
"""Longest row of probabilities, in bytes, for which keeping them pays: 1,024 fp32 numbers, or 2,048 of a half type.
Beyond, they take gigabytes and gain little."""


class BlockCausalAttend:
    """An `llama.attention.Attend` for whole sequences; the result is `CausalAttend`'s up to rounding.

    Longer sequences, and scores with a bias, soft-capping or dropout, are left to `CausalAttend`.
    """

    def __init__(self) -> None:
        self._general = CausalAttend()

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        batch, length, heads, head_dim = q_BLHD.shape
        if length * q_BLHD.element_size() > MAX_BYTES or not scoring.plain:
            return self._general(layer, q_BLHD, k_BLGD, v_BLGD, scoring)
        groups = k_BLGD.shape[2]
        # Scaling the queries is cheaper than scaling the scores, of which there are more.
        q_BLHD = q_BLHD * scoring.scale
        q_NRLD = q_BLHD.transpose(1, 2).reshape(batch * groups, heads // groups, length, head_dim)
        k_NLD, v_NLD = (x.transpose(1, 2).reshape(batch * groups, length, head_dim) for x in (k_BLGD, v_BLGD))
        out_NRLD: Tensor = _BlockCausal.apply(q_NRLD, k_NLD, v_NLD, scoring.window or length, torch.is_grad_enabled())
        return out_NRLD.view(batch, heads, length, head_dim).transpose(1, 2)


def _blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The blocks of queries, each with the keys that any of its queries sees."""
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        yield slice(begin, end), slice(max(0, begin - window + 1), end)


def _hide(scores_NRQS: Tensor, queries: slice, keys: slice, window: int) -> None:
    """Sets what a query does not see to -inf: later keys among the last Q, and those before its window in front."""
    size = queries.stop - queries.start
    later = torch.ones(size, size, dtype=torch.bool, device=scores_NRQS.device).triu_(1)
    scores_NRQS[..., -size:].masked_fill_(later, -torch.inf)
    before = queries.stop - window - keys.start
    if before > 0:
        index = torch.arange(max(size, before), device=scores_NRQS.device)
        too_early = queries.start + index[:size, None] - (keys.start + index[:before]) >= window
        scores_NRQS[..., :before].masked_fill_(too_early, -torch.inf)


class _BlockCausal(torch.autograd.Function):
    """softmax(q·kᵀ)·v and its gradient (FlashAttention, arXiv:2205.14135, appendix B.2, without recomputation)."""

    @staticmethod
    def forward(ctx: Any, q_NRLD: Tensor, k_NLD: Tensor, v_NLD: Tensor, window: int, training: bool) -> Tensor:
        out_NRLD = torch.empty_like(q_NRLD)
        probabilities = []
        for queries, keys in _blocks(q_NRLD.shape[2], window):
            block = q_NRLD[:, :, queries]
            scores = torch.bmm(block.flatten(1, 2), k_NLD[:, keys].transpose(1, 2))
            _hide(scores.unflatten(1, block.shape[1:3]), queries, keys, window)
            p = scores.softmax(dim=-1)
            out_NRLD[:, :, queries] = torch.bmm(p, v_NLD[:, keys]).view_as(block)
            if training:
                probabilities.append(p)
        ctx.window = window
        ctx.save_for_backward(q_NRLD, k_NLD, v_NLD, *probabilities)
        return out_NRLD

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NRLD, k_NLD, v_NLD, *probabilities = ctx.saved_tensors
        dq_NRLD, dk_NLD, dv_NLD = torch.empty_like(q_NRLD), torch.zeros_like(k_NLD), torch.zeros_like(v_NLD)
        for p, (queries, keys) in zip(probabilities, _blocks(q_NRLD.shape[2], ctx.window), strict=True):
            block, gradient = q_NRLD[:, :, queries], gradients[0][:, :, queries].flatten(1, 2)
            dv_NLD[:, keys] += torch.bmm(p.transpose(1, 2), gradient)
            dp = torch.bmm(gradient, v_NLD[:, keys].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype)
            dq_NRLD[:, :, queries] = torch.bmm(ds, k_NLD[:, keys]).view_as(block)
            dk_NLD[:, keys] += torch.bmm(ds.transpose(1, 2), block.flatten(1, 2))
        return dq_NRLD, dk_NLD, dv_NLD, None, None
