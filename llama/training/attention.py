"""Causal attention for training on the CPU, block of queries by block of queries.

Legend: B batch, L sequence, H query heads, G key/value heads, R = H / G, N = B·G, D head dimension, Q block of queries.

Each block attends only to the keys from the first that any of its queries sees to its own end, so the masked part of
the square is never computed, nor are documents that ended before the block in every row; and the R query heads of a
group share one matrix product. The probabilities are kept for backward: L²/2 numbers a head and row of the batch, which
is why `MAX_BYTES` bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama.attention import CausalAttend, Scoring, document_positions
from llama.autograd import first_order

BLOCK = 64
MAX_BYTES = 4096
"""Longest row of probabilities, in bytes, for which keeping them pays: 1,024 fp32 numbers, or 2,048 of a half type.
Beyond, they take gigabytes and gain little."""


class BlockCausalAttend:
    """An `llama.attention.Attend` for whole sequences; the result is `CausalAttend`'s up to rounding.

    Longer sequences, and scores with a bias, soft-capping or dropout, are left to `CausalAttend`.

    Args:
        documents: as for `CausalAttend`, equal ids side by side.
    """

    def __init__(self, documents: Tensor | None = None) -> None:
        self._general = CausalAttend(documents)
        self._positions_BL = None if documents is None else document_positions(documents)
        self._blocks: dict[tuple[int, int | None], list[_Block]] = {}

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        batch, length, heads, head_dim = q_BLHD.shape
        if length * q_BLHD.element_size() > MAX_BYTES or not scoring.plain:
            return self._general(layer, q_BLHD, k_BLGD, v_BLGD, scoring)
        groups = k_BLGD.shape[2]
        shape = length, scoring.window
        if shape not in self._blocks:
            self._blocks[shape] = _cut(length, scoring.window, self._positions_BL, q_BLHD.device)
        # Scaling the queries is cheaper than scaling the scores, of which there are more.
        q_BLHD = q_BLHD * scoring.scale
        q_NRLD = q_BLHD.transpose(1, 2).reshape(batch * groups, heads // groups, length, head_dim)
        k_NLD, v_NLD = (x.transpose(1, 2).reshape(batch * groups, length, head_dim) for x in (k_BLGD, v_BLGD))
        out_NRLD: Tensor = _BlockCausal.apply(q_NRLD, k_NLD, v_NLD, batch, self._blocks[shape], torch.is_grad_enabled())
        return out_NRLD.view(batch, heads, length, head_dim).transpose(1, 2)


@dataclass(frozen=True)
class _Block:
    """A block of queries, and the keys that any of its queries sees."""

    queries: slice
    keys: slice
    later_QQ: Tensor
    """Hidden among the last Q keys."""
    before_BQS: Tensor | None
    """Hidden among the first S keys, for each row of the batch or (B = 1) for all alike."""


def _cut(length: int, window: int | None, positions_BL: Tensor | None, device: torch.device) -> list[_Block]:
    """`positions_BL` counts from the start of each document, without documents from that of the row."""
    index_L = torch.arange(length, device=device)
    seen_BL = index_L[None] + 1 if positions_BL is None else positions_BL + 1
    first_BL = index_L - (seen_BL if window is None else seen_BL.clamp(max=window)) + 1
    later_LL = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=device).triu_(1)
    blocks = []
    for begin in range(0, length, BLOCK):
        first_BQ = first_BL[:, begin : begin + BLOCK]
        size = first_BQ.shape[1]
        least, most = (int(bound) for bound in first_BQ.aminmax())
        before_BQS = index_L[least:most] < first_BQ[..., None] if most > least else None
        blocks.append(
            _Block(slice(begin, begin + size), slice(least, begin + size), later_LL[:size, :size], before_BQS)
        )
    return blocks


def _hide(scores_NXS: Tensor, block: _Block, batch: int) -> None:
    """Sets what a query does not see to -inf; X is R·Q."""
    size = block.later_QQ.shape[0]
    scores_BHQS = scores_NXS.view(batch, -1, size, scores_NXS.shape[-1])
    scores_BHQS[..., -size:].masked_fill_(block.later_QQ, -torch.inf)
    if block.before_BQS is not None:
        scores_BHQS[..., : block.before_BQS.shape[-1]].masked_fill_(block.before_BQS[:, None], -torch.inf)


class _BlockCausal(torch.autograd.Function):
    """softmax(q·kᵀ)·v and its gradient (FlashAttention, arXiv:2205.14135, appendix B.2, without recomputation)."""

    @staticmethod
    def forward(
        ctx: Any, q_NRLD: Tensor, k_NLD: Tensor, v_NLD: Tensor, batch: int, blocks: list[_Block], training: bool
    ) -> Tensor:
        out_NRLD = torch.empty_like(q_NRLD)
        probabilities = []
        for block in blocks:
            q_NRQD = q_NRLD[:, :, block.queries]
            scores = torch.bmm(q_NRQD.flatten(1, 2), k_NLD[:, block.keys].transpose(1, 2))
            _hide(scores, block, batch)
            p = scores.softmax(dim=-1)
            out_NRLD[:, :, block.queries] = torch.bmm(p, v_NLD[:, block.keys]).view_as(q_NRQD)
            if training:
                probabilities.append(p)
        ctx.blocks = blocks
        ctx.save_for_backward(q_NRLD, k_NLD, v_NLD, *probabilities)
        return out_NRLD

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_NRLD, k_NLD, v_NLD, *probabilities = ctx.saved_tensors
        dq_NRLD, dk_NLD, dv_NLD = torch.empty_like(q_NRLD), torch.zeros_like(k_NLD), torch.zeros_like(v_NLD)
        for p, block in zip(probabilities, ctx.blocks, strict=True):
            q_NRQD, gradient = q_NRLD[:, :, block.queries], gradients[0][:, :, block.queries].flatten(1, 2)
            dv_NLD[:, block.keys] += torch.bmm(p.transpose(1, 2), gradient)
            dp = torch.bmm(gradient, v_NLD[:, block.keys].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, dp.dtype)
            dq_NRLD[:, :, block.queries] = torch.bmm(ds, k_NLD[:, block.keys]).view_as(q_NRQD)
            dk_NLD[:, block.keys] += torch.bmm(ds.transpose(1, 2), q_NRQD.flatten(1, 2))
        return dq_NRLD, dk_NLD, dv_NLD, None, None, None
