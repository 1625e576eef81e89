"""How tokens reach their experts and come back.

Legend: T tokens, K experts chosen per token, N = T·K rows, E experts, M model dimension.

One interface, two implementations: `LocalDispatch` here, when every expert is in this process, and `AllToAllDispatch`
(llama/all_to_all.py) when experts are spread over ranks. Both are dropless: no token is cut off by a capacity.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ExpertsFunction(Protocol):
    """Local experts over rows sorted by expert: `counts_E[e]` rows for local expert e, answers in the same order."""

    def __call__(self, x_NM: Tensor, counts_E: Tensor) -> Tensor: ...


class Dispatch(Protocol):
    """Sends each token to its experts and returns `[T, M]`, the weighted sum of their answers."""

    def __call__(
        self, experts: ExpertsFunction, x_TM: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> Tensor: ...


def sort_by_expert(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns `order_N`, the (token, choice) pairs in order of their expert, and `counts_E` int64.

    The sort is stable, so each expert sees its tokens in their order: results do not depend on the run.
    """
    ids_N = topk_ids_TK.reshape(-1)
    return torch.argsort(ids_N, stable=True), torch.bincount(ids_N, minlength=num_experts)


def gather_rows(x_TM: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """One row per (token, choice) pair, in the order of `order_N`."""
    return x_TM[order_N // top_k]


def combine_rows(y_NM: Tensor, order_N: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Undoes `gather_rows` and sums each token's answers by its weights: `[T, M]`.

    A gather by the inverse permutation instead of an index_add: the sum has one order, on a GPU too.
    """
    tokens, top_k = topk_weights_TK.shape
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    y_TKM = y_NM[inverse_N].view(tokens, top_k, -1)
    return (y_TKM * topk_weights_TK[..., None].type_as(y_TKM)).sum(dim=1)


class LocalDispatch:
    """All experts are in this process."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(self, experts: ExpertsFunction, x_TM: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        order_N, counts_E = sort_by_expert(topk_ids_TK, self.num_experts)
        y_NM = experts(gather_rows(x_TM, order_N, topk_ids_TK.shape[1]), counts_E)
        return combine_rows(y_NM, order_N, topk_weights_TK)
