"""Expert rows summed by token, and the gradients of that, each in one pass over the rows on a GPU (Triton).

Legend: T tokens, K experts chosen per token, N = T·K pairs, R rows sorted by expert, M model dimension.

`llama.dispatch` asks `available` first, and computes the same in plain torch where this is False. Both moves are bound
by memory: a row is read once and written once, where torch's own operations take four to seven passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = None

_BLOCK = 1024


def available(rows: Tensor) -> bool:
    """Whether the kernels take these rows."""
    return triton is not None and rows.is_cuda and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)


def weighted_sum(y_RM: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """`[T, M]`: Σₖ weights[t, k] · y[row[t, k]], summed in fp32 in the order of the choices; weights None are 1."""
    tokens, choices = row_TK.shape
    dim = y_RM.shape[1]
    out_TM = y_RM.new_empty(tokens, dim)
    weights = row_TK if weights_TK is None else weights_TK.contiguous()
    grid = (tokens, triton.cdiv(dim, _BLOCK))
    _weighted_sum[grid](
        y_RM.contiguous(), row_TK.contiguous(), weights, out_TM, dim, choices, weights_TK is not None, _BLOCK
    )
    return out_TM


def weighted_sum_gradients(
    gradient_TM: Tensor, y_RM: Tensor, weights_TK: Tensor, pair_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `weighted_sum` by its rows, `[R, M]`, and by its weights, `[T, K]` fp32 (0 for a dropped pair)."""
    rows, dim = y_RM.shape
    d_y_RM = torch.empty_like(y_RM)
    d_weights_TK = torch.zeros_like(weights_TK, dtype=torch.float32)
    _weighted_sum_gradients[(rows,)](
        gradient_TM.contiguous(),
        y_RM.contiguous(),
        weights_TK.contiguous(),
        pair_R.contiguous(),
        d_y_RM,
        d_weights_TK,
        dim,
        weights_TK.shape[1],
        _BLOCK,
    )
    return d_y_RM, d_weights_TK


if triton is not None:

    @triton.jit
    def _weighted_sum(
        y,
        row,
        weights,
        out,
        dim: tl.constexpr,
        choices: tl.constexpr,
        weighted: tl.constexpr,
        block: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < dim
        total = tl.zeros((block,), dtype=tl.float32)
        for choice in tl.static_range(choices):
            pair = token * choices + choice
            values = tl.load(y + tl.load(row + pair) * dim + columns, mask=inside, other=0.0).to(tl.float32)
            if weighted:
                values = values * tl.load(weights + pair).to(tl.float32)
            total += values
        tl.store(out + token * dim + columns, total.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _weighted_sum_gradients(
        gradient,
        y,
        weights,
        pairs,
        d_y,
        d_weights,
        dim: tl.constexpr,
        choices: tl.constexpr,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        pair = tl.load(pairs + row)
        weight = tl.load(weights + pair).to(tl.float32)
        token = pair // choices
        product = tl.zeros((block,), dtype=tl.float32)
        for begin in range(0, dim, block):
            columns = begin + tl.arange(0, block)
            inside = columns < dim
            incoming = tl.load(gradient + token * dim + columns, mask=inside, other=0.0).to(tl.float32)
            product += incoming * tl.load(y + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_y + row * dim + columns, (incoming * weight).to(d_y.dtype.element_ty), mask=inside)
        tl.store(d_weights + pair, tl.sum(product, axis=0))
