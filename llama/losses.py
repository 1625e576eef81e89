"""Cross-entropy, as sums: the trainer divides by a count it has summed over all ranks.

Legend: T tokens, C tokens of a chunk, M model dimension, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from llama.autocast import autocast_dtype, autocast_off
from llama.autograd import first_order

IGNORE_INDEX = -100
"""Label of a position that is not predicted (padding, or a prompt in fine-tuning)."""

_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_GPU = 2**21, 2**28
"""Logits held at a time, about: few enough for a CPU's cache, and a gigabyte on a GPU, where the traffic of adding to
the weight's gradient counts for more."""
_CHUNK_ROWS = 128
"""Tokens taken at a time, at least: each chunk reads the whole weight and adds to the whole of its gradient."""


def linear_cross_entropy_sum(hidden: Tensor, weight_VM: Tensor, labels: Tensor) -> Tensor:
    """Sum of −log p(label) in nats, with logits hidden·weightᵀ that never exist all at once.

    The rows are taken in chunks, and each chunk's gradients are computed beside its loss: backward only scales them.
    Softmax and sum are fp32 (fp64 for fp64 input); under autocast the products are in autocast's type.

    Args:
        hidden: `[..., dim]`.
        weight_VM: `[vocab, dim]`, the output projection.
        labels: `[...]` int64 in [0, vocab), or `IGNORE_INDEX`, which adds nothing.

    Raises:
        ValueError: the labels' shape is not that of the tokens.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels of shape {list(labels.shape)} do not fit the tokens' {list(hidden.shape[:-1])}")
    dtype = autocast_dtype(hidden) or hidden.dtype
    flat_TM, labels_T = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    with autocast_off(hidden):
        total: Tensor = _LinearCrossEntropy.apply(flat_TM, weight_VM, labels_T, dtype, torch.is_grad_enabled())
    return total


@torch.no_grad()
def linear_cross_entropies(hidden: Tensor, weight_VM: Tensor, labels: Tensor) -> Tensor:
    """The terms of `linear_cross_entropy_sum`, `[...]` fp32 (fp64 for fp64 input), without a gradient; its chunks bound
    the memory here, too."""
    dtype = autocast_dtype(hidden) or hidden.dtype
    weight, rows = weight_VM.to(dtype), _chunk_rows(weight_VM)
    with autocast_off(hidden):
        chunks = zip(hidden.reshape(-1, hidden.shape[-1]).split(rows), labels.reshape(-1).split(rows), strict=True)
        losses = [
            cross_entropy(
                linear(hidden_CM.to(dtype), weight).to(torch.promote_types(dtype, torch.float32)),
                labels_C,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
            for hidden_CM, labels_C in chunks
        ]
    return torch.cat(losses).view(labels.shape)


def _chunk_rows(weight_VM: Tensor) -> int:
    elements = _CHUNK_ELEMENTS_GPU if weight_VM.is_cuda else _CHUNK_ELEMENTS
    return max(_CHUNK_ROWS, elements // len(weight_VM))


class _LinearCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax − one-hot, so a chunk needs nothing that comes after it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TM: Tensor, weight_VM: Tensor, labels_T: Tensor, dtype: torch.dtype, training: bool
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        weight = weight_VM.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden_TM.device)
        d_hidden_TM = torch.empty_like(hidden_TM) if needs_hidden else None
        d_weight_VM = torch.zeros_like(weight_VM, dtype=wide) if needs_weight else None
        rows = _chunk_rows(weight)
        for begin in range(0, len(labels_T), rows):
            hidden_CM = hidden_TM[begin : begin + rows].to(dtype)
            labels_C = labels_T[begin : begin + rows]
            counted_C = labels_C != IGNORE_INDEX
            target_C1 = labels_C.where(counted_C, 0)[:, None]
            log_p_CV = linear(hidden_CM, weight).to(wide).log_softmax(dim=-1)
            total -= log_p_CV.gather(1, target_C1).squeeze(1).masked_fill(~counted_C, 0.0).sum()
            if not (needs_hidden or needs_weight):
                continue
            d_logits_CV = log_p_CV.exp_()
            d_logits_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=wide))
            d_logits_CV[~counted_C] = 0.0
            d_logits_CV = d_logits_CV.to(dtype)
            if d_hidden_TM is not None:
                d_hidden_TM[begin : begin + rows] = d_logits_CV @ weight
            if d_weight_VM is not None:
                if dtype == wide:
                    d_weight_VM.addmm_(d_logits_CV.T, hidden_CM)
                else:
                    d_weight_VM += d_logits_CV.T @ hidden_CM
        ctx.save_for_backward(d_hidden_TM, d_weight_VM)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if d is None else d * gradients[0].to(d.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None, None
