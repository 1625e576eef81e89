"""How tokens reach their experts and come back.

Legend: T tokens, K experts chosen per token, N = T·K (token, choice) pairs, R ≤ N rows that experts compute,
E experts, M model dimension.

    x_TM ──gather by expert──▶ x_RM ── experts ──▶ y_RM ──weighted sum by token──▶ [T, M]

One interface, two implementations: `LocalDispatch` here, when every expert is in this process, and `AllToAllDispatch`
(llama/all_to_all.py) when experts are spread over ranks. Without a capacity nothing is dropped (R = N, dropless:
MegaBlocks, arXiv:2211.15841, §3), and the local road never waits for an accelerator: no size depends on data.

Both moves are gathers in both directions. A row's inverse position is known, so what autograd would do by adding rows
into place, in an order that changes from run to run on a GPU, is one sum in the order of the choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llama.autograd import first_order
from llama.kernels import rows as rows_kernel


class ExpertsFunction(Protocol):
    """Local experts over rows sorted by expert: `counts_E[e]` rows for local expert e, answers in the same order."""

    def __call__(self, x_RM: Tensor, counts_E: Tensor) -> Tensor: ...


class Dispatch(Protocol):
    """Sends each token to its experts and returns `[T, M]`, the weighted sum of their answers.

    `capacity` is the most rows that this process sends to any one expert; pairs beyond it are dropped and add nothing.
    """

    def __call__(
        self,
        experts: ExpertsFunction,
        x_TM: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        capacity: int | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class ExpertRows:
    """Which (token, choice) pair each row belongs to, rows sorted by expert, and the way back."""

    pair_R: Tensor
    """int64: row r is of token `pair_R[r] // K`, choice `pair_R[r] % K`."""
    row_TK: Tensor
    """int64: the row of each pair; any valid row for a dropped one."""
    counts_E: Tensor
    """int64: rows of each expert."""
    kept_TK: Tensor | None
    """Which pairs have a row; None means all."""


def count_by_expert(topk_ids_TK: Tensor, num_experts: int, counted_T: Tensor | None = None) -> Tensor:
    """int64 `[E]`: pairs by expert, those of `counted_T` tokens (bool; None: all). Not bincount, which waits for an
    accelerator to learn how long its result is."""
    ids_N = topk_ids_TK.reshape(-1)
    if counted_T is None:
        ones_N = torch.ones_like(ids_N)
    else:
        ones_N = counted_T[:, None].expand(topk_ids_TK.shape).reshape(-1).to(ids_N.dtype)
    return ids_N.new_zeros(num_experts).scatter_add_(0, ids_N, ones_N)


def inverse_permutation(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return inverse_N


def sort_by_expert(topk_ids_TK: Tensor, num_experts: int, capacity: int | None = None) -> ExpertRows:
    """Lays the pairs out by expert; the first `capacity` pairs of each expert get a row, or all of them with None.

    The sort is stable: an expert sees its tokens in their order, so results do not depend on the run, and when it is
    full it is the later tokens that skip it (Switch Transformer, arXiv:2101.03961, §2.2 and appendix F).
    """
    ids_N = topk_ids_TK.reshape(-1)
    sorted_N, pair_N = torch.sort(ids_N, stable=True)
    counts_E = count_by_expert(topk_ids_TK, num_experts)
    if capacity is None:
        return ExpertRows(pair_N, inverse_permutation(pair_N).view_as(topk_ids_TK), counts_E, None)
    begins_E = counts_E.cumsum(0) - counts_E
    place_N = torch.arange(len(ids_N), device=ids_N.device) - begins_E[sorted_N]
    pair_R = pair_N[place_N < capacity]
    row_N = torch.zeros_like(ids_N)
    row_N[pair_R] = torch.arange(len(pair_R), device=ids_N.device)
    kept_N = torch.zeros_like(ids_N, dtype=torch.bool).index_fill_(0, pair_R, True)
    return ExpertRows(pair_R, row_N.view_as(topk_ids_TK), counts_E.clamp(max=capacity), kept_N.view_as(topk_ids_TK))


def gather_rows(x_TM: Tensor, rows: ExpertRows) -> Tensor:
    """`[R, M]`: each row's token; differentiable."""
    gathered: Tensor = _Gather.apply(x_TM, rows.pair_R, rows.row_TK, rows.kept_TK)
    return gathered


def combine_rows(y_RM: Tensor, rows: ExpertRows, topk_weights_TK: Tensor) -> Tensor:
    """`[T, M]` in the rows' type: each token's rows, summed by its weights; differentiable in both."""
    if rows.kept_TK is not None:
        topk_weights_TK = topk_weights_TK * rows.kept_TK
    combined: Tensor = _Combine.apply(y_RM, topk_weights_TK, rows.pair_R, rows.row_TK)
    return combined


def _weighted_sum(y_RM: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Σₖ weights[t, k] · y[row[t, k]] in one pass over the rows."""
    if rows_kernel.available(y_RM):
        return rows_kernel.weighted_sum(y_RM, row_TK, weights_TK)
    return embedding_bag(row_TK, y_RM, mode="sum", per_sample_weights=weights_TK)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, pair_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return x_TM.index_select(0, pair_R // row_TK.shape[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        row_TK, kept_TK = ctx.saved_tensors
        gradient_RM = gradients[0].contiguous()
        weights_TK = None if kept_TK is None else kept_TK.to(gradient_RM.dtype)
        return _weighted_sum(gradient_RM, row_TK, weights_TK), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RM: Tensor, weights_TK: Tensor, pair_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RM, weights_TK, pair_R)
        return _weighted_sum(y_RM, row_TK, weights_TK.to(y_RM.dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RM, weights_TK, pair_R = ctx.saved_tensors
        if rows_kernel.available(y_RM):
            d_y_RM, d_weights_TK = rows_kernel.weighted_sum_gradients(gradients[0], y_RM, weights_TK, pair_R)
            return d_y_RM, d_weights_TK.to(weights_TK.dtype), None, None
        gradient_RM = gradients[0].index_select(0, pair_R // weights_TK.shape[1])
        weights_gradient_N = weights_TK.new_zeros(weights_TK.numel())
        weights_gradient_N[pair_R] = (gradient_RM * y_RM).sum(dim=1).to(weights_TK.dtype)
        weights_R = weights_TK.flatten()[pair_R].to(gradient_RM.dtype)
        return gradient_RM.mul_(weights_R[:, None]), weights_gradient_N.view_as(weights_TK), None, None


class LocalDispatch:
    """All experts are in this process."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self,
        experts: ExpertsFunction,
        x_TM: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        capacity: int | None = None,
    ) -> Tensor:
        rows = sort_by_expert(topk_ids_TK, self.num_experts, capacity)
        y_RM = experts(gather_rows(x_TM, rows), rows.counts_E)
        return combine_rows(y_RM, rows, topk_weights_TK)
