"""The GPU's kernels against float64; on a machine without a GPU only that they decline."""

import pytest
import torch

from llama.kernels import rows as kernel

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, CHOICES, DIM = 37, 3, 1100


def example(dtype):
    generator = torch.Generator().manual_seed(0)
    y_RM = torch.randn(TOKENS * CHOICES, DIM, generator=generator).to(dtype)
    weights_TK = torch.rand(TOKENS, CHOICES, generator=generator)
    row_TK = torch.randperm(TOKENS * CHOICES, generator=generator).view(TOKENS, CHOICES)
    pair_R = torch.empty(TOKENS * CHOICES, dtype=torch.int64)
    pair_R[row_TK.flatten()] = torch.arange(TOKENS * CHOICES)
    return y_RM, weights_TK, row_TK, pair_R


def test_rows_on_a_cpu_are_declined():
    assert not kernel.available(torch.zeros(2, 2))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [True, False])
def test_sum_and_gradients_are_those_of_float64(dtype, weighted):
    y_RM, weights_TK, row_TK, pair_R = example(dtype)
    exact_y = y_RM.double().requires_grad_()
    exact_weights = (weights_TK if weighted else torch.ones_like(weights_TK)).double().requires_grad_()
    expected = (exact_y[row_TK] * exact_weights[..., None]).sum(1)
    gradient = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected.backward(gradient.double())
    weights = weights_TK.cuda() if weighted else None
    out = kernel.weighted_sum(y_RM.cuda(), row_TK.cuda(), weights)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    assert out.dtype == dtype
    assert (out.double().cpu() - expected).norm() / expected.norm() < tolerance
    if weighted:
        d_y, d_weights = kernel.weighted_sum_gradients(gradient.cuda(), y_RM.cuda(), weights, pair_R.cuda())
        assert (d_y.double().cpu() - exact_y.grad).norm() / exact_y.grad.norm() < tolerance
        assert (d_weights.double().cpu() - exact_weights.grad).norm() / exact_weights.grad.norm() < 1e-5


@on_gpu
def test_the_gradient_of_a_dropped_pair_is_zero():
    y_RM, weights_TK, _, pair_R = (tensor.cuda() for tensor in example(torch.float32))
    gradient = torch.randn(TOKENS, DIM, device="cuda")
    _, d_weights = kernel.weighted_sum_gradients(gradient, y_RM[:-5].contiguous(), weights_TK, pair_R[:-5])
    assert (d_weights.flatten()[pair_R[-5:]] == 0).all() and (d_weights != 0).sum() == len(pair_R) - 5
