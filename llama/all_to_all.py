"""Expert-parallel dispatch: tokens travel to the ranks that hold their experts and back.

Legend: T tokens here, K experts chosen per token, N = T·K pairs, R rows here or arriving here, P ranks of the group,
E experts, S = E / P experts per rank, M model dimension.

    rows sorted by expert ──all-to-all──▶ by source rank, expert ──permute──▶ by expert ── experts ──▶ … the way back

Rank p of the group holds experts p·S to (p + 1)·S − 1. Nothing is padded: the ranks first exchange how many rows each
will send for each expert, then exactly these rows (dropless: MegaBlocks, arXiv:2211.15841, §3). Cost per
rank and direction, forward and again in backward: about N·(P − 1)/P rows of M elements.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from llama.autograd import first_order
from llama.dispatch import (
    ExpertRows,
    ExpertsFunction,
    combine_rows,
    gather_rows,
    inverse_permutation,
    sort_by_expert,
)


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
        self._number = next(_NUMBERS)
        _DISPATCHES[self._number] = self

    @torch.compiler.disable  # how many rows arrive is known only when they do
    def __call__(
        self,
        experts: ExpertsFunction,
        x_TM: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        capacity: int | None = None,
    ) -> Tensor:
        """As `llama.dispatch.Dispatch`; `experts` are this rank's, called even when no token arrives.

        Pairs over the capacity are dropped before they travel, by what this rank alone sends (a rank's tokens are a
        group of GShard, arXiv:2006.16668, §2.2). So the same pairs are dropped whatever the size of the group, and an
        expert is sent at most `capacity` rows by each of its ranks.
        """
        rows = sort_by_expert(topk_ids_TK, self.num_experts, capacity)
        counts_PS = rows.counts_E.view(self.group.size(), -1)
        arriving_PS = torch.empty_like(counts_PS)
        dist.all_to_all_single(arriving_PS, counts_PS, group=self.group)
        leaving, arriving = torch.stack((counts_PS.sum(1), arriving_PS.sum(1))).tolist()

        x_RM = self._exchange(gather_rows(x_TM, rows), leaving, arriving)
        by_expert, by_source = _orders(arriving_PS, sum(arriving))
        y_RM = experts(gather_rows(x_RM, by_expert), arriving_PS.sum(0))
        y_RM = self._exchange(gather_rows(y_RM, by_source), arriving, leaving)
        return combine_rows(y_RM, rows, topk_weights_TK)

    def _exchange(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """Sends `leaving[p]` consecutive rows to each rank p, returns `arriving[p]` rows from each; differentiable."""
        received: Tensor = _AllToAll.apply(rows, self, leaving, arriving)
        return received

    def send(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """The exchange itself, outside autograd; counts its bytes."""
        sent: Tensor = _all_to_all(rows.contiguous(), leaving, arriving, self._number)
        return sent


_NUMBERS = itertools.count()
_DISPATCHES: WeakValueDictionary[int, AllToAllDispatch] = WeakValueDictionary()
"""By number, which an operator can be given."""


@torch.library.custom_op("caravan::all_to_all", mutates_args=())
def _all_to_all(rows: Tensor, leaving: list[int], arriving: list[int], number: int) -> Tensor:
    """An operator, so that activation checkpointing can keep its result instead of sending the rows again."""
    dispatch = _DISPATCHES[number]
    received = rows.new_empty((sum(arriving), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, arriving, leaving, group=dispatch.group)
    away = len(rows) - leaving[dispatch.group.rank()]
    dispatch.bytes_sent += away * rows[:1].numel() * rows.element_size()
    return received


def _orders(arriving_PS: Tensor, rows: int) -> tuple[ExpertRows, ExpertRows]:
    """From the order of arrival (by source rank, then expert) to that of the experts, and back."""
    expert_S = torch.arange(arriving_PS.shape[1], device=arriving_PS.device)
    expert_R = expert_S.repeat(len(arriving_PS)).repeat_interleave(arriving_PS.flatten(), output_size=rows)
    order_R, counts_S = torch.argsort(expert_R, stable=True), arriving_PS.sum(0)
    inverse_R = inverse_permutation(order_R)
    return (
        ExpertRows(order_R, inverse_R[:, None], counts_S, None),
        ExpertRows(inverse_R, order_R[:, None], counts_S, None),
    )


class _AllToAll(torch.autograd.Function):
    """An all-to-all permutes rows over ranks; its gradient is the opposite all-to-all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dispatch: AllToAllDispatch, leaving: list[int], arriving: list[int]) -> Tensor:
        ctx.dispatch, ctx.leaving, ctx.arriving = dispatch, leaving, arriving
        return dispatch.send(rows, leaving, arriving)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.dispatch.send(gradients[0], ctx.arriving, ctx.leaving), None, None, None
