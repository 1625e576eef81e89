"""Expert-parallel dispatch: tokens travel to the ranks that hold their experts and back.

Legend: T tokens here, K experts chosen per token, N = T·K rows, R rows that arrive here, P ranks of the group,
E experts, S = E / P experts per rank, M model dimension.

    rows sorted by expert ──all-to-all──▶ by source rank, expert ──permute──▶ by expert ── experts ──▶ … the way back

Rank p of the group holds experts p·S to (p + 1)·S − 1. Nothing is dropped or padded: the ranks first exchange how many
rows each will send for each expert, then exactly these rows (dropless: MegaBlocks, arXiv:2211.15841, §3). Cost per
rank and direction, forward and again in backward: about N·(P − 1)/P rows of M elements.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama.dispatch import ExpertsFunction, combine_rows, gather_rows, sort_by_expert


class AllToAllDispatch:
    """Sends each token to the rank of its experts; every rank of `group` must call it, in the same order of layers.

    Args:
        group: the expert-parallel ranks; the experts are split over them in order of group rank.
        num_experts: over all ranks of the group.

    Attributes:
        bytes_sent: bytes of token rows that this rank has sent to other ranks, forward and backward, since the start.

    Raises:
        ValueError: the group's size does not divide `num_experts`.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        if num_experts % group.size():
            raise ValueError(
                f"model.moe.num_experts={num_experts} is not divisible by train.parallel.ep={group.size()}; "
                f"choose a divisor of {num_experts} for ep"
            )
        self.group = group
        self.num_experts = num_experts
        self.bytes_sent = 0

    def __call__(self, experts: ExpertsFunction, x_TM: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As `llama.dispatch.Dispatch`; `experts` are this rank's, called even when no token arrives."""
        order_N, counts_E = sort_by_expert(topk_ids_TK, self.num_experts)
        counts_PS = counts_E.view(self.group.size(), -1)
        arriving_PS = torch.empty_like(counts_PS)
        dist.all_to_all_single(arriving_PS, counts_PS, group=self.group)
        leaving, arriving = torch.stack((counts_PS.sum(1), arriving_PS.sum(1))).tolist()

        x_RM = self._exchange(gather_rows(x_TM, order_N, topk_ids_TK.shape[1]), leaving, arriving)
        expert_R = torch.arange(arriving_PS.shape[1], device=x_RM.device).repeat(self.group.size())
        by_expert_R = torch.argsort(expert_R.repeat_interleave(arriving_PS.flatten()), stable=True)
        y_RM = experts(x_RM.index_select(0, by_expert_R), arriving_PS.sum(0))
        y_NM = self._exchange(y_RM.index_select(0, torch.argsort(by_expert_R)), arriving, leaving)
        return combine_rows(y_NM, order_N, topk_weights_TK)

    def _exchange(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """Sends `leaving[p]` consecutive rows to each rank p, returns `arriving[p]` rows from each; differentiable."""
        received: Tensor = _AllToAll.apply(rows, self, leaving, arriving)
        return received

    def send(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """The exchange itself, outside autograd; counts its bytes."""
        rows = rows.contiguous()
        received = rows.new_empty((sum(arriving), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, arriving, leaving, group=self.group)
        away = len(rows) - leaving[self.group.rank()]
        self.bytes_sent += away * rows[:1].numel() * rows.element_size()
        return received


class _AllToAll(torch.autograd.Function):
    """An all-to-all permutes rows over ranks; its gradient is the opposite all-to-all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dispatch: AllToAllDispatch, leaving: list[int], arriving: list[int]) -> Tensor:
        ctx.dispatch, ctx.leaving, ctx.arriving = dispatch, leaving, arriving
        return dispatch.send(rows, leaving, arriving)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.dispatch.send(gradients[0], ctx.arriving, ctx.leaving), None, None, None
