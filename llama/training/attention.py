"""Causal attention for training on the CPU, block of queries by block of queries.

Legend: B batch, L sequence, H query heads, G key/value heads, R = H / G, N = B·G, D head dimension, Q block of queries.

Each block attends only to the keys up to its end, so the masked half of the square is never computed, and the R query
heads of a group share one matrix product. The probabilities are kept for backward: L²/2 numbers a head and row of the
batch, which is why `MAX_LENGTH` bounds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64
MAX_LENGTH = 2048
"""Longest sequence for which keeping the probabilities is reasonable."""


class BlockCausalAttend:
    """An `llama.attention.Attend` for whole sequences; the result is `CausalAttend`'s up to rounding."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor) -> Tensor:
        batch, length, heads, head_dim = q_BLHD.shape
        groups = k_BLGD.shape[2]
        q_NRLD = q_BLHD.transpose(1, 2).reshape(batch * groups, heads // groups, length, head_dim)
        k_NLD, v_NLD = (x.transpose(1, 2).reshape(batch * groups, length, head_dim) for x in (k_BLGD, v_BLGD))
        out_NRLD: Tensor = _BlockCausal.apply(q_NRLD, k_NLD, v_NLD)
        return out_NRLD.view(batch, heads, length, head_dim).transpose(1, 2)


class _BlockCausal(torch.autograd.Function):
    """softmax(q·kᵀ/√D)·v and its gradient (FlashAttention, arXiv:2205.14135, appendix B.2, without recomputation)."""

    @staticmethod
    def forward(ctx: Any, q_NRLD: Tensor, k_NLD: Tensor, v_NLD: Tensor) -> Tensor:
        _, _, length, head_dim = q_NRLD.shape
        out_NRLD = torch.empty_like(q_NRLD)
        probabilities = []
        for begin in range(0, length, BLOCK):
            end = min(begin + BLOCK, length)
            block = q_NRLD[:, :, begin:end]
            scores = torch.bmm(block.flatten(1, 2), k_NLD[:, :end].transpose(1, 2)).mul_(head_dim**-0.5)
            later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=scores.device).triu_(1)
            scores.unflatten(1, block.shape[1:3])[..., begin:].masked_fill_(later, -torch.inf)
            p = scores.softmax(dim=-1)
            out_NRLD[:, :, begin:end] = torch.bmm(p, v_NLD[:, :end]).view_as(block)
            probabilities.append(p)
        ctx.save_for_backward(q_NRLD, k_NLD, v_NLD, *probabilities)
        return out_NRLD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_NRLD, k_NLD, v_NLD, *probabilities = ctx.saved_tensors
        _, _, length, head_dim = q_NRLD.shape
        dq_NRLD, dk_NLD, dv_NLD = torch.empty_like(q_NRLD), torch.zeros_like(k_NLD), torch.zeros_like(v_NLD)
        for p, begin in zip(probabilities, range(0, length, BLOCK), strict=True):
            end = min(begin + BLOCK, length)
            block, gradient = q_NRLD[:, :, begin:end], gradients[0][:, :, begin:end].flatten(1, 2)
            dv_NLD[:, :end] += torch.bmm(p.transpose(1, 2), gradient)
            dp = torch.bmm(gradient, v_NLD[:, :end].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype).mul_(head_dim**-0.5)
            dq_NRLD[:, :, begin:end] = torch.bmm(ds, k_NLD[:, :end]).view_as(block)
            dk_NLD[:, :end] += torch.bmm(ds.transpose(1, 2), block.flatten(1, 2))
        return dq_NRLD, dk_NLD, dv_NLD
